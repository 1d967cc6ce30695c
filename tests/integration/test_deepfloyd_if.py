"""The whole road of DeepFloyd IF's first stage on a tiny model: pixels, T5, and a variance among the predictions.

The judge is diffusers: its pipeline, and the lines of its training script.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import DDPMScheduler, IFPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import mse_loss

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import resolve
from lowmem_db.data.identifiers import rare_identifiers
from lowmem_db.engine.build import build_step
from lowmem_db.engine.draw import Artist, Job
from lowmem_db.engine.fitting import check_fits
from lowmem_db.errors import ConfigError, DependencyError, ModelError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.finding import find_model, model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.text_encoders import cut_prompt_warnings, embed_prompts, load_text_encoders
from lowmem_db.planning.plan import plan
from lowmem_db.planning.target import target_of_device
from lowmem_db.preparation.prepare import check_photos, prepare
from lowmem_db.run.run import train
from lowmem_db.sampling.latents import SamplingSettings
from tests.cli.conftest import Run
from tests.cli.conftest import run as run
from tests.integration.test_resume import final_bytes, kill_in_step, metric_rows, run_in_child
from tests.tiny_models import IF_RESOLUTION, write_tiny_if

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_if(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_if(tmp_path_factory.mktemp("if") / "tiny")


@pytest.fixture
def fields(tiny_fields: dict[str, object], tiny_if: Path) -> dict[str, object]:
    return tiny_fields | {
        "model.base": str(tiny_if), "data.resolution": IF_RESOLUTION, "prior.num_class_images": 2,
        "training.learning_rate": 1e-3, "checkpointing.every": 2,
    }  # fmt: skip


def config_of(fields: dict[str, object], **changes: object) -> Config:
    return load_config(
        None, list((fields | {name.replace("__", "."): value for name, value in changes.items()}).items())
    )


def pipeline_of(folder: Path, **components: Any) -> IFPipeline:
    """Load the pipeline of diffusers, without the parts that a trainer has no use for."""
    if transformers.__version__ < "5":
        pytest.skip("for a pipeline transformers 4 reads spiece.model, which the small model does not have")
    absent = dict.fromkeys(["safety_checker", "feature_extractor", "watermarker"])
    pipeline = IFPipeline.from_pretrained(
        folder, local_files_only=True, requires_safety_checker=False, **absent, **components
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by(pipeline: IFPipeline, prompt: str, seeds: list[int]) -> Tensor:
    """Draw in diffusers' pipeline, from the noise of generators; it gives values in [-1, 1]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": 4, "guidance_scale": 7.0, "output_type": "pt", "clean_caption": False}
    found = pipeline(prompt, num_images_per_prompt=len(seeds), generator=generators, **options).images
    return torch.as_tensor(found).clamp(-1, 1)


def drawn_here(model: ModelFolder, denoiser: Denoiser, prompt: str, seeds: list[int]) -> Tensor:
    table = embed_prompts(model, load_text_encoders(model), [prompt, ""])
    artist = Artist(model=model, settings=SamplingSettings(sampler="ddpm", num_inference_steps=4, guidance_scale=7.0))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    job = Job(prompts=[prompt], size=(IF_RESOLUTION, IF_RESOLUTION), generators=generators)
    return model.space.load().decode(artist.latents(denoiser, table.conditioning([prompt, ""]), job))


