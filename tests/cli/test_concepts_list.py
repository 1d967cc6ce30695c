"""``--concepts_list``: the subjects of a run from a JSON file, and the other flags of the scripts that have it."""

import json
import shlex
from pathlib import Path

import pytest

from lowmem_db.cli.arguments import read_arguments
from lowmem_db.config.schema import ConceptConfig
from lowmem_db.errors import LowmemDbError
from tests.cli.test_commands_of_diffusers import Said, said
from tests.preparation.test_concepts import prepared

__all__ = ["said"]

DOG = {
    "instance_prompt": "photo of zwx dog", "class_prompt": "photo of a dog", "instance_data_dir": "photos",
    "class_data_dir": "classes/dog",
}  # fmt: skip
PERSON = {
    "instance_prompt": "photo of ukj person", "class_prompt": "photo of a person", "instance_data_dir": "people",
    "class_data_dir": "classes/person",
}  # fmt: skip
COMMAND = ["--pretrained_model_name_or_path=m", "--concepts_list=concepts.json", "--max_train_steps=3"]
PRIOR = "--with_prior_preservation"
NOTEBOOK = """
  python3 train_dreambooth.py --pretrained_model_name_or_path=m --pretrained_vae_name_or_path="some/vae"
  --output_dir=out --with_prior_preservation --prior_loss_weight=1.0 --seed=1337 --resolution=512 --train_batch_size=1
  --train_text_encoder --mixed_precision="fp16" --use_8bit_adam --gradient_accumulation_steps=1 --learning_rate=1e-6
  --lr_scheduler="constant" --lr_warmup_steps=0 --num_class_images=50 --sample_batch_size=4 --max_train_steps=800
  --save_interval=400 --save_sample_prompt="photo of zwx dog" --n_save_sample=2 --save_guidance_scale=5
  --save_infer_steps=20 --save_sample_negative_prompt=blurry --log_interval=10 --save_min_steps=0 --pad_tokens --hflip
  --concepts_list="concepts.json"
"""


