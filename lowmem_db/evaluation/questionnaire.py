"""The two studies of arXiv:2208.12242 (section 4.2, Table 2): which of two methods do people prefer?

One study asks which of two images is more like the subject, the other which fits the prompt better, in the paper's own
words. Each is written as questionnaires, self-contained pages with different pairs of images; in the paper 24 for each
study, with 25 pairs, answered by three people each. Which method is image A depends on a seed in the page and is not
visible; the page saves the answers as a file.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from lowmem_db import fingerprint
from lowmem_db.data.photos import read_photo
from lowmem_db.errors import DataError
from lowmem_db.evaluation.folders import Limits, SubjectFiles, find_subjects
from lowmem_db.randomness import derive_seed, permutation
from lowmem_db.sampling.images import make_folder
from lowmem_db.storage.atomic import write_text
from lowmem_db.storage.pages import embedded, with_policy

Kind = Literal["subject", "prompt"]
NUM_PAIRS = 25
"""Number of comparisons in each questionnaire of the paper."""
KINDS: tuple[Kind, ...] = ("subject", "prompt")
_TEMPLATE = Path(__file__).parent / "questionnaire.html"
_PLACEHOLDER = "QUESTIONNAIRE_JSON"
_PIXELS = 384
_NOTHING_IN_COMMON: dict[Kind, str] = {
    "subject": "--pairs: the folders have no subject and prompt in common; draw both with the same prompts",
    "prompt": "--kind: prompt: the folders have no known prompt in common; add prompts.txt to both, draw both with the "
    "same prompts, or ask with --kind subject alone",
}


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """One image of each method for the same subject and prompt."""

    subject: SubjectFiles
    prompt: str | None
    files: tuple[Path, Path]


def is_swapped(seed: int, question: str) -> bool:
    """Return whether the second method is on the left in a question."""
    return derive_seed(seed, f"questionnaire/{question}") % 2 == 1


def check_methods(folders: Sequence[Path], option: str = "--pairs") -> tuple[str, str]:
    """Return the names of the methods in two folders: the folder names or, if these are the same, the paths.

    Args:
        folders: The folders.
        option: The option that they are given with, for the message.

    Raises:
        DataError: They are not two different folders.
    """
    if len(folders) != 2 or folders[0].resolve() == folders[1].resolve():
        raise DataError(f"{option}: allowed: two different folders of images, one for each method")
    first, second = (folder.resolve().name for folder in folders)
    return (first, second) if first != second else (str(folders[0]), str(folders[1]))


def find_pairs(
    first: Sequence[SubjectFiles], second: Sequence[SubjectFiles], *, num_pairs: int, seed: int, kind: Kind = "subject"
) -> list[ImagePair]:
    """Choose pairs of images, spread evenly over subjects and prompts; for the study about prompts, with a prompt.

    Raises:
        DataError: The two methods have no subject and prompt in common.
    """
    partners = {subject.name: subject for subject in second}
    pairs = [
        ImagePair(subject=subject, prompt=prompt, files=files)
        for subject in first
        if subject.name in partners
        for prompt, files in _matched(subject, partners[subject.name])
        if kind == "subject" or prompt is not None
    ]
    if not pairs:
        raise DataError(_NOTHING_IN_COMMON[kind])
    order = permutation(seed, "questionnaire/pairs", 0, len(pairs))
    seen: dict[tuple[str, str | None], int] = {}
    ranked = []
    for index in order:
        group = (pairs[index].subject.name, pairs[index].prompt)
        seen[group] = seen.get(group, 0) + 1
        ranked.append((seen[group], index))
    by_round = sorted(ranked, key=lambda entry: entry[0])  # every prompt once before any prompt twice
    return [pairs[index] for _, index in by_round[:num_pairs]]


def write_questionnaires(
    folder: Path, names: tuple[str, str], kind: Kind, pairs: Sequence[ImagePair], *, num_pairs: int, seed: int
) -> list[tuple[Path, int]]:
    """Write the pages of one study, ``questionnaire-KIND-NN.html``; return each with its number of questions.

    Args:
        folder: Folder of the pages.
        names: Names of the methods in the tally, which people do not see.
        kind: Which study.
        pairs: Pairs from :func:`find_pairs`.
        num_pairs: Pairs on each page; the last may have fewer.
        seed: Decides which method is image A.
    """
    study = study_key(kind, names, [identity_of(pair) for pair in pairs], seed)
    template = with_policy(_TEMPLATE.read_text(encoding="utf-8"))
    pages = []
    for number, start in enumerate(range(0, len(pairs), num_pairs), start=1):
        pictures: dict[str, str] = {}
        questions = [
            _question(f"{kind}-{index:03d}", kind, pair, pictures, seed)
            for index, pair in enumerate(pairs[start : start + num_pairs], start=start)
        ]
        content = {"study": study, "kind": kind, "seed": str(seed), "names": list(names), "questions": questions}
        content["pictures"] = pictures
        content["questionnaire"] = fingerprint.of_values(content)
        page = folder / f"questionnaire-{kind}-{number:02d}.html"
        write_text(page, template.replace(_PLACEHOLDER, embedded(content)))
        pages.append((page, len(questions)))
    return pages


def study_key(kind: Kind, names: tuple[str, str], pairs: Sequence[list[str | None]], seed: int) -> str:
    """Return the key of a study, by which its answers are known; pairs as :func:`identity_of` gives them."""
    return fingerprint.of_values(kind, str(seed), list(names), list(pairs))


def identity_of(pair: ImagePair) -> list[str | None]:
    """Return what makes a pair the same wherever its files lie."""
    return [pair.subject.name, pair.prompt, *(fingerprint.of_files([file]) for file in pair.files)]


def _matched(first: SubjectFiles, second: SubjectFiles) -> list[tuple[str | None, tuple[Path, Path]]]:
    """Return the images of two methods for the same prompts; images without prompts are paired by their order."""
    matched = []
    for prompt in dict.fromkeys(prompt for prompt, _ in first.prompts):
        left, right = (
            [file for text, files in own.prompts if text == prompt for file in files] for own in (first, second)
        )
        matched += [(prompt, files) for files in zip(left, right, strict=False)]
    return matched


def _question(name: str, kind: Kind, pair: ImagePair, pictures: dict[str, str], seed: int) -> dict[str, Any]:
    left, right = reversed(pair.files) if is_swapped(seed, name) else pair.files
    question: dict[str, Any] = {"id": name, "kind": kind, "images": [_add(left, pictures), _add(right, pictures)]}
    if kind == "subject":
        return question | {"references": [_add(file, pictures) for file in pair.subject.photos]}
    return question | {"prompt": pair.prompt}


def _add(file: Path, pictures: dict[str, str]) -> str:
    """Put a picture into the page once, under a name that does not reveal its file."""
    image = read_photo(file)
    image.thumbnail((_PIXELS, _PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    address = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    key = fingerprint.of_values(address)[:12]
    pictures[key] = address
    return key


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """What is asked.

    Attributes:
        kinds: The studies to write.
        num_questionnaires: Questionnaires of each study, with different pairs.
        num_pairs: Pairs in each questionnaire.
        seed: Chooses pairs and sides.
    """

    kinds: tuple[Kind, ...] = KINDS
    num_questionnaires: int = 1
    num_pairs: int = NUM_PAIRS
    seed: int = 0


def write_studies(
    folders: Sequence[Path], real: Path | None, limits: Limits, output: Path, request: StudyRequest
) -> list[tuple[Path, int]]:
    """Write the questionnaires about two folders of images into a folder.

    Returns:
        Each page with its number of questions.

    Raises:
        DataError: The folders cannot be compared, or have too few images for so many questionnaires.
        StorageError: The disk is full.
    """
    names = check_methods(folders)
    first, second = (find_subjects(folder, real, None, limits) for folder in folders)
    wanted = request.num_questionnaires * request.num_pairs
    pairs: dict[Kind, list[ImagePair]] = {
        kind: find_pairs(first, second, num_pairs=wanted, seed=request.seed, kind=kind) for kind in request.kinds
    }
    fewest = min(map(len, pairs.values()))
    if request.num_questionnaires > 1 and fewest < wanted:
        raise DataError(
            f"--num-questionnaires: {request.num_questionnaires} of {request.num_pairs} pairs need {wanted} pairs, but "
            f"the folders have {fewest} in common; draw more images, or use a smaller number here or in --num-pairs"
        )
    make_folder(output)
    return [
        page
        for kind, chosen in pairs.items()
        for page in write_questionnaires(output, names, kind, chosen, num_pairs=request.num_pairs, seed=request.seed)
    ]
