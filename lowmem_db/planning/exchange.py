"""What processes that share the steps of a run send to each other."""

from dataclasses import dataclass

from lowmem_db.config.schema import Config
from lowmem_db.distributed.reduction import is_ordered
from lowmem_db.environment import GIB
from lowmem_db.planning.cards import Card, pcie_seconds


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The gradients, and weights that are shared out, that cross between the cards in one step.

    Attributes:
        sent_bytes: What the busiest process sends.
        received_bytes: What it receives meanwhile.
        seconds: How long that takes over PCIe; the step waits for it.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0


def exchange_of(strategy: Config, gradient_bytes: int, card: Card) -> Exchange:
    """Predict what crosses in a step: a ring of all processes or, in the order of one process, through the first one.

    Args:
        strategy: The resolved configuration.
        gradient_bytes: Bytes of all gradients.
        card: The card of each process.
    """
    count = strategy.distributed.num_processes
    if count == 1:
        return Exchange()
    if not is_ordered(strategy):
        around = 2 * (count - 1) * gradient_bytes // count
        return Exchange(sent_bytes=around, received_bytes=around, seconds=pcie_seconds(around, card))
    rounds = strategy.training.gradient_accumulation_steps * (strategy.memory.micro_batches or 1)
    received = rounds * (count - 1) * gradient_bytes
    seconds = pcie_seconds(received + gradient_bytes, card)
    return Exchange(sent_bytes=gradient_bytes, received_bytes=received, seconds=seconds)


def exchange_of_shards(strategy: Config, weight_bytes: int, gradient_bytes: int, card: Card) -> Exchange:
    """Predict what crosses in a step if the model is shared out: a ring for each time that it is put together.

    That happens to the weights in the forward and in the backward pass of every batch, to their gradients after it, and
    once more to the gradients where clipping needs norms in the order of one process.

    Args:
        strategy: The resolved configuration.
        weight_bytes: Bytes of the weights of the whole model.
        gradient_bytes: Bytes of all gradients.
        card: The card of each process.
    """
    count = strategy.distributed.num_processes
    batches = strategy.training.gradient_accumulation_steps * (strategy.memory.micro_batches or 1)
    has_norms = is_ordered(strategy) and strategy.training.clipping in {"global", "per_tensor"}
    moved = batches * (2 * weight_bytes + gradient_bytes) + gradient_bytes * has_norms
    around = (count - 1) * moved // count
    return Exchange(sent_bytes=around, received_bytes=around, seconds=pcie_seconds(around, card))


def in_words(strategy: Config, exchange: Exchange) -> str:
    """Return what crosses between the cards in one line."""
    sent, received = exchange.sent_bytes, exchange.received_bytes
    both = f"{_size(sent)} each way" if sent == received else f"{_size(received)} to the first and {_size(sent)} back"
    return (
        f"{strategy.distributed.num_processes} processes: all figures are those of one; {both} cross between the cards "
        f"in each step, {exchange.seconds:.2f} s over PCIe, which is in its time"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 100 else f"{num_bytes / (1 << 20):.1f} MiB"
