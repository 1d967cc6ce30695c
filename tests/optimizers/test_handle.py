"""The handle around every optimizer."""

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn

from lowmem_db import environment
from lowmem_db.config.schema import OptimizerConfig
from lowmem_db.errors import ConfigError, DependencyError
from lowmem_db.optimizers.handle import OptimizerHandle, build_optimizer

NEEDS_BITSANDBYTES = pytest.mark.skipif(
    not environment.is_installed("bitsandbytes"), reason="8-bit AdamW is bitsandbytes'"
)
NAMES = ["adamw", pytest.param("adamw8bit", marks=NEEDS_BITSANDBYTES)]
RATES = [{"unet": 1e-2 / (step + 1), "text_encoder": 3e-3 * (step + 1)} for step in range(6)]


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"unet": nn.Linear(128, 64), "text_encoder": nn.Linear(64, 3)}


def build(
    name: str, trained: dict[str, nn.Module], max_grad_norm: float | None = None, scale_loss: bool = False
) -> OptimizerHandle:
    return build_optimizer(
        OptimizerConfig(name=name),
        trained,
        max_grad_norm=max_grad_norm,
        scale_loss=scale_loss,
        device=torch.device("cpu"),
    )


def loss_of(trained: dict[str, nn.Module], step: int) -> Tensor:
    inputs = torch.randn(4, 128, generator=torch.Generator().manual_seed(step))
    return trained["text_encoder"](trained["unet"](inputs).tanh()).square().sum()


def do_step(handle: OptimizerHandle, trained: dict[str, nn.Module], step: int) -> float:
    handle.zero_grad()
    handle.set_learning_rates(RATES[step])
    handle.backward(loss_of(trained, step))
    norm = handle.gradient_norm()
    handle.step(norm)
    return norm


def weights(trained: dict[str, nn.Module]) -> list[Tensor]:
    return [parameter.detach().clone() for module in trained.values() for parameter in module.parameters()]


def assert_equal(ones: list[Tensor], others: list[Tensor]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one, other)


def test_adamw_is_the_published_formula() -> None:
    """Algorithm 2 of arXiv:1711.05101, in float64."""
    trained = modules()
    handle = build("adamw", trained)
    beta1, beta2, epsilon, decay = 0.9, 0.999, 1e-8, 1e-2
    reference = {name: [p.detach().double() for p in module.parameters()] for name, module in trained.items()}
    moments = {name: [(torch.zeros_like(p), torch.zeros_like(p)) for p in values] for name, values in reference.items()}
    for step in range(3):
        do_step(handle, trained, step)
        for name, module in trained.items():
            rate = RATES[step][name]
            for index, parameter in enumerate(module.parameters()):
                gradient, weight = parameter.grad.double(), reference[name][index]
                m, v = moments[name][index]
                m = beta1 * m + (1 - beta1) * gradient
                v = beta2 * v + (1 - beta2) * gradient.square()
                moments[name][index] = (m, v)
                m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
                weight = weight - rate * decay * weight - rate * m_hat / (v_hat.sqrt() + epsilon)
                reference[name][index] = weight
                torch.testing.assert_close(parameter.detach().double(), weight, atol=1e-6, rtol=1e-5)


def test_clipping_is_that_of_the_joint_norm() -> None:
    for max_grad_norm in (0.5, 1e6):
        trained, reference = modules(), modules()
        handle = build("adamw", trained, max_grad_norm=max_grad_norm)
        loss_of(reference, 0).backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [parameter for module in reference.values() for parameter in module.parameters()], max_grad_norm
        )
        assert do_step(handle, trained, 0) == pytest.approx(norm.item(), rel=1e-6)
        for name, module in trained.items():
            for one, other in zip(module.parameters(), reference[name].parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-9)


