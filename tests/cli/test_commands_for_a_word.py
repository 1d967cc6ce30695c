"""Commands for diffusers' Textual Inversion scripts: every flag, the defaults, and what they train.

Read off the scripts at diffusers 58eb52c0: names and defaults, no code.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem_db.cli.arguments import Request, read_arguments
from lowmem_db.errors import LowmemDbError
from tests.cli.commands_of_diffusers import LORA, refused, remark, sets
from tests.cli.conftest import Run
from tests.cli.test_commands_of_diffusers import Said, check_flags, said, value_of

__all__ = ["said"]

PLAIN, SDXL = "textual_inversion.py", "textual_inversion_sdxl.py"
BOTH = (PLAIN, SDXL)
NEEDED = {
    "pretrained_model_name_or_path": "some/model", "train_data_dir": "photos", "placeholder_token": "<cat-toy>",
    "initializer_token": "toy",
}  # fmt: skip
PROMPT = ("--validation_prompt=a <cat-toy>",)
FLAGS = {
    "save_steps": (BOTH, "=50", (), sets(checkpointing__every=50)),
    "save_steps beside checkpoints": (
        BOTH, "=50", ("--checkpointing_steps=70",), remark("no effect with --checkpointing_steps; every checkpoint "),
    ),
    "save_as_full_pipeline": (BOTH, "", (), remark("final/ is the embedding, which load_textual_inversion adds")),
    "num_vectors": (BOTH, "=5", (), sets(textual_inversion__num_vectors=5)),
    "pretrained_model_name_or_path": (BOTH, "=m", (), sets(model__base="m")),
    "revision": (BOTH, "=main", (), sets(model__revision="main")),
    "variant": (BOTH, "=fp16", (), sets(model__variant="fp16")),
    "tokenizer_name": ((PLAIN,), "=t", (), refused("the tokenizer is the one in the model's folder")),
    "train_data_dir": (BOTH, "=photos", (), sets(subject__instance_dir="photos")),
    "placeholder_token": (
        BOTH, "=<my-cat>", (),
        sets(textual_inversion__token="<my-cat>", subject__instance_prompt="a <my-cat>"),
    ),
    "initializer_token": (BOTH, "=cat", (), sets(textual_inversion__initializer="cat")),
    "learnable_property": (
        BOTH, "=style", (),
        sets(
            textual_inversion__templates="style",
            subject__instance_prompt="a painting in the style of <cat-toy>",
        ),
    ),
    "learnable_property, another one": (BOTH, "=texture", (), refused("allowed: object, style")),
    "repeats": (BOTH, "=9", (), remark("no effect; photos are repeated until --max_train_steps are done")),
    "repeats with epochs": (
        (PLAIN,), "=9", (*PROMPT, "--validation_epochs=2"), sets(sampling__every=2 * 9 * 4),
    ),
    "output_dir": (BOTH, "=out", (), sets(output_dir="out")),
    "seed": (BOTH, "=7", (), sets(seed=7)),
    "resolution": (BOTH, "=768", (), sets(data__resolution=768)),
    "center_crop": (BOTH, "", (), sets(data__crop="center")),
    "train_batch_size": (BOTH, "=2", (), sets(training__train_batch_size=2)),
    "num_train_epochs": (BOTH, "=9", (), remark("no effect; textual_inversion")),
    "max_train_steps": (BOTH, "=400", (), sets(training__max_train_steps=400)),
    "gradient_accumulation_steps": (BOTH, "=2", (), sets(training__gradient_accumulation_steps=2)),
    "gradient_checkpointing": (BOTH, "", (), sets(memory__checkpointing="layers")),
    "learning_rate": (BOTH, "=5.0e-04", (), sets(textual_inversion__learning_rate=5e-4, training__learning_rate=5e-6)),
    "scale_lr": (BOTH, "", (), sets(training__scale_learning_rate=True)),
    "lr_scheduler": (BOTH, "=linear", (), sets(training__lr_scheduler="linear", training__lr_warmup_steps=500)),
    "lr_warmup_steps": (BOTH, "=3", ("--lr_scheduler=linear",), sets(training__lr_warmup_steps=3)),
    "lr_warmup_steps with constant": (BOTH, "=500", (), remark("no effect without --lr_scheduler=constant_with_")),
    "lr_num_cycles": (BOTH, "=3", ("--lr_scheduler=cosine_with_restarts",), sets(training__lr_num_cycles=3)),
    "dataloader_num_workers": (BOTH, "=0", (), remark("no effect; batches come from the caches")),
    "adam_beta1": (BOTH, "=0.8", (), sets(optimizer__beta1=0.8)),
    "adam_beta2": (BOTH, "=0.99", (), sets(optimizer__beta2=0.99)),
    "adam_weight_decay": (BOTH, "=0.1", (), sets(optimizer__weight_decay=0.1)),
    "adam_epsilon": (BOTH, "=1e-6", (), sets(optimizer__epsilon=1e-6)),
    "use_8bit_adam": ((SDXL,), "", (), sets(optimizer__name="adamw8bit")),
    "push_to_hub": (BOTH, "", (), sets(final__push_to_hub=True)),
    "hub_token": (BOTH, "=t", (), refused("hf auth login")),
    "hub_model_id": (BOTH, "=me/cat", ("--push_to_hub",), sets(final__hub_model_id="me/cat")),
    "logging_dir": (BOTH, "=logs", (), remark("no effect; TensorBoard's files are in output_dir/tensorboard")),
    "mixed_precision": (BOTH, "=bf16", (), sets(training__mixed_precision="bf16")),
    "allow_tf32": (BOTH, "", (), sets(training__allow_tf32=True)),
    "report_to": (BOTH, "=tensorboard", (), sets(logging__tensorboard=True)),
    "validation_prompt": (BOTH, "=a <cat-toy>", (), sets(sampling__prompts=("a <cat-toy>",), sampling__every=100)),
    "num_validation_images": (BOTH, "=2", PROMPT, sets(sampling__num_images=2)),
    "validation_steps": (BOTH, "=50", PROMPT, sets(sampling__every=50)),
    "validation_epochs": ((PLAIN,), "=1", PROMPT, sets(sampling__every=100 * 4)),
    "validation_epochs without a prompt": ((PLAIN,), "=1", (), remark("no effect without --validation_prompt")),
    "local_rank": (BOTH, "=-1", (), remark("no effect; the launcher says it in LOCAL_RANK")),
    "checkpointing_steps": (BOTH, "=100", (), sets(checkpointing__every=100)),
    "checkpoints_total_limit": (BOTH, "=3", (), sets(checkpointing__keep=3)),
    "resume_from_checkpoint": (BOTH, "=latest", (), ("resumes", None)),
    "enable_xformers_memory_efficient_attention": (BOTH, "", (), sets(memory__attention="xformers")),
    "no_safe_serialization": ((PLAIN,), "", (), refused("only safetensors are written")),
}  # fmt: skip
"""By flag, and a word on the case: the scripts that have it, its value, what else stands in the command, its fate."""

DEFAULTS = {
    "output_dir": "text-inversion-model", "textual_inversion.enabled": True, "textual_inversion.num_vectors": 1,
    "textual_inversion.templates": "object", "textual_inversion.learning_rate": 1e-4, "prior.enabled": False,
    "lora.enabled": False, "data.resolution": 512, "data.random_flip": True, "training.max_train_steps": 5000,
    "training.train_batch_size": 16, "training.gradient_accumulation_steps": 1, "training.lr_scheduler": "constant",
    "training.lr_warmup_steps": 0, "training.lr_warmup_from_zero": True, "training.scale_learning_rate": False,
    "training.max_grad_norm": None, "training.mixed_precision": None, "optimizer.name": "adamw",
    "optimizer.beta1": 0.9, "optimizer.beta2": 0.999, "optimizer.weight_decay": 1e-2, "optimizer.epsilon": 1e-8,
    "checkpointing.every": 500, "checkpointing.keep": None, "sampling.num_images": 4, "sampling.every": 100,
    "sampling.num_inference_steps": 25, "sampling.sampler": "dpm_solver", "final.layout": "flat",
}  # fmt: skip
README = {
    PLAIN: """
      accelerate launch textual_inversion.py --pretrained_model_name_or_path=m --train_data_dir=photos
      --learnable_property="object" --placeholder_token="<cat-toy>" --initializer_token="toy" --resolution=512
      --train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=3000 --learning_rate=5.0e-04 --scale_lr
      --lr_scheduler="constant" --lr_warmup_steps=0 --push_to_hub --output_dir="textual_inversion_cat"
    """,
    SDXL: """
      accelerate launch textual_inversion_sdxl.py --pretrained_model_name_or_path=m --train_data_dir=photos
      --learnable_property="object" --placeholder_token="<cat-toy>" --initializer_token="toy" --mixed_precision="bf16"
      --resolution=768 --train_batch_size=1 --gradient_accumulation_steps=4 --max_train_steps=500
      --learning_rate=5.0e-04 --scale_lr --lr_scheduler="constant" --lr_warmup_steps=0 --save_as_full_pipeline
      --output_dir="./textual_inversion_cat_sdxl"
    """,
}


def request(*arguments: str) -> Request:
    """Return what a command asks for; a flag that is given again wins."""
    return read_arguments([arguments[0], *(f"--{name}={value}" for name, value in NEEDED.items()), *arguments[1:]])


@pytest.mark.parametrize("case", FLAGS)
def test_each_flag_of_both_scripts(case: str, said: Said) -> None:
    check_flags(case, FLAGS, request, said)


def test_the_table_holds_every_flag_of_the_scripts(said: Said) -> None:
    counts = {script: len({re.split(r"\W", c)[0] for c in FLAGS if script in FLAGS[c][0]}) for script in BOTH}
    assert counts == {PLAIN: 48, SDXL: 46}


@pytest.mark.parametrize("script", BOTH)
def test_defaults_are_those_of_the_script(script: str, said: Said) -> None:
    config = request(script, *PROMPT).config
    expected = DEFAULTS | {"sampling.guidance_scale": 5.0 if script == SDXL else 7.5}
    assert {path: value_of(config, path) for path in expected} == expected
    assert said() == [
        f"defaults are those of diffusers' {script} (the embedding of a new word trains); different here: seed=0, so "
        "that a run can be repeated, the plan chooses types and checkpointing that fit the card, photos are cropped "
        "to squares, not squeezed"
    ]


@pytest.mark.parametrize("script", README)
def test_command_of_the_readme_runs_as_it_is(script: str, said: Said) -> None:
    words = shlex.split(README[script])
    config = read_arguments(words).config
    own, training = config.textual_inversion, config.training
    assert (own.enabled, own.token, own.initializer, own.learning_rate) == (True, "<cat-toy>", "toy", 5e-4)
    assert (training.scale_learning_rate, training.max_train_steps) == (True, 3000 if script == PLAIN else 500)
    assert said()[0].startswith(f"defaults are those of diffusers' {script}")
    hyphens = [re.sub(r"^--[^=]*", lambda flag: "--" + flag[0][2:].replace("_", "-"), word) for word in words]
    assert read_arguments(hyphens).config == config


def test_flags_alone_are_recognised(said: Said) -> None:
    flags = [word for word in shlex.split(README[PLAIN]) if word.startswith("--")]
    assert read_arguments(flags).config == read_arguments(shlex.split(README[PLAIN])).config
    of_sdxl = [flag.replace("_path=m", "_path=some/sdxl") for flag in flags]
    said()
    assert read_arguments(of_sdxl).config.sampling.guidance_scale == 5.0
    assert said()[0].startswith(f"defaults are those of diffusers' {SDXL}")
    assert read_arguments([*flags, "lora.enabled=false"]).config == read_arguments(flags).config


def test_beside_a_configuration_file_the_flags_set_its_fields(said: Said) -> None:
    flags = ["--placeholder_token=<my-cat>", "--initializer_token=cat", "--learning_rate=1e-3"]
    config = read_arguments(["sd15_textual_inversion", *flags]).config
    assert (config.textual_inversion.token, config.subject.instance_prompt) == ("<my-cat>", "a <my-cat>")
    assert (config.textual_inversion.learning_rate, config.training.train_batch_size) == (1e-3, 1)


def test_a_prompt_of_ones_own_is_kept(said: Said) -> None:
    for prompt in ("subject.instance_prompt=my <cat-toy>", "--instance_prompt=my <cat-toy>"):
        assert request(PLAIN, prompt).config.subject.instance_prompt == "my <cat-toy>"


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        (
            [PLAIN, "--pretrained_model_name_or_path=m", "--train_data_dir=photos"],
            ["--placeholder_token: is missing, and textual_inversion.py needs it; add it", "--initializer_token: is m"],
        ),
        (["--placeholder_token=<a>", "--initializer_token=a"], ["--train_data_dir: is missing"]),
        (
            ["--pretrained_model_name_or_path=m", "--train_data_dir=photos"],
            ["--train_data_dir: is a flag of textual_inversion.py, which needs --placeholder_token too; for "],
        ),
        ([LORA, "--num_vectors=2"], ["--num_vectors: is a flag of textual_inversion.py, not of train_dreambooth_lora"]),
        (
            [PLAIN, *(f"--{name}={value}" for name, value in NEEDED.items()), "--with_prior_preservation"],
            ["prior.enabled: true needs", "prior.enabled: true has nothing to preserve"],
        ),
        (
            [PLAIN, *(f"--{name}={value}" for name, value in NEEDED.items()), "--rank=4"],
            ["lora.enabled: true trains adapters", "lora.enabled: false gives"],
        ),
    ],
)
def test_what_is_missing_or_of_another_script_is_named(command: list[str], lines: list[str], said: Said) -> None:
    with pytest.raises(LowmemDbError) as raised:
        read_arguments(command)
    found = str(raised.value).splitlines()
    assert any(line.startswith(start) for line in found for start in lines)
    assert len(found) <= len(lines)


COMMAND = """
  --learnable_property object --placeholder_token <cat-toy> --initializer_token a --save_steps 1 --num_vectors 2
  --resolution 32 --train_batch_size 1 --gradient_accumulation_steps 1 --learning_rate 5.0e-04 --scale_lr
  --lr_scheduler constant --lr_warmup_steps 0
