"""Checks that run before slow imports: folders and models that do not exist, typos in their names.

Nothing here imports torch, so that the answer comes at once.
"""

from collections.abc import Sequence
from pathlib import Path

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.data.folder import holds_nothing, look_into
from lowmem_db.errors import ConfigError, DataError, ModelError
from lowmem_db.storage.places import EMBEDDING_FILE, LORA_FILE, is_run, place_of


def check_inputs(config: Config) -> None:
    """Check the folders and the base model of a run by their names.

    Raises:
        DataError: The photo folder does not exist, cannot be read, or holds no picture; or the class image folder is
            not one, or is the photo folder.
        ConfigError: The final model would overwrite the base.
        ModelError: The base model does not exist, or is no model.
    """
    for number, subject in enumerate(config.subjects):
        field = "subject.instance_dir" if number == 0 else f"subject.concepts[{number - 1}].instance_dir"
        look_into(subject.instance_dir, field)
        if config.prior.enabled and subject.class_dir is not None:
            for other in config.subjects:
                check_class_dir(subject.class_dir, other.instance_dir)
    class_dir = config.prior.class_dir
    if config.prior.class_prompts and class_dir is not None and is_users_own(class_dir):
        raise ConfigError(
            f"prior.class_prompts: {class_dir} holds your own pictures, so no class images are drawn; leave it out, "
            "and write the prompt of a picture into a text file of the same name beside it"
        )
    folders = [subject.instance_dir.resolve() for subject in config.subjects]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise DataError(
            f"subject.concepts: {twice[0]} is the photo folder of two subjects, so the model could not tell them "
            "apart; allowed: a folder for each. Remove one of them"
        )
    if config.final.layout == "flat" and config.output_dir.resolve() == Path(config.model.base).resolve():
        raise ConfigError(
            f"output_dir: {config.output_dir} is the folder of model.base, which final.layout=flat would overwrite; "
            "choose another output_dir"
        )
    place_of(config.model.base)


def check_class_dir(class_dir: Path, photos: Path) -> None:
    """Check the folder of class images: the user's own pictures, or where images are to be drawn.

    Raises:
        DataError: It is a file, holds things but no picture, or is the photo folder.
    """
    if class_dir.resolve() == photos.resolve():
        raise DataError(
            f"prior.class_dir: {class_dir} is also the photo folder, so the subject would become the class; allowed: "
            "pictures of other members of the class. Choose another folder, or leave it out to have them drawn"
        )
    if class_dir.exists() and (not class_dir.is_dir() or is_users_own(class_dir)):
        look_into(class_dir, "prior.class_dir")


def check_source(source: str, base: str | None = None, upscale: Sequence[str] = ()) -> None:
    """Check by its name a run, a LoRA or a model, the model that it was trained on, and those that enlarge.

    Raises:
        ModelError: There is nothing by that name, or it is neither.
    """
    for field, name in (("RUN_OR_MODEL", source), *(("--upscale", each) for each in upscale)):
        path = Path(name)
        holds_trained = any((path / file).is_file() for file in (LORA_FILE, EMBEDDING_FILE))
        if not name.strip() or not (is_run(path) or holds_trained or path.name == LORA_FILE):
            check_place(field, name)
    if base is not None:
        check_place("--base", base)


def check_place(field: str, name: str) -> None:
    """Check a model by its name; what is wrong is said of the option or argument that gives it.

    Raises:
        ModelError: There is nothing by that name, or it is no model.
    """
    if not name.strip():
        raise ModelError(f"{field}: is empty; name a run or a model (a shell variable that is not set is empty too)")
    try:
        place_of(name)
    except ModelError as error:
        raise ModelError(f"{field}: {str(error).removeprefix('model.base: ')}") from error


def config_of(source: str) -> Config | None:
    """Return the configuration of a run, or None if it is not a run.

    Raises:
        ConfigError: It cannot be read.
    """
    return load_config(Path(source) / "config.yaml") if is_run(Path(source)) else None


def is_users_own(class_dir: Path) -> bool:
    """Return whether a folder of class images holds pictures of the user, and none that were drawn for it."""
    if not class_dir.is_dir() or holds_nothing(class_dir):
        return False
    folders = [class_dir, *(entry for entry in class_dir.iterdir() if entry.is_dir())]
    return not any((folder / "manifest.json").is_file() for folder in folders)
