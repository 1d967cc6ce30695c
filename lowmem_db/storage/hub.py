"""Uploading a finished model to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from lowmem_db.errors import StorageError
from lowmem_db.storage.places import HUB_ID

# The hub's HTTP error shares its base class with the errors of the HTTP library: requests, httpx or httpx2.
_TRANSPORT_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base.__name__ == "HTTPError"
)
_HUB_ERRORS = (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, *_TRANSPORT_ERRORS)


def check_id(model_id: str) -> None:
    """Check the name of a repository.

    Raises:
        StorageError: It is not ``owner/name``.
    """
    if HUB_ID.fullmatch(model_id) is None:
        raise StorageError(
            f"OWNER/NAME: {model_id!r} is not allowed; allowed: the name of a user or an organisation on the hub and "
            "that of the model, such as anna/teapot"
        )


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


def upload_model(folder: Path, model_id: str, original: Path | None = None, *, private: bool = False) -> str:
    """Upload a folder as a model repository, which is created if necessary; return its URL.

    Args:
        folder: A complete model.
        model_id: ``name`` or ``owner/name``.
        original: The folder it is a copy of, for messages.
        private: Whether nobody else sees a repository that is created.

    Raises:
        StorageError: The hub refused the upload or cannot be reached; the folder is untouched.
    """
    api = HfApi()
    try:
        repository = api.create_repo(model_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload by lowmem-db")
    except _HUB_ERRORS as error:
        raise StorageError(
            f"{model_id!r} was not uploaded ({_first_line(error)}); log in with `hf auth login` if nobody is, and "
            f"upload the model with: hf upload {model_id} {original or folder}"
        ) from error
    return str(repository)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
