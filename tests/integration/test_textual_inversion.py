"""Textual Inversion of tiny models: what changes, what diffusers does with it, and with the same gradient."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from lowmem_db import api, fingerprint
from lowmem_db.adaptation.embeddings import LearnedEmbedding
from lowmem_db.cli.train import train
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import resolve
from lowmem_db.engine.build import build_step, count_on_meta
from lowmem_db.engine.source import find_source
from lowmem_db.errors import ConfigError, LowmemDbError
from lowmem_db.evaluation.folders import Limits
from lowmem_db.evaluation.protocol import PromptChoice, find_runs
from lowmem_db.models.finding import model_of
from lowmem_db.models.new_words import extended_embedding
from lowmem_db.preparation.prepare import prepare
from lowmem_db.run.run import check_photos
from lowmem_db.storage.run_folder import RunFolder

CPU = torch.device("cpu")
PROMPT = "a <z> in"


@pytest.fixture
def fields(tiny_fields: dict[str, object]) -> dict[str, object]:
    own = dict(tiny_fields)
    for name in ("training.learning_rate", "prior.num_class_images", "prior.num_inference_steps"):
        del own[name]
    return own | {
        "subject.instance_prompt": "a <z>", "subject.class_prompt": "a d", "training.max_train_steps": 3,
        "training.train_batch_size": 2, "textual_inversion.enabled": True, "textual_inversion.token": "<z>",
        "textual_inversion.num_vectors": 2, "textual_inversion.learning_rate": 0.1,
        "textual_inversion.templates": "prompt",
    }  # fmt: skip


def run_of(fields: dict[str, object]) -> Path:
    train([f"{field}={json.dumps(value)}" for field, value in fields.items()])
    return Path(str(fields["output_dir"]))


def load(fields: dict[str, object]) -> Config:
    return resolve(load_config(None, list(fields.items())))


def drawn_by_diffusers(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    random = torch.Generator().manual_seed(3)
    given = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt", "generator": random} | options
    return torch.as_tensor(pipeline(PROMPT, **given).images)


def of_run(run: Path, kind: Any, base: Path) -> Any:
    """Return diffusers' pipeline of the base, with the text encoders that ``generate`` uses for a run."""
    source, pipeline = find_source(str(run)), kind.from_pretrained(base, local_files_only=True)
    for name in source.model.family.text_encoders:
        setattr(pipeline, name, source.load(name, CPU, torch.float32))
        tokenizer = source.model.tokenizer_of(name)
        setattr(pipeline, tokenizer, source.model.load(tokenizer))
    return pipeline


def test_only_the_new_rows_train_and_diffusers_draws_the_same(fields: dict[str, object], tiny_model: Path) -> None:
    before = fingerprint.of_files(sorted(file for file in tiny_model.rglob("*") if file.is_file()))
    run = run_of(fields)
    assert fingerprint.of_files(sorted(file for file in tiny_model.rglob("*") if file.is_file())) == before
    assert [file.name for file in (run / "final").glob("*.safetensors")] == ["learned_embeds.safetensors"]
    assert (
        'pipeline.load_textual_inversion(rows.get("clip_l", rows.get("<z>")), token="<z>")'
        in (run / "final" / "README.md").read_text()
    )
    (rows,) = load_file(run / "final" / "learned_embeds.safetensors").items()
    assert (rows[0], tuple(rows[1].shape)) == ("<z>", (2, 16))
    checkpoint = load_file(RunFolder(run).checkpoint_dir(3) / "text_encoder.safetensors")
    assert sum(tensor.numel() for tensor in checkpoint.values()) == 2 * 16
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    untrained = pipeline.text_encoder.get_input_embeddings().weight
    initial = untrained[pipeline.tokenizer.encode("d", add_special_tokens=False)[0]]
    assert (rows[1] - initial).abs().min() > 0
    pipeline.load_textual_inversion(str(run / "final" / "learned_embeds.safetensors"))
    ours = drawn_by_diffusers(of_run(run, StableDiffusionPipeline, tiny_model))
    assert torch.equal(drawn_by_diffusers(pipeline), ours)
    plain: Any = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    assert (drawn_by_diffusers(plain) - ours).abs().max() > 1e-4