def test_gradients_of_several_backward_passes_add_up() -> None:
    trained, reference = modules(), modules()
    handle = build("adamw", trained)
    for step in (0, 1):
        handle.backward(loss_of(trained, step))
    (loss_of(reference, 0) + loss_of(reference, 1)).backward()
    for name, module in trained.items():
        for one, other in zip(module.parameters(), reference[name].parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    handle.zero_grad()
    assert all(parameter.grad is None for parameter in handle.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_restored_optimizer_goes_on_bit_for_bit_with_rates_that_move(name: str) -> None:
    trained = modules()
    handle = build(name, trained, max_grad_norm=1.0)
    for step in range(3):
        do_step(handle, trained, step)
    saved_state, saved_weights = copy.deepcopy(handle.state_dict()), copy.deepcopy(trained)
    for step in range(3, 6):
        do_step(handle, trained, step)

    restored = build(name, saved_weights, max_grad_norm=1.0)
    restored.load_state_dict(saved_state)
    for step in range(3, 6):
        do_step(restored, saved_weights, step)
    assert_equal(weights(trained), weights(saved_weights))
    assert [group["lr"] for group in restored.optimizer.param_groups] == list(RATES[5].values())


@pytest.mark.parametrize("name", NAMES)
def test_each_group_has_its_own_rate(name: str) -> None:
    trained = modules()
    handle = build(name, trained)
    before = weights(trained)
    handle.backward(loss_of(trained, 0))
    handle.set_learning_rates({"unet": 0.0, "text_encoder": 1e-2})
    handle.step(handle.gradient_norm())
    after = weights(trained)
    assert_equal(after[:2], before[:2])
    assert not torch.equal(after[2], before[2])
    assert handle.group_names() == ["unet", "text_encoder"]


@pytest.mark.parametrize("name", NAMES)
def test_removed_group_stays_as_it_is_and_the_other_goes_on_as_alone(name: str) -> None:
    trained = modules()
    handle = build(name, trained)
    for step in range(2):
        do_step(handle, trained, step)
    handle.remove_group("text_encoder")
    before = weights(trained)
    for step in range(2, 4):
        do_step(handle, trained, step)
    assert_equal(weights(trained)[2:], before[2:])
    assert not torch.equal(weights(trained)[0], before[0])
    assert handle.group_names() == ["unet"]
    assert len(handle.state_dict()["optimizer"]["state"]) == 2

    again = modules()
    restored = build(name, again)
    restored.remove_group("text_encoder")
    restored.load_state_dict(copy.deepcopy(handle.state_dict()))
    again["unet"].load_state_dict(trained["unet"].state_dict())
    again["text_encoder"].load_state_dict(trained["text_encoder"].state_dict())
    do_step(handle, trained, 4)
    do_step(restored, again, 4)
    assert_equal(weights(again), weights(trained))


def test_scaled_loss_gives_the_same_step() -> None:
    trained, scaled = modules(), modules()
    plain, scaling = build("adamw", trained, 0.5), build("adamw", scaled, 0.5, scale_loss=True)
    for step in range(3):
        assert do_step(scaling, scaled, step) == pytest.approx(do_step(plain, trained, step), rel=1e-5)
    for one, other in zip(weights(scaled), weights(trained), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_overflow_leaves_a_step_out_and_halves_the_scale(bad: float, max_grad_norm: float | None) -> None:
    trained = modules()
    handle = build("adamw", trained, max_grad_norm, scale_loss=True)
    do_step(handle, trained, 0)
    before, scale = weights(trained), handle.scaler.get_scale()
    handle.zero_grad()
    handle.backward(loss_of(trained, 1))
    next(trained["unet"].parameters()).grad[0, 0] = bad
    norm = handle.gradient_norm()
    assert not math.isfinite(norm)
    handle.step(norm)
    assert_equal(weights(trained), before)
    assert handle.scaler.get_scale() == scale / 2
    do_step(handle, trained, 2)
    assert not torch.equal(weights(trained)[0], before[0])
    assert all(torch.isfinite(weight).all() for weight in weights(trained))


def test_scale_of_the_loss_is_restored() -> None:
    trained = modules()
    handle = build("adamw", trained, scale_loss=True)
    do_step(handle, trained, 0)
    handle.scaler.update(128.0)
    restored = build("adamw", trained, scale_loss=True)
    restored.load_state_dict(copy.deepcopy(handle.state_dict()))
    assert restored.scaler.get_scale() == 128.0


@pytest.mark.parametrize("scaled_before", [True, False])
def test_run_may_go_on_with_another_precision(scaled_before: bool) -> None:
    trained = modules()
    handle = build("adamw", trained, scale_loss=scaled_before)
    do_step(handle, trained, 0)
    restored = build("adamw", trained, scale_loss=not scaled_before)
    restored.load_state_dict(copy.deepcopy(handle.state_dict()))
    assert restored.optimizer.state_dict()["state"].keys() == handle.optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize(
    ("name", "at_least", "at_most"), [("adamw", 8, 8.1), pytest.param("adamw8bit", 2, 3, marks=NEEDS_BITSANDBYTES)]
)
def test_bytes_of_state_per_parameter(name: str, at_least: float, at_most: float) -> None:
    trained = {"unet": nn.Linear(256, 256, bias=False)}
    handle = build(name, trained)
    assert handle.bytes_per_parameter() == 0
    handle.backward(trained["unet"](torch.ones(1, 256)).sum())
    handle.set_learning_rates({"unet": 1e-3})
    handle.step(handle.gradient_norm())
    assert at_least <= handle.bytes_per_parameter() <= at_most


def test_module_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="unet: has no parameter that trains"):
        build("adamw", {"unet": nn.Linear(2, 2).requires_grad_(False)})


def test_missing_bitsandbytes_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DependencyError, match=r'bitsandbytes, for 8-bit AdamW, .*; pip install "lowmem-db\[8bit\]"'):
        build("adamw8bit", modules())


def test_resumed_optimizer_keeps_the_settings_of_its_run() -> None:
    def build(weight_decay: float) -> OptimizerHandle:
        config = OptimizerConfig(weight_decay=weight_decay)
        return build_optimizer(
            config, {"unet": nn.Linear(2, 2)}, max_grad_norm=None, scale_loss=False, device=torch.device("cpu")
        )

    before, after = build(0.1), build(0.3)
    after.load_state_dict(before.state_dict())
    assert after.optimizer.param_groups[0]["weight_decay"] == 0.3
