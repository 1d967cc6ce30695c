"""From files of answers to the percentages of Table 2 of arXiv:2208.12242: each question is decided by majority."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lowmem_db.errors import DataError
from lowmem_db.evaluation.questionnaire import KINDS, is_swapped

UNDECIDED = "undecided"


class Answers(BaseModel):
    """A file that the questionnaire's page has saved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    questionnaire: str
    """Key of the page."""
    seed: int
    """What decided which method stood left."""
    names: tuple[str, str]
    """The two methods."""
    rater: str
    """A random name of who answered."""
    answers: dict[str, Literal["left", "right", "undecided"]]
    """By question."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """How the questions of one kind were decided.

    Attributes:
        num_questions: Questions that somebody has answered.
        num_votes: Answers.
        percentages: Of the questions, by what most people chose: the two methods, and ``undecided``, ties included.
    """

    num_questions: int
    num_votes: int
    percentages: dict[str, float]


def tally(files: Sequence[Path]) -> dict[str, Any]:
    """Read files of answers and count.

    Returns:
        JSON values: ``names``, ``num_raters``, and for ``subject`` and ``prompt`` what :class:`Preference` holds.

    Raises:
        DataError: A file is damaged, there twice, or of another page than the first.
    """
    if not files:
        raise DataError("--tally: needs files of answers; allowed: the files that the questionnaire has saved")
    read = [_read(file) for file in files]
    _check(files, read)
    names = read[0].names
    votes = [vote for answers in read for vote in _votes(answers)]
    result: dict[str, Any] = {"names": list(names), "num_raters": len(read)}
    for kind in KINDS:
        of_kind = [(question, choice) for question, choice in votes if question.startswith(f"{kind}-")]
        result[kind] = vars(count(of_kind, names))
    return result


def count(votes: Sequence[tuple[str, str]], names: tuple[str, str]) -> Preference:
    """Decide each question by majority; two answers with the same number of votes leave it undecided.

    Args:
        votes: Question and choice: one of the names, or ``undecided``.
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
    """Return a table of what :func:`tally` has found, its header first."""
    choices = [*result["names"], UNDECIDED]
    shares = [[f"{result[kind]['percentages'][choice]:.1f} %" for choice in choices] for kind in KINDS]
    counts = [[str(result[kind]["num_questions"]), str(result[kind]["num_votes"])] for kind in KINDS]
    rows = [[f"{kind} fidelity", *share, *count] for kind, share, count in zip(KINDS, shares, counts, strict=True)]
    return [["", *choices, "questions", "answers"], *rows]


def _majority(counter: Mapping[str, int]) -> str:
    most = max(counter.values())
    leaders = [choice for choice, number in counter.items() if number == most]
    return leaders[0] if len(leaders) == 1 else UNDECIDED


def _votes(answers: Answers) -> list[tuple[str, str]]:
    sides = {
        question: answers.names[::-1] if is_swapped(answers.seed, question) else answers.names
        for question in answers.answers
    }
    return [
        (question, UNDECIDED if answer == UNDECIDED else sides[question][answer == "right"])
        for question, answer in answers.answers.items()
    ]


def _read(file: Path) -> Answers:
    try:
        return Answers.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"--tally: {file}: cannot be read ({error.strerror}); allowed: a file of answers") from error
    except (ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"--tally: {file}: is no file of answers ({reason}); allowed: what the page has saved"
        ) from error


def _check(files: Sequence[Path], read: Sequence[Answers]) -> None:
    first_of_rater: dict[str, Path] = {}
    for file, answers in zip(files, read, strict=True):
        if answers.questionnaire != read[0].questionnaire:
            raise DataError(f"--tally: {file} answers another page than {files[0]}; count the pages apart")
        if answers.rater in first_of_rater:
            raise DataError(
                f"--tally: {file} is of the same person as {first_of_rater[answers.rater]}; leave one of them out"
            )
        first_of_rater[answers.rater] = file
