"""The phases of a run; each is traced by running its real code on the meta device."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db.adaptation.layers import count_trained
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import autocast, changed
from lowmem_db.engine.build import Prepared, build_ema, build_step, prepare_modules
from lowmem_db.engine.samples import evaluating, load_decoder, sample_artist, sample_job
from lowmem_db.engine.step import train_step
from lowmem_db.memory import sharding
from lowmem_db.memory.weight_stream import weights_on_host
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import CPU, META
from lowmem_db.models.saving import DTYPES
from lowmem_db.optimizers.build import build_optimizer, stays_whole
from lowmem_db.planning.caching_allocator import Event
from lowmem_db.planning.cards import Card
from lowmem_db.planning.copying import copy_of
from lowmem_db.planning.costs import DECODER, CostRecorder, Costs
from lowmem_db.planning.timeline import BlockFigures, Timeline
from lowmem_db.planning.tracing import real_paths
from lowmem_db.planning.tracker import CUDA_ROUNDING, AllocationTracker
from lowmem_db.preparation.class_images import (
    class_artist,
    class_job,
    load_class_decoder,
    load_class_text_encoders,
    load_frozen_denoiser,
)
from lowmem_db.preparation.encode import load_encoder, load_encoders_of_text
from lowmem_db.records import Batch, Conditioning, MemoryParts


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The result of tracing a phase.

    Attributes:
        peak: Bytes on the device at the peak.
        resident: Bytes on the device that stay in use when the phase is done.
        host_bytes: Peak bytes on the host.
        pinned_bytes: Peak bytes of those that are pinned.
        costs: The costs of its operators.
        blocks: Figures of the blocks in a training step, in the order of the forward pass.
        trained_bytes: Bytes of the parameters that train.
        num_trained: How many parameters of each component train.
        streamed_bytes: Bytes of the weights that are on the host.
        streamed_trained_bytes: Bytes of those among them that train.
        passing: Bytes of weights and of gradients that are put together for a layer of a model that is shared out.
    """

    peak: MemoryParts
    resident: MemoryParts
    host_bytes: int
    costs: Costs
    pinned_bytes: int = 0
    blocks: Mapping[str, BlockFigures] = field(default_factory=dict)
    trained_bytes: int = 0
    num_trained: Mapping[str, int] = field(default_factory=dict)
    streamed_bytes: int = 0
    streamed_trained_bytes: int = 0
    passing: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class TracedRun:
    """The run to trace: a resolved configuration and its model, for a card.

    Attributes:
        prepared: Models that were built for earlier traces, which copy them: building takes as long as a step.
    """

    config: Config
    model: ModelFolder
    card: Card
    prepared: dict[Any, Prepared] = field(default_factory=dict, compare=False)

    def prepare(self) -> Prepared | None:
        """Return the model with what trains in it, to be copied in the trace; None if it cannot be copied."""
        lora, training = self.config.lora, self.config.training
        if lora.base_weights in {"int8", "nf4"}:
            return None
        key = (
            lora.model_dump_json(), training.layers, training.train_text_encoder, training.mixed_precision,
            self.config.memory.weights,
        )  # fmt: skip
        if key not in self.prepared:
            self.prepared[key] = prepare_modules(self.config, self.model, META)
        return self.prepared[key]

    @contextmanager
    def tracing(self, *, autocast: bool = False) -> Iterator[tuple[AllocationTracker, CostRecorder]]:
        """Return a context that tracks the code in it as if it ran on the card."""
        costs = CostRecorder()
        rounding = 1 if self.card.is_cpu else CUDA_ROUNDING
        tracker = AllocationTracker(
            rounding=rounding, cpu_kernels=self.card.is_cpu, costs=costs, eager_step=self.card.eager_step
        )
        gc.freeze()  # otherwise the collector walks through torch's own objects again and again
        try:
            with real_paths(on_cpu=self.card.is_cpu, autocast=autocast), tracker.tracking():
                yield tracker, costs
        finally:
            gc.unfreeze()


def trace_class_images(run: TracedRun) -> Traced:
    """Trace the drawing of one batch of class images: first the denoiser, then the decoder.

    Resident text encoders need less than the denoiser after them; streamed ones may need more.
    """
    drawn = _trace_class_drawing(run)
    if not run.config.memory.stream_weights:
        return drawn
    text = _trace_class_text(run)
    return replace(
        drawn,
        peak=max(drawn.peak, text.peak, key=lambda parts: parts.total),
        host_bytes=max(drawn.host_bytes, text.host_bytes),
        pinned_bytes=max(drawn.pinned_bytes, text.pinned_bytes),
    )


