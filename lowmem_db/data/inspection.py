"""What training will see of a folder of photos: sizes, crops, captions, sharpness, near-duplicates."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lowmem_db.config.schema import DataConfig
from lowmem_db.data.buckets import sizes_of
from lowmem_db.data.captions import Captions
from lowmem_db.data.crops import Box, crop_box, num_distinct_crops
from lowmem_db.data.folder import PhotoFolder, look_into
from lowmem_db.data.likeness import BLURRED, Hash, difference_hash, near_duplicates, sharpness
from lowmem_db.data.photos import photo_warnings, read_photo, record_of
from lowmem_db.errors import DataError, DependencyError
from lowmem_db.records import ImageRecord, Size

_THUMBNAIL = 1024


@dataclass(frozen=True, kw_only=True)
class SeenPhoto:
    """A photo as training sees it.

    Attributes:
        record: The file, its size and its prompt.
        has_caption: Whether the prompt is its own.
        size: Height and width that it is trained at.
        crops: What is cut out of it, in pixels of the file.
        sharpness: See :func:`lowmem_db.data.likeness.sharpness`.
        image: The photo, reduced.
    """

    record: ImageRecord
    has_caption: bool
    size: Size
    crops: tuple[Box, ...]
    sharpness: float
    image: Image.Image


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is in a folder of photos.

    Attributes:
        folder: The folder.
        field: The configuration field that named it, for messages.
        photos: The photos that can be used.
        problems: One line for each photo, caption or link that cannot be used.
        warnings: What is allowed but makes the result worse.
        remarks: What is left over and nobody misses.
    """

    folder: Path
    field: str
    photos: tuple[SeenPhoto, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def captions(self) -> str:
        """How many photos have a caption of their own, in words."""
        own = sum(photo.has_caption for photo in self.photos)
        return f"captions: {own} of {len(self.photos)} photos have their own"

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values; crops are left, top, width and height."""
        return {
            "folder": str(self.folder),
            "photos": [
                {
                    "file": photo.record.path.name,
                    "width": photo.record.width,
                    "height": photo.record.height,
                    "prompt": photo.record.prompt,
                    "has_caption": photo.has_caption,
                    "trained_at": {"width": photo.size[1], "height": photo.size[0]},
                    "crops": [[round(n, 1) for n in (c.left, c.top, c.width, c.height)] for c in photo.crops],
                    "sharpness": round(photo.sharpness, 1),
                }
                for photo in self.photos
            ],
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "remarks": list(self.remarks),
        }


def inspect_photos(
    folder: Path, config: DataConfig, *, prompt: str, field: str = "subject.instance_dir", least_step: int = 8
) -> Inspection:
    """Look at a folder of photos as training does; photos that cannot be used are listed.

    Args:
        folder: The folder.
        config: The section ``data``.
        prompt: Prompt of photos without a caption.
        field: The configuration field that named the folder, for messages.
        least_step: Smallest step of bucket sizes that fits the model.

    Raises:
        DataError: The folder does not exist, cannot be read, or holds no picture.
    """
    found = look_into(folder, field)
    problems = list(found.broken)
    captions = _captions(found, problems)
    records: list[ImageRecord] = []
    own: dict[Path, str | None] = {}
    for path in found.photos:
        try:
            own[path] = None if captions is None else captions.of(path)
            records.append(record_of(path, own[path] or prompt, config.resolution))
        except (DataError, DependencyError) as error:
            problems.append(str(error))
    sizes = sizes_of(config, records, least_step=least_step)
    seen: list[SeenPhoto] = []
    hashes: dict[Path, Hash] = {}
    for record, size in zip(records, sizes, strict=True):
        image = read_photo(record.path)
        hashes[record.path] = difference_hash(image)
        seen.append(
            SeenPhoto(
                record=record,
                has_caption=own[record.path] is not None,
                size=size,
                crops=tuple(_crops(record, size, config)),
                sharpness=sharpness(image),
                image=_reduced(image),
            )
        )
    return Inspection(
        folder=folder,
        field=field,
        photos=tuple(seen),
        problems=tuple(problems),
        warnings=tuple(_warnings(found, seen, hashes, config, field)),
        remarks=tuple(found.remarks()),
    )


def _captions(found: PhotoFolder, problems: list[str]) -> Captions | None:
    try:
        return Captions(found)
    except DataError as error:
        problems.append(str(error))
        return None


def _crops(record: ImageRecord, size: Size, config: DataConfig) -> Iterator[Box]:
    count = num_distinct_crops(record, size=size, crop=config.crop, num_crops=config.num_crops)
    return (crop_box(record, size, config.crop, index) for index in range(count))


def _reduced(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return small


def _warnings(
    found: PhotoFolder, seen: list[SeenPhoto], hashes: dict[Path, Hash], config: DataConfig, field: str
) -> Iterator[str]:
    records = [photo.record for photo in seen]
    yield from (
        message.removeprefix(f"{field}: ")
        for message in photo_warnings(
            records,
            resolution=config.resolution,
            field=field,
            aspect_ratio_buckets=config.aspect_ratio_buckets,
        )
    )
    keys = {record.path: record.content_key for record in records}
    for group in near_duplicates(hashes):
        if len({keys[path] for path in group}) > 1:
            names = ", ".join(path.name for path in group)
            yield f"{names} are nearly the same, so this view counts {len(group)} times; keep the best one"
    if blurred := [photo for photo in seen if photo.sharpness < BLURRED]:
        names = ", ".join(f"{photo.record.path.name} ({photo.sharpness:.0f})" for photo in blurred)
        yield f"blurred, with a sharpness below {BLURRED:.0f}: {names}; sharper photos train better"
    yield from found.orphans()
    yield from found.unread()
