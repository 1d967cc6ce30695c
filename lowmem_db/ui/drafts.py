"""A run before it starts: photos, what they show, a base, and what the planner says of them. Kept in files."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from lowmem_db.config import shipped
from lowmem_db.config.loading import Tree, load_config
from lowmem_db.config.recipes import IDENTIFIER, RECIPES, Wish, check_recipe, check_words, fields_for, name_for, text_of
from lowmem_db.data.captions import Captions
from lowmem_db.data.folder import CAPTION_SUFFIXES, PHOTO_SUFFIXES, look_into
from lowmem_db.errors import ConfigError, DataError
from lowmem_db.run.new import recipe_here
from lowmem_db.storage.atomic import write_text
from lowmem_db.storage.places import place_of
from lowmem_db.storage.run_folder import RunFolder, read_json
from lowmem_db.ui import jobs, workplace
from lowmem_db.ui.workplace import Workplace

MAX_UPLOAD_BYTES = 100 << 20
_CHUNK_BYTES = 1 << 20
_LEFT_OUT = re.compile(r"[\x00-\x1f\x7f<>:\"/\\\\|?*]+")


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A run that has not started.

    Attributes:
        name: Its name, and that of its run and its configuration.
        noun: What the photos show.
        photos: Folder of the photos.
        identifier: The rare word that names the subject.
        recipe: The configuration to start from.
        base: A model in place of the recipe's; empty for none.
        steps: Training steps; 0 for those of the recipe.
    """

    name: str
    noun: str
    photos: str
    identifier: str = IDENTIFIER
    recipe: str = "demo"
    base: str = ""
    steps: int = 0


@dataclass(frozen=True)
class Photo:
    """A photo of a draft: its name, its caption, and whether that can be changed here."""

    name: str
    caption: str
    is_editable: bool