"""
"""Flags of diffusers' own tests of the script."""


def test_what_diffusers_asks_of_its_script(run: Run, tiny_model: Path, photos_dir: Path, tmp_path: Path) -> None:
    command = ["train", f"examples/textual_inversion/{PLAIN}", "--pretrained_model_name_or_path", tiny_model]
    command += ["--train_data_dir", photos_dir, *COMMAND.split(), "--output_dir", tmp_path / "out"]
    outcome = run(*command, "--max_train_steps", 2)
    assert outcome.code == 0, outcome.err
    (rows,) = load_file(tmp_path / "out" / "learned_embeds.safetensors").values()
    assert rows.shape == (2, 16)
    more = run(*command, "--max_train_steps=3", "--checkpoints_total_limit=2", "--resume_from_checkpoint=checkpoint-2")
    assert more.code == 0, more.err
    assert {path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*")} == {"step-000002", "step-000003"}
    of_step = run("export", tmp_path / "out", "--step", 2)
    assert (of_step.code, of_step.out.strip()) == (0, "out-step-000002.safetensors"), of_step.err
    ((token, before),) = load_file(tmp_path / "out-step-000002.safetensors").items()
    assert token == "<cat-toy>"
    assert torch.equal(before, rows)
    assert not torch.equal(before, next(iter(load_file(tmp_path / "out" / "learned_embeds.safetensors").values())))
    assert run("export", tmp_path / "out", "--step", 2, "--precision", "fp16", "--out", "half.safetensors").code == 0
    assert next(iter(load_file(tmp_path / "half.safetensors").values())).dtype == torch.float16
    again = run("export", tmp_path / "out", "--step", 2)
    assert again.code == 2
    assert "--out: out-step-000002.safetensors exists and will not be overwritten" in again.err
    merged = run("export", tmp_path / "out", "--step", 2, "--merge")
    assert merged.code == 2
    assert "--merge: has no effect on a learned embedding" in merged.err