def test_both_text_encoders_of_sdxl_learn(fields: dict[str, object], tiny_sdxl: Path) -> None:
    run = run_of(fields | {"model.base": str(tiny_sdxl)})
    found = load_file(run / "final" / "learned_embeds.safetensors")
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {"clip_l": (2, 16), "clip_g": (2, 16)}
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    pipeline.load_textual_inversion(found["clip_l"], token="<z>")
    pipeline.load_textual_inversion(
        found["clip_g"], token="<z>", text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
    )
    ours = drawn_by_diffusers(of_run(run, StableDiffusionXLPipeline, tiny_sdxl))
    assert torch.equal(drawn_by_diffusers(pipeline), ours)


@pytest.mark.parametrize("checkpointing", ["none", "segments"])
def test_gradient_is_that_of_a_longer_table(fields: dict[str, object], checkpointing: str) -> None:
    """diffusers resizes the table, and copies the old rows back after each step, which all have decayed."""
    config = load(fields | {"memory.checkpointing": checkpointing, "training.mixed_precision": "no"})
    model = model_of(config)
    denoiser, objective, _ = build_step(config, model, CPU)
    batch = prepare(config, model, CPU, check_photos(config)).batches_at(0)[0]
    noised = objective.noise(batch, 0)
    extended = extended_embedding(denoiser.modules()["text_encoder"])

    def loss() -> Tensor:
        prediction = denoiser.predict(noised.noisy_latents, noised.timesteps, batch.conditioning)
        return objective.loss(prediction, noised).total

    loss().backward()
    assert extended.learned is not None
    longer = nn.Embedding.from_pretrained(torch.cat([extended.weight, extended.new_rows()]).detach(), freeze=False)
    denoiser.modules()["text_encoder"].set_input_embeddings(longer)  # type: ignore[operator]
    loss().backward()
    theirs = longer.weight.grad
    torch.testing.assert_close(extended.learned.grad, theirs[-2:], rtol=1e-5, atol=1e-9)
    assert theirs[:-2].abs().max() > 0
    assert all(parameter.grad is None for parameter in denoiser.module.parameters())


def test_only_the_rows_are_counted_and_planned(fields: dict[str, object]) -> None:
    config = load(fields)
    assert count_on_meta(config, model_of(config, weights=False)) == {"unet": 0, "text_encoder": 32}
    plan = api.plan(config)
    assert {phase.name for phase in plan.phases} >= {"train"}
    assert "encode_text" not in {phase.name for phase in plan.phases}


def test_word_of_a_checkpoint_and_of_final_is_drawn_alike(fields: dict[str, object]) -> None:
    run = run_of(fields | {"ema.enabled": True})
    final = find_source(str(run)).model.words[0]
    shutil.rmtree(run / "final")
    of_checkpoint = find_source(str(run)).model.words[0]
    assert of_checkpoint.token == final.token == "<z>"
    assert torch.equal(of_checkpoint.vectors["text_encoder"], final.vectors["text_encoder"])


def test_folder_of_an_embedding_is_drawn_with_its_base(fields: dict[str, object]) -> None:
    run = run_of(fields)
    (copied := run.parent / "copied").mkdir()
    (run / "final" / "learned_embeds.safetensors").rename(copied / "learned_embeds.safetensors")
    assert [word.token for word in find_source(str(copied)).model.words] == ["<z>"]


def pivotal(tiny_fields: dict[str, object], first: Path, **changes: object) -> dict[str, object]:
    """Return the fields of a run that goes on with the word of a first run."""
    own = {"output_dir": str(first.parent / "second"), "model.embeddings": str(first), "training.max_train_steps": 1}
    return tiny_fields | own | {"subject.instance_prompt": "a <z> d", "subject.class_prompt": "a d"} | changes


