"""``lowmem-db evaluate``: of a run, of folders, the questionnaire and its tally."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.evaluation.conftest import PHOTOGRAPHS, random_picture, write_images

QUICK = ("--prompts", 2, "--images", 2, "--num-class-images", 2, "--num-inference-steps", 1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", ["a dog", "a dog in the snow"], 2)


def test_run_is_drawn_and_scored_and_a_second_call_draws_nothing(run: Run, trained: Path, tmp_path: Path) -> None:
    first = run("evaluate", trained, *QUICK, "--json")
    assert (first.code, "drawing 6 images" in first.err) == (0, True)
    report = json.loads(first.out)
    pairs = {name: found["num_pairs"] for name, found in report["metrics"].items()}
    assert pairs == {"EN0-I": 2 * 2 * 3, "EN0-PRES": 2 * 3, "EN0-DIV": 2}
    assert set(report["encoders"]) == {"en0"}
    output = tmp_path / "evaluation"
    assert json.loads((output / "evaluation.json").read_text()) == report
    assert {file.name for file in (output / "run").iterdir()} == {
        "00-00.png", "00-01.png", "01-00.png", "01-01.png", "class", "contact_sheet.png", "manifest.json", "prompts.txt"
    }  # fmt: skip
    (output / "run" / "01-00.png").unlink()
    second = run("evaluate", trained, *QUICK, "--json")
    assert "drawing 1 images" in second.err
    assert second.out == first.out
    assert "drawing" not in run("evaluate", trained, *QUICK, "--json").err


def test_failures_are_told_with_what_the_model_drew_before_training(
    run: Run, config_file: Path, tmp_path: Path
) -> None:
    fields = ("training.learning_rate=1e-2", "subject.class_prompt=a dog")
    assert run("train", config_file, *fields).code == 0
    (tmp_path / "prompts.txt").write_text("a zx dog on the beach\na zx dog on a red background\n")
    options = ("--prompt-file", tmp_path / "prompts.txt", *QUICK, "--encoder", "en0", "--encoder", "captions")
    plain = run("evaluate", tmp_path / "run", *options, "--json")
    failures = json.loads(plain.out)["subjects"]["run"]["failures"]
    assert failures["context"]["num_prompts"] == 2
    assert failures["entanglement"] is None
    assert failures["copies"]["share"] == 0
    whole = run("evaluate", tmp_path / "run", *options, "--failures", "--json")
    assert "drawing 6 images" in whole.err  # two of the subject alone, two of each prompt before training
    told = json.loads(whole.out)["subjects"]["run"]
    assert told["failures"]["entanglement"]["figure"] == "EN0-I"
    assert {"caption_background", "caption_background_untuned", "EN0-I_drop"} <= {
        *told["prompts"]["a dog on the beach"]
    }
    assert all("reason" in each for each in told["failures"]["context"]["not_drawn"])
    folder = tmp_path / "evaluation" / "run"
    assert len(list((folder / "untuned").iterdir())) == 4
    assert (folder / "untuned" / "00-00.png").read_bytes() != (folder / "00-00.png").read_bytes()
    table = run("evaluate", tmp_path / "run", *options, "--failures")
    assert "run: entanglement: EN0-I is " in table.out
    refused = run("evaluate", folder, "--real", PHOTOGRAPHS / "dog3", "--failures")
    assert (refused.code, "--failures: cannot be used here" in refused.err) == (2, True)


def test_shards_draw_and_the_whole_scores(run: Run, trained: Path, tmp_path: Path) -> None:
    whole = run("evaluate", trained, *QUICK, "--json", "-o", "whole")
    for number in (1, 2):
        outcome = run("evaluate", trained, *QUICK, "--shard", f"{number}/2", "-o", "parts")
        assert (outcome.code, outcome.out.startswith(f"shard {number}/2 is done")) == (0, True)
        assert not (tmp_path / "parts" / "evaluation.json").exists()
    parts = run("evaluate", trained, *QUICK, "--json", "-o", "parts")
    assert "drawing" not in parts.err
    assert parts.out == whole.out


def test_checkpoint_of_a_run_that_is_not_done_is_scored(run: Run, config_file: Path, tmp_path: Path) -> None:
    fields = (
        "training.max_train_steps=3",
        "training.learning_rate=1e-2",
        "checkpointing.every=1",
        "checkpointing.keep=3",
    )
    assert run("train", config_file, *fields).code == 0
    whole = run("evaluate", tmp_path / "run", *QUICK, "--json", "-o", "whole")
    shutil.rmtree(tmp_path / "run" / "final")
    half = run("evaluate", tmp_path / "run", *QUICK, "--json", "-o", "half")
    assert "drawing from its checkpoint of step 3" in half.err
    assert half.out == whole.out
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")
    older = run("evaluate", tmp_path / "run", *QUICK, "--json", "-o", "half")
    assert (older.code, "has images drawn with other settings (checkpoint)" in older.err) == (2, True)
    assert run("evaluate", tmp_path / "run", "--class-images", tmp_path / "run").code == 2


def test_images_of_any_tool_are_compared_with_photos(run: Run, images: Path, tmp_path: Path) -> None:
    outcome = run("evaluate", images, "--real", PHOTOGRAPHS / "dog3", "--class-images", images)
    assert outcome.code == 0
    for name in ("EN0-I", "EN0-PRES", "EN0-DIV"):
        assert name in outcome.out
    assert "DINO" not in outcome.out
    assert "Table 1" not in outcome.out
    assert outcome.out.splitlines()[-1] == str(Path("evaluation") / "evaluation.json")
    assert (tmp_path / "evaluation" / "dog3" / "contact_sheet.png").is_file()


def test_more_subjects_than_one(run: Run, tmp_path: Path) -> None:
    for index, name in enumerate(("dog3", "robot_toy", "bear_plushie")):
        write_images(tmp_path / "all" / name, ["a thing"], 2, seed=index)
    chosen = ("--subjects", "dog3,robot_toy", "--images", 1, "--json")
    report = json.loads(run("evaluate", tmp_path / "all", "--real", PHOTOGRAPHS, *chosen).out)
    assert set(report["subjects"]) == {"dog3", "robot_toy"}
    assert report["metrics"]["EN0-I"]["num_pairs"] == 2 * 3


def test_questionnaire_is_written_and_tallied(run: Run, images: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "others", ["a dog", "a dog in the snow"], 2, seed=1)
    outcome = run("evaluate", "--pairs", images, other, "--real", PHOTOGRAPHS / "dog3", "--num-pairs", 3)
    pages = [f"evaluation/questionnaire-{kind}-01.html: 3 questions" for kind in ("subject", "prompt")]
    assert (outcome.code, outcome.out.splitlines()) == (0, pages)
    page = (tmp_path / "evaluation" / "questionnaire-subject-01.html").read_text()
    content = json.loads(page.partition('id="content">')[2].partition("</script>")[0])
    saved = {name: content[name] for name in ("study", "questionnaire", "seed", "names")}
    for rater in ("a", "b"):
        answers = {question["id"]: "undecided" for question in content["questions"]}
        (tmp_path / f"{rater}.json").write_text(json.dumps(saved | {"rater": rater, "answers": answers}))
    counted = run("evaluate", "--tally", "a.json", "b.json", "--json")
    assert json.loads(counted.out)["subject"]["percentages"] == {"images": 0, "others": 0, "undecided": 100}
    shown = run("evaluate", "--tally", "a.json", "b.json")
    assert (shown.code, "2 people" in shown.out, "100.0 %" in shown.out) == (0, True, True)
    assert all(figure in shown.out for figure in ("68 %", "12 %", "1800"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("nothing",), "RUN_OR_IMAGES: nothing does not exist"),
        (("images",), "--real: is required"),
        (("images", "images"), "RUN_OR_IMAGES: 2 given; allowed: one"),
        (("images", "--real", "nothing"), "--real: nothing does not exist"),
        (("images", "--real", "empty"), "--real: empty has no pictures"),
        (("empty", "--real", "images"), "IMAGES: empty is empty"),
        (("images", "--real", "damaged"), "photo.png: cannot be decoded"),
        (("images", "--real", "images", "--encoder", "foo"), "--encoder: 'foo' is unknown"),
        (("images", "--real", "images", "--encoder", "dino=empty"), "does not have a config.json and weights"),
        (("images", "--real", "images", "--shard", "3/2"), "--shard: '3/2'"),
        (("images", "--real", "images", "--shard", "1/2"), "--shard: cannot be used here, because images is not a run"),
        (("images", "--real", "images", "--suite", "objects", "--sampler", "ddim"), "--suite, --sampler: cannot be"),
        (("images", "--real", "images", "--subjects", "0"), "--subjects: '0'"),
        (("images", "--real", "images", "--subjects", "cat"), "--subjects: cat not found; allowed: images"),
        (("images", "--real", "images", "--device", "cuda:9"), "device: 'cuda:9' does not exist"),
        (("images", "--real", "images", "-o", "file"), "file: cannot be written"),
        (("--pairs", "images", "--real", "images"), "--pairs: allowed: two different folders"),
        (("images", "--num-questionnaires", 2, "--kind", "prompt"), "--num-questionnaires, --kind: belongs to"),
        (("--tally", "nothing.json"), "--tally: nothing.json: cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    run: Run, images: Path, tmp_path: Path, arguments: tuple, part: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    shutil.copytree(images, tmp_path / "damaged")
    random_picture(0).save(tmp_path / "damaged" / "photo.png")
    (tmp_path / "damaged" / "photo.png").write_bytes(b"\x89PNG")
    outcome = run("evaluate", *arguments)
    assert outcome.code == 2, outcome
    assert part in outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err


def test_options_without_an_effect_beside_tally_and_pairs_are_refused(run: Run, images: Path) -> None:
    told = run("evaluate", "answers.json", "--tally", "--failures", "--real", "photos")
    assert (told.code, "--real, --failures: no effect with --tally" in told.err) == (2, True)
    told = run("evaluate", images, images, "--pairs", "--step", 3)
    assert (told.code, "--step: no effect with --pairs" in told.err) == (2, True)
