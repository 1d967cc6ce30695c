"""The arithmetic of a run beside that of diffusers' ``train_dreambooth.py``, unmodified, with the same random numbers.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python benchmarks/parity/train_dreambooth.py --diffusers diffusers --output benchmarks/results/parity.json

For each combination of prior preservation, prediction type, text encoder and gradient accumulation, on a tiny random
model in fp32: the script runs five steps of AdamW with recorders in torch and accelerate; its latents, noise and
timesteps are then given to the training step of this package, built from the same flags. Compared are the gradients of
the first step, bit by bit, the losses of all steps, and the weights afterwards. Needs the script, no network, no card.

Each combination is compared twice: with the noisy latents and targets of this package, and with those that the script's
scheduler makes from the same draws. They differ in the last bit at some timesteps, because ``Diffusion`` computes
sqrt(1 - alphas_cumprod) in float64 and diffusers' schedulers in float32; nothing else in a gradient differs.
"""

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import accelerate
import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.parity.script import load_script  # noqa: E402
from lowmem_db.cli.arguments import read_arguments  # noqa: E402
from lowmem_db.config.schema import Config  # noqa: E402
from lowmem_db.config.strategy import resolve  # noqa: E402
from lowmem_db.engine.build import build_step  # noqa: E402
from lowmem_db.engine.step import train_step  # noqa: E402
from lowmem_db.models.finding import model_of  # noqa: E402
from lowmem_db.models.saving import published_state  # noqa: E402
from lowmem_db.objective.objective import NoisedBatch, Objective  # noqa: E402
from lowmem_db.optimizers.schedules import learning_rates  # noqa: E402
from lowmem_db.preparation.prepare import check_photos, prepare  # noqa: E402
from lowmem_db.records import Batch  # noqa: E402
from tests.tiny_models import write_tiny_model  # noqa: E402

SCRIPT = Path("examples/dreambooth/train_dreambooth.py")
STEPS = 5
CPU = torch.device("cpu")
Weights = dict[str, Tensor]


@dataclass
class Recording:
    """What the script drew and computed."""

    latents: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    weights: Weights = field(default_factory=dict)


class Injected(Objective):
    """The objective, with latents, noise and timesteps of a recording instead of its own."""

    def inject(self, recording: Recording, model: Path) -> None:
        """Use the draws of a recording, in order, with the scale and the scheduler of a model."""
        self._draws = zip(recording.latents, recording.noise, recording.timesteps, strict=True)
        self._scale = json.loads((model / "vae" / "config.json").read_text())["scaling_factor"]
        self._scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")

    def noise(self, batch: Batch, step: int) -> NoisedBatch:
        """Return the next draws, noised with the coefficients of this package."""
        del step
        latents, noise, timesteps = next(self._draws)
        noisy_latents, target = self.noised(latents * self._scale, noise, timesteps)
        return NoisedBatch(
            noisy_latents=noisy_latents, target=target, timesteps=timesteps, num_instance=batch.num_instance
        )

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents and target."""
        in_noisy, of_noise, in_target, target_noise = (
            each.reshape(-1, 1, 1, 1) for each in self.process.coefficients(timesteps)
        )
        return in_noisy * latents + of_noise * noise, in_target * latents + target_noise * noise


class NoisedByScheduler(Injected):
    """The same with noisy latents and targets as the script makes them."""

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents and target."""
        is_epsilon = self._scheduler.config.prediction_type == "epsilon"
        target = noise if is_epsilon else self._scheduler.get_velocity(latents, noise, timesteps)
        return self._scheduler.add_noise(latents, noise, timesteps), target


@contextlib.contextmanager
def recorded(recording: Recording) -> Iterator[None]:
    """Record what is drawn, the losses, and the gradients of the first step before they are clipped."""
    sample, randn_like, randint = DiagonalGaussianDistribution.sample, torch.randn_like, torch.randint
    backward, clip = accelerate.Accelerator.backward, accelerate.Accelerator.clip_grad_norm_

    def keep(into: list[Tensor], value: Tensor) -> Tensor:
        into.append(value.detach().clone())
        return value

    def backward_kept(self: accelerate.Accelerator, loss: Tensor, **options: Any) -> None:
        recording.losses.append(loss.item())
        backward(self, loss, **options)

    def clip_kept(self: accelerate.Accelerator, parameters: Any, *arguments: Any) -> Any:
        all_parameters = list(parameters)
        if not recording.gradients:
            recording.gradients += [parameter.grad.clone() for parameter in all_parameters]
        return clip(self, all_parameters, *arguments)

    with (
        patch.object(
            DiagonalGaussianDistribution, "sample", lambda self, *rest: keep(recording.latents, sample(self, *rest))
        ),
        patch.object(torch, "randn_like", lambda *rest, **options: keep(recording.noise, randn_like(*rest, **options))),
        patch.object(torch, "randint", lambda *rest, **options: keep(recording.timesteps, randint(*rest, **options))),
        patch.object(accelerate.Accelerator, "backward", backward_kept),
        patch.object(accelerate.Accelerator, "clip_grad_norm_", clip_kept),
    ):
        yield