class Drafts:
    """The drafts of a workplace.

    Args:
        place: The workplace.
    """

    def __init__(self, place: Workplace) -> None:
        self.place = place
        self._folder = place.own / "drafts"
        self._planning = Lock()

    def all(self) -> dict[str, Draft]:
        """Return all drafts by name."""
        found = (_read(file) for file in sorted(self._folder.glob("*.json")))
        return {draft.name: draft for draft in found if draft is not None}

    def new(self, noun: str, folder: str) -> Draft:
        """Begin a draft.

        Args:
            noun: What the photos show.
            folder: Where the photos are on this machine; empty if they will be uploaded.

        Raises:
            ConfigError: The noun cannot be used.
            DataError: The folder has no photo.
        """
        check_words(noun, IDENTIFIER)
        if folder:
            look_into(Path(folder).expanduser(), "folder")
        name = next(name for name in _names(name_for(noun)) if self._is_free(name))
        photos = Path(folder).expanduser().absolute() if folder else self.place.home / "photos" / name
        photos.mkdir(parents=True, exist_ok=True)
        draft = Draft(name=name, noun=noun.strip(), photos=str(photos), recipe=recipe_here())
        self.save(draft)
        return draft

    def save(self, draft: Draft) -> None:
        """Write a draft."""
        write_text(self._folder / f"{draft.name}.json", json.dumps(asdict(draft), indent=2) + "\n")

    def change(self, draft: Draft, *, noun: str, identifier: str, recipe: str, base: str, steps: str) -> Draft:
        """Change what was asked.

        Raises:
            ConfigError: A value cannot be used.
            ModelError: The base does not exist.
        """
        check_words(noun, identifier)
        check_recipe(recipe)
        if steps and not (steps.isdecimal() and 0 < int(steps) <= 1_000_000):
            raise ConfigError(f"steps: {steps!r} is not allowed; allowed: a number of steps, such as 800, or nothing")
        if base:
            place_of(base)
        changed = replace(
            draft, noun=noun.strip(), identifier=identifier, recipe=recipe, base=base.strip(), steps=int(steps or 0)
        )
        self.save(changed)
        return changed

    def delete(self, draft: Draft) -> None:
        """Forget a draft; its photos stay."""
        (self._folder / f"{draft.name}.json").unlink(missing_ok=True)
        shutil.rmtree(self.plan_folder(draft), ignore_errors=True)

    def plan_folder(self, draft: Draft) -> Path:
        """Return the folder of the job that plans a draft."""
        return self._folder / f"{draft.name}-plan"

    def fields_of(self, draft: Draft) -> Tree:
        """Return the fields of its configuration."""
        wish = Wish(
            photos=Path(draft.photos),
            noun=draft.noun,
            identifier=draft.identifier,
            recipe=draft.recipe,
            base=draft.base or None,
            output_dir=Path("runs") / draft.name,
        )
        fields = fields_for(wish)
        fields["output_dir"] = str(self.place.runs.absolute() / draft.name)
        if draft.steps:
            training = fields["training"] | {"max_train_steps": draft.steps}
            if "lr_warmup_steps" in training:
                training["lr_warmup_steps"] = min(training["lr_warmup_steps"], draft.steps // 10)
            fields["training"] = training
        return fields

    def plan(self, draft: Draft) -> jobs.Job:
        """Return how far the plan is; start it if there is none for the draft as it is now."""
        with self._planning:  # two tabs may ask at once
            return self._plan(draft)

    def _plan(self, draft: Draft) -> jobs.Job:
        folder = self.plan_folder(draft)
        text = text_of(self.fields_of(draft), [])
        key = folder.with_suffix(".yaml")
        looked_at = [photo.name for photo in self.photos_of(draft)]
        state = f"{text}# {' '.join(looked_at)}\n"
        job = jobs.job_in(folder)
        if key.is_file() and key.read_text(encoding="utf-8") == state and job.state not in {"none", "stopped"}:
            return job
        if not looked_at:
            return jobs.Job("none", "There are no photos yet.")
        if job.is_running:
            jobs.stop(folder)
            return job
        write_text(key, state)
        load_config(key)
        jobs.start(folder, [["photos", str(key), "--json", "--output", str(folder / "photos.png")],
                            ["plan", str(key), "--json"]])  # fmt: skip
        return jobs.job_in(folder)

    def train(self, draft: Draft) -> RunFolder:
        """Write the configuration beside the runs, and start the run.

        Raises:
            DataError: There is no photo.
            ConfigError: The configuration exists already.
        """
        look_into(Path(draft.photos), "photos")
        file = self.place.home / f"{draft.name}.yaml"
        if file.exists():
            raise ConfigError(f"{file}: exists already; begin anew, or move it away")
        header = [f"{draft.noun}; made by the page from `lowmem-db configs {draft.recipe}`"]
        write_text(file, text_of(self.fields_of(draft), header))
        run = RunFolder(self.place.runs / draft.name)
        workplace.train(run, file)
        self.delete(draft)
        return run

    def photos_of(self, draft: Draft) -> list[Photo]:
        """Return the photos of a draft with their captions."""
        try:
            found = look_into(Path(draft.photos), "photos")
            captions = Captions(found)
        except DataError:
            return []
        return [Photo(path.name, _caption(captions, path), found.table is None) for path in found.photos]

    def add(self, draft: Draft, uploads: Iterable[tuple[str, BinaryIO]]) -> None:
        """Keep uploaded photos and captions, each a name and a content.

        A photo whose name is taken gets another, and so does the caption that comes with it.

        Raises:
            DataError: One is neither, or too large.
        """
        names: dict[str, str] = {}
        for name, content in sorted(uploads, key=lambda upload: Path(upload[0]).suffix.lower() in CAPTION_SUFFIXES):
            given = Path(name)
            is_caption = given.suffix.lower() in CAPTION_SUFFIXES
            wanted = names.get(given.stem, given.stem) + given.suffix if is_caption else name
            kept = self._add(draft, wanted, content)
            names[given.stem] = kept.stem

    def _add(self, draft: Draft, name: str, content: BinaryIO) -> Path:
        clean = _LEFT_OUT.sub("_", Path(name.replace("\\", "/")).name).strip(". ")[-100:]
        if Path(clean).suffix.lower() not in PHOTO_SUFFIXES | CAPTION_SUFFIXES:
            raise DataError(
                f"{name}: is no photo; allowed: JPEG, PNG, WebP, AVIF, HEIC, TIFF, BMP, GIF, and .txt captions"
            )
        folder = Path(draft.photos)
        folder.mkdir(parents=True, exist_ok=True)
        target = next(folder / free for free in _file_names(clean) if not (folder / free).exists())
        size = 0
        try:
            with target.open("xb") as file:
                while chunk := content.read(_CHUNK_BYTES):
                    size += len(chunk)
                    if size > MAX_UPLOAD_BYTES:
                        raise DataError(f"{name}: is larger than {MAX_UPLOAD_BYTES >> 20} MB; make it smaller")
                    file.write(chunk)
        except DataError:
            target.unlink()
            raise
        return target

    def photo(self, draft: Draft, name: str) -> Path | None:
        """Return the file of a photo, or None if the draft has none of this name."""
        return next((Path(draft.photos) / each.name for each in self.photos_of(draft) if each.name == name), None)

    def remove(self, draft: Draft, name: str) -> None:
        """Delete an uploaded photo and its caption; photos in a folder of the user's are not touched.

        Raises:
            DataError: It was not uploaded here.
        """
        path = self.photo(draft, name)
        if path is None or not self.is_uploaded(draft):
            raise DataError(f"{name}: was not uploaded here; remove it from {draft.photos}")
        path.unlink()
        path.with_suffix(".txt").unlink(missing_ok=True)

    def is_uploaded(self, draft: Draft) -> bool:
        """Return whether the photos were uploaded, and so are the page's."""
        return Path(draft.photos) == self.place.home / "photos" / draft.name

    def caption(self, draft: Draft, name: str, text: str) -> None:
        """Write the caption of a photo beside it; an empty one is deleted.

        Raises:
            DataError: There is no such photo, or its captions stand in a table.
        """
        path = self.photo(draft, name)
        if path is None:
            raise DataError(f"{name}: is no photo of {draft.name}")
        found = look_into(Path(draft.photos), "photos")
        if found.table is not None:
            raise DataError(f"{name}: its caption stands in {found.table.name}; change it there")
        file = next(iter(found.captions[path]), path.with_suffix(".txt"))
        if text.strip():
            write_text(file, " ".join(text.split()) + "\n")
        else:
            file.unlink(missing_ok=True)

    def _is_free(self, name: str) -> bool:
        place = self.place
        taken = (place.runs / name, place.home / f"{name}.yaml", place.home / "photos" / name)
        return not any(path.exists() for path in taken) and name not in self.all()


def recipes() -> list[tuple[str, str]]:
    """Return the configurations to start from, each with what it trains."""
    return [(name, shipped.describe(name).split(". ")[0].rstrip(".")) for name in RECIPES]


def _caption(captions: Captions, path: Path) -> str:
    try:
        return captions.of(path) or ""
    except DataError:
        return ""


def _read(file: Path) -> Draft | None:
    values: Any = read_json(file)
    try:
        return Draft(**values)
    except TypeError:
        return None


def _names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}{number}" for number in range(2, 10_000))


def _file_names(name: str) -> Iterator[str]:
    path = Path(name)
    yield name
    yield from (f"{path.stem}-{number}{path.suffix}" for number in range(2, 10_000))
