"""Full DreamBooth fine-tuning of diffusion models inside the memory of a gaming GPU (arXiv:2208.12242).

>>> import lowmem_db
>>> config = lowmem_db.load_config(overrides={...})  # doctest: +SKIP
>>> run = lowmem_db.train(config)  # doctest: +SKIP

Importing the package loads neither torch nor diffusers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem_db.api import ask, evaluate, export, gallery, generate, load_config, new, plan, publish, report, train
    from lowmem_db.config.schema import Config

__version__ = "0.1.0"
__all__ = [
    "Config",
    "ask",
    "evaluate",
    "export",
    "gallery",
    "generate",
    "load_config",
    "new",
    "plan",
    "publish",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lowmem_db import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
