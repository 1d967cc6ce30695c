"""The weights in a checkpoint of a full fine-tuning, as the final model of that step would have them."""

from pathlib import Path

from torch import Tensor

from lowmem_db.config.schema import Config
from lowmem_db.optimizers.weights import EXTRA_BITS, in_fp32
from lowmem_db.storage.tensors import read_state


def trained_components(checkpoint: Path) -> tuple[str, ...]:
    """Return the names of the components whose weights are in a checkpoint."""
    return tuple(
        file.stem for file in sorted(checkpoint.glob("*.safetensors")) if file.stem not in {"optimizer", "ema"}
    )


def checkpoint_weights(checkpoint: Path, component: str, config: Config) -> dict[str, Tensor]:
    """Return the weights of a component: the moving average if there is one, 24-bit weights with their extra bits.

    Args:
        checkpoint: The checkpoint.
        component: One of :func:`trained_components`.
        config: Configuration of the run.

    Raises:
        StorageError: A file is missing or damaged.
    """
    weights: dict[str, Tensor] = read_state(checkpoint / f"{component}.safetensors")
    averaged = _own(read_state(checkpoint / "ema.safetensors"), component) if config.ema.enabled else {}
    if config.memory.weights == "bf16_extra_bits":
        states = _own(read_state(checkpoint / "optimizer.safetensors")["parameters"], component)
        bits = {name: state[EXTRA_BITS] for name, state in states.items() if EXTRA_BITS in state}
        weights = {name: in_fp32(weight, bits[name]) if name in bits else weight for name, weight in weights.items()}
    return weights | averaged


def _own(by_name: dict, component: str) -> dict:
    prefix = f"{component}."
    return {name.removeprefix(prefix): value for name, value in by_name.items() if name.startswith(prefix)}
