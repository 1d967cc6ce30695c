"""Images of prompts from a model on disk: a run, a folder, or a hub id. One component is in memory at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.console import say, track
from lowmem_db.errors import DataError
from lowmem_db.models.conditioning import embed_prompts
from lowmem_db.models.latents import decode_latents, downscaling
from lowmem_db.models.loading import load_autoencoder, load_noise_schedule, load_text_encoder, load_tokenizer, load_unet
from lowmem_db.models.lora_file import LORA_FILE, LoraFile, lora_of_checkpoint, put_into, read_lora
from lowmem_db.models.source import ModelFolder, find_model
from lowmem_db.randomness import generator
from lowmem_db.sampling.images import to_images
from lowmem_db.sampling.latents import SamplingSettings, sample_latents
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.storage.tensors import read_state


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A model to draw from.

    Attributes:
        model: The folder that holds its components.
        checkpoint: Checkpoint whose weights replace those of the folder, for a run that is not done; or None.
        lora: Adapters that the components get; or None.
        run_config: Configuration of the run it comes from; or None.
    """

    model: ModelFolder
    checkpoint: Path | None = None
    lora: LoraFile | None = None
    run_config: Config | None = None


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
        return ImageSource(model=model, lora=lora_of_checkpoint(checkpoint, config), run_config=config)
    return ImageSource(model=model, checkpoint=checkpoint, run_config=config)


def _lora_source(folder: Path, run_config: Config | None = None) -> ImageSource | None:
    """Return the base model and the adapters where a folder holds a LoRA, as ``final/`` of a LoRA run does."""
    if not (folder / LORA_FILE).is_file():
        return None
    lora = read_lora(folder / LORA_FILE)
    base = run_config.model.model_dump() if run_config is not None else lora.base
    if not base:
        raise DataError(f"{folder / LORA_FILE}: does not say its base model; draw from the run folder instead")
    return ImageSource(model=find_model(**base), lora=lora, run_config=run_config)


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
    embeds = embed_for(source, [*prompts, ""], device=device, dtype=dtype)
    latents = _sample(source, embeds, settings, num_images=num_images, resolution=resolution, seed=seed)
    autoencoder = load_autoencoder(source.model, device=device)
    return [
        (prompt, to_images(decode_latents(autoencoder, drawn))) for prompt, drawn in zip(prompts, latents, strict=True)
    ]


def embed_for(source: ImageSource, prompts: Sequence[str], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the embeddings of prompts by the text encoder of a source, with the weights of its checkpoint."""
    text_encoder = load_text_encoder(source.model, device=device, dtype=dtype)
    _take_trained(text_encoder, source, "text_encoder")
    return embed_prompts(load_tokenizer(source.model), text_encoder, prompts)


def load_denoiser(
    source: ImageSource, *, device: torch.device, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, DDPMScheduler]:
    """Load the UNet of a source, with the weights of its checkpoint, and the noise schedule it was trained with."""
    unet = load_unet(source.model, device=device, dtype=dtype)
    _take_trained(unet, source, "unet")
    trained_as = None if source.run_config is None else source.run_config.objective.prediction_type
    return unet, load_noise_schedule(source.model, trained_as)


def _sample(
    source: ImageSource, embeds: Tensor, settings: SamplingSettings, *, num_images: int, resolution: int, seed: int
) -> list[Tensor]:
    unet, noise_schedule = load_denoiser(source, device=embeds.device, dtype=embeds.dtype)
    latent_size = resolution // downscaling(source.model.config_of("vae"))
    prompt_embeds, empty_embeds = embeds[:-1], embeds[-1:]
    return [
        sample_latents(
            unet,
            noise_schedule,
            settings,
            prompt_embeds=prompt[None].expand(num_images, -1, -1),
            empty_embeds=empty_embeds,
            latent_size=latent_size,
            generators=[generator(seed, "samples", index) for index in range(num_images)],
        )
        for prompt in track(prompt_embeds, "drawing prompts", len(prompt_embeds))
    ]


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
