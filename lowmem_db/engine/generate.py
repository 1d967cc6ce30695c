"""Images of prompts from a model on disk: a run, a folder, or a hub id. One component is in memory at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import nn

from lowmem_db import environment
from lowmem_db.adaptation.lora_file import LORA_FILE, LoraFile, lora_of_checkpoint, put_into, read_lora
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.console import say, track
from lowmem_db.data.batches import PromptTable
from lowmem_db.errors import DataError
from lowmem_db.models.conditioning import whole_picture_time_ids
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.latents import decode_latents, downscaling
from lowmem_db.models.loading import load_autoencoder, load_noise_schedule, load_unet
from lowmem_db.models.source import ModelFolder, find_model
from lowmem_db.models.text_encoders import load_text_encoders, tokenize_prompts
from lowmem_db.randomness import generator
from lowmem_db.sampling.images import to_images
from lowmem_db.sampling.latents import SamplingSettings, sample_prompt
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.storage.tensors import read_state


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A model to draw from.

    Attributes:
        model: The folder that holds its components.
        checkpoint: Checkpoint whose weights replace those of the folder, for a run that is not done; or None.
        lora: Adapters that the components get; or None.
        lora_files: Files that hold them.
        run_config: Configuration of the run it comes from; or None.
    """

    model: ModelFolder
    checkpoint: Path | None = None
    lora: LoraFile | None = None
    lora_files: tuple[Path, ...] = ()
    run_config: Config | None = None

    @property
    def trained_files(self) -> tuple[Path, ...]:
        """Files that decide what is drawn beside those of the model."""
        return self.lora_files if self.checkpoint is None else tuple(sorted(self.checkpoint.glob("*.safetensors")))


def find_source(source: str) -> ImageSource:
    """Find what to draw from: the final model of a run, else its newest checkpoint; or any model.

    Raises:
        DataError: A run folder has neither.
        ModelError: There is no such model.
    """
    run = RunFolder(Path(source))
    if not run.config_file.is_file():
        return _lora_source(Path(source)) or ImageSource(model=find_model(source))
    config = load_config(run.config_file)
    if (of_lora := _lora_source(run.final_dir, config)) is not None:
        return of_lora
    if run.final_dir.is_dir():
        return ImageSource(model=find_model(str(run.final_dir)), run_config=config)
    steps = run.complete_steps()
    if not steps:
        raise DataError(f"{run.root}: the run has no final model and no complete checkpoint yet; train it first")
    say(f"the run is not done: drawing from its checkpoint of step {steps[-1]}")
    model, checkpoint = find_model(**config.model.model_dump()), run.checkpoint_dir(steps[-1])
    if config.lora.enabled:
        files = tuple(sorted(checkpoint.glob("*.safetensors")))
        return ImageSource(
            model=model, lora=lora_of_checkpoint(checkpoint, config), lora_files=files, run_config=config
        )
    return ImageSource(model=model, checkpoint=checkpoint, run_config=config)


def _lora_source(folder: Path, run_config: Config | None = None) -> ImageSource | None:
    """Return the base model and the adapters where a folder holds a LoRA, as ``final/`` of a LoRA run does."""
    if not (folder / LORA_FILE).is_file():
        return None
    lora = read_lora(folder / LORA_FILE)
    base = run_config.model.model_dump() if run_config is not None else lora.base
    if not base:
        raise DataError(f"{folder / LORA_FILE}: does not say its base model; draw from the run folder instead")
    return ImageSource(model=find_model(**base), lora=lora, lora_files=(folder / LORA_FILE,), run_config=run_config)


def default_resolution(source: ImageSource) -> int:
    """Return the pixels of a side that a model draws best: those of its run, or those it was made for."""
    if source.run_config is not None:
        return source.run_config.data.resolution
    return source.model.config_of("unet")["sample_size"] * downscaling(source.model.config_of("vae"))


def generate_images(
    source: ImageSource,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    num_images: int,
    resolution: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[tuple[str, list[Image.Image]]]:
    """Draw ``num_images`` of each prompt.

    Image ``i`` of a prompt starts from the same noise whatever the prompt, so that prompts can be compared.

    Args:
        source: What to draw from.
        prompts: What to draw.
        settings: Sampler, steps and guidance.
        num_images: Images of each prompt.
        resolution: Pixels of a side.
        seed: Seed of the noise.
        device: Where to compute.
        dtype: Type to compute in.

    Raises:
        DataError: The resolution is no whole number of latent pixels.
    """
    latent_pixel = downscaling(source.model.config_of("vae"))
    if resolution % latent_pixel:
        raise DataError(f"--resolution: {resolution} is not a multiple of {latent_pixel}, the size of a latent pixel")
    table = embed_for(source, [*prompts, ""], device=device, dtype=dtype)
    denoiser, noise_schedule = load_denoiser(source, device=device, dtype=dtype)
    time_ids = whole_picture_time_ids(resolution, resolution, 2)
    latents = [
        sample_prompt(
            denoiser,
            noise_schedule,
            settings,
            table.conditioning([prompt, ""], time_ids),
            latent_size=resolution // latent_pixel,
            generators=[generator(seed, "samples", index) for index in range(num_images)],
        )
        for prompt in track(prompts, "drawing prompts", len(prompts))
    ]
    del denoiser
    environment.release_memory(device)
    autoencoder = load_autoencoder(source.model, device=device)
    return [
        (prompt, to_images(decode_latents(autoencoder, drawn))) for prompt, drawn in zip(prompts, latents, strict=True)
    ]


def embed_for(source: ImageSource, prompts: Sequence[str], *, device: torch.device, dtype: torch.dtype) -> PromptTable:
    """Return the embeddings of prompts by the text encoders of a source, with the weights of its checkpoint."""
    text_encoders = load_text_encoders(source.model, device=device, dtype=dtype)
    for name, module in text_encoders.modules().items():
        _take_trained(module, source, name)
    conditioning = text_encoders.embed(tokenize_prompts(source.model, prompts))
    return PromptTable.of(prompts, conditioning, zeroes_empty_prompt=source.model.zeroes_empty_prompt)


def load_denoiser(source: ImageSource, *, device: torch.device, dtype: torch.dtype) -> tuple[Denoiser, DDPMScheduler]:
    """Load the denoiser of a source, without text encoders, and the noise schedule it was trained with.

    It has the weights of the source's checkpoint.
    """
    unet = load_unet(source.model, device=device, dtype=dtype)
    _take_trained(unet, source, "unet")
    if source.run_config is None:
        return Denoiser(unet, None), load_noise_schedule(source.model)
    changed = source.run_config.objective
    schedule = load_noise_schedule(source.model, changed.prediction_type, changed.zero_terminal_snr)
    return Denoiser(unet, None), schedule


def _take_trained(module: nn.Module, source: ImageSource, component: str) -> None:
    """Put what a run trained into a component: adapters, or the weights of its checkpoint.

    Where the run keeps a moving average, that of the checkpoint counts.
    """
    if source.lora is not None:
        put_into(component, module, source.lora)
    if source.checkpoint is None or not (source.checkpoint / f"{component}.safetensors").is_file():
        return
    module.load_state_dict(read_state(source.checkpoint / f"{component}.safetensors"))
    if source.run_config is not None and source.run_config.ema.enabled:
        average = read_state(source.checkpoint / "ema.safetensors")
        prefix = f"{component}."
        own = {name.removeprefix(prefix): value for name, value in average.items() if name.startswith(prefix)}
        module.load_state_dict(own, strict=False)
