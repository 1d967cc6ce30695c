"""Layers of a model by name, and selecting them by shell patterns.

A layer is called ``component.path``. Text encoders use the names of published files, with ``text_model.``, which
transformers 5 leaves out in memory.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lowmem_db.errors import ConfigError
from lowmem_db.models.names import published_name

_NUM_EXAMPLES = 3


def named_layers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return all layers that have parameters of their own.

    Args:
        modules: Components by name.
    """
    return {
        f"{component}.{published_name(component, path)}": layer
        for component, module in modules.items()
        for path, layer in module.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    }


def select(patterns: Iterable[str], names: Sequence[str], *, field: str, allowed: str) -> set[str]:
    """Return the names that patterns select.

    Args:
        patterns: Shell patterns that match whole names, such as ``unet.*.attn2.*``.
        names: The names that exist.
        field: The field that holds the patterns, for messages.
        allowed: What the field allows besides patterns, for messages; may be empty.

    Raises:
        ConfigError: A pattern selects nothing; the message gives names that exist.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ConfigError(
                f"{field}: {pattern!r} selects no layer; allowed: {allowed}shell patterns for names such as "
                f"{', '.join(_examples(pattern, names))}"
            )
        chosen |= found
    return chosen


def train_layers(modules: Mapping[str, nn.Module], patterns: Sequence[str]) -> None:
    """Make the layers that ``training.layers`` selects trainable, and no others; without patterns, all layers.

    Raises:
        ConfigError: A pattern selects no layer, or no layer of a text encoder that should train is selected.
    """
    for module in modules.values():
        module.requires_grad_(not patterns)
    layers = named_layers(modules)
    chosen = select(patterns, list(layers), field="training.layers", allowed="")
    for name in chosen:
        for parameter in layers[name].parameters(recurse=False):
            parameter.requires_grad_(True)
    check_components(modules, chosen if patterns else layers, field="training.layers")


def freeze(modules: Mapping[str, nn.Module]) -> None:
    """Make everything untrainable."""
    for module in modules.values():
        module.requires_grad_(False)


def that_train(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the components that have trainable parameters."""
    return {name: modules[name] for name, count in count_trained(modules).items() if count}


def count_trained(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the number of trainable parameters of each component."""
    return {
        component: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for component, module in modules.items()
    }


def check_components(modules: Mapping[str, nn.Module], chosen: Iterable[str], *, field: str) -> None:
    """Refuse a selection without a layer of a text encoder that ``training.train_text_encoder`` asks for.

    The denoiser, which comes first, may be left out: then only the text encoders train.

    Raises:
        ConfigError: A text encoder has no selected layer.
    """
    _, *text_encoders = modules
    missing = set(text_encoders) - {name.partition(".")[0] for name in chosen}
    for component in sorted(missing):
        raise ConfigError(
            f"{field}: selects no layer of {component}, which training.train_text_encoder=true trains; add a "
            "pattern, or set training.train_text_encoder=false"
        )


def _examples(pattern: str, names: Sequence[str]) -> list[str]:
    """Return names similar to a pattern, filled up with others."""
    near = difflib.get_close_matches(pattern, names, n=_NUM_EXAMPLES, cutoff=0.3)
    return list(dict.fromkeys([*near, *names[:: max(1, len(names) // _NUM_EXAMPLES)]]))[:_NUM_EXAMPLES]