def _trace_class_drawing(run: TracedRun) -> Traced:
    config, model = _short(run.config), run.model
    dtype = _class_dtype(run)
    count = min(config.prior.sample_batch_size, config.prior.num_class_images)
    size = (config.data.resolution, config.data.resolution)
    with run.tracing() as (tracker, costs), torch.no_grad():
        job = class_job(config, range(count), size)
        told = model.family.blank_embeds(model, len(job.prompts) + 1, META, dtype)
        conditioning = Conditioning(tokens={}, embeds=told)
        with tracker.new_tensors_are("weights"):
            denoiser = load_frozen_denoiser(config, model, META, dtype)
        tracker.reset_peak()
        costs.clear()
        with tracker.new_tensors_are("activations"):
            latents = class_artist(config, model).latents(denoiser, conditioning, job)
        del denoiser
        gc.collect()  # a streamed model refers to itself
        costs.start_block(DECODER)
        with tracker.new_tensors_are("weights"):
            codec = load_class_decoder(config, model, META, dtype)
        with tracker.new_tensors_are("activations"):
            pixels = codec.decode(latents)
        del pixels
        return _found(tracker, costs)


def _class_dtype(run: TracedRun) -> torch.dtype:
    return DTYPES[run.config.prior.precision or ("fp32" if run.card.is_cpu else "fp16")]


def _trace_class_text(run: TracedRun) -> Traced:
    """Trace the text encoders on the class prompt and the empty one."""
    model = run.model
    with run.tracing() as (tracker, costs), torch.no_grad():
        with tracker.new_tensors_are("weights"):
            text_encoders = load_class_text_encoders(run.config, model, META, _class_dtype(run))
        tracker.reset_peak()
        with tracker.new_tensors_are("activations"):
            made = model.family.encode(text_encoders, model.family.blank_tokens(model, 2))
        del made
        return _found(tracker, costs)


def trace_encode_images(run: TracedRun) -> Traced:
    """Trace the encoding of one image, in fp32."""
    resolution = run.config.data.resolution
    with run.tracing() as (tracker, costs):
        with tracker.new_tensors_are("weights"):
            codec = load_encoder(run.config, run.model, META)
        tracker.reset_peak()
        costs.clear()
        with tracker.new_tensors_are("activations"):
            moments = codec.encode(torch.zeros(1, 3, resolution, resolution))
        del moments
        return _found(tracker, costs)


def trace_encode_text(run: TracedRun) -> Traced:
    """Trace the text encoders on one prompt, in fp32."""
    model = run.model
    tokens = model.family.blank_tokens(model, 1)
    with run.tracing() as (tracker, costs), torch.no_grad():
        with tracker.new_tensors_are("weights"):
            text_encoders = load_encoders_of_text(run.config, model, META)
        tracker.reset_peak()
        with tracker.new_tensors_are("activations"):
            made = model.family.encode(text_encoders, tokens)
        del made
        return _found(tracker, costs)


def trace_train(run: TracedRun) -> Traced:
    """Trace one training step that is not the first, and the moving average after it."""
    config, prepared = run.config, run.prepare()
    with run.tracing(autocast=autocast(config) != "no") as (tracker, costs):
        with tracker.new_tensors_are("optimizer_state"):
            denoiser, objective, optimizer = build_step(config, run.model, META, copy_of(prepared))
        tracker.register(weights_of(denoiser.modules().values()), "weights")
        with tracker.new_tensors_are("other"):
            ema = build_ema(config, denoiser, optimizer)
        optimizer.set_learning_rates(dict.fromkeys(denoiser.modules(), 1e-6))
        batches = training_batches(config, run.model, denoiser)
        timeline = Timeline(tracker, costs)
        tracker.reset_peak()
        costs.clear()
        with timeline.recorded(denoiser.blocks()), tracker.new_tensors_are("activations"):
            with tracker.gradients_of(optimizer.parameters()):
                train_step(denoiser, objective, optimizer, batches, 1)
            if ema is not None:
                ema.update(2)
        return _found(tracker, costs, timeline.figures())


def trace_allocations(run: TracedRun, *, num_steps: int = 2) -> tuple[list[Event], int]:
    """Trace training steps one after the other, from what stays in memory between them.

    Returns:
        What is allocated and freed, in its order, and the bytes of tensors at the peak.
    """
    config = run.config
    with run.tracing(autocast=autocast(config) != "no") as (tracker, _):
        denoiser, objective, optimizer = build_step(config, run.model, META)
        optimizer.set_learning_rates(dict.fromkeys(denoiser.modules(), 1e-6))
        tracker.register(weights_of(denoiser.modules().values()), "weights")
        batches = training_batches(config, run.model, denoiser)
        events = tracker.record_events()
        tracker.reset_peak()
        for step in range(num_steps):
            train_step(denoiser, objective, optimizer, batches, step)
        return list(events), tracker.peak.total


