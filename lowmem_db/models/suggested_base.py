"""Which model a LoRA or an embedding belongs to.

Its file may suggest one; only the user, or the bytes of the model, can decide.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_db.storage.places import EMBEDDED

_FIELDS = "lowmem_db_base"
_KEY = "lowmem_db_base_key"
_NAMES = ("base", "revision", "variant")
_READING = ("clip_skip", "prompt_chunks")  # how prompts are read
_MOST = 8


@dataclass(frozen=True, kw_only=True)
class SuggestedBase:
    """What the metadata of a file say of the model it was trained on.

    Attributes:
        fields: Those fields of ``model`` that name it and say how prompts are read; never a consent such as
            ``allow_pickle``.
        key: Content key of the model, or None if the file does not say.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None

    def __post_init__(self) -> None:
        kept = {name: value for name, value in self.fields.items() if name in (*_NAMES, *_READING)}
        object.__setattr__(self, "fields", kept)

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "SuggestedBase":
        """Read the metadata of a file.

        Raises:
            ValueError: They are damaged.
        """
        fields = json.loads(metadata.get(_FIELDS, "{}"))
        if not isinstance(fields, dict):
            raise ValueError(f"{_FIELDS}: a {type(fields).__name__} instead of a mapping")
        return cls(fields=fields, key=metadata.get(_KEY))

    @property
    def name(self) -> str:
        """What the model is called, or nothing if the file does not say."""
        found = self.fields.get("base")
        return found if isinstance(found, str) else ""

    @property
    def variant(self) -> str | None:
        """Which of its files, as in ``model.variant``."""
        found = self.fields.get("variant")
        return found if isinstance(found, str) else None

    @property
    def reading(self) -> dict[str, Any]:
        """How prompts are read, as far as the file says that and makes sense."""
        asked = {name: self.fields.get(name) for name in _READING}
        return {name: n for name, n in asked.items() if type(n) is int and 1 <= n <= _MOST}

    def is_local(self) -> bool:
        """Return whether the name is that of a model on this machine, without a look at another one."""
        is_remote = self.name.startswith(("//", "\\\\"))
        return self.name in EMBEDDED or (not is_remote and Path(self.name).exists())

    def metadata(self) -> dict[str, str]:
        """Return what :meth:`of` reads."""
        fields = {_FIELDS: json.dumps(dict(self.fields))} if self.fields else {}
        return fields | ({} if self.key is None else {_KEY: self.key})

    def without_folders(self) -> "SuggestedBase":
        """Return the same for a file that is shared: a model on this machine by its name, not by its path."""
        if not Path(self.name).is_absolute():
            return self
        return SuggestedBase(fields={**self.fields, "base": Path(self.name).name}, key=self.key)
