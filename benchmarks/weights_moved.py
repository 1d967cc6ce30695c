"""How many weights of a small UNet move at the learning rate of DreamBooth, and how far they end from the fp32 run.

Four ways to keep a weight take the same 200 steps on the same batches: fp32, bf16 with 8 extra bits, bf16 rounded
stochastically, and bf16 rounded to nearest, which is what a plain bf16 model does. Forward and backward run in fp32 on
the stored values, so that only the storage differs.

    python benchmarks/weights_moved.py [--device cuda] [--tiny] > docs/weights_moved.md
"""

import argparse
import copy

import torch
from diffusers import UNet2DModel
from lowmem_db_kernels import (
    adamw8bit_step,
    bias_corrections,
    init_state,
    pack_extra_bits_eager,
    unpack_extra_bits_eager,
)

STEPS, LEARNING_RATE = 200, 2e-6
FORMATS = {"fp32": "fp32", "24 bits": "bf16_extra_bits", "stochastic": "bf16_stochastic", "rounded": "bf16"}
FRACTION_BITS = {"fp32": 23, "bf16_extra_bits": 15, "bf16_stochastic": 7 + 16, "bf16": 7}


class StoredParameter:
    """A weight in its storage format, and the fp32 parameter of the model that shows its value."""

    def __init__(self, parameter: torch.nn.Parameter, kind: str, index: int) -> None:
        self.parameter, self.kind, self.index = parameter, kind, index
        self.state = init_state(parameter)
        self.weight, self.extra_bits = parameter.detach().clone(), None
        if kind == "24 bits":
            self.weight, self.extra_bits = pack_extra_bits_eager(self.weight)
        elif kind != "fp32":
            self.weight = self.weight.to(torch.bfloat16)
        self._show()
        self.start = parameter.detach().clone()

    def step(self, step: torch.Tensor, corrections: torch.Tensor) -> None:
        """Take one step with the parameter's gradient."""
        rounded = self.kind == "rounded"
        weight = self.weight.float() if rounded else self.weight
        seed = self.index if self.kind == "stochastic" else None
        adamw8bit_step(
            weight, self.parameter.grad, self.state, lr=LEARNING_RATE, step=step, corrections=corrections,
            extra_bits=self.extra_bits, rounding_seed=seed,
        )  # fmt: skip
        if rounded:
            self.weight.copy_(weight)
        self._show()

    def _show(self) -> None:
        value = self.weight if self.extra_bits is None else unpack_extra_bits_eager(self.weight, self.extra_bits)
        self.parameter.data.copy_(value)


def movable_fraction(weights: torch.Tensor, lr: float, weight_format: str) -> float:
    """Return the share of weights that a step of size ``lr`` changes: at least half the distance to the next number.

    Adam's normalized update is of size one, so a step is about the learning rate.
    """
    exponent = torch.frexp(weights.detach().float()).exponent
    half_spacing = torch.ldexp(torch.ones_like(weights.detach().float()), exponent - 2 - FRACTION_BITS[weight_format])
    return (half_spacing <= lr).float().mean().item()


def build_unet() -> UNet2DModel:
    """Build a UNet of about a million weights, drawn as a trained network's are: about N(0, 0.03^2)."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip


def train(unet: UNet2DModel, kind: str, num_steps: int) -> list[StoredParameter]:
    """Take the steps and return the stored weights."""
    device = unet.device
    stored = [StoredParameter(parameter, kind, index) for index, parameter in enumerate(unet.parameters())]
    for number in range(1, num_steps + 1):
        generator = torch.Generator().manual_seed(number)
        noisy, target = torch.randn(2, 2, 4, 8, 8, generator=generator).to(device)
        step = torch.tensor(number, device=device)
        unet.zero_grad()
        (unet(noisy, torch.tensor([100, 700], device=device)).sample - target).square().mean().backward()
        corrections = bias_corrections(step, (0.9, 0.999))
        for parameter in stored:
            parameter.step(step, corrections)
    return stored


def flat(stored: list[StoredParameter]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all weights, after and before training."""
    after = torch.cat([parameter.parameter.detach().flatten() for parameter in stored])
    return after, torch.cat([parameter.start.flatten() for parameter in stored])


def main() -> None:
    """Train in the four formats and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="two steps, to try the script")
    options = parser.parse_args()
    num_steps = 2 if options.tiny else STEPS
    unet = build_unet().to(options.device)
    ends = {kind: flat(train(copy.deepcopy(unet), kind, num_steps)) for kind in FORMATS}
    reference = ends["fp32"][0] - ends["fp32"][1]
    print(f"Weights: {len(reference):,}; {num_steps} steps at learning rate {LEARNING_RATE:g}.\n")
    print("| weights | can move, predicted | moved | distance from the fp32 run / its own way | length of the way |")
    print("|---|---|---|---|---|")
    for kind, (after, before) in ends.items():
        way = after - before
        movable = movable_fraction(before, LEARNING_RATE, FORMATS[kind])
        distance = (way - reference).norm() / reference.norm()
        moved = (way != 0).float().mean()
        print(f"| {kind} | {movable:.1%} | {moved:.1%} | {distance:.3f} | {way.norm() / reference.norm():.3f} |")


if __name__ == "__main__":
    main()
