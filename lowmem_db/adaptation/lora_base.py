"""Which model a LoRA belongs to. Its file may suggest one; only the user, or the bytes of the model, can decide."""

import shlex
from pathlib import Path
from typing import Any

from lowmem_db.adaptation.lora_file import LoraFile
from lowmem_db.errors import ModelError
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder

_READING = ("clip_skip", "prompt_chunks")  # how prompts are read
_MOST = 8


def find_base(lora: LoraFile, *, source: str, given: str | None) -> ModelFolder:
    """Return the base model of a LoRA that is not part of a run.

    Without ``given``, that is the local model that the file suggests, if it has the content key in the file. Nothing
    that a file names is ever downloaded, and no file allows pickled weights.

    Args:
        lora: The LoRA.
        source: Its folder, for messages.
        given: What the user named, as in ``model.base``.

    Raises:
        ModelError: The model does not exist, or the user has to name it.
    """
    asked = {name: lora.base.get(name) for name in _READING}
    reading: dict[str, Any] = {name: n for name, n in asked.items() if type(n) is int and 1 <= n <= _MOST}
    if given is not None:
        return find_model(given, **reading)
    suggested = lora.base.get("base")
    if not isinstance(suggested, str) or not suggested:
        raise ModelError(f"--base: {source} is a LoRA that does not say what it was trained on; add --base MODEL")
    if lora.base_key is not None and _is_here(suggested):
        variant = lora.base.get("variant")
        model = find_model(suggested, variant=variant if isinstance(variant, str) else None, **reading)
        if model.whole_key == lora.base_key:
            return model
    raise ModelError(
        f"--base: {source} is a LoRA that says it was trained on {suggested!r}; a file alone does not choose a model: "
        f"add --base {shlex.quote(suggested)}, if that is right"
    )


def _is_here(suggested: str) -> bool:
    """Return whether a name is that of a local model, without a look at another machine."""
    is_remote = suggested.startswith(("//", "\\\\"))
    return suggested == "demo" or (not is_remote and Path(suggested).exists())
