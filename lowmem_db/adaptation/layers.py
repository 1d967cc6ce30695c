"""Layers of a model by name, and which of them shell patterns select.

A layer is called ``component.path``. Those of text encoders are called as in published files, with ``text_model.``,
which transformers 5 leaves out in memory.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lowmem_db.errors import ConfigError
from lowmem_db.models.names import published_name

_NUM_EXAMPLES = 3


def named_layers(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return all layers that hold parameters of their own.

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
        patterns: Shell patterns of whole names: ``unet.*.attn2.*``.
        names: The names that exist.
        field: The field that holds the patterns, for messages.
        allowed: What the field allows beside patterns, for messages; may be empty.

    Raises:
        ConfigError: A pattern selects nothing; the message names names that exist.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ConfigError(
                f"{field}: {pattern!r} selects no layer; allowed: {allowed}shell patterns of names such as "
                f"{', '.join(_examples(pattern, names))}"
            )
        chosen |= found
    return chosen


def train_layers(modules: Mapping[str, nn.Module], patterns: Sequence[str]) -> None:
    """Let the parameters of the layers that ``training.layers`` selects train, and no others; no pattern: all.

    Raises:
        ConfigError: A pattern selects no layer, or a text encoder that trains has no layer that is selected.
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
    """Let nothing train."""
    for module in modules.values():
        module.requires_grad_(False)


def that_train(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the components in which something trains."""
    return {name: modules[name] for name, count in count_trained(modules).items() if count}


def count_trained(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return how many parameters of each component train."""
    return {
        component: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for component, module in modules.items()
    }


def check_components(modules: Mapping[str, nn.Module], chosen: Iterable[str], *, field: str) -> None:
    """Refuse a choice without a layer of a text encoder that ``training.train_text_encoder`` asks for.

    The denoiser, which comes first, may stay as it is: then the text encoders train alone.

    Raises:
        ConfigError: With the way out.
    """
    _, *text_encoders = modules
    missing = set(text_encoders) - {name.partition(".")[0] for name in chosen}
    for component in sorted(missing):
        raise ConfigError(
            f"{field}: selects no layer of {component}, which training.train_text_encoder=true lets train; add a "
            "pattern, or set training.train_text_encoder=false"
        )


def _examples(pattern: str, names: Sequence[str]) -> list[str]:
    """Return names near a pattern, and others where there are not enough."""
    near = difflib.get_close_matches(pattern, names, n=_NUM_EXAMPLES, cutoff=0.3)
    return list(dict.fromkeys([*near, *names[:: max(1, len(names) // _NUM_EXAMPLES)]]))[:_NUM_EXAMPLES]
