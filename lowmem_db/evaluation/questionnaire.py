"""The questionnaire of arXiv:2208.12242 (section 4.2, Table 2): which of two methods do people prefer?

One self-contained page asks two questions about each pair of images: which looks more like the subject, and which fits
the prompt better. Which method is on the left depends on a seed in the page and is not visible; the page saves the
answers as a file.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lowmem_db import fingerprint
from lowmem_db.data.photos import read_photo
from lowmem_db.errors import DataError
from lowmem_db.evaluation.folders import Limits, SubjectFiles, find_subjects
from lowmem_db.randomness import derive_seed, permutation
from lowmem_db.sampling.images import make_folder
from lowmem_db.storage.atomic import write_text
from lowmem_db.storage.pages import embedded, with_policy

NUM_PAIRS = 25
"""Number of comparisons that each person answered in the paper's study."""
KINDS = ("subject", "prompt")
_TEMPLATE = Path(__file__).parent / "questionnaire.html"
_PLACEHOLDER = "QUESTIONNAIRE_JSON"
_PIXELS = 384
_NUM_REFERENCES = 4


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """One image of each method for the same subject and prompt."""

    subject: SubjectFiles
    prompt: str | None
    files: tuple[Path, Path]


def is_swapped(seed: int, question: str) -> bool:
    """Return whether the second method is on the left in a question."""
    return derive_seed(seed, f"questionnaire/{question}") % 2 == 1


def check_methods(folders: Sequence[Path]) -> tuple[str, str]:
    """Return the names of the methods in two folders: the folder names or, if these are the same, the paths.

    Raises:
        DataError: They are not two different folders.
    """
    if len(folders) != 2 or folders[0].resolve() == folders[1].resolve():
        raise DataError("--pairs: allowed: two different folders of images, one for each method")
    first, second = (folder.resolve().name for folder in folders)
    return (first, second) if first != second else (str(folders[0]), str(folders[1]))


def find_pairs(
    first: Sequence[SubjectFiles], second: Sequence[SubjectFiles], *, num_pairs: int, seed: int
) -> list[ImagePair]:
    """Choose pairs of images, spread evenly over subjects and prompts.

    Raises:
        DataError: The two methods have no subject and prompt in common.
    """
    partners = {subject.name: subject for subject in second}
    pairs = [
        ImagePair(subject=subject, prompt=prompt, files=files)
        for subject in first
        if subject.name in partners
        for prompt, files in _matched(subject, partners[subject.name])
    ]
    if not pairs:
        raise DataError("--pairs: the folders have no subject and prompt in common; draw both with the same prompts")
    order = permutation(seed, "questionnaire/pairs", 0, len(pairs))
    seen: dict[tuple[str, str | None], int] = {}
    ranked = []
    for index in order:
        group = (pairs[index].subject.name, pairs[index].prompt)
        seen[group] = seen.get(group, 0) + 1
        ranked.append((seen[group], index))
    by_round = sorted(ranked, key=lambda entry: entry[0])  # every prompt once before any prompt twice
    return [pairs[index] for _, index in by_round[:num_pairs]]


def write_questionnaire(path: Path, names: tuple[str, str], pairs: Sequence[ImagePair], *, seed: int) -> int:
    """Write the page; return the number of questions.

    Args:
        path: The HTML file.
        names: Names of the methods in the tally, which people do not see.
        pairs: Pairs from :func:`find_pairs`.
        seed: Decides which method is on the left.
    """
    pictures: dict[str, str] = {}
    questions = [
        _question(f"{kind}-{number:03d}", kind, pair, pictures, seed)
        for kind in KINDS
        for number, pair in enumerate(pairs)
        if kind == "subject" or pair.prompt is not None
    ]
    content = {"seed": str(seed), "names": list(names), "questions": questions, "pictures": pictures}
    content["questionnaire"] = fingerprint.of_values(content)
    page = with_policy(_TEMPLATE.read_text(encoding="utf-8"))
    write_text(path, page.replace(_PLACEHOLDER, embedded(content)))
    return len(questions)


def _matched(first: SubjectFiles, second: SubjectFiles) -> list[tuple[str | None, tuple[Path, Path]]]:
    """Return the images of two methods for the same prompts; images without prompts are paired by their order."""
    matched = []
    for prompt in dict.fromkeys(prompt for prompt, _ in first.prompts):
        left, right = (
            [file for text, files in own.prompts if text == prompt for file in files] for own in (first, second)
        )
        matched += [(prompt, files) for files in zip(left, right, strict=False)]
    return matched


def _question(name: str, kind: str, pair: ImagePair, pictures: dict[str, str], seed: int) -> dict[str, Any]:
    left, right = reversed(pair.files) if is_swapped(seed, name) else pair.files
    question: dict[str, Any] = {"id": name, "kind": kind, "images": [_add(left, pictures), _add(right, pictures)]}
    if kind == "subject":
        return question | {"references": [_add(file, pictures) for file in pair.subject.photos[:_NUM_REFERENCES]]}
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


def write_page(
    folders: Sequence[Path], real: Path | None, limits: Limits, output: Path, *, num_pairs: int, seed: int
) -> tuple[Path, int, int]:
    """Write the questionnaire about two folders of images into a folder.

    Returns:
        The page, the number of questions, and the number of pairs of images.

    Raises:
        DataError: The folders cannot be compared.
        StorageError: The disk is full.
    """
    names = check_methods(folders)
    first, second = (find_subjects(folder, real, None, limits) for folder in folders)
    pairs = find_pairs(first, second, num_pairs=num_pairs, seed=seed)
    make_folder(output)
    page = output / "questionnaire.html"
    return page, write_questionnaire(page, names, pairs, seed=seed), len(pairs)
