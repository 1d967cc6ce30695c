"""Checks that run before slow imports: missing folders, and typos in their names."""

from lowmem_db.config.schema import Config
from lowmem_db.data.folder import look_into
from lowmem_db.errors import DataError


def check_inputs(config: Config) -> None:
    """Check the folders of a run.

    Raises:
        DataError: The photo folder does not exist, cannot be read, holds no picture, or is also the class image folder.
    """
    photos, class_dir = config.subject.instance_dir, config.prior.class_dir
    look_into(photos, "subject.instance_dir")
    if config.prior.enabled and class_dir is not None and class_dir.resolve() == photos.resolve():
        raise DataError(
            f"prior.class_dir: {class_dir} is also the photo folder, so the subject would become the class; allowed: "
            "pictures of other members of the class. Choose another folder, or leave it out to have them drawn"
        )