def test_t5_layer_by_layer_gives_the_bits_of_the_whole_encoder(tiny_if: Path) -> None:
    model = find_model(str(tiny_if))
    prompts = ["a sks Dog ", "", "two words of other lengths"]
    tokens = model.family.tokenize(model, prompts)
    whole = model.load_whole("text_encoder")
    with torch.no_grad():
        expected = whole(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    assert torch.equal(model.family.encode(load_text_encoders(model), tokens)["embeds"], expected)
    embeds, _ = pipeline_of(tiny_if).encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.equal(embeds, expected)


def test_t5_holds_one_layer_at_a_time(tiny_if: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = find_model(str(tiny_if))
    encoder = model.load("text_encoder")
    stack, _ = encoder._parts
    held: list[int] = []
    real = type(stack).forward

    def counting(self: Any, *given: Any, **named: Any) -> Any:
        held.append(sum(parameter.numel() for parameter in self.parameters()))
        return real(self, *given, **named)

    monkeypatch.setattr(type(stack), "forward", counting)
    model.family.encode_each({"text_encoder": encoder}, [model.family.tokenize(model, [each]) for each in "ab"])
    assert len(held) == 2 * 3  # two prompts, three layers
    assert max(held) < model.num_parameters("text_encoder") / 8
    assert sum(parameter.numel() for parameter in stack.parameters()) == 0


def test_loss_and_gradients_are_those_of_diffusers_lines(fields: dict[str, object]) -> None:
    config = config_of(fields, training__train_batch_size=2)
    model = model_of(config)
    batches = prepare(config, model, CPU, check_photos(config))
    denoiser, objective, _ = build_step(resolve(config), model, CPU)
    pipeline = pipeline_of(Path(config.model.base))
    theirs = pipeline.unet.train().requires_grad_(True)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    for step in range(3):
        (batch,) = batches.batches_at(step)
        noised = objective.noise(batch, step)
        objective.loss(
            denoiser.predict(noised.noisy_latents, noised.timesteps, batch.conditioning), noised
        ).total.backward()
        noise = noised.target  # epsilon is predicted
        pixels, timesteps = batch.latent_mean, noised.timesteps
        prompts = ["a zx dog"] * 2 + ["a dog"] * 2
        embeds = torch.cat([pipeline.encode_prompt(each, do_classifier_free_guidance=False)[0] for each in prompts])
        noisy = schedule.add_noise(pixels, noise, timesteps)
        torch.testing.assert_close(noised.noisy_latents, noisy, rtol=0, atol=1e-6)
        predicted, _ = theirs(noisy, timesteps, encoder_hidden_states=embeds).sample.chunk(2, dim=1)
        (predicted, predicted_prior), (target, target_prior) = predicted.chunk(2), noise.chunk(2)
        loss = mse_loss(predicted, target) + 1.0 * mse_loss(predicted_prior, target_prior)
        loss.backward()
        ours = objective.loss(denoiser.predict(noised.noisy_latents, timesteps, batch.conditioning), noised)
        assert ours.total.item() == pytest.approx(loss.item(), abs=1e-6)
        others = dict(theirs.named_parameters())
        for name, parameter in denoiser.module.named_parameters():
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-5, atol=1e-6, msg=name)
        variance = denoiser.module.conv_out.weight.grad[3:]
        assert torch.equal(variance, torch.zeros_like(variance)), "the variance has no loss"
        denoiser.module.zero_grad()
        theirs.zero_grad()


def test_hybrid_loss_trains_the_variance_and_the_final_model_is_drawn_with_it(
    fields: dict[str, object], tmp_path: Path
) -> None:
    hybrid = fields | {"objective.variance": "hybrid", "training.max_train_steps": 1}
    config = config_of(hybrid)
    model = model_of(config)
    (batch,) = prepare(config, model, CPU, check_photos(config)).batches_at(0)
    rows = {}
    for variance in ("frozen", "hybrid"):
        changed = config.model_copy(update={"objective": config.objective.model_copy(update={"variance": variance})})
        denoiser, objective, _ = build_step(resolve(changed), model, CPU)
        noised = objective.noise(batch, 0)
        prediction = denoiser.predict(noised.noisy_latents, noised.timesteps, batch.conditioning)
        assert prediction.shape[1] == (6 if variance == "hybrid" else 3)
        objective.loss(prediction, noised).total.backward()
        rows[variance] = denoiser.module.conv_out.weight.grad
    assert torch.equal(rows["hybrid"][:3], rows["frozen"][:3])
    assert rows["hybrid"][3:].abs().max() > 0
    assert rows["frozen"][3:].abs().max() == 0
    final = train(config).final_dir
    assert pipeline_of(final).scheduler.config["variance_type"] == "learned_range"
    assert "variance_type" not in (final / "README.md").read_text()


def test_hybrid_loss_is_refused_without_a_predicted_variance(tiny_fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"objective\.variance: 'hybrid' has no effect on"):
        train(load_config(None, list((tiny_fields | {"objective.variance": "hybrid"}).items())))


def test_class_images_are_those_of_diffusers_pipeline(tiny_if: Path) -> None:
    model = find_model(str(tiny_if))
    denoiser = Denoiser(model.family, {"unet": model.load("unet")})
    ours = drawn_here(model, denoiser, "a dog", [3, 4])
    torch.testing.assert_close(ours, drawn_by(pipeline_of(tiny_if), "a dog", [3, 4]), rtol=0, atol=1e-6)
    fixed = DDPMScheduler.from_pretrained(tiny_if / "scheduler", variance_type="fixed_small")
    other = drawn_by(pipeline_of(tiny_if, scheduler=fixed), "a dog", [3, 4])
    assert (ours - other).abs().max() > 1e-3, "the variance that the model predicts has no effect"


VARIANTS = {
    "full": {"sampling.prompts": ["a zx dog"], "sampling.num_images": 1, "sampling.num_inference_steps": 2},
    "24-bit weights in backward, recomputed": {
        "optimizer.name": "adamw8bit", "memory.optimizer_in_backward": True, "memory.weights": "bf16_extra_bits",
        "memory.checkpointing": "segments", "memory.stream_optimizer_state": True,
    },
    "LoRA": {"lora.enabled": True, "lora.rank": 2},
    "hybrid loss": {"objective.variance": "hybrid", "sampling.prompts": ["a zx dog"], "sampling.num_images": 1,
                    "sampling.num_inference_steps": 2, "sampling.sampler": "ddpm"},
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(
    fields: dict[str, object], tmp_path: Path, tiny_if: Path, variant: str
) -> None:
    chosen = fields | VARIANTS[variant]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killing = kill_in_step(3, f"DeepFloyd IF, {variant}")
    assert run_in_child(chosen | {"output_dir": str(killed)}, killing) == -signal.SIGKILL
    assert run_in_child(chosen | {"output_dir": str(killed)}) == 0
    assert run_in_child(chosen | {"output_dir": str(whole)}) == 0
    assert final_bytes(killed) == final_bytes(whole)
    assert metric_rows(killed) == metric_rows(whole)


def test_final_model_loads_in_diffusers_and_draws_what_it_drew_here(
    run: Run, fields: dict[str, object], tmp_path: Path, tiny_if: Path
) -> None:
    command = [f"{field}={json.dumps(value)}" for field, value in fields.items()]
    assert run("train", *command, "prior.enabled=false").code == 0
    final = tmp_path / "run" / "final"
    pipeline = pipeline_of(final)
    assert pipeline.scheduler.config["variance_type"] == "fixed_small"
    model = find_model(str(final))
    denoiser = Denoiser(model.family, {"unet": model.load("unet")})
    ours = drawn_here(model, denoiser, "a zx dog", [1])
    torch.testing.assert_close(ours, drawn_by(pipeline, "a zx dog", [1]), rtol=0, atol=1e-6)
    assert (ours - drawn_by(pipeline_of(tiny_if), "a zx dog", [1])).abs().max() > 1e-3
    (file,) = (final / "unet").glob("*.safetensors")
    before, after = load_file(tiny_if / "unet" / file.name), load_file(file)
    assert all(not torch.equal(before[name], weight) for name, weight in after.items())
    assert (final / "text_encoder" / "model.safetensors").read_bytes() == (
        tiny_if / "text_encoder" / "model.safetensors"
    ).read_bytes()
    assert (
        run("generate", tmp_path / "run", "-p", "a zx dog", "--num-inference-steps", 2, "-o", tmp_path / "a").code == 0
    )
    refused = run("export", tmp_path / "run", "--out", tmp_path / "one.safetensors")
    assert (refused.code, "--format diffusers" in refused.err) == (2, True)


def test_small_model_of_this_package_draws_as_in_diffusers() -> None:
    model = find_model("demo_if")
    pipeline = pipeline_of(model.path, torch_dtype=torch.float32)
    ours = drawn_here(model, Denoiser(model.family, {"unet": model.load("unet")}), "a red car", [1])
    torch.testing.assert_close(ours, drawn_by(pipeline, "a red car", [1]), rtol=0, atol=1e-5)


@pytest.mark.long
def test_small_cascade_of_this_package_trains_and_draws(run: Run, tmp_path: Path) -> None:
    few = ("training.max_train_steps=2", "training.lr_warmup_steps=0", f"cache_dir={tmp_path / 'cache'}")
    of_class = ("prior.num_class_images=2", "prior.num_inference_steps=2", "sampling.num_inference_steps=2")
    first, second = (f"output_dir={tmp_path / name}" for name in ("first", "second"))
    assert run("train", "demo_cascade", *few, *of_class, first).code == 0
    assert run("train", "demo_cascade_ii", *few, second).code == 0
    assert [find_model(str(tmp_path / name)).resolution for name in ("first", "second")] == [16, 64]
    drawn = ("--num-images", 1, "--num-inference-steps", 2, "--output", tmp_path / "drawn")
    assert run("generate", tmp_path / "first", "--upscale", tmp_path / "second", *drawn).code == 0
    with Image.open(tmp_path / "drawn" / "00-00.png") as image:
        assert image.size == (64, 64)


@pytest.mark.long
def test_adapters_load_in_diffusers(run: Run, fields: dict[str, object], tmp_path: Path, tiny_if: Path) -> None:
    lora = {"lora.enabled": True, "lora.rank": 2, "training.learning_rate": 0.1, "prior.enabled": False}
    assert run("train", *(f"{field}={json.dumps(value)}" for field, value in (fields | lora).items())).code == 0
    final = tmp_path / "run" / "final"
    state = load_file(final / "pytorch_lora_weights.safetensors")
    assert any(".add_k_proj." in name for name in state), "diffusers' script adapts the prompt's keys too"
    assert "variance_type='fixed_small'" in (final / "README.md").read_text()
    assert "kohya" not in (final / "README.md").read_text()
    refused = run("export", tmp_path / "run", "--format", "lora-kohya", "--out", tmp_path / "one.safetensors")
    assert (refused.code, "no names for adapters of DeepFloyd IF" in refused.err) == (2, True)
    pipeline = pipeline_of(
        tiny_if, scheduler=DDPMScheduler.from_pretrained(tiny_if / "scheduler", variance_type="fixed_small")
    )
    before = drawn_by(pipeline, "a zx dog", [1])
    pipeline.load_lora_weights(final)
    assert (drawn_by(pipeline, "a zx dog", [1]) - before).abs().max() > 1e-3


README = {
    "train_dreambooth.py": [
        "--instance_prompt=a photo of sks dog", "--learning_rate=1e-7", "--max_train_steps=150",
        "--validation_prompt", "a photo of sks dog", "--validation_steps", "25", "--use_8bit_adam",
        "--set_grads_to_none", "--skip_save_text_encoder", "--validation_scheduler", "DDPMScheduler",
    ],
    "train_dreambooth_lora.py": [
        "--instance_prompt=a sks dog", "--learning_rate=5e-6", "--scale_lr", "--max_train_steps=1200",
        "--validation_prompt=a sks dog", "--validation_epochs=25", "--checkpointing_steps=100",
    ],
}  # fmt: skip
"""The commands of diffusers' documentation for the first stage, but for the hub and Weights & Biases."""
OF_BOTH = [
    "--train_batch_size=4", "--gradient_accumulation_steps=1", "--pre_compute_text_embeddings",
    "--tokenizer_max_length=77", "--text_encoder_use_attention_mask",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("script", ["train_dreambooth.py", "train_dreambooth_lora.py"])
def test_commands_of_diffusers_documentation_run(
    run: Run, tiny_if: Path, photos_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    """They are shortened to two steps, and the model and its pictures are the tiny ones."""
    monkeypatch.setenv("LOWMEM_DB_CACHE", str(tmp_path / "cache"))
    here = [
        f"--pretrained_model_name_or_path={tiny_if}", f"--instance_data_dir={photos_dir}", "--output_dir=out",
        f"--resolution={IF_RESOLUTION}",
    ]  # fmt: skip
    short = ["training.max_train_steps=2", "sampling.num_inference_steps=2", "sampling.num_images=1"]
    done = run("train", script, *here, *OF_BOTH, *README[script], *short)
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "final").is_dir()


def test_plan_knows_its_phases(fields: dict[str, object]) -> None:
    config = config_of(fields, sampling__prompts=["a zx dog"])
    found = plan(config, target_of_device(config, CPU))
    assert [phase.name for phase in found.phases] == ["class_images", "encode_images", "encode_text", "train", "sample"]
    of_text = next(phase for phase in found.phases if phase.name == "encode_text")
    assert 0 < of_text.parts.total < model_of(config).num_parameters("text_encoder") * 4 / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__resolution": 32}, r"^data\.resolution: 32, but .* draws pictures of 16 px; set data\.resolution=16"),
        ({"training__train_text_encoder": True}, r"T5 .* is always frozen, as in the paper; set training\.train_text"),
        ({"objective__prediction_type": "v_prediction"}, r"^objective\.prediction_type: .* leave it out"),
        ({"objective__zero_terminal_snr": True}, r"^objective\.zero_terminal_snr: .* leave it out"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_way_out(
    fields: dict[str, object], changes: dict[str, object], message: str
) -> None:
    config = config_of(fields, **changes)
    with pytest.raises(ConfigError, match=message):
        check_fits(config, model_of(config))


def test_other_ways_to_read_prompts_are_refused(fields: dict[str, object], tiny_if: Path, tiny_model: Path) -> None:
    assert find_model(str(tiny_if), attention_mask=True).family.masks_padding
    with pytest.raises(ConfigError, match=r"^model\.attention_mask: false, but .* ignores padding"):
        find_model(str(tiny_if), attention_mask=False)
    with pytest.raises(ConfigError, match=r"^model\.attention_mask: true, but Stable .* attends to all tokens"):
        find_model(str(tiny_model), attention_mask=True)
    with pytest.raises(ConfigError, match=r"^model\.clip_skip: "):
        find_model(str(tiny_if), clip_skip=2)
    word = {"textual_inversion.enabled": True, "textual_inversion.token": "zx", "prior.enabled": False}
    learning = {name: value for name, value in (fields | word).items() if name != "training.learning_rate"}
    with pytest.raises(ConfigError, match="no new words can be added"):
        model_of(load_config(None, list(learning.items())))
    with pytest.raises(ModelError, match="which has no autoencoder"):
        find_model(str(tiny_if), vae=str(tiny_model / "vae"))


def test_long_prompts_are_cut_after_76_tokens(tiny_if: Path) -> None:
    model = find_model(str(tiny_if))
    assert cut_prompt_warnings(model, ["dog " * 76]) == []
    (warning,) = cut_prompt_warnings(model, ["dog " * 78])
    assert "reads 77 tokens and ignores the last 2" in warning
    assert warning.endswith("; shorten it")


def test_identifiers_survive_the_small_letters_of_the_pipeline(tiny_if: Path) -> None:
    tokenizer = find_model(str(tiny_if)).load("tokenizer")
    assert tokenizer("A ZX Dog").input_ids == tokenizer("a zx dog").input_ids
    found = rare_identifiers(tokenizer, count=60)
    assert all(each.text == each.text.lower() for each in found)
    assert all(5000 <= token <= 10000 for each in found for token in each.token_ids)


def test_a_tokenizer_of_sentencepiece_alone_asks_for_its_library(
    tiny_if: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_if(tmp_path / "model")
    (model / "tokenizer" / "tokenizer.json").rename(model / "tokenizer" / "spiece.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DependencyError, match=r"lowmem-db\[t5\]"):
        find_model(str(model)).load("tokenizer")
    (model / "tokenizer" / "spiece.model").unlink()
    with pytest.raises(ModelError, match=r"has neither tokenizer\.json nor spiece\.model"):
        find_model(str(model)).load("tokenizer")


def test_text_encoder_in_shards_under_its_second_name_is_read(tiny_if: Path, tmp_path: Path) -> None:
    model = write_tiny_if(tmp_path / "model")
    folder = model / "text_encoder"
    state = load_file(folder / "model.safetensors")
    assert "encoder.embed_tokens.weight" not in state
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    names = sorted(state)
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    found, plain = find_model(str(model)), find_model(str(tiny_if))
    tokens = plain.family.tokenize(plain, ["a dog"])
    assert found.num_parameters("text_encoder") == plain.num_parameters("text_encoder")
    embeds = [each.family.encode(load_text_encoders(each), tokens)["embeds"] for each in (found, plain)]
    assert torch.equal(*embeds)
