"""SDXL's denoiser is told what diffusers' pipeline tells it."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.clip import tokenize
from lowmem_db.models.families.stable_diffusion_xl import SD_XL_OF_ANY_WIDTH
from lowmem_db.records import Conditioning
from tests.tiny_models import (
    tiny_autoencoder,
    tiny_sdxl_unet,
    tiny_text_encoder,
    tiny_text_encoder_2,
    write_byte_tokenizer,
)


def test_trained_and_frozen_text_encoders_give_what_the_pipeline_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_byte_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    unet, text_encoder, text_encoder_2 = (
        tiny_sdxl_unet().eval(),
        tiny_text_encoder().eval(),
        tiny_text_encoder_2().eval(),
    )
    autoencoder: AutoencoderKL = tiny_autoencoder()
    pipeline = StableDiffusionXLPipeline(
        autoencoder, text_encoder, text_encoder_2, tokenizer, tokenizer, unet, DDIMScheduler()
    )
    input_ids = tokenize(tokenizer, ["a dog", "a cat"])
    time_ids = torch.tensor([[32.0, 48.0, 0.0, 8.0, 32.0, 32.0]] * 2)
    latents, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([3, 900])
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(["a dog", "a cat"], do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        expected = unet(latents, timesteps, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
        trained = Conditioning(
            tokens={"input_ids": input_ids, "input_ids_2": input_ids}, picture={"time_ids": time_ids}
        )
        denoiser = Denoiser(
            SD_XL_OF_ANY_WIDTH, {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
        )
        assert torch.equal(denoiser.predict(latents, timesteps, trained), expected)
        frozen = Conditioning(tokens={}, embeds={"embeds": embeds, "pooled": pooled}, picture={"time_ids": time_ids})
        assert torch.equal(Denoiser(SD_XL_OF_ANY_WIDTH, {"unet": unet}).predict(latents, timesteps, frozen), expected)
    assert list(denoiser.modules()) == ["unet", "text_encoder", "text_encoder_2"]
