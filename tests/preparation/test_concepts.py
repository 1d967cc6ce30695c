"""Several subjects in one run: their photos are mixed, each has its prompt and its class."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowmem_db.config.loading import load_config, read_yaml
from lowmem_db.config.schema import Config
from lowmem_db.data.batches import BatchSource
from lowmem_db.errors import ConfigError, DataError
from lowmem_db.models.finding import model_of
from lowmem_db.models.loading import CPU
from lowmem_db.preparation.prepare import check_photos, prepare
from lowmem_db.run.inputs import check_inputs
from lowmem_db.run.run import train

FIELDS = {
    "prior.num_class_images": 2,
    "prior.num_inference_steps": 1,
    "prior.sample_batch_size": 2,
    "training.max_train_steps": 2,
}


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """Photos with the same names as those of the first subject."""
    folder = tmp_path / "cats"
    folder.mkdir()
    for number in (0, 1):
        Image.new("RGB", (64, 64), (90 * number, 50, 50)).save(folder / f"photo{number}.png")
    (folder / "photo1.txt").write_text("a qy cat that sleeps")
    return folder


def config_of(tiny_fields: dict[str, object], *concepts: dict[str, object], **fields: object) -> Config:
    return load_config(None, list((tiny_fields | FIELDS | {"subject.concepts": list(concepts)} | fields).items()))


def prepared(config: Config) -> BatchSource:
    return prepare(config, model_of(config), CPU, check_photos(config))


def test_each_subject_has_its_photos_prompts_and_class(
    tiny_fields: dict[str, object], cats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cat = {"instance_dir": str(cats), "instance_prompt": "a qy cat", "class_prompt": "a cat", "repeats": 3}
    batches = prepared(config_of(tiny_fields, cat))
    seen = Counter(image.record.prompt for image in batches.instance_images)
    assert seen == {"a zx dog": 3, "a qy cat": 3, "a qy cat that sleeps": 3}
    assert Counter(image.record.prompt for image in batches.class_images) == {"a dog": 2, "a cat": 2}
    epoch = [batches.batches_at(step)[0] for step in range(9)]
    drawn = Counter(batch.sources[0] for batch in epoch)
    assert sum(drawn.values()) == 9
    assert drawn["photo2.png"] == 1
    again = prepared(config_of(tiny_fields, cat)).batches_at(5)[0]
    assert torch.equal(again.latent_mean, epoch[5].latent_mean)
    said = capsys.readouterr().err
    assert "subject.concepts[0].instance_dir: 1 of 2 photos have their own caption" in said
    assert "encoding photo0.png again" not in said


def test_subjects_of_one_class_share_its_images(tiny_fields: dict[str, object], cats: Path) -> None:
    dog = {"instance_dir": str(cats), "instance_prompt": "a qy dog", "class_prompt": "a dog"}
    batches = prepared(config_of(tiny_fields, dog))
    assert [image.record.prompt for image in batches.class_images] == ["a dog"] * 2


def test_run_with_two_subjects_is_resumed(tiny_fields: dict[str, object], cats: Path, tmp_path: Path) -> None:
    cat = {"instance_dir": str(cats), "instance_prompt": "a qy cat", "class_prompt": "a cat"}
    whole = train(config_of(tiny_fields, cat))
    halves = config_of(tiny_fields, cat, output_dir=str(tmp_path / "halves"))
    train(halves.model_copy(update={"training": halves.training.model_copy(update={"max_train_steps": 1})}))
    shutil.rmtree(tmp_path / "halves" / "final")
    resumed = train(halves, resume=True)
    rows = [run.metrics_file.read_text().splitlines() for run in (whole, resumed)]
    assert [row.split('"seconds"')[0] for row in rows[0]] == [row.split('"seconds"')[0] for row in rows[1]]
    assert read_yaml(resumed.config_file)["subject"]["concepts"][0]["instance_dir"] == str(cats)


def test_single_subject_is_as_before(tiny_fields: dict[str, object]) -> None:
    config = config_of(tiny_fields)
    assert config.of_subject(0) == config
    assert config.subject.concepts == ()


@pytest.mark.parametrize(
    ("concept", "said"),
    [
        ({"instance_prompt": "a qy cat"}, "subject.concepts: 0.instance_dir is missing; add it"),
        ({"instance_dir": "x", "instance_prompt": "a zx dog", "class_prompt": "a"}, "the same instance_prompt"),
        ({"instance_dir": "x", "instance_prompt": "a qy cat"}, "needs the class_prompt of every subject"),
        (
            {"instance_dir": "x", "instance_prompt": "a", "prompt": "b"},
            "0.prompt is an unknown field; allowed: ",
        ),
    ],
)
def test_what_is_missing_is_named(tiny_fields: dict[str, object], concept: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(tiny_fields, concept)


def test_folders_are_checked_at_once(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    cat = {"instance_prompt": "a qy cat", "class_prompt": "a cat"}
    with pytest.raises(DataError, match=r"subject\.concepts\[0\]\.instance_dir: .*nothing does not exist"):
        check_inputs(config_of(tiny_fields, cat | {"instance_dir": str(tmp_path / "nothing")}))
    with pytest.raises(DataError, match="is the photo folder of two subjects"):
        check_inputs(config_of(tiny_fields, cat | {"instance_dir": tiny_fields["subject.instance_dir"]}))
