"""Extracting a LoRA from a full fine-tuning, or from a DoRA: the nearest low-rank matrix to the change of each layer.

By the Eckart-Young-Mirsky theorem that is the truncated singular value decomposition.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db.adaptation.lora_file import LoraFile, put_into
from lowmem_db.adaptation.low_rank import merge
from lowmem_db.console import track
from lowmem_db.errors import ModelError
from lowmem_db.exporting.lora import LoraSource
from lowmem_db.exporting.source import ExportSource
from lowmem_db.models.finding import find_base, find_suggested
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import META
from lowmem_db.models.names import published_name
from lowmem_db.models.stored_weights import stored_weights
from lowmem_db.models.suggested_base import SuggestedBase


@dataclass(frozen=True)
class ChangeNorms:
    """Squared Frobenius norms of the change of a component's weights.

    Attributes:
        in_lora: Of the part of the change that the LoRA contains.
        total: Of the whole change, including biases, norms and embeddings, which a LoRA cannot contain.
    """

    in_lora: float
    total: float

    @property
    def share(self) -> float:
        """The share of the change that the LoRA contains; 1 if nothing has changed."""
        return self.in_lora / self.total if self.total else 1.0


def extract_lora(source: ExportSource, base: ModelFolder, rank: int) -> tuple[LoraSource, dict[str, ChangeNorms]]:
    """Extract a LoRA from the difference of two models.

    Args:
        source: The fine-tuned model.
        base: The model it was trained from.
        rank: Rank of the LoRA.

    Returns:
        The LoRA, and the norms of each component that has changed.

    Raises:
        ModelError: Nothing has changed, or the models have different architectures.
    """
    state: dict[str, Tensor] = {}
    all_norms: dict[str, ChangeNorms] = {}
    for component in (base.family.denoiser, *base.family.text_encoders):
        source.model.verify(component)
        after = {name: stored.read for name, stored in stored_weights(source.model, component).items()}
        found, norms = _of_component(component, after, base, rank)
        if norms.total > 0.0:
            all_norms[component] = norms
            state |= {f"{component}.{name}": tensor for name, tensor in found.items()}
    if not state:
        raise ModelError(f"{source.name}: no linear or convolutional layer differs from those of {base.name}")
    fields = {} if source.config is None else source.config.model.model_dump()
    suggested = SuggestedBase(fields=fields)
    lora = LoraFile(state=state, settings=_plain_settings(state, rank), base=suggested, metadata={})
    return LoraSource(name=source.name, lora=lora, config=source.config), all_norms


def bake_dora(source: LoraSource, base: ModelFolder, rank: int) -> tuple[LoraSource, dict[str, ChangeNorms]]:
    """Turn a DoRA into a plain LoRA, because no two programs agree on what kohya's ``dora_scale`` means.

    Args:
        source: The DoRA.
        base: The model it was trained on.
        rank: Rank of the LoRA.

    Returns:
        The LoRA, and the norms of each component.

    Raises:
        ModelError: The DoRA belongs to another model.
    """
    state: dict[str, Tensor] = {}
    all_norms: dict[str, ChangeNorms] = {}
    for component in source.lora.settings:
        module = base.load(component)
        put_into(component, module, source.lora)
        merge(module)
        merged = {published_name(component, name): tensor for name, tensor in module.state_dict().items()}
        after = {name: tensor.detach for name, tensor in merged.items()}
        found, all_norms[component] = _of_component(component, after, base, rank)
        state |= {f"{component}.{name}": tensor for name, tensor in found.items()}
    lora = replace(source.lora, state=state, settings=_plain_settings(state, rank))
    return replace(source, lora=lora), all_norms


def _plain_settings(state: Mapping[str, Tensor], rank: int) -> dict[str, Mapping[str, Any]]:
    settings = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
    return dict.fromkeys(sorted({name.partition(".")[0] for name in state}), settings)


def base_of(source: ExportSource, given: str | None) -> ModelFolder:
    """Return the model that a fine-tuning started from.

    Raises:
        ModelError: It is not known, or does not exist.
    """
    config = source.config
    trained_on, cache_dir = (None, None) if config is None else (config.model, config.cache_dir)
    return find_base(trained_on, given, of=source.name, cache_dir=cache_dir, exact=False)


def base_of_lora(source: LoraSource, given: str | None = None) -> ModelFolder:
    """Return the model that a LoRA was trained on.

    Args:
        source: The LoRA.
        given: The base model that the user named. Default: that of the run, see also :func:`find_base`.

    Raises:
        ModelError: It is not known, or does not exist.
    """
    config = source.config
    if config is None:
        return find_suggested(source.lora.base, of=f"{source.name} is a LoRA", given=given)
    return find_base(config.model, given, of=source.name, cache_dir=config.cache_dir, exact=False)


def total_of(norms: Mapping[str, ChangeNorms]) -> ChangeNorms:
    """Return the sums of all components' norms."""
    parts = norms.values()
    return ChangeNorms(sum(part.in_lora for part in parts), sum(part.total for part in parts))


def _of_component(
    component: str, after: Mapping[str, Callable[[], Tensor]], base: ModelFolder, rank: int
) -> tuple[dict[str, Tensor], ChangeNorms]:
    before = stored_weights(base, component)
    if differing := [name for name in before if name not in after or after[name]().shape != before[name].shape]:
        raise ModelError(
            f"--base: {component} of {base.name} has different shapes ({differing[0]}); name the model that the "
            "training started from"
        )
    layers = dict(_layers(component, base))
    state: dict[str, Tensor] = {}
    in_lora = total = 0.0
    for name in track(before, f"extracting {component}", len(before)):
        change = after[name]().float() - before[name].read().float()
        norm = float(change.double().square().sum())
        total += norm
        if norm > 0.0 and name in layers:
            down, up, norm = _factors(change, rank)
            in_lora += norm
            state |= {f"{layers[name]}.lora_A.weight": down, f"{layers[name]}.lora_B.weight": up}
    return state, ChangeNorms(in_lora, total)


def _layers(component: str, model: ModelFolder) -> Iterator[tuple[str, str]]:
    """Yield the weights that can have adapters, with the paths of their layers; the text projection cannot."""
    for path, layer in model.load(component, META).named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and path != "text_projection":
            published = published_name(component, path)
            yield f"{published}.weight", published


def _factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return both factors of an adapter, padded with zeros if a layer's rank is lower, and the squared norm of both."""
    left, values, right = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    values = values[:rank]
    roots = values.sqrt()
    down = change.new_zeros(rank, right.shape[1])
    up = change.new_zeros(left.shape[0], rank)
    down[: len(values)] = (roots[:, None] * right[: len(values)]).float()
    up[:, : len(values)] = (left[:, : len(values)] * roots).float()
    norm = float(values.square().sum())
    if change.ndim == 2:
        return down, up, norm
    return down.view(rank, *change.shape[1:]), up[:, :, None, None], norm
