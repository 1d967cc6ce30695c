import itertools
import math

import pytest
import torch
from kernel_contract import DTYPES, assert_bit_equal, assert_independent_of_order, assert_no_worse_than_eager, guarded
from lowmem_db_kernels._triton import jit, tl
from lowmem_db_kernels.noise import noise_eager, noise_tables, noise_triton
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


def problem(shape, device, dtype, *, std=True, given=False):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(shape, generator=generator).to(dtype).to(device)
    tables = noise_tables(torch.linspace(0.9999, 0.0, 20, dtype=torch.float64, device=device))
    return {
        "latents": latents,
        "timesteps": torch.arange(shape[0], device=device) * 19 // max(shape[0] - 1, 1),
        "sqrt_alphas_cumprod": tables.sqrt_alphas_cumprod,
        "sqrt_one_minus_alphas_cumprod": tables.sqrt_one_minus_alphas_cumprod,
        "std": torch.rand(shape, generator=generator).to(dtype).to(device) if std else None,
        "noise": torch.randn(shape, generator=generator).to(dtype).to(device) if given else None,
        "sample_ids": torch.arange(shape[0], device=device) * 2**33 + 5,
    }


def options(prediction_type="epsilon", offset=0.0, perturbation=0.0, out_dtype=torch.float32):
    return (SEED_LOW, SEED_HIGH, STEP, prediction_type, offset, perturbation, out_dtype)


def exact_result(arguments, settings):
    """float64 through the whole transform; the random words are integers and the same for all."""
    with torch.no_grad():
        *_, prediction_type, offset, perturbation, _ = settings
        latents = arguments["latents"].double()
        shape, ids = latents.shape, arguments["sample_ids"]
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

        clean = latents if arguments["std"] is None else latents + arguments["std"].double() * draw(1, shape)
        noise = draw(0, shape) if arguments["noise"] is None else arguments["noise"].double()
        if offset:
            noise = noise + offset * draw(2, shape[:2]).reshape(*shape[:2], 1, 1)
        seen = noise + (perturbation * draw(3, shape) if perturbation else 0)
        alpha, sigma = (
            arguments[name].double()[arguments["timesteps"]].reshape(-1, 1, 1, 1)
            for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        )
        target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[prediction_type]
        return alpha * clean + sigma * seen, target


def check(arguments, settings):
    with guarded() as guard:
        got = noise_triton(*(guard(value) for value in arguments.values()), *settings)
    eager = noise_eager(*arguments.values(), *settings)
    for name, *tensors in zip(("noisy", "target"), got, eager, exact_result(arguments, settings), strict=True):
        assert tensors[0].dtype == tensors[1].dtype, name
        assert_no_worse_than_eager(name, *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_kernel_matches_its_twin(device, dtype, prediction_type):
    check(problem((2, 4, 9, 15), device, dtype), options(prediction_type, 0.1, 0.05, out_dtype=dtype))


@pytest.mark.parametrize(("std", "given"), itertools.product([False, True], repeat=2))
def test_kernel_serves_given_and_drawn_parts(device, std, given):
    check(problem((2, 4, 16, 20), device, torch.float32, std=std, given=given), options("v_prediction"))


@pytest.mark.parametrize("size", [1, 3, 63, 257, 1023])
def test_odd_sizes(device, size):
    check(problem((-(-64 // size) + 1, 1, 1, size), device, torch.float32), options("v_prediction", 0.1, 0.1))


def test_many_channels(device):
    check(problem((1, 37, 2, 3), device, torch.float32), options("epsilon", 0.3))


def test_empty_batch(device):
    arguments = problem((0, 4, 8, 8), device, torch.float32)
    noisy, target = noise_triton(*arguments.values(), *options())
    assert noisy.shape == target.shape == (0, 4, 8, 8)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_inf_and_nan_stay_where_they_are(device):
    arguments = problem((2, 4, 8, 8), device, torch.float32)
    arguments["latents"][0, 0, 0, :2] = torch.tensor([float("inf"), float("nan")])
    noisy, target = noise_triton(*arguments.values(), *options())
    assert torch.equal(noisy.isfinite(), arguments["latents"].isfinite())
    assert target.isfinite().all()


def test_result_does_not_depend_on_program_order(device):
    arguments = problem((2, 4, 14, 16), device, torch.float32)
    names = ("noisy", "target")
    run = lambda: dict(zip(names, noise_triton(*arguments.values(), *options("v_prediction", 0.1)), strict=True))  # noqa: E731
    assert_independent_of_order(run, blocks=(128, 512))
