"""What training will see of the pictures a user gives: a folder of photos, or all folders of a configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_db.config import shipped
from lowmem_db.config.loading import load_config, parse_override
from lowmem_db.config.schema import Config
from lowmem_db.data.folder import look_into
from lowmem_db.errors import ConfigError
from lowmem_db.run.inputs import check_inputs, is_users_own

if TYPE_CHECKING:
    from lowmem_db.data.inspection import Inspection


def inspect(source: Path, overrides: Sequence[str], output: Path | None) -> "dict[str, Inspection]":
    """Look at the photos and, if they are the user's own, the class images; draw a sheet of the photos.

    Args:
        source: A folder of photos, or a configuration.
        overrides: ``section.key=value``.
        output: The sheet to draw, or None.

    Returns:
        What was found: ``photos``, and ``class_images``.

    Raises:
        ConfigError: An override or the configuration cannot be used.
        DataError: A folder does not exist, or holds no picture.
        StorageError: The sheet cannot be written.
    """
    config = _config(source, overrides)
    from lowmem_db.data.contact_sheet import contact_sheet
    from lowmem_db.data.inspection import inspect_photos
    from lowmem_db.storage.atomic import write_file

    step = _least_step(config) if config.data.aspect_ratio_buckets else 8
    prompt, class_dir = config.subject.instance_prompt, config.prior.class_dir
    found = {"photos": inspect_photos(config.subject.instance_dir, config.data, prompt=prompt, least_step=step)}
    if config.prior.enabled and class_dir is not None and is_users_own(class_dir):
        class_prompt = config.subject.class_prompt or ""
        found["class_images"] = inspect_photos(
            class_dir, config.data, prompt=class_prompt, field="prior.class_dir", least_step=step
        )
    if output is not None:
        sheet = contact_sheet(found["photos"])
        write_file(output, lambda path: sheet.save(path, format="PNG"))
    return found


def _config(source: Path, overrides: Sequence[str]) -> Config:
    """Return the configuration that photos are looked at with; nothing heavy is imported."""
    changes = [parse_override(override) for override in overrides]
    if not source.exists() and (shipped_one := shipped.find(source)).is_file():
        source = shipped_one
    if source.is_file() and source.suffix.lower() in {".yaml", ".yml"}:
        config = load_config(source, changes)
        check_inputs(config)
        return config
    if source.is_file():
        raise ConfigError(f"FOLDER_OR_CONFIG: {source} is a file; allowed: a folder of photos, or a configuration")
    look_into(source, "FOLDER_OR_CONFIG")
    plain = {
        "model.base": "demo",
        "subject.instance_dir": str(source),
        "subject.instance_prompt": "",
        "output_dir": "runs",
        "prior.enabled": False,
    }
    return load_config(None, [*plain.items(), *changes])


def _least_step(config: Config) -> int:
    from lowmem_db.models.finding import model_of

    model = model_of(config, weights=False)
    return model.family.size_step(model)
