"""How a run saves memory: the fields that a configuration may leave open, each declared once.

A *resolved* configuration leaves none of them open, and everything below planning gets only that. The declaration of a
field determines how a strategy is named and compared, which of the planner's traces it shares with others, what a
resumed run takes over, and its JSON.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lowmem_db.config import choices
from lowmem_db.config.choices import Situation
from lowmem_db.config.schema import Config, Placement

Trace = Literal["weights", "resident", "class_images", "encode_images", "encode_text", "train", "sample"]
"""What the planner measures: weights as loaded, what stays in memory between steps, and the phases of a run."""


def _itself(value: Any) -> Hashable:
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


@dataclass(frozen=True, kw_only=True)
class StrategyField:
    """A field of the configuration that the planner fills in if it is left open.

    Attributes:
        path: Its path in the configuration; ``memory.techniques.NAME`` for a technique from outside this package.
        choices: The values that the planner tries, the mildest first.
        plain: Its value in a run without a plan.
        words: Its words on the screen for a resolved configuration, or None to say nothing.
        rank: Fields with a lower rank weigh more when the effort of strategies is compared.
        effort: How much a value does to save memory.
        overhead: Fraction of a step's time that a value costs, in addition to recomputation.
        traced: The measurements that depend on the field. Each has a function that maps values to keys; values with
            the same key share one measurement.
        applies: Whether the field has an effect in a configuration; it stays None otherwise.
        is_exact: Whether its values differ only in memory and time, so that a run that is out of memory may change it.
    """

    path: str
    choices: Callable[[Config, Situation], Iterable[Any]]
    plain: Callable[[Config], Any]
    words: Callable[[Config], str | None]
    rank: int
    effort: Callable[[Any], int]
    overhead: Callable[[Any], float]
    traced: Mapping[Trace, Callable[[Any], Hashable]]
    applies: Callable[[Config], bool] = lambda config: True
    is_exact: bool = False

    @property
    def name(self) -> str:
        """Its name without the section."""
        return self.path.rpartition(".")[2]

    def of(self, config: Config | Mapping[str, Any]) -> Any:
        """Return its value in a configuration or in a tree read from a file, or None if it is missing."""
        value: Any = config
        for name in self.path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        return value

    def is_open(self, config: Config) -> bool:
        """Return whether a configuration leaves it to the planner."""
        return self.of(config) is None and self.applies(config)


def switch(
    path: str,
    words: str,
    *,
    choices: Callable[[Config, Situation], Iterable[bool]] = choices.off,
    rank: int = 3,
    overhead: float = 0.0,
    traced: Iterable[Trace] = ("train",),
    is_exact: bool = False,
) -> StrategyField:
    """Return a field that is on or off, and off in a run without a plan.

    Args:
        path: As in :class:`StrategyField`.
        words: Its words on the screen if it is on.
        choices: As in :class:`StrategyField`. Default: only off, so that only a configuration turns it on.
        rank: As in :class:`StrategyField`.
        overhead: Fraction of a step's time that it costs.
        traced: The measurements that depend on it.
        is_exact: As in :class:`StrategyField`.
    """

    def said(config: Config) -> str | None:
        return words if field.of(config) else None

    field = StrategyField(
        path=path,
        choices=choices,
        plain=lambda config: False,
        words=said,
        rank=rank,
        effort=int,
        overhead=lambda is_on: overhead * is_on,
        traced=dict.fromkeys(traced, bool),
        is_exact=is_exact,
    )
    return field


def autocast(config: Config) -> Literal["no", "fp16", "bf16"]:
    """Return the autocast type of a resolved configuration; there is no autocast if the weights themselves are bf16."""
    precision = config.training.mixed_precision
    return precision if config.memory.weights == "fp32" and precision is not None else "no"


def _weights_in_words(config: Config) -> str:
    base, compute_type = config.lora.base_weights, autocast(config)
    trained = "embedding" if config.textual_inversion.enabled else "LoRA"
    weights = f"{config.memory.weights}" if base is None else f"{trained} on {base} weights"
    return weights + (f" with {compute_type} autocast" if compute_type != "no" else "")


def _placement_in_words(config: Config) -> str:
    placement = config.memory.checkpointing
    if placement is None or placement == "none":
        return "no checkpointing"
    if isinstance(placement, str):
        return f"checkpointed {placement}"
    blocks = [name for name, kind in placement.items() if kind != "none"]
    return f"checkpointed {' and '.join(blocks)}" if len(blocks) <= 2 else f"checkpointed {len(blocks)} blocks"


def _parts_in_words(config: Config) -> str | None:
    parts = config.memory.micro_batches or 0
    return f"batches in {parts} parts" if parts > 1 else None


def _depth(placement: Placement | Mapping[str, Placement]) -> int:
    """Return how much is recomputed: all blocks rank above some, and more blocks above fewer."""
    depth = {"none": 0, "layers": 1, "segments": 2, "nested": 3}
    return 1000 * depth[placement] + 1 if isinstance(placement, str) else 1000 + len(placement)


def _is_fp32(weights: str) -> bool:
    return weights == "fp32"


def _unsaid(config: Config) -> None:
    del config


def _free(value: Any) -> float:
    del value
    return 0.0


FIELDS: tuple[StrategyField, ...] = (
    StrategyField(
        path="memory.weights",
        choices=choices.weights,
        plain=lambda config: "fp32",
        words=_weights_in_words,
        rank=0,
        effort=("fp32", "bf16_extra_bits", "bf16_stochastic").index,
        overhead=_free,
        traced={"weights": _is_fp32, "resident": _itself, "train": _itself, "sample": _is_fp32},
    ),
    StrategyField(
        path="lora.base_weights",
        choices=choices.base_weights,
        plain=lambda config: "fp32",
        words=_unsaid,  # said with the weights
        rank=1,
        effort=(None, "fp32", "fp16", "bf16", "int8", "nf4").index,
        overhead=_free,
        traced={
            "weights": _itself,
            "resident": _itself,
            "train": _itself,
            "sample": _itself,
            "class_images": lambda kind: kind if kind in {"int8", "nf4"} else None,
        },
        applies=lambda config: not config.trains_weights,
    ),
    StrategyField(
        path="training.mixed_precision",
        choices=choices.mixed_precision,
        plain=choices.plain_precision,
        words=_unsaid,  # said with the weights
        rank=0,
        effort=lambda precision: 0,
        overhead=_free,
        traced=dict.fromkeys(("weights", "resident", "train", "sample"), _itself),
    ),
    StrategyField(
        path="memory.checkpointing",
        choices=choices.checkpointing,
        plain=lambda config: "none",
        words=_placement_in_words,
        rank=4,
        effort=_depth,
        overhead=_free,  # what is recomputed is counted block by block
        traced={"train": _itself},
        is_exact=True,
    ),
    switch(
        "memory.fused_layers",
        "fused layers",
        choices=choices.fused_layers,
        rank=2,
        traced=("train", "sample"),
    ),
    switch("memory.channels_last", "channels_last", choices=choices.channels_last, rank=2, traced=("train", "sample")),
    switch("memory.optimizer_in_backward", "optimizer in backward", choices=choices.gradients, is_exact=True),
    switch(
        "memory.stream_optimizer_state",
        "streamed optimizer state",
        choices=choices.optimizer_states,
        overhead=0.03,  # copies to the host and back take bandwidth and launches
        traced=("resident", "train"),
        is_exact=True,
    ),
    switch(
        "memory.stream_weights",
        "streamed weights",
        choices=choices.stream_weights,
        rank=5,
        overhead=0.03,
        traced=("weights", "resident", "class_images", "encode_images", "encode_text", "train", "sample"),
        is_exact=True,
    ),
    StrategyField(
        path="memory.optimizer_step",
        choices=choices.optimizer_steps,
        plain=lambda config: "device",
        words=lambda config: "optimizer step on the host" if config.memory.optimizer_step == "host" else None,
        rank=5,
        effort=lambda where: int(where == "host"),
        overhead=_free,
        traced={"resident": _itself, "train": _itself},
    ),
    switch(
        "memory.offload_checkpoints",
        "checkpoints on the host",
        choices=choices.offload_checkpoints,
        overhead=0.03,
        is_exact=True,
    ),
    switch("memory.tiled_samples", "tiled samples", traced=("sample",), is_exact=True),
    switch("memory.tiled_preparation", "tiled preparation", traced=("class_images", "encode_images")),
    StrategyField(
        path="memory.micro_batches",
        choices=choices.whole_batches,
        plain=lambda config: 0,
        words=_parts_in_words,
        rank=3,
        effort=int,
        overhead=lambda parts: 0.02 * max(0, parts - 1),  # smaller batches use a card less well
        traced={"train": lambda parts: max(1, parts)},
        is_exact=True,
    ),
    StrategyField(
        path="training.clipping",
        choices=choices.clipping,
        plain=lambda config: next(choices.clipping(config)),
        words=_unsaid,
        rank=0,
        effort=lambda clipping: 0,
        overhead=_free,
        traced={"train": _itself},
    ),
)
"""Fields of this package, in the order in which they are chosen and shown."""
_registered: list[StrategyField] = []


def register(field: StrategyField) -> Callable[[], None]:
    """Let the planner choose the field of a technique from outside this package; return a function that undoes this."""
    _registered.append(field)
    return lambda: _registered.remove(field)


def is_registered(name: str) -> bool:
    """Return whether a technique from outside this package is known."""
    return any(field.path == f"memory.techniques.{name}" for field in _registered)


def fields() -> tuple[StrategyField, ...]:
    """Return all fields in the order in which they are chosen; registered ones come last."""
    return (*FIELDS, *_registered)


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a configuration with some values replaced, keyed by field path; they are not validated."""
    sections: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, name, *key = path.split(".", 2)
        of_section = sections.setdefault(section, {})
        if key:
            before = of_section.get(name, getattr(getattr(config, section), name))
            of_section[name] = {**before, key[0]: value}
        else:
            of_section[name] = dict(value) if isinstance(value, Mapping) else value
    update = {section: getattr(config, section).model_copy(update=made) for section, made in sections.items()}
    return config.model_copy(update=update)


