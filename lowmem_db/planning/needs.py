"""The device memory that the phases of a run need with a strategy, including the allowance."""

from collections.abc import Sequence
from dataclasses import replace

from lowmem_db.config.schema import Config
from lowmem_db.planning.allowance import allowance_bytes, communicator_bytes
from lowmem_db.planning.predictor import Predictor, phase_of
from lowmem_db.records import PhaseMemory

_HOST_REST = 256 << 20  # pictures, batches, what is copied at a time
_QUANTIZED = {"int8": 2, "nf4": 4}  # bytes of the type that they are loaded in, for each byte on the card


class Needs:
    """Bytes that strategies need, each given as a resolved configuration.

    Args:
        predictor: The source of the figures.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._card = predictor.run.card

    def phases(self, strategy: Config) -> list[PhaseMemory]:
        """Return the phases of a run, with an exact trace of training."""
        traced = self._predictor.train(strategy)
        phases = self._predictor.before_training(strategy)
        phases.append(phase_of("train", traced))
        if strategy.prompts_drawn:
            kept = self._predictor.resident(strategy)
            phases.append(replace(phase_of("sample", kept), parts=self._predictor.sample(strategy)))
        return phases

    def of_phases(self, phases: Sequence[PhaseMemory]) -> int:
        """Return what phases need if they run one after the other."""
        return max(self._with_allowance(phase.parts.total, in_step=phase.name == "train") for phase in phases)

    def host_peak(self, strategy: Config, phases: Sequence[PhaseMemory]) -> int:
        """Return what phases on a card need of the host beside it: models while they load, and what stays there."""
        if self._card.is_cpu:
            return 0
        needed = [max(phase.host_bytes, _loaded(strategy, phase)) for phase in phases]
        return max(*needed, self._while_built(strategy)) + _HOST_REST

    def _while_built(self, strategy: Config) -> int:
        """Return the bytes on the host before the first step if weights stream: extra bits are there twice."""
        kept = self._predictor.resident(strategy)
        has_extra_bits = strategy.memory.weights == "bf16_extra_bits" and strategy.memory.stream_weights
        return kept.host_bytes + (kept.trained_bytes // 2 if has_extra_bits else 0)

    def before_training(self, strategy: Config) -> int:
        """Return what preparation needs."""
        return self.of_phases(self._predictor.before_training(strategy))

    def between_steps(self, strategy: Config) -> int:
        """Return the least that training needs: what stays in memory, and all gradients unless they are freed early."""
        kept = self._predictor.resident(strategy)
        gradients = 0 if strategy.memory.optimizer_in_backward else kept.trained_bytes
        return self._with_allowance(kept.resident.total + gradients)

    def samples(self, strategy: Config) -> int:
        """Return what samples during training need."""
        return self._with_allowance(self._predictor.sample(strategy).total) if strategy.prompts_drawn else 0

    def training(self, strategy: Config) -> int:
        """Return what training needs, predicted from the figures of its blocks if it was not traced."""
        return self._with_allowance(self._predictor.train_bytes(strategy), in_step=True)

    def at_least(self, strategy: Config) -> int:
        """Return the least that a run needs, without a trace of training."""
        return max(self.before_training(strategy), self.between_steps(strategy), self.samples(strategy))

    def whole_run(self, strategy: Config) -> int:
        """Return what a run needs, including :meth:`training`."""
        return max(self.at_least(strategy), self.training(strategy))

    def _with_allowance(self, num_bytes: int, *, in_step: bool = False) -> int:
        attentions = self._predictor.attentions if in_step and not self._card.is_cpu else ()
        shared = communicator_bytes(self._card, self._predictor.run.config.distributed.num_processes) if in_step else 0
        return num_bytes + allowance_bytes(num_bytes, self._card, attentions) + shared


def _loaded(strategy: Config, phase: PhaseMemory) -> int:
    """Return the bytes of a phase's models on the host, where they are converted before they go to the card.

    What several processes share out is on the host of each as a whole, and in checkpoints on that of the first.
    """
    if phase.name == "train":
        has_extra_bits = strategy.memory.weights == "bf16_extra_bits"
        weights = phase.parts.weights * 3 // 2 if has_extra_bits else phase.parts.weights
        if strategy.distributed.sharding == "full":
            return strategy.distributed.num_processes * max(weights, phase.parts.optimizer_state)
        if has_extra_bits:
            return weights
    is_quantized = phase.name in {"train", "class_images"}
    return phase.parts.weights * (_QUANTIZED.get(str(strategy.lora.base_weights), 1) if is_quantized else 1)
