"""A family of models is added from this file alone: a transformer on pixels, with flow matching and words of its own.

It has no autoencoder and no tokenizer, its denoiser is no UNet, and its noise process is no diffusion. What the
package asks of a model it asks of the family.
"""

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.config.strategy import resolve
from lowmem_db.data.batches import PromptTable
from lowmem_db.engine.build import build_step
from lowmem_db.engine.draw import Artist, Job
from lowmem_db.errors import ConfigError
from lowmem_db.models.families import FAMILIES, Component, Family, register
from lowmem_db.models.families.blocks import Block, LayerBlock
from lowmem_db.models.families.spaces import PixelSpace
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.finding import find_model
from lowmem_db.models.loading import load_module
from lowmem_db.models.saving import save_component
from lowmem_db.objective.process import Flow
from lowmem_db.planning.plan import plan
from lowmem_db.planning.target import target_of_device
from lowmem_db.records import Batch, Conditioning
from lowmem_db.sampling.latents import SamplingSettings
from tests.cli.conftest import Run
from tests.cli.conftest import run as run
from tests.integration.test_resume import final_bytes, kill_in_step, metric_rows, run_in_child

CPU = torch.device("cpu")
NUM_LETTERS = 12
RESOLUTION = 16


class ToyBlock(nn.Module):
    """Attention over patches and words, and a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU())
        self.down = nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(tokens))[:, None].chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(query, key, value)[:, 0]
        tokens = tokens + self.out(attended)
        return tokens + self.down(self.feed_forward(tokens))


class ToyTransformer(ModelMixin, ConfigMixin):
    """Predicts the velocity of a flow on pixels."""

    @register_to_config
    def __init__(self, sample_size: int = RESOLUTION, patch_size: int = 4, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        num_patches = (sample_size // patch_size) ** 2
        self.patchify = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.randn(num_patches, width) * 0.1)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(depth))
        self.unpatchify = nn.ConvTranspose2d(width, 3, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        patches = self.patchify(pixels)
        tokens = patches.flatten(2).transpose(1, 2) + self.position + self.time(sigma.view(-1, 1))[:, None]
        count = tokens.shape[1]
        tokens = torch.cat([tokens, words], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.unpatchify(tokens[:, :count].transpose(1, 2).reshape(patches.shape))


class ToyWords(ModelMixin, ConfigMixin):
    """An embedding for each letter."""

    @register_to_config
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.letters = nn.Embedding(256, width)

    def forward(self, letters: Tensor) -> Tensor:
        return self.letters(letters)


class ToyFamily(Family):
    name = "toy flow"
    components = (
        Component("transformer", "denoiser", partial(load_module, ToyTransformer)),
        Component("words", "text_encoder", partial(load_module, ToyWords)),
        Component("scheduler", "scheduler"),
    )
    pipelines = ("ToyPipeline",)

    def recognises(self, files: ModelFiles) -> bool:
        return True

    def tokenize(self, files: ModelFiles, prompts: Sequence[str]) -> dict[str, Tensor]:
        letters = [list(prompt.encode()[:NUM_LETTERS].ljust(NUM_LETTERS)) for prompt in prompts]
        return {"letters": torch.tensor(letters)}

    def encode(self, text_encoders: Mapping[str, nn.Module], tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        words = text_encoders["words"]
        return {"words": words(tokens["letters"].to(words.device))}

    def blank_tokens(self, files: ModelFiles, count: int) -> dict[str, Tensor]:
        return self.tokenize(files, [""] * count)

    def blank_embeds(
        self, files: ModelFiles, count: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        width = files.config_of("words")["width"]
        return {"words": torch.zeros(count, NUM_LETTERS, width, device=device, dtype=dtype)}

    def space(self, files: ModelFiles) -> PixelSpace:
        return PixelSpace()

    def size_step(self, files: ModelFiles) -> int:
        return files.config_of("transformer")["patch_size"]

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        sigma = (timesteps / 1000).to(noisy.device, noisy.dtype).expand(len(noisy))
        return denoiser(noisy, sigma, conditioning.embeds["words"])

    def process(self, files: ModelFiles, objective: ObjectiveConfig) -> Flow:
        if objective.prediction_type is not None or objective.zero_terminal_snr is not None:
            raise ConfigError("objective.prediction_type: a flow predicts its velocity alone; leave it out")
        return Flow(shift=files.config_of("scheduler")["shift"])

    def sampler(self, files: ModelFiles, name: str, objective: ObjectiveConfig | None = None) -> Any:
        if name != "ddim":
            raise ConfigError(f"sampling.sampler: {name!r} is for diffusions; allowed for {self.name}: ddim")
        return FlowMatchEulerDiscreteScheduler.from_config(files.config_of("scheduler"))

    def blocks(self, modules: Mapping[str, nn.Module]) -> dict[str, Block]:
        words = {"words": LayerBlock(modules["words"], [modules["words"]])} if "words" in modules else {}
        layers = modules["transformer"].blocks
        return words | {f"transformer.blocks.{index}": LayerBlock(layer, [layer]) for index, layer in enumerate(layers)}


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    with register(ToyFamily()):
        yield


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "model"
    torch.manual_seed(0)
    save_component(folder / "transformer", ToyTransformer(), dtype=torch.float32)
    save_component(folder / "words", ToyWords(), dtype=torch.float32)
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    return folder


@pytest.fixture
def fields(tiny_fields: dict[str, object], toy_model: Path) -> dict[str, object]:
    return tiny_fields | {
        "model.base": str(toy_model), "data.resolution": RESOLUTION, "prior.sampler": "ddim",
        "prior.num_class_images": 2, "checkpointing.every": 2, "sampling.prompts": ["a zx dog"],
        "sampling.num_images": 2, "sampling.num_inference_steps": 2,
    }  # fmt: skip


def arguments(fields: dict[str, object]) -> list[str]:
    return [f"{field}={json.dumps(value)}" for field, value in fields.items()]


def test_family_is_known_while_it_is_registered(toy_model: Path) -> None:
    model = find_model(str(toy_model))
    assert (model.family.name, model.resolution, model.family.denoiser) == ("toy flow", RESOLUTION, "transformer")
    assert model.family is FAMILIES[0]


VARIANTS = {
    "frozen words": {"memory.checkpointing": "none"},
    "trained words in backward": {
        "training.train_text_encoder": True, "training.learning_rate_text_encoder": 5e-4, "optimizer.name": "adamw8bit",
        "memory.optimizer_in_backward": True, "memory.weights": "bf16_extra_bits", "memory.checkpointing": "layers",
        "ema.enabled": True, "data.aspect_ratio_buckets": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(
    fields: dict[str, object], tmp_path: Path, toy_model: Path, variant: str
) -> None:
    chosen = fields | VARIANTS[variant]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (
        run_in_child(chosen | {"output_dir": str(killed)}, kill_in_step(3, f"another family, {variant}"))
        == -signal.SIGKILL
    )
    assert run_in_child(chosen | {"output_dir": str(killed)}) == 0
    assert run_in_child(chosen | {"output_dir": str(whole)}) == 0
    assert final_bytes(killed) == final_bytes(whole)
    assert metric_rows(killed) == metric_rows(whole)
    assert len(list((killed / "samples" / "step-000004").glob("0*.png"))) == 2
    (file,) = (whole / "final" / "transformer").glob("*.safetensors")
    before, after = load_file(toy_model / "transformer" / file.name), load_file(file)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], weight) for name, weight in after.items())


def test_final_model_is_planned_drawn_from_evaluated_and_exported(
    run: Run, fields: dict[str, object], tmp_path: Path
) -> None:
    assert run("train", *arguments(fields)).code == 0
    config = load_config(None, list(fields.items()))
    found = plan(config, target_of_device(config, CPU))
    assert [phase.name for phase in found.phases] == ["class_images", "encode_images", "encode_text", "train", "sample"]
    assert all(phase.parts.total > 0 for phase in found.phases)
    assert (
        run("generate", tmp_path / "run", "-p", "a zx dog", "--num-inference-steps", 2, "-o", tmp_path / "a").code == 0
    )
    assert len(list((tmp_path / "a").glob("0*.png"))) == 4
    refused = run("generate", tmp_path / "run", "-p", "a zx dog", "--sampler", "ddpm", "-o", tmp_path / "b")
    assert (refused.code, "allowed for toy flow: ddim" in refused.err) == (2, True)
    out = tmp_path / "exported"
    assert run("export", tmp_path / "run", "--format", "diffusers", "--out", out).code == 0
    assert find_model(str(out)).family.name == "toy flow"
    refused = run("export", tmp_path / "run", "--out", tmp_path / "one.safetensors")
    assert (refused.code, "toy flow has no single-file format" in refused.err) == (2, True)


def test_noise_target_and_sampler_belong_together(
    fields: dict[str, object], toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A denoiser that knows the picture has no loss, and a sampler finds the picture with it."""
    model, config = find_model(str(toy_model)), load_config(None, list(fields.items()))
    denoiser, objective, _ = build_step(resolve(config), model, CPU)
    picture = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1

    def knowing(family: Family, module: nn.Module, noisy: Tensor, timesteps: Tensor, told: Conditioning) -> Tensor:
        known = picture.repeat(len(noisy) // len(picture), 1, 1, 1)
        return (noisy - known) / (timesteps / 1000).view(-1, 1, 1, 1)

    monkeypatch.setattr(ToyFamily, "predict", knowing)
    told = PromptTable.of(["a", ""], model.family.tokenize(model, ["a", ""]), zeroes_empty_prompt=False).with_embeds(
        ["a", ""], model.family.blank_embeds(model, 2, CPU, torch.float32)
    ).conditioning(["a", ""])  # fmt: skip
    batch = Batch(
        latent_mean=picture, latent_std=torch.zeros_like(picture), conditioning=told, sample_ids=torch.arange(2),
        num_instance=2, sources=("a", "b"),
    )  # fmt: skip
    noised = objective.noise(batch, 0)
    prediction = denoiser.predict(noised.noisy_latents, noised.timesteps, told)
    assert objective.loss(prediction, noised).total < 1e-8
    artist = Artist(model=model, settings=SamplingSettings(sampler="ddim", num_inference_steps=3, guidance_scale=2.0))
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    drawn = artist.latents(denoiser, told, Job(prompts=["a"], size=(RESOLUTION, RESOLUTION), generators=generators))
    torch.testing.assert_close(drawn, picture, rtol=0, atol=1e-5)