def run_script(script: ModuleType, flags: list[str], components: list[str], out: Path) -> Recording:
    """Run the script, and return what it drew and computed."""
    recording = Recording()
    with recorded(recording), contextlib.redirect_stderr(io.StringIO()):
        script.main(script.parse_args(flags))
    files = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    for component in components:
        recording.weights |= prefixed(component, load_file(out / component / files[component]))
    return recording


def prefixed(component: str, weights: Weights) -> Weights:
    """Return weights by component and name."""
    return {f"{component}.{name}": value for name, value in weights.items()}


def compare(config: Config, recording: Recording, noised_by: type[Injected]) -> dict[str, Any]:
    """Train with the draws of a recording, and compare."""
    model = model_of(config)
    with contextlib.redirect_stderr(io.StringIO()):
        source = prepare(config, model, CPU, check_photos(config))
    denoiser, objective, optimizer = build_step(resolve(config), model, CPU)
    objective.__class__ = noised_by
    objective.inject(recording, model.path)
    parameters = [(f"{name}.{key}", value) for name, module in denoiser.modules().items()
                  for key, value in module.named_parameters() if value.requires_grad]  # fmt: skip
    gradients: list[Tensor] = []
    step_optimizer = optimizer.step_and_read

    def step_kept(report: Tensor) -> tuple[float, list[float]]:
        if not gradients:
            gradients.extend(value.grad.clone() for _, value in parameters)
        return step_optimizer(report)

    optimizer.step_and_read = step_kept
    losses = []
    for step in range(STEPS):
        optimizer.set_learning_rates(learning_rates(config, denoiser.modules(), step))
        losses.append(train_step(denoiser, objective, optimizer, source.batches_at(step), step).loss)
    batches = config.training.gradient_accumulation_steps
    theirs = [sum(recording.losses[first : first + batches]) / batches for first in range(0, STEPS * batches, batches)]
    ours = {key: value for name, module in denoiser.modules().items()
            for key, value in prefixed(name, published_state(name, module, torch.float32)).items()}  # fmt: skip
    equal = [torch.equal(mine, other) for mine, other in zip(gradients, recording.gradients, strict=True)]
    return {
        "gradients_of_step_1": len(equal),
        "of_them_bit_equal": sum(equal),
        "largest_difference_of_gradients": max(
            (mine - other).abs().max().item() for mine, other in zip(gradients, recording.gradients, strict=True)
        ),
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(losses, theirs, strict=True)),
        "largest_difference_of_weights": max(
            (ours[name] - value).abs().max().item() for name, value in recording.weights.items()
        ),
    }


def write_model(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write a tiny model with random weights; the script wants to know the class of its text encoder."""
    write_tiny_model(folder, prediction_type=prediction_type)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["CLIPTextModel"]}))
    return folder


def write_pictures(folder: Path, seed: int, side: int = 32) -> Path:
    """Write four square pictures."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    for index in range(4):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def main() -> None:
    """Compare all combinations, print a line for each, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="a clone of diffusers, or the script itself")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["LOWMEM_DB_KERNELS"] = "eager"
    script = load_script(arguments.diffusers if arguments.diffusers.is_file() else arguments.diffusers / SCRIPT)
    logging.disable(logging.WARNING)
    rows = []
    for prior, prediction, text_encoder, accumulation in itertools.product(
        (False, True), ("epsilon", "v_prediction"), (False, True), (1, 2)
    ):
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            flags = [
                f"--pretrained_model_name_or_path={write_model(root / 'model', prediction)}",
                f"--instance_data_dir={write_pictures(root / 'photos', 0)}", "--instance_prompt=a zx dog",
                f"--output_dir={root / 'out'}", "--resolution=32", "--train_batch_size=2", "--seed=1",
                f"--max_train_steps={STEPS}", f"--gradient_accumulation_steps={accumulation}",
                "--learning_rate=1e-5", "--lr_scheduler=constant", "--mixed_precision=no",
            ]  # fmt: skip
            if prior:
                flags += ["--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=4",
                          f"--class_data_dir={write_pictures(root / 'class', 1)}"]  # fmt: skip
            flags += ["--train_text_encoder"] * text_encoder
            components = ["unet", "text_encoder"] if text_encoder else ["unet"]
            recording = run_script(script, flags, components, root / "out")
            with contextlib.redirect_stderr(io.StringIO()):
                overrides = ["device=cpu", f"cache_dir={root / 'cache'}", "memory.weights=fp32"]
                config = read_arguments([SCRIPT.name, *flags, *overrides]).config
            row = {
                "prior": prior, "prediction_type": prediction, "train_text_encoder": text_encoder,
                "gradient_accumulation_steps": accumulation,
                "with_noise_of_the_script": compare(config, recording, NoisedByScheduler),
                "with_noise_of_this_package": compare(config, recording, Injected),
            }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.output is not None:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "accelerate")}
        arguments.output.write_text(json.dumps({"versions": versions, "steps": STEPS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
