"""Low-rank adapters through peft: LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353).

Adapters are put into a model in place. Its own weights are then frozen and keep the type they were loaded in; the
adapters are fp32. In files they have the names that diffusers and peft use.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db import environment
from lowmem_db.adaptation.layers import check_components, select
from lowmem_db.config.schema import LoraConfig
from lowmem_db.errors import DependencyError
from lowmem_db.models.names import published_name
from lowmem_db.randomness import generator

_KINDS = {
    "attention": (
        ".to_q",
        ".to_k",
        ".to_v",
        ".to_out.0",
        ".add_k_proj",
        ".add_v_proj",
        ".q_proj",
        ".k_proj",
        ".v_proj",
        ".out_proj",
    ),
    "feed_forward": (".ff.net.0.proj", ".ff.net.2", ".mlp.fc1", ".mlp.fc2"),
}
_CONVOLUTIONS = "convolutions"
_IN_MEMORY = ".default"  # peft's name of an adapter, inside the names of its parameters


def attach(modules: Mapping[str, nn.Module], config: LoraConfig, *, seed: int) -> None:
    """Freeze models and add adapters, which have no effect until they are trained.

    Args:
        modules: Components by name; changed in place.
        config: The section ``lora``.
        seed: The run's seed; the adapters' first factors are drawn from it.

    Raises:
        ConfigError: ``lora.targets`` selects nothing, or nothing in a component.
        DependencyError: peft is missing.
    """
    targets = find_targets(modules, config.targets)
    for component, module in modules.items():
        inject(module, targets[component], peft_settings(config))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                if ".lora_A." in name and not parameter.is_meta:
                    _draw(parameter, generator(seed, f"lora {component}.{published_name(component, name)}"))


def find_targets(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> dict[str, list[str]]:
    """Return the paths of the layers that get adapters, by component.

    Raises:
        ConfigError: One of the targets selects nothing, or together they select nothing in a component.
    """
    layers = {
        f"{component}.{published_name(component, path)}": (component, path, layer)
        for component, module in modules.items()
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    chosen: set[str] = set()
    for target in targets:
        if target in {*_KINDS, _CONVOLUTIONS}:
            chosen |= {name for name, (_, _, layer) in layers.items() if _is_of_kind(target, name, layer)}
        else:
            kinds = f"{', '.join([*_KINDS, _CONVOLUTIONS])}, and "
            chosen |= select([target], list(layers), field="lora.targets", allowed=kinds)
    check_components(modules, chosen, field="lora.targets")
    found: dict[str, list[str]] = {component: [] for component in modules}
    for name, (component, path, _) in layers.items():
        if name in chosen:
            found[component].append(path)
    return found


def peft_settings(config: LoraConfig) -> dict[str, Any]:
    """Return the settings of adapters under peft's names, as files hold them too."""
    return {
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "use_dora": config.dora,
    }


def inject(module: nn.Module, paths: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Freeze a module and add adapters, of the layers' type, to some of its layers.

    Args:
        module: Changed in place.
        paths: Paths of the layers.
        settings: As :func:`peft_settings` returns them.

    Raises:
        DependencyError: peft is missing, or refuses a library that it finds.
    """
    peft = environment.require("peft")
    module.requires_grad_(False)
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**settings, target_modules=list(paths)), module)
    except ImportError as error:  # peft looks at optional libraries only now, and refuses old ones
        raise DependencyError(_refused_by_peft(error)) from error
    for _, layer in _adapted_layers(module):
        layer.cast_input_dtype_enabled = False  # autocast does it, without an fp32 copy in between
    module.train(module.training)  # peft's layers are made in training mode, in which their dropout is active


def check_peft(config: LoraConfig) -> None:
    """Refuse a peft that cannot add adapters on this machine, before a model is loaded.

    Raises:
        DependencyError: It is missing, or refuses a library that it finds.
    """
    inject(nn.ModuleDict({"layer": nn.Linear(8, 8)}), ["layer"], peft_settings(config))


def _refused_by_peft(error: ImportError) -> str:
    reason = " ".join(str(error).split())
    way_out = "pip uninstall torchao, which nothing here needs" if "torchao" in reason else "pip install --upgrade peft"
    return f"peft {environment.version_of('peft')}, needed for LoRA and DoRA, cannot be used here ({reason}); {way_out}"


def merge(module: nn.Module) -> None:
    """Add a module's adapters to its weights and remove them, in place.

    Raises:
        ValueError: A weight would become infinite or NaN.
    """
    for path, layer in _adapted_layers(module):
        layer.merge(safe_merge=True)
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, layer.get_base_layer())


def detach(modules: Mapping[str, nn.Module]) -> None:
    """Remove the adapters, in place, without adding them to the weights, which stay frozen."""
    for module in modules.values():
        for path, layer in _adapted_layers(module):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, layer.get_base_layer())


def adapters_of(component: str, module: nn.Module) -> dict[str, Tensor]:
    """Return a component's adapters under their names in files, without the component."""
    return {name_in_files(component, name): parameter.detach() for name, parameter in _adapters(module)}


@torch.no_grad()
def load_adapters(component: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load adapters that :func:`adapters_of` returned.

    Raises:
        KeyError: An adapter is missing.
        ValueError: There are unknown ones, or one has the wrong shape.
    """
    own = {name_in_files(component, name): parameter for name, parameter in _adapters(module)}
    if unknown := state.keys() - own.keys():
        raise ValueError(f"{component} has no adapter {sorted(unknown)[0]}")
    for name, parameter in own.items():
        if state[name].shape != parameter.shape:
            raise ValueError(f"{component}.{name} is {list(state[name].shape)}, not {list(parameter.shape)}")
        parameter.copy_(state[name])


def name_in_files(component: str, name: str) -> str:
    """Return the name of an adapter's parameter in files, without peft's name of the adapter.

    peft leaves out ``.weight`` for DoRA's norms in files; transformers 5 finds those of a text encoder only with it.
    """
    name = published_name(component, name.replace(_IN_MEMORY, "", 1))
    loses_suffix = not component.startswith("text_encoder") and ".lora_magnitude_vector." in name
    return name.removesuffix(".weight") if loses_suffix else name


class AdapterState:
    """The adapters of a component, for checkpoints: the frozen weights are in the base model.

    Args:
        component: Name of the component.
        module: The component.
    """

    def __init__(self, component: str, module: nn.Module) -> None:
        self._component = component
        self._module = module

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapters by name."""
        return adapters_of(self._component, self._module)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the adapters of :meth:`state_dict`."""
        load_adapters(self._component, self._module, state)


def _adapted_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers with which peft has replaced the adapted ones, by path."""
    kind: Any = environment.require("peft").tuners.lora.LoraLayer
    return [(path, layer) for path, layer in module.named_modules() if isinstance(layer, kind)]


def _is_of_kind(kind: str, name: str, layer: nn.Module) -> bool:
    if kind == _CONVOLUTIONS:
        return isinstance(layer, nn.Conv2d)
    return name.endswith(_KINDS[kind])


def _adapters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if ".lora_" in name)


def _draw(parameter: nn.Parameter, random: torch.Generator) -> None:
    """Draw the first factor of an adapter as peft does, but from its own generator; the second factor is zero."""
    nn.init.kaiming_uniform_(parameter.data, a=math.sqrt(5), generator=random)
