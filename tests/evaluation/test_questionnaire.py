"""The page, and the tally of its answers."""

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowmem_db.errors import DataError
from lowmem_db.evaluation.folders import Limits, SubjectFiles, find_subjects
from lowmem_db.evaluation.questionnaire import (
    KINDS,
    Kind,
    StudyRequest,
    check_methods,
    find_pairs,
    is_swapped,
    write_questionnaires,
    write_studies,
)
from lowmem_db.evaluation.tally import count, tally, tally_rows
from tests.evaluation.conftest import PHOTOGRAPHS, write_images

PROMPTS = ["a thing", "a thing in the snow", "a </script> thing"]
NAMES = ("ours", "theirs")


def method(folder: Path, seed: int, prompts: list[str] = PROMPTS) -> list[SubjectFiles]:
    for index, name in enumerate(("dog3", "robot_toy")):
        write_images(folder / name, prompts, 2, seed=seed + index)
    return find_subjects(folder, PHOTOGRAPHS, None, Limits())


@pytest.fixture
def methods(tmp_path: Path) -> tuple[list[SubjectFiles], list[SubjectFiles]]:
    return method(tmp_path / "ours", 0), method(tmp_path / "theirs", 5)


@pytest.fixture
def page(methods: tuple[list[SubjectFiles], list[SubjectFiles]], tmp_path: Path) -> Path:
    return write_page(methods, tmp_path, "subject")


def write_page(methods: tuple[list[SubjectFiles], list[SubjectFiles]], folder: Path, kind: Kind) -> Path:
    pairs = find_pairs(*methods, num_pairs=8, seed=3, kind=kind)
    ((page, num_questions),) = write_questionnaires(folder, NAMES, kind, pairs, num_pairs=25, seed=3)
    assert (page.name, num_questions) == (f"questionnaire-{kind}-01.html", 8)
    return page


