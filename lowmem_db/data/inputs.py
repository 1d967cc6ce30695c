"""Checks that run before slow imports: missing folders, and typos in their names."""

from pathlib import Path

from lowmem_db.config.schema import Config
from lowmem_db.data.folder import look_into
from lowmem_db.errors import ConfigError, DataError


def check_inputs(config: Config) -> None:
    """Check the folders of a run.

    Raises:
        DataError: The photo folder does not exist, cannot be read, holds no picture, or is also the class image folder.
        ConfigError: The final model would overwrite the base.
    """
    photos, class_dir = config.subject.instance_dir, config.prior.class_dir
    look_into(photos, "subject.instance_dir")
    if config.prior.enabled and class_dir is not None and class_dir.resolve() == photos.resolve():
        raise DataError(
            f"prior.class_dir: {class_dir} is also the photo folder, so the subject would become the class; allowed: "
            "pictures of other members of the class. Choose another folder, or leave it out to have them drawn"
        )
    if config.final.layout == "flat" and config.output_dir.resolve() == Path(config.model.base).resolve():
        raise ConfigError(
            f"output_dir: {config.output_dir} is the folder of model.base, which final.layout=flat would overwrite; "
            "choose another output_dir"
        )
