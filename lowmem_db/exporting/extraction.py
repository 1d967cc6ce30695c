"""A LoRA made from a full fine-tuning: the nearest matrix of low rank to what training changed in each layer.

By the theorem of Eckart, Young and Mirsky that is the singular value decomposition cut off at the rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem_db.adaptation.lora_file import LoraFile
from lowmem_db.console import track
from lowmem_db.errors import ModelError
from lowmem_db.exporting.lora import LoraSource
from lowmem_db.exporting.source import ExportSource
from lowmem_db.models.finding import find_model, model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import META
from lowmem_db.models.names import published_name
from lowmem_db.models.stored_weights import stored_weights


@dataclass(frozen=True)
class Kept:
    """Squared Frobenius norms of what training changed in a component.

    Attributes:
        kept: Of what the LoRA has of it.
        total: Of all of it: biases, norms and embeddings too, which no LoRA has.
    """

    kept: float
    total: float

    @property
    def share(self) -> float:
        """What part of the change the LoRA keeps; 1 where nothing has changed."""
        return self.kept / self.total if self.total else 1.0


def extract_lora(source: ExportSource, base: ModelFolder, rank: int) -> tuple[LoraSource, dict[str, Kept]]:
    """Make a LoRA from the difference of two models.

    Args:
        source: The fine-tuned model.
        base: The model it was trained from.
        rank: Rank of the LoRA.

    Returns:
        The LoRA, and what it keeps of each component that has changed.

    Raises:
        ModelError: Nothing has changed, or the models are of different architectures.
    """
    state: dict[str, Tensor] = {}
    kept: dict[str, Kept] = {}
    for component in (base.family.denoiser, *base.family.text_encoders):
        found, norms = _of_component(component, source.model, base, rank)
        if norms.total > 0.0:
            kept[component] = norms
            state |= {f"{component}.{name}": tensor for name, tensor in found.items()}
    if not state:
        raise ModelError(f"{source.name}: no linear or convolutional layer differs from those of {base.name}")
    settings = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
    adapted = {name.partition(".")[0] for name in state}
    fields = {} if source.config is None else source.config.model.model_dump()
    lora = LoraFile(state=state, settings=dict.fromkeys(sorted(adapted), settings), base=fields, metadata={})
    return LoraSource(name=source.name, lora=lora, config=source.config), kept


def base_of(source: ExportSource, given: str | None) -> ModelFolder:
    """Return the model that a fine-tuning started from.

    Raises:
        ModelError: Nobody says which, or it is not there.
    """
    if given is not None:
        return find_model(given)
    if source.config is None:
        raise ModelError(f"--base: {source.name} is no run and does not say its base model; set --base MODEL")
    return model_of(source.config)


def total_of(kept: dict[str, Kept]) -> Kept:
    """Return the norms of all components together."""
    return Kept(sum(each.kept for each in kept.values()), sum(each.total for each in kept.values()))


def _of_component(component: str, tuned: ModelFolder, base: ModelFolder, rank: int) -> tuple[dict[str, Tensor], Kept]:
    after, before = stored_weights(tuned, component), stored_weights(base, component)
    if differing := [name for name in before if name not in after or after[name].shape != before[name].shape]:
        raise ModelError(f"--base: {component} of {base.name} has another shape ({differing[0]}); name the right base")
    layers = dict(_layers(component, base))
    state: dict[str, Tensor] = {}
    kept = total = 0.0
    for name in track(before, f"extracting {component}", len(before)):
        change = after[name].read().float() - before[name].read().float()
        norm = float(change.double().square().sum())
        total += norm
        if norm > 0.0 and name in layers:
            down, up, kept_of_layer = _factors(change, rank)
            kept += kept_of_layer
            state |= {f"{layers[name]}.lora_A.weight": down, f"{layers[name]}.lora_B.weight": up}
    return state, Kept(kept, total)


def _layers(component: str, model: ModelFolder) -> Iterator[tuple[str, str]]:
    """Yield the weights that can have adapters, with the paths of their layers; the final projection cannot."""
    for path, layer in model.load(component, META).named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and path != "text_projection":
            published = published_name(component, path)
            yield f"{published}.weight", published


def _factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return both factors of an adapter, filled with zeros where a layer has no such rank, and the norm they keep."""
    left, values, right = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    values = values[:rank]
    roots = values.sqrt()
    down = change.new_zeros(rank, right.shape[1])
    up = change.new_zeros(left.shape[0], rank)
    down[: len(values)] = (roots[:, None] * right[: len(values)]).float()
    up[:, : len(values)] = (left[:, : len(values)] * roots).float()
    kept = float(values.square().sum())
    if change.ndim == 2:
        return down, up, kept
    return down.view(rank, *change.shape[1:]), up[:, :, None, None], kept