def content(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def decoded(address: str) -> np.ndarray:
    data = base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def test_every_prompt_comes_once_before_any_comes_twice(
    methods: tuple[list[SubjectFiles], list[SubjectFiles]],
) -> None:
    pairs = find_pairs(*methods, num_pairs=8, seed=0)
    groups = Counter((pair.subject.name, pair.prompt) for pair in pairs)
    assert len(groups) == 6
    assert sorted(groups.values()) == [1, 1, 1, 1, 2, 2]
    for pair in pairs:
        assert [file.parts[-3:-1] for file in pair.files] == [
            ("ours", pair.subject.name),
            ("theirs", pair.subject.name),
        ]
        assert pair.files[0].name == pair.files[1].name
    assert find_pairs(*methods, num_pairs=8, seed=0) == pairs
    assert find_pairs(*methods, num_pairs=8, seed=1) != pairs
    assert len(find_pairs(*methods, num_pairs=99, seed=0)) == 12


def test_page_shows_both_images_on_the_sides_that_the_seed_says(
    page: Path, methods: tuple[list[SubjectFiles], list[SubjectFiles]]
) -> None:
    found = content(page)
    pairs = find_pairs(*methods, num_pairs=8, seed=3)
    swapped = 0
    for question in found["questions"]:
        pair = pairs[int(question["id"].split("-")[1])]
        files = pair.files[::-1] if is_swapped(3, question["id"]) else pair.files
        swapped += is_swapped(3, question["id"])
        for key, file in zip(question["images"], files, strict=True):
            with Image.open(file) as picture:
                difference = np.abs(decoded(found["pictures"][key]) - np.asarray(picture).astype(float))
            assert difference.mean() < 10
    assert 0 < swapped < 8


def test_each_study_asks_the_papers_question_with_its_instructions(page: Path) -> None:
    text = page.read_text()
    for sentence in (
        "Which of the two images best reproduces the identity (e.g. item type and details) of the reference item?",
        "Which of the two images is best described by the reference text?",
        "Read the task carefully, inspect the reference items and then inspect the generated items.",
        "Select which of the two generated items (A or B) reproduces the identity (e.g. item type and details) of the "
        "reference item.",
        "The subject might be wearing accessories (e.g. hats, outfits). These should not affect your answer. "
        "Do not take them into account.",
        "Read the task carefully, inspect the reference text and then inspect the generated items.",
        "Select which of the two generated items (A or B) is best described by the reference text.",
        "If you\u2019re not sure, select Cannot Determine / Both Equally.",
    ):
        assert sentence in text


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_whole_and_hides_the_files(
    methods: tuple[list[SubjectFiles], list[SubjectFiles]], tmp_path: Path, kind: Kind
) -> None:
    text = write_page(methods, tmp_path, kind).read_text()
    assert "QUESTIONNAIRE_JSON" not in text
    assert not re.search(r'(src|href)="', text)
    assert "http:" not in text
    assert "https:" not in text
    assert ".png" not in text
    assert "dog3" not in text
    found = content(tmp_path / f"questionnaire-{kind}-01.html")
    assert (found["kind"], len(found["questions"])) == (kind, 8)
    for question in found["questions"]:
        assert question["kind"] == kind
        assert len(question.get("references", [])) == (3 if kind == "subject" else 0)  # all photos
        assert ("prompt" in question) == (kind == "prompt")
        assert set(question["images"] + question.get("references", [])) <= set(found["pictures"])
    prompts = {question.get("prompt") for question in found["questions"]}
    assert prompts == (set(PROMPTS) if kind == "prompt" else {None})


def test_sides_are_even() -> None:
    swapped = sum(is_swapped(0, f"subject-{number:03d}") for number in range(1000))
    assert 430 < swapped < 570  # 4.4 standard deviations


def test_images_without_prompts_have_no_question_about_prompts(tmp_path: Path) -> None:
    one, other = (write_images(tmp_path / name, ["x"], 3, seed=seed) for seed, name in enumerate(NAMES))
    for folder in (one, other):
        (folder / "prompts.txt").unlink()
    found = [find_subjects(folder, PHOTOGRAPHS / "dog3", None, Limits()) for folder in (one, other)]
    assert len(find_pairs(*found, num_pairs=25, seed=0)) == 3
    with pytest.raises(DataError, match="no known prompt in common"):
        find_pairs(*found, num_pairs=25, seed=0, kind="prompt")


def test_methods_that_share_nothing_are_refused(tmp_path: Path) -> None:
    one, other = method(tmp_path / "a", 0, ["a dog"]), method(tmp_path / "b", 1, ["a cat"])
    with pytest.raises(DataError, match="--pairs: the folders have no subject and prompt in common"):
        find_pairs(one, other, num_pairs=1, seed=0)


def test_methods_are_two_different_folders(tmp_path: Path) -> None:
    assert check_methods([Path("x/ours"), Path("theirs")]) == ("ours", "theirs")
    assert check_methods([Path("x/images"), Path("y/images")]) == ("x/images", "y/images")
    for folders in ([tmp_path], [tmp_path, tmp_path / "." / ""], [tmp_path] * 3):
        with pytest.raises(DataError, match="two different folders"):
            check_methods(folders)


def answer(page: Path, folder: Path, rater: str, choices: dict[str, str]) -> Path:
    """Write what a person saves who chooses a method, or ``undecided``, in each question."""
    found = content(page)
    sides = {}
    for question, choice in choices.items():
        names = NAMES[::-1] if is_swapped(int(found["seed"]), question) else NAMES
        sides[question] = "undecided" if choice == "undecided" else ("left", "right")[names.index(choice)]
    saved = {name: found[name] for name in ("study", "questionnaire", "seed", "names")} | {
        "rater": rater,
        "answers": sides,
    }
    (folder / f"{rater}.json").write_text(json.dumps(saved))
    return folder / f"{rater}.json"


def test_answers_are_counted_for_the_method_behind_the_side(
    methods: tuple[list[SubjectFiles], list[SubjectFiles]], tmp_path: Path
) -> None:
    files = []
    for kind, preferred in (("subject", "ours"), ("prompt", "theirs")):
        page = write_page(methods, tmp_path, kind)
        choices = {question["id"]: preferred for question in content(page)["questions"]}
        files += [answer(page, tmp_path, f"{kind}-{rater}", choices) for rater in "ab"]
    result = tally(files)
    assert (result["names"], result["num_raters"]) == (["ours", "theirs"], 4)
    assert result["subject"] == {
        "num_questionnaires": 1, "num_raters": 2, "num_questions": 8, "num_votes": 16,
        "percentages": {"ours": 100, "theirs": 0, "undecided": 0},
    }  # fmt: skip
    assert result["prompt"]["percentages"] == {"ours": 0, "theirs": 100, "undecided": 0}
    assert tally_rows(result)[1] == ["subject fidelity", "100.0 %", "0.0 %", "0.0 %", "1", "2", "8", "16"]


def test_the_papers_study_is_24_questionnaires_of_25_questions_answered_by_three_people_each(tmp_path: Path) -> None:
    prompts = [f"a thing in place {number}" for number in range(25)]
    folders = [tmp_path / name for name in NAMES]
    for seed, folder in enumerate(folders):
        write_images(folder, prompts, 24, seed=seed, pixels=8)
    request = StudyRequest(kinds=("subject",), num_questionnaires=24)
    pages = write_studies(folders, PHOTOGRAPHS / "dog3", Limits(), tmp_path / "out", request)
    assert [number for _, number in pages] == [25] * 24
    asked = [[question["id"] for question in content(page)["questions"]] for page, _ in pages]
    assert len({question for questions in asked for question in questions}) == 600
    files = []
    for page, questions in zip([page for page, _ in pages], asked, strict=True):
        for person, preferred in enumerate(("ours", "ours", "theirs")):
            name = f"{page.stem}-{person}"
            files.append(answer(page, tmp_path, name, dict.fromkeys(questions, preferred)))
    found = tally(files)["subject"]
    assert found.pop("percentages") == {"ours": 100, "theirs": 0, "undecided": 0}
    assert found == {"num_questionnaires": 24, "num_raters": 72, "num_questions": 600, "num_votes": 1800}
    with pytest.raises(DataError, match=r"--num-questionnaires: 25 of 25 pairs need 625 pairs, but .* have 600"):
        write_studies(folders, PHOTOGRAPHS / "dog3", Limits(), tmp_path / "out", StudyRequest(num_questionnaires=25))


def test_answers_to_pages_of_earlier_versions_are_counted(page: Path, tmp_path: Path) -> None:
    """One page asked both kinds of questions, and had no study."""
    files = []
    for rater in "ab":
        file = answer(page, tmp_path, rater, {"subject-000": "ours", "prompt-000": "theirs"})
        old = json.loads(file.read_text())
        del old["study"]
        file.write_text(json.dumps(old))
        files.append(file)
    assert tally(files)["prompt"]["percentages"]["theirs"] == 100


def test_majority_decides_and_ties_stay_undecided() -> None:
    votes = [("q0", "a"), ("q0", "a"), ("q0", "b"), ("q1", "a"), ("q1", "b"), ("q2", "undecided"), ("q3", "b")]
    found = count(votes, ("a", "b"))
    assert (found.num_questions, found.num_votes) == (4, 7)
    assert found.percentages == {"a": 25, "b": 25, "undecided": 50}
    assert count([], ("a", "b")).percentages == {"a": 0, "b": 0, "undecided": 0}


def test_files_that_do_not_belong_together_are_refused(page: Path, tmp_path: Path) -> None:
    one = answer(page, tmp_path, "a", {"subject-000": "ours"})
    again = tmp_path / "again.json"
    again.write_text(one.read_text())
    with pytest.raises(DataError, match=r"again\.json is from the same person as .*a\.json"):
        tally([one, again])
    other = one.read_text().replace('"rater": "a"', '"rater": "b"')
    again.write_text(other.replace('"study": "', '"study": "0'))
    with pytest.raises(DataError, match=r"again\.json is from a different study than .*a\.json"):
        tally([one, again])
    again.write_text(other.replace('"ours"', '"mine"'))
    with pytest.raises(DataError, match=r"again\.json compares other methods than .*a\.json"):
        tally([one, again])


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"answers": {"subject-000": "up"}}'])
def test_files_that_hold_no_answers_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json: is not an answer file"):
        tally([tmp_path / "a.json"])
    with pytest.raises(DataError, match=r"nothing\.json: cannot be read"):
        tally([tmp_path / "nothing.json"])
    with pytest.raises(DataError, match="needs answer files"):
        tally([])


def test_files_that_are_not_whole_are_refused(page: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json: has no answer"):
        tally([answer(page, tmp_path, "a", {})])
    with pytest.raises(DataError, match=r"b\.json: lacks the answers to 1 questions, such as 001"):
        tally([answer(page, tmp_path, "b", {"subject-000": "ours", "subject-002": "ours"})])
    with pytest.raises(DataError, match=r"c\.json: 'mine-000' is no question"):
        tally([answer(page, tmp_path, "c", {"subject-000": "ours", "mine-000": "ours"})])