def test_weights_go_on_with_a_learned_word_and_the_model_keeps_it(
    fields: dict[str, object], tiny_fields: dict[str, object]
) -> None:
    first = run_of(fields)
    run = run_of(pivotal(tiny_fields, first, **{"training.train_text_encoder": True, "training.max_train_steps": 2}))
    file = run / "final" / "embeddings" / "z.safetensors"
    assert torch.equal(load_file(file)["<z>"], load_file(first / "final" / "learned_embeds.safetensors")["<z>"])
    names = load_file(run / "final" / "text_encoder" / "model.safetensors").keys()
    assert not any("rows" in name or "learned" in name for name in names)
    shutil.rmtree(first)  # the model has the word itself
    assert [word.token for word in find_source(str(run)).model.words] == ["<z>"]
    card = (run / "final" / "README.md").read_text()
    assert 'pipeline.load_textual_inversion("FOLDER/embeddings/z.safetensors", token="<z>")' in card
    pipeline: Any = StableDiffusionPipeline.from_pretrained(run / "final", local_files_only=True)
    pipeline.load_textual_inversion(str(file), token="<z>")
    ours = drawn_by_diffusers(of_run(run, StableDiffusionPipeline, run / "final"))
    assert torch.equal(drawn_by_diffusers(pipeline), ours)
    (found,) = find_runs(run, PromptChoice(), Limits())
    assert (found.prompts[0], found.captions[0]) == ("a <z> d in the jungle", "a d in the jungle")


def test_lora_goes_on_with_a_learned_word_and_keeps_it_without_its_run(
    fields: dict[str, object], tiny_fields: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_of(fields)
    run = run_of(pivotal(tiny_fields, first, **{"lora.enabled": True}))
    assert "the identifier" not in capsys.readouterr().err  # it is the learned word, and no warning is due
    shutil.rmtree(first)
    assert [word.token for word in find_source(str(run)).model.words] == ["<z>"]
    (copied := run.parent / "copied").mkdir()
    (run / "final").rename(copied / "lora")
    assert [word.token for word in find_source(str(copied / "lora")).model.words] == ["<z>"]


def test_run_without_a_word_is_no_embedding(fields: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(LowmemDbError, match=r"holds no learned_embeds.safetensors; allowed: a finished run of Textual"):
        run_of(fields | {"model.embeddings": [str(tmp_path)]})


def test_suite_says_the_word_alone_and_captions_say_the_class(fields: dict[str, object]) -> None:
    run = run_of(fields)
    (found,) = find_runs(run, PromptChoice(), Limits())
    assert (found.prompts[0], found.captions[0]) == ("a <z> in the jungle", "a d in the jungle")


def test_prompts_are_templates_drawn_for_each_step_and_sample(fields: dict[str, object]) -> None:
    config = load(fields | {"textual_inversion.templates": "object"})
    source = prepare(config, model_of(config), CPU, check_photos(config))
    image = source.instance_images[0]
    drawn = {source._prompt(image, step, sample) for step in range(40) for sample in range(2)}
    assert 20 < len(drawn) <= 27
    assert all("<z>" in prompt for prompt in drawn)
    assert [source._prompt(image, 5, 1)] * 3 == [source._prompt(image, 5, 1) for _ in range(3)]
    assert drawn <= source.prompts.tokens.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject.instance_prompt": "a sks d"}, "subject.instance_prompt: 'a sks d' does not have the new word"),
        ({"prior.enabled": True}, "prior.enabled: true has nothing to preserve"),
        ({"lora.enabled": True}, "lora.enabled: true trains adapters"),
        ({"training.learning_rate": 1e-3}, "set textual_inversion.learning_rate"),
        ({"training.train_text_encoder": True}, "training.train_text_encoder: true trains weights"),
        ({"memory.weights": "bf16_extra_bits"}, "adapters and embeddings train in fp32"),
        ({"subject.class_prompt": None}, "textual_inversion.initializer: is missing"),
        ({"textual_inversion.enabled": False}, "textual_inversion.enabled: false gives the other fields"),
        (
            {"textual_inversion.token": "my word"},
            "textual_inversion.token: 'my word' is not allowed: it must be one word",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(
    fields: dict[str, object], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(fields | changes)


def test_initializer_that_is_not_one_token_is_refused_before_anything_is_encoded(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"textual_inversion.initializer: 'dog' is 3 tokens"):
        run_of(fields | {"textual_inversion.initializer": "dog"})
    assert not (Path(str(fields["cache_dir"])) / "latents").exists()


def test_export_says_what_to_do_instead(fields: dict[str, object]) -> None:
    run = run_of(fields)
    with pytest.raises(LowmemDbError, match=r"holds a learned embedding, .* copy .*learned_embeds\.safetensors"):
        api.export(run, layout="diffusers")


def test_adaptation_counts_the_rows(fields: dict[str, object]) -> None:
    adaptation, model = LearnedEmbedding(load(fields)), model_of(load(fields))
    assert adaptation.values_in_final(model, {"unet": 0, "text_encoder": 32}) == 32