def write(content: object) -> None:
    Path("concepts.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_first_subject_and_further_ones(said: Said) -> None:
    write([DOG, PERSON])
    config = read_arguments([*COMMAND, PRIOR]).config
    assert config.subjects == (
        ConceptConfig(
            instance_dir=Path("photos"),
            instance_prompt="photo of zwx dog",
            class_prompt="photo of a dog",
            class_dir=Path("classes/dog"),
        ),
        ConceptConfig(
            instance_dir=Path("people"),
            instance_prompt="photo of ukj person",
            class_prompt="photo of a person",
            class_dir=Path("classes/person"),
        ),
    )
    assert "--concepts_list" not in "".join(said())
    assert read_arguments([*COMMAND, PRIOR, "subject.class_prompt=a dog"]).config.subject.class_prompt == "a dog"


def test_command_of_the_notebook_runs_as_it_is(said: Said) -> None:
    write([DOG, PERSON])
    config = read_arguments(shlex.split(NOTEBOOK)).config
    assert [subject.instance_prompt for subject in config.subjects] == ["photo of zwx dog", "photo of ukj person"]
    assert (config.model.vae, config.checkpointing.every) == ("some/vae", 400)
    drawn = config.sampling
    assert (drawn.prompts, drawn.negative_prompt, drawn.every) == (("photo of zwx dog",), "blurry", None)
    assert (drawn.num_images, drawn.guidance_scale, drawn.num_inference_steps) == (2, 5.0, 20)
    assert config.data.random_flip
    lines = said()
    assert "--log_interval: no effect; every step is logged" in lines
    assert "--pad_tokens: prompts always have the length of the model's tokenizer" in lines


def test_keys_that_change_nothing_are_named(said: Said) -> None:
    write([DOG | {"validation_prompt": "a zwx dog in the snow"}, PERSON | {"n_save_sample": 4}])
    config = read_arguments(COMMAND).config
    assert [(subject.class_prompt, subject.class_dir) for subject in config.subjects] == [(None, None)] * 2
    lines = said()
    assert "--concepts_list: class_prompt, class_data_dir: no effect without --with_prior_preservation" in lines
    assert (
        "--concepts_list: validation_prompt, n_save_sample: no effect; samples are those of the run: "
        "--validation_prompt"
    ) in lines


def test_beside_a_configuration_file_that_file_decides_about_the_prior(said: Said) -> None:
    write([DOG, PERSON])
    Path("run.yaml").write_text("output_dir: out\nmodel: {base: m}\nprior: {enabled: true}\n")
    assert read_arguments(["run.yaml", "--concepts_list=concepts.json"]).config.prior.class_dir == Path("classes/dog")


def test_epochs_count_the_photos_and_classes_of_all_subjects(said: Said) -> None:
    write([DOG, PERSON])
    Path("people").mkdir()
    for number in range(9):
        Path(f"people/{number}.png").touch()
    command = [*COMMAND[:2], "--num_train_epochs=2", "--train_batch_size=1", "--num_class_images=20"]
    assert read_arguments(command).config.training.max_train_steps == 2 * (4 + 9)
    assert read_arguments([*command, PRIOR]).config.training.max_train_steps == 2 * (20 + 20)


WITHOUT_PHOTOS = {key: value for key, value in DOG.items() if key != "instance_data_dir"}


@pytest.mark.parametrize(
    ("content", "more", "expected"),
    [
        ("[{'instance_prompt': 'a'}]", [], ["cannot be read as JSON: Expecting property name"]),
        ("[" * 100_000, [], ["cannot be read as JSON: "]),
        ('[{"instance_prompt": "a", "instance_prompt": "b"}]', [], ["cannot be read as JSON: instance_prompt ap"]),
        ({"instance_prompt": "a"}, [], ["holds dict; allowed: a list, such as [{"]),
        ([], [], ["is empty; allowed: a list"]),
        ([DOG, "photos"], [], ["entry 2: holds str; allowed: a mapping, such as {"]),
        ([WITHOUT_PHOTOS], [], ["entry 1: instance_data_dir is missing; add it"]),
        ([DOG, PERSON | {"instance_prompt": ""}], [], ["entry 2: instance_prompt is missing; add it"]),
        ([DOG | {"class_prompt": None}], [PRIOR], ["entry 1: class_prompt is missing; add it, or leave --with_prior"]),
        ([DOG, PERSON | {"instance_prompt": DOG["instance_prompt"]}], [], ["entry 2: instance_prompt: 'photo of zwx"]),
        ([DOG | {"instance_data_dir": 3}], [], ["entry 1: instance_data_dir: 3 is not allowed: it must be a text"]),
        ([DOG | {"num_class_images": 9}], [], ["entry 1: num_class_images is not supported; every class has the"]),
        ([DOG | {"instance_promt": "a"}], [], ["entry 1: instance_promt is an unknown key; did you mean instance_p"]),
        ([DOG | {"colour": "a"}], [], ["entry 1: colour is an unknown key; allowed: instance_data_dir, instance_pr"]),
        ([WITHOUT_PHOTOS, {"x": 1}], [], [
            "entry 1: instance_data_dir is missing", "entry 2: instance_data_dir is missing",
            "entry 2: instance_prompt is missing", "entry 2: x is an unknown key",
        ]),
    ],
)  # fmt: skip
def test_what_is_wrong_names_the_file_the_entry_and_the_key(
    content: object, more: list[str], expected: list[str], said: Said
) -> None:
    write(content)
    with pytest.raises(LowmemDbError) as refused:
        read_arguments([*COMMAND, *more])
    lines = str(refused.value).splitlines()
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(f"--concepts_list: concepts.json: {start}")


def test_a_file_that_is_not_there(said: Said) -> None:
    with pytest.raises(LowmemDbError, match=r"^--concepts_list: concepts.json: cannot be read as JSON: No such file"):
        read_arguments(COMMAND)


def test_a_single_subject_beside_the_list_is_refused(said: Said) -> None:
    write([DOG])
    with pytest.raises(LowmemDbError) as refused:
        read_arguments([*COMMAND, "--instance_prompt=a sks cat", "--class_data_dir=c"])
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == [
        "--instance_prompt", "--class_data_dir",
    ]  # fmt: skip


def test_photos_of_the_list_are_what_trains(
    tiny_fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = Path(str(tiny_fields["subject.instance_dir"]))
    Path("people").symlink_to(photos)
    write([DOG | {"instance_data_dir": str(photos), "class_data_dir": ""}, PERSON])
    own = ("subject.", "output_dir", "model.base", "prior.")
    others = [f"{name}={value}" for name, value in tiny_fields.items() if not name.startswith(own)]
    command = [
        "train_dreambooth.py",
        f"--base={tiny_fields['model.base']}",
        "--output_dir=run",
        "--concepts_list=concepts.json",
    ]
    batches = prepared(read_arguments([*command, *others]).config)
    assert {image.record.prompt for image in batches.instance_images} == {"photo of zwx dog", "photo of ukj person"}