def trace_residents(run: TracedRun, strategies: Sequence[Config]) -> list[Traced]:
    """Trace what stays in memory between steps, for strategies that load their weights in the same types."""
    after_backward = [_stepping_after_backward(strategy) for strategy in strategies]
    found: list[Traced] = []
    prepared = replace(run, config=after_backward[0]).prepare()
    with run.tracing() as (tracker, costs):
        denoiser, _, optimizer = build_step(after_backward[0], run.model, META, copy_of(prepared))
        passing = _share_out(denoiser, after_backward[0])
        tracker.register(weights_of(denoiser.modules().values()), "weights")
        on_host = weights_on_host(denoiser.modules().values())
        for strategy in after_backward:
            del optimizer
            tracker.reset_peak()
            with tracker.new_tensors_are("optimizer_state"):
                optimizer = build_optimizer(strategy, denoiser.modules(), META, on_host=on_host)
            with tracker.new_tensors_are("other"):
                ema = build_ema(strategy, denoiser, optimizer)
            streamed = [weight for weight in weights_of(denoiser.modules().values()) if tracker.is_on_host(weight)]
            found.append(
                replace(
                    _found(tracker, costs),
                    trained_bytes=sum(parameter.nbytes for parameter in optimizer.parameters()),
                    num_trained=count_trained(denoiser.modules()),
                    streamed_bytes=sum(weight.nbytes for weight in streamed),
                    streamed_trained_bytes=sum(weight.nbytes for weight in streamed if weight.requires_grad),
                    passing=passing,
                )
            )
            del ema
    return found


def _share_out(denoiser: Denoiser, config: Config) -> tuple[int, int]:
    """Leave of a model what one of several processes holds; return the bytes that are put together at a time."""
    if config.distributed.sharding == "none":
        return 0, 0
    whole = partial(stays_whole, config=config)
    passing = sharding.passing_bytes(denoiser, whole)
    sharding.shrink(denoiser, config.distributed.num_processes, whole)
    return passing


def trace_sample(run: TracedRun) -> Traced:
    """Trace the samples for one prompt with the model in memory; optimizer states and averages are not counted."""
    config, model = _short(_stepping_after_backward(run.config)), run.model
    prepared = run.prepare()
    with run.tracing(autocast=autocast(config) != "no") as (tracker, costs):
        denoiser = build_step(config, model, META, copy_of(prepared))[0]
        tracker.register(weights_of(denoiser.modules().values()), "weights")
        conditioning = _conditioning(model, denoiser, 2)
        tracker.reset_peak()
        costs.clear()
        with tracker.new_tensors_are("activations"):
            with evaluating(denoiser):
                latents = sample_artist(config, model).latents(denoiser, conditioning, sample_job(config, ""))
            costs.start_block(DECODER)
            with tracker.new_tensors_are("weights"):
                codec = load_decoder(config, model, denoiser)
            pixels = codec.decode(latents)
        del latents, pixels, codec
        return _found(tracker, costs)


def _stepping_after_backward(config: Config) -> Config:
    """Return a configuration without hooks on parameters, because hooks would keep optimizer states alive."""
    return changed(config, {"memory.optimizer_in_backward": False})


def _found(tracker: AllocationTracker, costs: CostRecorder, blocks: Mapping[str, BlockFigures] | None = None) -> Traced:
    return Traced(
        peak=tracker.peak,
        resident=tracker.live,
        host_bytes=tracker.peak_host_bytes,
        pinned_bytes=tracker.peak_pinned_bytes,
        costs=costs.costs(),
        blocks=blocks or {},
    )


def _short(config: Config) -> Config:
    """Return a configuration that samples in one step, which needs as much memory as fifty."""
    prior = config.prior.model_copy(update={"num_inference_steps": 1})
    num_images = min(config.sampling.num_images, 2) if config.memory.tiled_samples else config.sampling.num_images
    sampling = config.sampling.model_copy(update={"num_inference_steps": 1, "num_images": num_images})
    return config.model_copy(update={"prior": prior, "sampling": sampling})


def weights_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield parameters and buffers."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def training_batches(config: Config, model: ModelFolder, denoiser: Denoiser) -> list[Batch]:
    """Return batches with the shapes of a step, on the host; more than two need no more memory than two."""
    parts = max(1, config.memory.micro_batches or 0)
    num_instance = config.training.train_batch_size // parts
    count = num_instance * (2 if config.prior.enabled else 1)
    size = config.data.resolution // model.space.cell
    moments = torch.zeros(count, model.space.channels, size, size)
    batch = Batch(
        latent_mean=moments,
        latent_std=moments,
        conditioning=_conditioning(model, denoiser, count),
        sample_ids=torch.arange(count),
        num_instance=num_instance,
        sources=("",) * count,
    )
    return [batch] * min(2, config.training.gradient_accumulation_steps * parts)


def _conditioning(model: ModelFolder, denoiser: Denoiser, count: int) -> Conditioning:
    """Return tokens on the host, and the embeddings of frozen text encoders."""
    family, is_frozen = model.family, not denoiser.text_encoders()
    return Conditioning(
        tokens=family.blank_tokens(model, count),
        embeds=family.blank_embeds(model, count, CPU, torch.float32) if is_frozen else {},
        picture=family.describe_pictures(torch.zeros(count, 6)),
    )
