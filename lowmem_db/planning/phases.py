"""The phases of a run, each traced by running its real code on the meta device."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import Strategy
from lowmem_db.memory import checkpointing
from lowmem_db.models.conditioning import encode_prompt
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.latents import decode_latents, downscaling, encode_moments
from lowmem_db.models.loading import load_autoencoder, load_text_encoder, load_unet
from lowmem_db.models.saving import DTYPES
from lowmem_db.models.source import ModelFolder
from lowmem_db.planning.cards import Card
from lowmem_db.planning.costs import CostRecorder, Costs
from lowmem_db.planning.tracing import real_paths
from lowmem_db.planning.tracker import CUDA_ROUNDING, AllocationTracker
from lowmem_db.preparation.class_images import draw_batch
from lowmem_db.records import Batch, Conditioning, MemoryParts
from lowmem_db.training.setup import build_ema, build_step
from lowmem_db.training.step import train_step

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What a trace of a phase found.

    Attributes:
        peak: Bytes of the device when most were in use.
        resident: Bytes that stay when the phase's work is done.
        host_bytes: Most bytes of the host in use at once.
        costs: What its operators do.
    """

    peak: MemoryParts
    resident: MemoryParts
    host_bytes: int
    costs: Costs


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is traced: a configuration and a model for a card."""

    config: Config
    model: ModelFolder
    card: Card

    @contextmanager
    def tracing(self, *, autocast: bool = False) -> Iterator[tuple[AllocationTracker, CostRecorder]]:
        """Return a tracker that follows the block as if it ran on the card."""
        costs = CostRecorder()
        rounding = 1 if self.card.is_cpu else CUDA_ROUNDING
        tracker = AllocationTracker(rounding=rounding, eager_kernels=self.card.is_cpu, costs=costs)
        with real_paths(on_cpu=self.card.is_cpu, autocast=autocast), tracker.tracking():
            yield tracker, costs


def trace_class_images(subject: Subject) -> Traced:
    """Trace the generation of one batch of class images: UNet and autoencoder, no optimizer."""
    config = _short(subject.config)
    precision = config.prior.precision or ("fp32" if subject.card.is_cpu else "fp16")
    count = min(config.prior.sample_batch_size, config.prior.num_class_images)
    with subject.tracing() as (tracker, costs), torch.no_grad():
        with tracker.new_tensors_are("weights"):
            text_encoder = load_text_encoder(subject.model, device=META, dtype=DTYPES[precision])
        embeds = encode_prompt(text_encoder, _input_ids(text_encoder, 2))
        del text_encoder
        with tracker.new_tensors_are("weights"):
            unet = load_unet(subject.model, device=META, dtype=DTYPES[precision])
            autoencoder = load_autoencoder(subject.model, device=META, dtype=DTYPES[precision])
        with tracker.new_tensors_are("activations"):
            pixels = draw_batch(
                config, subject.model, unet, autoencoder, range(count), prompt_embeds=embeds[:1], empty_embeds=embeds[1:]
            )
        del pixels
        return Traced(peak=tracker.peak, resident=tracker.live, host_bytes=0, costs=costs.costs())


def trace_encode_images(subject: Subject) -> Traced:
    """Trace the autoencoder on one picture, in fp32, as :func:`lowmem_db.preparation.encode.encode_images` runs it."""
    resolution = subject.config.data.resolution
    with subject.tracing() as (tracker, costs):
        with tracker.new_tensors_are("weights"):
            autoencoder = load_autoencoder(subject.model, device=META)
        with tracker.new_tensors_are("activations"):
            moments = encode_moments(autoencoder, torch.empty(1, 3, resolution, resolution))
        del moments
        return Traced(peak=tracker.peak, resident=tracker.live, host_bytes=0, costs=costs.costs())


def trace_encode_text(subject: Subject) -> Traced:
    """Trace the text encoder on one prompt, in fp32, as :func:`lowmem_db.preparation.encode.encode_prompts` runs it."""
    with subject.tracing() as (tracker, costs), torch.no_grad():
        with tracker.new_tensors_are("weights"):
            text_encoder = load_text_encoder(subject.model, device=META)
        with tracker.new_tensors_are("activations"):
            embeds = encode_prompt(text_encoder, _input_ids(text_encoder, 1))
        del embeds
        return Traced(peak=tracker.peak, resident=tracker.live, host_bytes=0, costs=costs.costs())


def trace_train(subject: Subject, strategy: Strategy) -> Traced:
    """Trace one training step that others went before, and the moving average after it."""
    config = subject.config
    with subject.tracing(autocast=strategy.autocast != "no") as (tracker, costs):
        with tracker.new_tensors_are("optimizer_state"):
            denoiser, objective, optimizer = build_step(config, strategy, subject.model, META)
        tracker.register(_weights(denoiser.modules().values()), "weights")
        with tracker.new_tensors_are("other"):
            ema = build_ema(config, denoiser, optimizer)
        optimizer.set_learning_rates(dict.fromkeys(denoiser.modules(), 1e-6))
        batches = _batches(config, subject.model, denoiser)
        tracker.reset_peak()
        costs.clear()
        with _blocks_recorded(costs, denoiser.modules()), tracker.gradients_of(optimizer.parameters()):
            with tracker.new_tensors_are("activations"):
                train_step(denoiser, objective, optimizer, batches, 1)
                if ema is not None:
                    ema.update(2)
        return Traced(
            peak=tracker.peak, resident=tracker.live, host_bytes=tracker.peak_host_bytes, costs=costs.costs()
        )


def _short(config: Config) -> Config:
    """Return a configuration that samples in two steps, which need what fifty need."""
    prior = config.prior.model_copy(update={"num_inference_steps": 2})
    sampling = config.sampling.model_copy(update={"num_inference_steps": 2})
    return config.model_copy(update={"prior": prior, "sampling": sampling})


def _input_ids(text_encoder: nn.Module, count: int) -> Tensor:
    return torch.zeros(count, text_encoder.config.max_position_embeddings, dtype=torch.int64)  # type: ignore[union-attr]


def _weights(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _batches(config: Config, model: ModelFolder, denoiser: Denoiser) -> list[Batch]:
    """Return batches of the shapes of a step, on the host; more than two need no more memory than two."""
    count = config.training.train_batch_size * (2 if config.prior.enabled else 1)
    size = config.data.resolution // downscaling(model.config_of("vae"))
    moments = torch.zeros(count, denoiser.unet.config["in_channels"], size, size)
    batch = Batch(
        latent_mean=moments,
        latent_std=moments,
        conditioning=_conditioning(model, count),
        sample_ids=torch.arange(count),
        num_instance=config.training.train_batch_size,
        sources=("",) * count,
    )
    return [batch] * min(2, config.training.gradient_accumulation_steps)


def _conditioning(model: ModelFolder, count: int) -> Conditioning:
    """Return token ids, and the embeddings a frozen text encoder would have made."""
    text = model.config_of("text_encoder")
    tokens = text["max_position_embeddings"]
    embeds = torch.zeros(count, tokens, model.config_of("unet")["cross_attention_dim"])
    return Conditioning(input_ids=torch.zeros(count, tokens, dtype=torch.int64), prompt_embeds=embeds)


@contextmanager
def _blocks_recorded(costs: CostRecorder, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Tell the operators of each block's forward pass apart."""
    handles = []
    for name in checkpointing.block_names(modules):
        component, _, path = name.partition(".")
        block = modules[component].get_submodule(path)
        handles.append(block.register_forward_pre_hook(lambda *_, name=name: costs.start_block(name)))
        handles.append(block.register_forward_hook(lambda *_: costs.end_block()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
