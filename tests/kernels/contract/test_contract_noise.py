import math

import pytest
import torch
from kernel_contract import (
    DTYPES,
    assert_bit_equal,
    assert_independent_of_order,
    assert_no_worse_than_eager,
    guarded,
    slow_to_interpret,
)
from lowmem_db_kernels._triton import jit, tl
from lowmem_db_kernels.noise import NoiseOperands, noise_eager, noise_triton
from lowmem_db_kernels.philox import as_int32, philox_4x32, philox_4x32_eager, split_seed

SEED_LOW, SEED_HIGH, STEP = 123456789, -2, 77


@jit
def philox_kernel(words_ptr, c1, c2, c3, k0, k1, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    c1 = c1.to(tl.uint32, bitcast=True)
    c2 = c2.to(tl.uint32, bitcast=True)
    c3 = c3.to(tl.uint32, bitcast=True)
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox_4x32(lane.to(tl.uint32) - 16, c1, c2, c3, k0, k1)
    tl.store(words_ptr + lane, w0.to(tl.int64))
    tl.store(words_ptr + BLOCK + lane, w1.to(tl.int64))
    tl.store(words_ptr + 2 * BLOCK + lane, w2.to(tl.int64))
    tl.store(words_ptr + 3 * BLOCK + lane, w3.to(tl.int64))


@pytest.mark.parametrize(
    ("c1", "c2", "c3", "seed"), [(0, 0, 0, 0), (1, 2**31, 2**32 - 1, 2**63 + 5), (2**31 - 1, 77, 3, -1)]
)
def test_philox_words_are_bit_equal(device, c1, c2, c3, seed):
    words = torch.empty((4, 32), dtype=torch.int64, device=device)
    philox_kernel[(1,)](words, *(as_int32(word) for word in (c1, c2, c3, *split_seed(seed))), BLOCK=32)
    lane = (torch.arange(32, device=device) - 16) & 0xFFFFFFFF
    expected = philox_4x32_eager((lane, *(torch.tensor(c, device=device) for c in (c1, c2, c3))), seed)
    assert_bit_equal("words", words, torch.stack(expected))


TARGETS = {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "flow": (-1.0, 1.0), "mixed": (-0.3, 0.7)}


def problem(shape, device, dtype, *, std=True, target="mixed", offset=0.0, perturbation=0.0):
    generator = torch.Generator().manual_seed(3)
    rows = lambda value: torch.full(shape[:1], value, device=device)  # noqa: E731
    latents = torch.randn(shape, generator=generator).to(dtype).to(device)
    sigma = torch.linspace(0.01, 1.0, max(shape[0], 1), device=device)[: shape[0]]
    return NoiseOperands(
        latents=latents,
        alpha=1 - sigma,
        sigma=sigma,
        target_latents=rows(TARGETS[target][0]),
        target_noise=rows(TARGETS[target][1]),
        std=torch.rand(shape, generator=generator).to(dtype).to(device) if std else None,
        sample_ids=torch.arange(shape[0], device=device) * 2**33 + 5,
        seed_low=SEED_LOW,
        seed_high=SEED_HIGH,
        step=STEP,
        noise_offset=offset,
        input_perturbation=perturbation,
    )


def exact_result(operands):
    """float64 through the whole transform; the random words are integers and the same for all."""
    latents = operands.latents.double()
    shape, ids = latents.shape, operands.sample_ids
    seed = (SEED_LOW & 0xFFFFFFFF) | (SEED_HIGH & 0xFFFFFFFF) << 32

    def draw(stream, shape):
        count = shape[1:].numel()
        quads = torch.arange(-(-count // 4), device=ids.device)[None]
        counter = (quads, ids[:, None] & 0xFFFFFFFF, torch.tensor(STEP), (ids[:, None] >> 32) * 256 + stream)
        words = [word.double() for word in philox_4x32_eager(counter, seed)]
        normals = []
        for radius, angle in (words[:2], words[2:]):
            length = (-2 * ((radius + 0.5) / 2**32).log()).sqrt()
            normals += [length * (angle * 2 * math.pi / 2**32).cos(), length * (angle * 2 * math.pi / 2**32).sin()]
        return torch.stack(normals, -1).flatten(1)[:, :count].reshape(shape)

    clean = latents if operands.std is None else latents + operands.std.double() * draw(1, shape)
    noise = draw(0, shape)
    if operands.noise_offset:
        noise = noise + operands.noise_offset * draw(2, shape[:2]).reshape(*shape[:2], 1, 1)
    seen = noise + (operands.input_perturbation * draw(3, shape) if operands.input_perturbation else 0)
    alpha, sigma, of_latents, of_noise = (values.double().reshape(-1, 1, 1, 1) for values in operands[1:5])
    return alpha * clean + sigma * seen, of_latents * clean + of_noise * noise


def guard_all(operands, guard):
    return NoiseOperands(*(guard(value) if isinstance(value, torch.Tensor) else value for value in operands))


def check(operands):
    with guarded() as guard:
        got = noise_triton(guard_all(operands, guard))
    eager = noise_eager(operands)
    for name, *tensors in zip(("noisy", "target"), got, eager, exact_result(operands), strict=True):
        assert tensors[0].dtype == tensors[1].dtype, name
        assert_no_worse_than_eager(name, *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kernel_matches_its_twin(device, dtype, target):
    check(problem((2, 4, 9, 15), device, dtype, target=target, offset=0.1, perturbation=0.05))


@pytest.mark.parametrize("std", [False, True])
def test_kernel_serves_given_and_drawn_latents(device, std):
    check(problem((2, 4, 16, 20), device, torch.float32, std=std))


@pytest.mark.parametrize("size", [slow_to_interpret(1), slow_to_interpret(3), 63, 257, 1023])
def test_odd_sizes(device, size):
    check(problem((-(-64 // size) + 1, 1, 1, size), device, torch.float32, offset=0.1, perturbation=0.1))


def test_many_channels(device):
    check(problem((1, 37, 2, 3), device, torch.float32, target="epsilon", offset=0.3))


def test_empty_batch(device):
    noisy, target = noise_triton(problem((0, 4, 8, 8), device, torch.float32))
    assert noisy.shape == target.shape == (0, 4, 8, 8)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_inf_and_nan_stay_where_they_are(device):
    operands = problem((2, 4, 8, 8), device, torch.float32, target="epsilon")
    operands.latents[0, 0, 0, :2] = torch.tensor([float("inf"), float("nan")])
    noisy, target = noise_triton(operands)
    assert torch.equal(noisy.isfinite(), operands.latents.isfinite())
    assert target.isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_target_of_latents_alone_has_their_bits(device):
    operands = problem((2, 4, 8, 8), device, torch.float32, target="sample", std=False)
    operands.latents[0, 0, 0, :2] = torch.tensor([float("inf"), -0.0])
    assert_bit_equal("target", noise_triton(operands)[1], operands.latents)


def test_result_does_not_depend_on_program_order(device):
    operands = problem((2, 4, 14, 16), device, torch.float32, offset=0.1)
    run = lambda: dict(zip(("noisy", "target"), noise_triton(operands), strict=True))  # noqa: E731
    assert_independent_of_order(run, blocks=(128, 512))
