"""Uploading a finished model to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from lowmem_db.errors import StorageError

# The hub's HTTP error shares its base class with the errors of the HTTP library: requests, httpx or httpx2.
_TRANSPORT_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base.__name__ == "HTTPError"
)
_HUB_ERRORS = (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, *_TRANSPORT_ERRORS)


def check_login() -> None:
    """Check before a run that its model can be uploaded afterwards.

    Raises:
        StorageError: Nobody is logged in, or the hub cannot be reached.
    """
    try:
        HfApi().whoami()
    except _HUB_ERRORS as error:
        raise StorageError(
            f"final.push_to_hub: true, but there is no login for the hub ({_first_line(error)}); run `hf auth login`, "
            "or leave final.push_to_hub out"
        ) from error


def upload_model(folder: Path, model_id: str) -> str:
    """Upload a folder as a model repository, which is created if necessary; return its URL.

    Args:
        folder: A complete model.
        model_id: ``name`` or ``owner/name``.

    Raises:
        StorageError: The hub refused the upload or cannot be reached; the folder is untouched.
    """
    api = HfApi()
    try:
        repository = api.create_repo(model_id, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder)
    except _HUB_ERRORS as error:
        raise StorageError(
            f"final.hub_model_id: {model_id!r} was not uploaded ({_first_line(error)}); "
            f"upload the model with: hf upload {model_id} {folder}"
        ) from error
    return str(repository)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
