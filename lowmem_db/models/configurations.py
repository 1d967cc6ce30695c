"""The configurations of components come from strangers: their keys are taken from a list, their numbers are bounded.

Of a configuration of transformers only the fields of the network itself are used. Others can make the library fetch and
run code: ``auto_map``, or ``_attn_implementation: owner/repository``.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lowmem_db.errors import ModelError

NONSENSE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    StrictDataclassError,
)  # fmt: skip
"""What libraries raise when they are given a configuration that makes no sense."""
_LARGEST = 1 << 20
_MOST_LAYERS = 1 << 10
_MOST_ITEMS = 1 << 12
_DEEPEST = 3
_COUNTS_OF_LAYERS = ("num_hidden_layers", "layers_per_block", "transformer_layers_per_block", "num_layers")
_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # in transformers 4 of the library's class too
_FOREIGN_CODE = ("quantization_config", "auto_map", "custom_pipeline")


def check_values(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a configuration that is quantized, brings code, or has sizes that no model has.

    Raises:
        ModelError: It does; the message names the file, the key and its value.
    """
    for key in _FOREIGN_CODE:
        if config.get(key) is not None:
            raise ModelError(
                f"{file}: {key} is {_shown(config[key])}, which is not supported; use a version of the model without it"
            )
    for key, value in config.items():
        if not key.startswith("_") and key not in {"id2label", "label2id"}:
            _check_value(key, value, file)


def own_fields(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a network of transformers in its configuration, without those of the library.

    Args:
        kind: The class of its configuration.
        config: The configuration.
    """
    library = next(base for base in kind.__mro__ if base.__name__ in {"PreTrainedConfig", "PretrainedConfig"})
    names = _parameters(kind) - (_parameters(library) - _TOKENS)
    names.add("architectures")  # a name that is only written again
    return {name: value for name, value in config.items() if name in names}


def _parameters(kind: Any) -> set[str]:
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {each.name for each in inspect.signature(kind.__init__).parameters.values() if each.kind in named}


def _check_value(key: str, value: Any, file: Path) -> None:
    numbers = list(_numbers(value, key, file, _DEEPEST))
    largest = _MOST_LAYERS if key in _COUNTS_OF_LAYERS else _LARGEST
    if any(not -largest <= number <= largest for number in numbers):  # NaN too
        raise ModelError(
            f"{file}: {key} is {_shown(value)}; allowed: numbers up to {largest}. Download the model again"
        )


def _numbers(value: Any, key: str, file: Path, depth: int) -> Iterator[int | float]:
    if isinstance(value, list | dict):
        if depth == 0 or len(value) > _MOST_ITEMS:
            raise ModelError(f"{file}: {key} is {_shown(value)}, too long or too deep; download the model again")
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item, key, file, depth - 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
