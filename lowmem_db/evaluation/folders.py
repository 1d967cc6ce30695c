"""Reading folders of images, made by any tool, for evaluation.

A folder of drawn images may have one of four forms: ``prompts.txt`` with one prompt per line and images named
``PROMPT-IMAGE`` (numbers from zero); ``images.json``, as ``lowmem-db generate`` writes it; a text file of the same name
next to each image; a folder for each prompt, named after it. Images without a prompt are compared only with the photos.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_db.console import say
from lowmem_db.data.photos import read_photo, scan_photos
from lowmem_db.errors import DataError
from lowmem_db.evaluation.scoring import Pictures
from lowmem_db.records import ImageRecord
from lowmem_db.sampling.images import GRID_FILE
from lowmem_db.sampling.prompts import read_prompt_file
from lowmem_db.storage.run_folder import RunFolder, read_json

PROMPTS_FILE = "prompts.txt"
SETTINGS_FILE = "images.json"
CONTACT_SHEET = "contact_sheet.png"
_NUMBERED = re.compile(r"(\d+)-(\d+)")
_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".heic", ".heif", ".hif", ".tif", ".tiff", ".bmp", ".gif")
)


@dataclass(frozen=True, kw_only=True)
class SubjectFiles:
    """The picture files of one subject; each has been decoded once to check it.

    Attributes:
        name: Name of the subject.
        photos: Real photos.
        prompts: Each prompt, or None if it is not known, with its images.
        class_images: Images of the class prompt.
        plain: Drawn images of the subject without a context.
        untuned: Prompts with the images that the model drew for them before training.
        class_caption: What the prompts say without their context: ``a dog``.
    """

    name: str
    photos: tuple[Path, ...]
    prompts: tuple[tuple[str | None, tuple[Path, ...]], ...]
    class_images: tuple[Path, ...] = ()
    plain: tuple[Path, ...] = ()
    untuned: tuple[tuple[str, tuple[Path, ...]], ...] = ()
    class_caption: str | None = None

    @property
    def num_images(self) -> int:
        """Number of drawn images."""
        return sum(len(files) for _, files in self.prompts)

    def read(self) -> Pictures:
        """Read all pictures."""
        return Pictures(
            photos=[read_photo(file) for file in self.photos],
            prompts=[(prompt, [read_photo(file) for file in files]) for prompt, files in self.prompts],
            class_images=[read_photo(file) for file in self.class_images],
            plain=[read_photo(file) for file in self.plain],
            untuned=[(prompt, [read_photo(file) for file in files]) for prompt, files in self.untuned],
            class_caption=self.class_caption,
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits that make an evaluation smaller. Default: no limits.

    Attributes:
        subjects: Number of subjects, in the order of their names; or their names.
        num_prompts: Number of prompts, from the first.
        num_images: Number of images of each prompt.
    """

    subjects: int | tuple[str, ...] | None = None
    num_prompts: int | None = None
    num_images: int | None = None


def parse_subjects(text: str | None) -> int | tuple[str, ...] | None:
    """Parse the option ``--subjects``: a number, or names separated by commas.

    Raises:
        DataError: It is neither.
    """
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or text.strip() == "0":
        raise DataError(f"--subjects: {text!r}; allowed: a number from 1, or names separated by commas: dog,cat")
    return int(text) if text.strip().isdigit() else names


def find_subjects(images: Path, photos: Path | None, class_images: Path | None, limits: Limits) -> list[SubjectFiles]:
    """Find the pictures to compare: those of one subject, or a folder for each subject in each of the folders.

    Raises:
        DataError: A folder is missing or empty, or pictures cannot be read; one line for each problem.
    """
    for field, folder in (("IMAGES", images), ("--real", photos), ("--class-images", class_images)):
        if folder is not None and not folder.is_dir():
            raise DataError(
                f"{field}: {folder} {'is a file' if folder.exists() else 'does not exist'}; allowed: a folder"
            )
    if photos is None:
        raise DataError(f"--real: is required, because {images} is not a run; give the photos of the subject")
    if _holds_pictures(photos):
        (name,) = choose([photos.resolve().name], limits)
        return [read_subject(name, _of_the_one_subject(images), photos, class_images, limits)]
    names = choose(_names_of_both(images, photos), limits)
    return gather(
        lambda name: read_subject(name, images / name, photos / name, class_images and class_images / name, limits),
        names,
    )


def read_subject(name: str, images: Path, photos: Path, class_images: Path | None, limits: Limits) -> SubjectFiles:
    """Read the folders of one subject.

    Raises:
        DataError: One of them is missing or empty, or pictures cannot be read.
    """
    return SubjectFiles(
        name=name,
        photos=scan_pictures(photos, "--real"),
        prompts=read_prompts_of(images, limits),
        class_images=() if class_images is None else scan_pictures(class_images, "--class-images"),
    )


def scan_pictures(folder: Path, field: str) -> tuple[Path, ...]:
    """Check and list the pictures of a folder.

    Raises:
        DataError: There are none, or some cannot be read.
    """
    return tuple(record.path for record in _scan(folder, field))


def choose(names: Sequence[str], limits: Limits) -> list[str]:
    """Return the subjects within the limits.

    Raises:
        DataError: One that was named does not exist.
    """
    if isinstance(limits.subjects, tuple):
        missing = [name for name in limits.subjects if name not in names]
        if missing:
            raise DataError(f"--subjects: {', '.join(missing)} not found; allowed: {', '.join(names)}")
        return list(dict.fromkeys(limits.subjects))
    return list(names)[: limits.subjects]


