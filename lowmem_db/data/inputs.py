"""What a command looks at before anything that takes time to import: folders that are not there, and typos in them."""

from lowmem_db.config.schema import Config
from lowmem_db.data.folder import look_into
from lowmem_db.errors import DataError


def check_inputs(config: Config) -> None:
    """See that the folders of a run are there and are what they are said to be.

    Raises:
        DataError: The folder of photos is missing, may not be read or has no picture, or serves as class images too.
    """
    photos, class_dir = config.subject.instance_dir, config.prior.class_dir
    look_into(photos, "subject.instance_dir")
    if config.prior.enabled and class_dir is not None and class_dir.resolve() == photos.resolve():
        raise DataError(
            f"prior.class_dir: {class_dir} is the folder of photos too, so the subject would be the class; "
            "allowed: pictures of others of the class. Choose another folder, or leave it out and let them be drawn"
        )
