"""From answer files to the percentages of Table 2 of arXiv:2208.12242: each question is decided by majority.

The questionnaires of a study are counted together. In the paper 24 questionnaires of 25 questions, each answered by
three people, are 600 questions and 1,800 answers.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lowmem_db.errors import DataError
from lowmem_db.evaluation.questionnaire import KINDS, Kind, is_swapped

UNDECIDED = "undecided"
_QUESTION = re.compile(rf"(?:{'|'.join(KINDS)})-\d+")
_COUNTED = ("questionnaires", "raters", "questions", "votes")
PAPER_TABLE: dict[str, dict[str, float]] = {
    "subject": {"DreamBooth (Stable Diffusion)": 68, "Textual Inversion (Stable Diffusion)": 22, UNDECIDED: 10},
    "prompt": {"DreamBooth (Stable Diffusion)": 81, "Textual Inversion (Stable Diffusion)": 12, UNDECIDED: 7},
}
"""Table 2 of arXiv:2208.12242, in per cent: 24 questionnaires of 25 questions for each study, 3 people each."""


class Answers(BaseModel):
    """A file saved by the questionnaire's page."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: str | None = None
    """Key of the study to which the page belongs; pages of earlier versions are a study each."""
    questionnaire: str
    """Key of the page, to tell pages apart."""
    seed: int
    """The seed that decided which method was on the left."""
    names: tuple[str, str]
    """The two methods."""
    rater: str
    """A random name for the person who answered."""
    answers: dict[str, Literal["left", "right", "undecided"]]
    """Answers by question."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """How the questions of one kind were decided.

    Attributes:
        num_questions: Number of questions with answers.
        num_votes: Number of answers.
        percentages: Percentage of questions won by each method, and ``undecided``, which includes ties.
    """

    num_questions: int
    num_votes: int
    percentages: dict[str, float]


def tally(files: Sequence[Path]) -> dict[str, Any]:
    """Read answer files and count.

    Returns:
        JSON values: ``names``, ``num_raters``, and for ``subject`` and ``prompt`` the number of pages and people, and
        the fields of :class:`Preference`.

    Raises:
        DataError: A file is damaged, given twice, or from a different study than another.
    """
    read = read_answers(files)
    names = read[0].names
    result: dict[str, Any] = {"names": list(names), "num_raters": len(read)}
    for kind in KINDS:
        asked = [answers for answers in read if votes_of(answers, kind)]
        result[kind] = {
            "num_questionnaires": len({answers.questionnaire for answers in asked}),
            "num_raters": len(asked),
            **vars(count([vote for answers in asked for vote in votes_of(answers, kind)], names)),
        }
    return result


def read_answers(files: Sequence[Path]) -> list[Answers]:
    """Read answer files that can be counted together.

    Raises:
        DataError: A file is damaged, given twice, or from a different study than another.
    """
    if not files:
        raise DataError("--tally: needs answer files; allowed: files saved by the questionnaire")
    read = [_read(file) for file in files]
    _check(files, read)
    return read


def count(votes: Sequence[tuple[str, str]], names: tuple[str, str]) -> Preference:
    """Decide each question by majority; a tie leaves it undecided.

    Args:
        votes: Pairs of question and choice; the choice is one of the names or ``undecided``.
        names: The two methods.
    """
    by_question: dict[str, Counter[str]] = {}
    for question, choice in votes:
        by_question.setdefault(question, Counter())[choice] += 1
    decided = Counter(_majority(counter) for counter in by_question.values())
    total = max(1, len(by_question))
    return Preference(
        num_questions=len(by_question),
        num_votes=len(votes),
        percentages={choice: 100 * decided[choice] / total for choice in (*names, UNDECIDED)},
    )


def tally_rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the result of :func:`tally` as a table, header first."""
    choices = [*result["names"], UNDECIDED]
    shares = [[f"{result[kind]['percentages'][choice]:.1f} %" for choice in choices] for kind in KINDS]
    counts = [[str(result[kind][f"num_{counted}"]) for counted in _COUNTED] for kind in KINDS]
    rows = [[f"{kind} fidelity", *share, *count] for kind, share, count in zip(KINDS, shares, counts, strict=True)]
    return [["", *choices, "questionnaires", "people", "questions", "answers"], *rows]


def paper_rows() -> list[list[str]]:
    """Return the paper's Table 2 in the form of :func:`tally_rows`."""
    header = ["", *PAPER_TABLE["subject"], "questionnaires", "people", "questions", "answers"]
    counts = ["24", "72", "600", "1800"]
    return [
        header,
        *([f"{kind} fidelity", *(f"{v} %" for v in row.values()), *counts] for kind, row in PAPER_TABLE.items()),
    ]


def _majority(counter: Mapping[str, int]) -> str:
    most = max(counter.values())
    leaders = [choice for choice, number in counter.items() if number == most]
    return leaders[0] if len(leaders) == 1 else UNDECIDED


def votes_of(answers: Answers, kind: Kind) -> list[tuple[str, str]]:
    """Return the answers to the questions of one kind: pairs of question, and name of a method or ``undecided``."""
    votes = []
    for question, answer in answers.answers.items():
        if question.startswith(f"{kind}-"):
            sides = answers.names[::-1] if is_swapped(answers.seed, question) else answers.names
            votes.append((question, UNDECIDED if answer == UNDECIDED else sides[answer == "right"]))
    return votes


def _kinds_of(answers: Answers) -> list[Kind]:
    return [kind for kind in KINDS if votes_of(answers, kind)]


def _read(file: Path) -> Answers:
    answers = _parsed(file)
    strange = [name for name in answers.answers if not _QUESTION.fullmatch(name)]
    if strange:
        raise DataError(f"--tally: {file}: {strange[0]!r} is no question of a questionnaire; get the file again")
    numbers = sorted(int(name.rpartition("-")[2]) for name in answers.answers)
    if not numbers:
        raise DataError(f"--tally: {file}: has no answer; leave the file out, or ask for it again")
    if missing := sorted(set(range(numbers[0], numbers[-1])) - set(numbers)):
        raise DataError(
            f"--tally: {file}: lacks the answers to {len(missing)} questions, such as {missing[0]:03d}; ask for the "
            "whole file again: the page saves it after its last question"
        )
    return answers


def _parsed(file: Path) -> Answers:
    try:
        return Answers.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"--tally: {file}: cannot be read ({error.strerror}); allowed: an answer file") from error
    except (ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"--tally: {file}: is not an answer file ({reason}); allowed: files saved by the questionnaire"
        ) from error


def _check(files: Sequence[Path], read: Sequence[Answers]) -> None:
    """Refuse answers that cannot be counted together: a study asks one kind of question about one set of pairs."""
    studies: dict[Kind, tuple[str, Path]] = {}
    first_of_rater: dict[str, Path] = {}
    for file, answers in zip(files, read, strict=True):
        key = answers.study or answers.questionnaire
        for kind in _kinds_of(answers):
            known, first = studies.setdefault(kind, (key, file))
            if known != key:
                raise DataError(f"--tally: {file} is from a different study than {first}; tally each study separately")
        if answers.names != read[0].names:
            raise DataError(f"--tally: {file} compares other methods than {files[0]}; tally them separately")
        if answers.rater in first_of_rater:
            raise DataError(
                f"--tally: {file} is from the same person as {first_of_rater[answers.rater]}; leave one of them out"
            )
        first_of_rater[answers.rater] = file