def resolve(config: Config, choices: Mapping[str, Any] | None = None) -> Config:
    """Fill in what a configuration leaves open, with the given choices or the values of a run without a plan.

    Args:
        config: The configuration; fields that it gives are kept.
        choices: Values, keyed by field path.
    """
    for field in fields():
        if field.is_open(config):
            value = (choices or {}).get(field.path)
            config = changed(config, {field.path: field.plain(config) if value is None else value})
    return config


def open_paths(config: Config) -> frozenset[str]:
    """Return the paths of the fields that a configuration leaves open; empty if it is resolved."""
    return frozenset(field.path for field in fields() if field.is_open(config))


def check_resolved(config: Config) -> None:
    """Refuse a configuration that is not resolved, which is a mistake of the caller, not of the user.

    Raises:
        ValueError: A field is open.
    """
    if left := open_paths(config):
        raise ValueError(f"the configuration leaves open {', '.join(sorted(left))}; resolve it first")


def values_of(config: Config) -> dict[str, Any]:
    """Return the strategy of a resolved configuration: values keyed by field name, as in JSON."""
    return {field.name: field.of(config) for field in fields()}


def key_of(config: Config, trace: Trace) -> tuple[Hashable, ...]:
    """Return a hashable key of everything in a resolved configuration that a measurement depends on."""
    return tuple(field.traced[trace](field.of(config)) for field in fields() if trace in field.traced)


def describe(config: Config) -> str:
    """Return the strategy of a resolved configuration in words, for the screen."""
    return ", ".join(words for field in fields() if (words := field.words(config)) is not None)


def effort_of(config: Config) -> tuple[int, ...]:
    """Return how much a strategy does to save memory, as a tuple for comparison."""
    totals: dict[int, int] = {}
    for field in fields():
        totals[field.rank] = totals.get(field.rank, 0) + field.effort(field.of(config))
    return tuple(totals[rank] for rank in sorted(totals))


def overhead_of(config: Config) -> float:
    """Return the fraction of a step's time that a strategy costs, in addition to recomputation."""
    return sum(field.overhead(field.of(config)) for field in fields())
