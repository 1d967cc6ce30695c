"""Predicted seconds of the phases of a run, from the costs of their traces; loading and downloads are not counted."""

from math import ceil

import numpy as np

from lowmem_db.config.schema import Config
from lowmem_db.planning.cards import Card, host_seconds, operator_seconds, pcie_seconds
from lowmem_db.planning.costs import DECODER, Costs
from lowmem_db.planning.disk import num_class_images, num_encoded
from lowmem_db.planning.predictor import Predictor


def seconds_of_phases(predictor: Predictor, strategy: Config, exchange: float = 0.0) -> dict[str, float]:
    """Predict the seconds of each phase of a run; several processes share all of them.

    Args:
        predictor: Has traced the phases.
        strategy: The resolved configuration.
        exchange: Seconds of each step in which processes exchange gradients.
    """
    card, found, num_processes = predictor.run.card, {}, strategy.distributed.num_processes
    if count := num_class_images(strategy):
        traced, prior = predictor.class_images(strategy), strategy.prior
        at_once = min(prior.sample_batch_size, prior.num_class_images)
        found["class_images"] = ceil(ceil(count / at_once) / num_processes) * _drawing(
            traced.costs, card, prior.num_inference_steps
        )
    encoding = operator_seconds(predictor.encode_images(strategy).costs, card).sum()
    found["encode_images"] = float(encoding) * ceil(num_encoded(strategy) / num_processes)
    steps, accumulated = strategy.training.max_train_steps, strategy.training.gradient_accumulation_steps
    computing = predictor.seconds(strategy) * max(1.0, accumulated / 2)  # a trace has two batches at most
    found["train"] = steps * (computing + exchange)
    if count := _num_prompts_drawn(strategy):
        num_images = strategy.sampling.num_images
        traced_images = min(num_images, 2) if strategy.memory.tiled_samples else num_images
        seconds = _drawing(predictor.samples(strategy).costs, card, strategy.sampling.num_inference_steps)
        found["sample"] = count * seconds * num_images / traced_images
    return found


def _drawing(costs: Costs, card: Card, num_inference_steps: int) -> float:
    """Return the seconds of drawing a batch, from a trace with one sampling step."""
    decodes = costs.block == costs.block_names.index(DECODER)
    on_card, on_host = operator_seconds(costs, card), 0.0 if card.is_cpu else host_seconds(costs)
    seconds = np.maximum(on_card, on_host)
    drawing = max(float(seconds[~decodes].sum()), pcie_seconds(costs.host_to_device_bytes, card))  # weights may stream
    return num_inference_steps * drawing + float(seconds[decodes].sum())


def _num_prompts_drawn(config: Config) -> int:
    """Return how often a process of a run draws images of a prompt."""
    times = [
        (config.sampling.every or config.checkpointing.every, len(config.sampling.prompts)),
        (config.evaluation.every, len(config.prompts_scored)),
    ]
    last, num_processes = config.training.max_train_steps, config.distributed.num_processes
    return sum(-(-last // every) * ceil(prompts / num_processes) for every, prompts in times if every)