def gather(read: Callable[[str], SubjectFiles], names: Sequence[str]) -> list[SubjectFiles]:
    """Read all subjects, and report all problems at once."""
    found, problems = [], []
    for name in names:
        try:
            found.append(read(name))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return found


def read_prompts_of(folder: Path, limits: Limits) -> tuple[tuple[str | None, tuple[Path, ...]], ...]:
    """Read a folder of drawn images in one of the three forms.

    Raises:
        DataError: It is missing or empty, or has none of the forms.
    """
    if folder.is_dir() and not _holds_pictures(folder) and any(_picture_folders(folder)):
        found = [(_prompt_of_folder(inner), scan_pictures(inner, "IMAGES")) for inner in _picture_folders(folder)]
    elif (folder / PROMPTS_FILE).is_file():
        found = _numbered(folder)
    elif (folder / SETTINGS_FILE).is_file():
        found = _listed(folder)
    else:
        found = _captioned(_scan(folder, "IMAGES"))
    return tuple((prompt, files[: limits.num_images]) for prompt, files in found[: limits.num_prompts])


def _numbered(folder: Path) -> list[tuple[str | None, tuple[Path, ...]]]:
    prompts = read_prompt_file(folder / PROMPTS_FILE)
    by_prompt: dict[int, list[tuple[int, Path]]] = {}
    for record in _scan(folder, "IMAGES"):
        match = _NUMBERED.fullmatch(record.path.stem)
        if match is None or int(match[1]) >= len(prompts):
            raise DataError(
                f"IMAGES: {record.path}: belongs to none of the {len(prompts)} prompts in {PROMPTS_FILE}; allowed: "
                f"PROMPT-IMAGE with the number of the line from 0, such as 00-03.png. Rename it, or "
                f"remove {PROMPTS_FILE}"
            )
        by_prompt.setdefault(int(match[1]), []).append((int(match[2]), record.path))
    return [(prompts[number], tuple(path for _, path in sorted(by_prompt[number]))) for number in sorted(by_prompt)]


def _listed(folder: Path) -> list[tuple[str | None, tuple[Path, ...]]]:
    """Group images by the prompt that ``images.json`` names; one that it does not name is a group by itself."""
    content = read_json(folder / SETTINGS_FILE)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(
            f"IMAGES: {folder / SETTINGS_FILE}: is not a list of images; allowed: the file that lowmem-db generate "
            "writes. Remove it, or draw the images again"
        )
    prompts = {str(image.get("file")): image.get("prompt") for image in images if isinstance(image, dict)}
    records = _scan(folder, "IMAGES")
    return _captioned([replace(record, prompt=str(prompts.get(record.path.name) or "")) for record in records])


def _of_the_one_subject(images: Path) -> Path:
    """Return the folder of images of a single subject: where ``evaluate`` has written it, one folder deeper.

    Raises:
        DataError: The folder is a run, or holds several subjects.
    """
    if RunFolder(images).config_file.is_file():
        raise DataError(
            f"IMAGES: {images} is a run; draw its images first (lowmem-db evaluate {images}), and name the folder that "
            "this writes"
        )
    subjects = [] if _holds_pictures(images) else [f for f in _picture_folders(images) if (f / PROMPTS_FILE).is_file()]
    if len(subjects) > 1:
        raise DataError(
            f"IMAGES: {images} holds several subjects ({', '.join(folder.name for folder in subjects)}), but --real "
            "has the photos of one; name the folder of one of them"
        )
    return subjects[0] if subjects else images


def _captioned(records: Sequence[ImageRecord]) -> list[tuple[str | None, tuple[Path, ...]]]:
    """Group images by caption; an image without a caption is a group by itself."""
    found: list[tuple[str | None, tuple[Path, ...]]] = []
    by_prompt: dict[str, list[Path]] = {}
    for record in records:
        if record.prompt:
            by_prompt.setdefault(record.prompt, []).append(record.path)
        else:
            found.append((None, (record.path,)))
    return [*((prompt, tuple(paths)) for prompt, paths in by_prompt.items()), *found]


def _scan(folder: Path, field: str) -> list[ImageRecord]:
    records = scan_photos(folder, prompt="", resolution=1, field=field)
    kept = [record for record in records if record.path.name not in (GRID_FILE, CONTACT_SHEET)]
    if not kept:
        raise DataError(f"{field}: {folder} has only an overview and no single pictures; allowed: a folder of pictures")
    return kept


def _names_of_both(images: Path, photos: Path) -> list[str]:
    names = sorted(folder.name for folder in _picture_folders(photos))
    if not names:
        raise DataError(
            f"--real: {photos} has no pictures, and no folders with pictures; put photos of the subject there"
        )
    drawn = [name for name in names if (images / name).is_dir()]
    if not drawn:
        raise DataError(
            f"IMAGES: {images} has no folder named like a subject in {photos} ({', '.join(names[:3])}, ...); use the "
            "same names, or give the photos of one subject as --real"
        )
    if len(drawn) < len(names):
        say(f"skipped, because there are no images: {', '.join(name for name in names if name not in drawn)}")
    return drawn


def _prompt_of_folder(folder: Path) -> str:
    return " ".join(folder.name.replace("_", " ").split())


def _picture_folders(folder: Path) -> list[Path]:
    inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return [
        entry for entry in inner if _holds_pictures(entry) or any(_holds_pictures(below) for below in entry.iterdir())
    ]


def _holds_pictures(folder: Path) -> bool:
    return folder.is_dir() and any(
        file.suffix.lower() in _SUFFIXES and file.is_file() and not file.name.startswith(".")
        for file in folder.iterdir()
    )
