"""Prompts to embeddings, pictures to latents and back, and the denoiser, against diffusers' own pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.engine.generate import generate_images
from lowmem_db.engine.source import find_source
from lowmem_db.errors import ConfigError, ModelError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.clip import encode_prompt, tokenize
from lowmem_db.models.families.spaces import LatentCodec, LatentSpace
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.text_encoders import num_cut_tokens
from lowmem_db.records import Conditioning
from lowmem_db.sampling.latents import SamplingSettings
from tests.tiny_models import NUM_TOKENS

PROMPTS = ["", "a dog", "a sks dog " * 20, "süß 犬 🐕", "  A   DOG  ", 'don\'t "quote"']
START, END = 512, 513


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelFolder:
    return find_model(str(tiny_model))


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)


def test_token_ids_are_padded_and_cut(model: ModelFolder) -> None:
    empty, short, long = tokenize(model.load("tokenizer"), ["", "a", "a" * 100])
    assert empty.tolist() == [START] + [END] * (NUM_TOKENS - 1)
    assert short[0] == START
    assert short[2:].tolist() == [END] * (NUM_TOKENS - 2)
    assert len(long) == NUM_TOKENS
    assert (long[0], long[-1]) == (START, END)


@pytest.mark.parametrize("length", [0, 1, NUM_TOKENS - 2, NUM_TOKENS - 1, 100])
def test_cut_tokens_are_counted(model: ModelFolder, length: int) -> None:
    assert num_cut_tokens(model.load("tokenizer"), "a" * length) == max(0, length + 2 - NUM_TOKENS)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_are_those_of_the_pipeline(
    model: ModelFolder, pipeline: StableDiffusionPipeline, prompt: str
) -> None:
    ours = encode_prompt(model.load("text_encoder"), tokenize(model.load("tokenizer"), [prompt]))
    theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(ours, theirs)


def test_moments_are_those_of_the_autoencoder(model: ModelFolder) -> None:
    codec, pixels = LatentSpace(model).load(), torch.rand(2, 3, 32, 32) * 2 - 1
    autoencoder = codec.autoencoder
    mean, std = codec.encode(pixels)
    with torch.no_grad():
        posterior = autoencoder.encode(pixels).latent_dist
    factor = autoencoder.config.scaling_factor
    assert factor != 1
    assert torch.equal(mean, posterior.mean * factor)
    assert torch.equal(std, posterior.std * factor)


def test_decoding_undoes_the_scale_and_clamps(model: ModelFolder) -> None:
    codec = LatentSpace(model).load()
    autoencoder = codec.autoencoder
    latents = torch.randn(2, 4, 16, 16) * codec.scaling_factor
    with torch.no_grad():
        direct = autoencoder.decode(latents / autoencoder.config.scaling_factor).sample
    torch.testing.assert_close(codec.decode(latents), direct.clamp(-1, 1))
    assert codec.decode(latents * 1e4).abs().max() <= 1


def test_deterministic_autoencoder_has_no_deviation() -> None:
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4, upsampling_scaling_factor=2,
    ).eval()  # fmt: skip
    mean, std = LatentCodec(autoencoder, 2).encode(torch.rand(1, 3, 32, 32))
    assert mean.shape == std.shape
    assert not std.any()


def test_demo_s_autoencoder_gives_back_what_it_took() -> None:
    model = find_model("demo")
    codec = model.space.load()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    pixels = torch.stack([x, y, x * y])[None] * 0.8
    mean, _ = codec.encode(pixels)
    assert mean.shape[-1] == 64 // model.space.cell
    assert (codec.decode(mean) - pixels).square().mean() < 0.01


def test_latent_pixels_are_as_large_as_the_autoencoder_makes_them(model: ModelFolder) -> None:
    mean, _ = model.space.load().encode(torch.zeros(1, 3, 32, 32))
    assert model.space.cell == 32 // mean.shape[-1] == 2


@pytest.mark.parametrize("trains_text_encoder", [False, True])
def test_denoiser_predicts_what_the_unet_predicts(model: ModelFolder, trains_text_encoder: bool) -> None:
    unet, text_encoder = model.load("unet"), model.load("text_encoder")
    input_ids = tokenize(model.load("tokenizer"), ["a dog", "a cat"])
    latents, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([0, 999])
    with torch.no_grad():
        embeds = encode_prompt(text_encoder, input_ids)
        direct = unet(latents, timesteps, encoder_hidden_states=embeds).sample
        denoiser = Denoiser(
            model.family, {"unet": unet} | ({"text_encoder": text_encoder} if trains_text_encoder else {})
        )
        conditioning = Conditioning(
            tokens={"input_ids": input_ids}, embeds={} if trains_text_encoder else {"embeds": embeds}
        )
        assert torch.equal(denoiser.predict(latents, timesteps, conditioning), direct)
    assert list(denoiser.modules()) == (["unet", "text_encoder"] if trains_text_encoder else ["unet"])


def test_autocast_computes_in_half_and_keeps_weights_and_gradients(model: ModelFolder) -> None:
    unet, text_encoder = model.load("unet").requires_grad_(True), model.load("text_encoder").requires_grad_(True)
    conditioning = Conditioning(tokens=model.family.tokenize(model, ["a dog"]))
    modules = {"unet": unet, "text_encoder": text_encoder}
    latents, timesteps = torch.randn(1, 4, 16, 16), torch.tensor([500])
    exact = Denoiser(model.family, modules).predict(latents, timesteps, conditioning)
    half = Denoiser(model.family, modules, torch.bfloat16).predict(latents, timesteps, conditioning)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.05)
    half.square().sum().backward()
    gradients = [parameter.grad for parameter in [*unet.parameters(), *text_encoder.parameters()]]
    assert {gradient.dtype for gradient in gradients if gradient is not None} == {torch.float32}
    assert gradients[0] is not None
    assert gradients[-1] is not None


@pytest.mark.parametrize(
    "kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_models_of_another_noise_process_are_refused(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "playground"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": kind}))
    with pytest.raises(ModelError, match=f"has an {kind}: its noise process is not Stable Diffusion's"):
        find_model(str(folder))


def test_epsilon_at_zero_terminal_snr_is_neither_trained_nor_drawn_with(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "black"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    settings = SamplingSettings(sampler="ddim", num_inference_steps=2, guidance_scale=1.0)
    options = {"num_images": 1, "resolution": 32, "seed": 0, "device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(ConfigError, match=r"this model predicts epsilon.*a single file needs a YAML file"):
        generate_images(find_source(str(folder)), ["a dog"], settings, **options)
    model = find_model(str(folder))
    assert model.family.process(model, ObjectiveConfig(prediction_type="v_prediction")).prediction_type
