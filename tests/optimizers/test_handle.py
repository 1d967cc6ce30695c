"""The handle around every optimizer, stepping after the backward pass and in it."""

import copy
import gc
import itertools
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import resolve
from lowmem_db.errors import ConfigError, NonFiniteError
from lowmem_db.optimizers import adamw8bit, weights
from lowmem_db.optimizers.build import build_optimizer
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.optimizers.in_backward import InBackwardHandle
from tests.config.test_rules import NEEDED

CPU = torch.device("cpu")
RULES = ["adamw", "adamw8bit", "adafactor"]
KINDS = ["fp32", "bf16_extra_bits", "bf16_stochastic"]
IN_BACKWARD = {"memory.optimizer_in_backward": True}
STREAMED = IN_BACKWARD | {"memory.stream_optimizer_state": True}
ON_HOST = STREAMED | {
    "memory.checkpointing": "segments", "memory.stream_weights": True, "memory.optimizer_step": "host",
}  # fmt: skip
PLACES = ["after", "in backward", "streamed", "on the host"]
RATES = [{"unet": 1e-2 / (step + 1), "text_encoder": 3e-3 * (step + 1)} for step in range(6)]
Modules = dict[str, nn.Module]


def modules() -> Modules:
    """Two large matrices of other sizes than whole blocks, a convolution, and small parameters."""
    torch.manual_seed(0)
    unet = nn.Sequential(nn.Conv2d(3, 50, 6), nn.Flatten(), nn.Linear(450, 64), nn.Tanh(), nn.Linear(64, 65))
    return {"unet": unet, "text_encoder": nn.Linear(65, 70)}


def build(trained: Modules, fields: dict[str, object]) -> OptimizerHandle:
    """Build as the trainer does; the modules take on the kind of weights."""
    config = resolve(load_config(None, list((NEEDED | fields).items())))
    extra_bits = weights.apply(trained, config.memory.weights)
    handle = build_optimizer(config, trained, CPU)
    for name, bits in handle.extra_bits().items():
        bits.copy_(extra_bits[name])
    return handle


def loss_of(trained: Modules, step: int) -> Tensor:
    inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    unet, text_encoder = trained["unet"], trained["text_encoder"]
    dtype = next(unet.parameters()).dtype
    return text_encoder(unet(inputs.to(dtype)).tanh()).float().square().sum()


def do_step(handle: OptimizerHandle, trained: Modules, step: int) -> float:
    handle.zero_grad()
    handle.set_learning_rates({name: RATES[step][name] for name in handle.group_names()})
    handle.backward(loss_of(trained, step))
    return handle.step()


def weights_of(trained: Modules) -> list[Tensor]:
    return [parameter.detach().clone() for module in trained.values() for parameter in module.parameters()]


def assert_equal(ones: list[Tensor], others: list[Tensor]) -> None:
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one, other)


def test_adamw_is_the_published_formula() -> None:
    """Algorithm 2 of arXiv:1711.05101, in float64."""
    trained, reference = modules(), {name: module.double() for name, module in modules().items()}
    handle = build(trained, {"training.clipping": "none"})
    moments = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for m in reference.values() for p in m.parameters()}
    for step in range(3):
        do_step(handle, trained, step)
        loss_of(reference, step).backward()
        for name, module in reference.items():
            for parameter in module.parameters():
                m, v = moments[id(parameter)]
                m.mul_(0.9).add_(parameter.grad, alpha=0.1)
                v.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                with torch.no_grad():
                    parameter -= RATES[step][name] * (0.01 * parameter + m_hat / (v_hat.sqrt() + 1e-8))
                parameter.grad = None
    for one, other in zip(weights_of(trained), weights_of(reference), strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, IN_BACKWARD], ids=["after", "in backward"])
def test_adafactor_is_the_published_formula(fields: dict[str, object]) -> None:
    """Algorithm 4 of arXiv:1804.04235 with d = 1, matrices of (out, in * height * width), in float64."""
    trained, reference = {"unet": nn.Conv2d(20, 30, 3, bias=False)}, {"unet": nn.Conv2d(20, 30, 3, bias=False)}
    reference["unet"].load_state_dict(trained["unet"].state_dict())
    reference["unet"].double()
    handle = build(trained, {"optimizer.name": "adafactor", "training.clipping": "update_rms"} | fields)
    row, column = torch.zeros(30, dtype=torch.float64), torch.zeros(180, dtype=torch.float64)
    for step in range(4):
        images = torch.randn(2, 20, 5, 5, generator=torch.Generator().manual_seed(step)) * 10**step
        handle.set_learning_rates({"unet": 1e-2})
        handle.backward(trained["unet"](images).square().sum())
        handle.step()
        weight = reference["unet"].weight
        reference["unet"](images.double()).square().sum().backward()
        gradient = weight.grad.reshape(30, 180)
        decay = 1 - (step + 1) ** -0.8
        row = decay * row + (1 - decay) * (gradient.square() + 1e-30).mean(1)
        column = decay * column + (1 - decay) * (gradient.square() + 1e-30).mean(0)
        update = gradient / (row[:, None] * column / row.mean()).sqrt()
        update = update / update.square().mean().sqrt().clamp(min=1.0)
        with torch.no_grad():
            weight -= 1e-2 * (update.view_as(weight) + 0.01 * weight)
        weight.grad = None
    torch.testing.assert_close(trained["unet"].weight.double(), reference["unet"].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6])
def test_global_clipping_is_that_of_the_joint_norm(max_grad_norm: float) -> None:
    trained, reference = modules(), modules()
    handle = build(trained, {"training.max_grad_norm": max_grad_norm, "optimizer.weight_decay": 0.0})
    loss_of(reference, 0).backward()
    parameters = [parameter for module in reference.values() for parameter in module.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    assert do_step(handle, trained, 0) == pytest.approx(norm.item(), rel=1e-5)
    states = handle.state_dict()["parameters"]
    for (name, state), parameter in zip(sorted(states.items()), sorted_parameters(reference), strict=True):
        torch.testing.assert_close(state["exp_avg"], 0.1 * parameter.grad, rtol=1e-5, atol=1e-9, msg=name)


def sorted_parameters(trained: Modules) -> list[nn.Parameter]:
    return [parameter for _, parameter in sorted(weights.named_parameters(trained).items())]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("fields", [{}, IN_BACKWARD], ids=["after", "in backward"])
def test_per_tensor_clipping_is_that_of_each_norm(name: str, fields: dict[str, object]) -> None:
    """A gradient that is a hundred times as large makes the same step once it is clipped."""
    fields = {"optimizer.name": name, "training.clipping": "per_tensor", "training.max_grad_norm": 1e-3} | fields
    ones = []
    for factor in (1.0, 128.0):
        trained = {"unet": nn.Linear(100, 50, bias=False)}
        nn.init.constant_(trained["unet"].weight, 0.5)
        handle = build(trained, fields)
        handle.set_learning_rates({"unet": 1e-2})
        inputs = torch.linspace(0.5, 1, 400).view(4, 100)
        handle.backward(factor * trained["unet"](inputs).sum())
        handle.step()
        ones += weights_of(trained)
    torch.testing.assert_close(*ones)


@pytest.mark.parametrize("name", RULES)
def test_update_clipping_bounds_the_root_mean_square_of_the_update(name: str) -> None:
    trained = {"unet": nn.Linear(100, 50, bias=False)}
    fields = {"optimizer.name": name, "training.clipping": "update_rms", "optimizer.weight_decay": 0.0}
    handle = build(trained, fields | IN_BACKWARD)
    handle.set_learning_rates({"unet": 1e-2})
    for step in range(12):  # ten quiet steps, then gradients a thousand times as large: AdamW would leap
        before = trained["unet"].weight.detach().clone()
        inputs = torch.randn(4, 100, generator=torch.Generator().manual_seed(step))
        handle.backward(trained["unet"](inputs).sum() * (1000.0 if step >= 10 else 1.0))
        handle.step()
        moved = (trained["unet"].weight.detach() - before).square().mean().sqrt().item()
        assert 1e-4 < moved <= 1e-2 * 1.001


def test_lagged_clipping_uses_the_norms_of_past_steps() -> None:
    trained = modules()
    handle = build(trained, {"training.clipping": "lagged", "training.max_grad_norm": 0.5} | IN_BACKWARD)
    norms = [do_step(handle, trained, step) for step in range(3)]
    average = norms[0]
    for norm in norms[1:]:
        average = 0.9 * average + 0.1 * norm
    assert handle.clipping.average_norm.item() == pytest.approx(average, rel=1e-5)
    assert handle.clipping.scale(None).item() == pytest.approx(min(1.0, 0.5 / average), rel=1e-5)
    assert handle.clipping.scale(None) is handle.clipping.scale(None), "computed once for all gradients of a step"
    handle.clipping.load_state_dict({"average_norm": torch.tensor(5.0)})
    assert handle.clipping.scale(None).item() == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "kind"), itertools.product(RULES, KINDS))
@pytest.mark.parametrize("clipping", ["none", "update_rms", "per_tensor", "lagged"])
def test_stepping_in_the_backward_pass_and_streaming_change_no_bit(name: str, kind: str, clipping: str) -> None:
    fields = {"optimizer.name": name, "memory.weights": kind, "training.clipping": clipping}
    results = []
    for strategy in ({}, IN_BACKWARD, STREAMED, ON_HOST, {"memory.stream_optimizer_state": True}):
        trained = modules()
        handle = build(trained, fields | strategy)
        norms = [do_step(handle, trained, step) for step in range(4)]
        states = [tensor for state in handle.state_dict()["parameters"].values() for tensor in state.values()]
        results.append((weights_of(trained) + states, norms))
    for tensors, norms in results[1:]:
        assert norms == pytest.approx(results[0][1], rel=1e-5)
        if clipping == "lagged":  # the sum behind the norm has another order: the last bit of the scale may differ
            continue
        assert_equal(tensors, results[0][0])


def test_gradients_are_freed_as_they_come() -> None:
    trained = modules()
    handle = build(trained, IN_BACKWARD)
    handle.set_learning_rates(RATES[0])
    alive: list[int] = []
    for parameter in handle.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None and p.numel() > 4095 for p in handle.parameters()))
        )
    handle.backward(loss_of(trained, 0))
    assert len(alive) == 8
    assert max(alive) == 0
    assert sum(parameter.grad is not None for parameter in handle.parameters()) == 4  # small ones wait
    handle.step()
    assert all(parameter.grad is None for parameter in handle.parameters())


@pytest.mark.parametrize(
    "strategy", [{}, IN_BACKWARD, STREAMED, ON_HOST], ids=["after", "in backward", "streamed", "on the host"]
)
def test_optimizer_and_model_are_freed(strategy: dict) -> None:
    trained = modules()
    handle = build(trained, strategy)
    do_step(handle, trained, 0)
    seen = [weakref.ref(handle), weakref.ref(trained["unet"][2].weight)]
    del handle, trained
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


def test_undo_leaves_gradients_alone_again() -> None:
    trained = modules()
    handle = build(trained, IN_BACKWARD)
    assert isinstance(handle, InBackwardHandle)
    handle.undo()
    before = weights_of(trained)
    loss_of(trained, 0).backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    assert_equal(weights_of(trained), before)
    handle.apply()
    handle.zero_grad()
    do_step(handle, trained, 0)
    assert not torch.equal(weights_of(trained)[0], before[0])


def test_gradients_of_several_backward_passes_add_up() -> None:
    trained, reference = modules(), modules()
    handle = build(trained, {})
    for step in (0, 1):
        handle.backward(loss_of(trained, step))
    (loss_of(reference, 0) + loss_of(reference, 1)).backward()
    for one, other in zip(sorted_parameters(trained), sorted_parameters(reference), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    handle.zero_grad()
    assert all(parameter.grad is None for parameter in handle.parameters())


@pytest.mark.parametrize(("name", "kind"), itertools.product(RULES, KINDS))
@pytest.mark.parametrize(
    "strategy", [{}, IN_BACKWARD, STREAMED, ON_HOST], ids=["after", "in backward", "streamed", "on the host"]
)
def test_restored_optimizer_goes_on_bit_for_bit_with_rates_that_move(name: str, kind: str, strategy: dict) -> None:
    fields = {"optimizer.name": name, "memory.weights": kind, "training.max_grad_norm": 1.0} | strategy
    trained = modules()
    handle = build(trained, fields)
    for step in range(3):
        do_step(handle, trained, step)
    saved_state, saved_weights = copy.deepcopy(handle.state_dict()), modules()
    restored = build(saved_weights, fields)
    for component, module in saved_weights.items():
        module.load_state_dict(trained[component].state_dict())
    restored.load_state_dict(saved_state)
    for step in range(3, 6):
        do_step(handle, trained, step)
        do_step(restored, saved_weights, step)
    assert_equal(weights_of(trained), weights_of(saved_weights))
    assert_equal(
        list(handle.extra_bits().values()) or [torch.ones(1)], list(restored.extra_bits().values()) or [torch.ones(1)]
    )


@pytest.mark.parametrize(
    "strategy", [{}, IN_BACKWARD, STREAMED, ON_HOST], ids=["after", "in backward", "streamed", "on the host"]
)
@pytest.mark.parametrize("name", RULES)
def test_each_group_has_its_own_rate_also_after_a_resume(name: str, strategy: dict) -> None:
    trained = modules()
    fields = {"optimizer.name": name, "optimizer.weight_decay": 0.0} | strategy
    handle = build(trained, fields)
    do_step(handle, trained, 0)
    restored = build(trained, fields)
    handle_state = copy.deepcopy(handle.state_dict())
    if isinstance(handle, InBackwardHandle):
        handle.undo()
    restored.load_state_dict(handle_state)
    before = weights_of(trained)
    restored.set_learning_rates({"unet": 0.0, "text_encoder": 1e-2})
    restored.backward(loss_of(trained, 1))
    restored.step()
    after = weights_of(trained)
    assert_equal(after[:6], before[:6])
    assert not torch.equal(after[6], before[6])
    assert restored.group_names() == ["unet", "text_encoder"]


@pytest.mark.parametrize(
    "strategy", [{}, IN_BACKWARD, STREAMED, ON_HOST], ids=["after", "in backward", "streamed", "on the host"]
)
@pytest.mark.parametrize("name", RULES)
def test_removed_group_stays_as_it_is_and_the_other_goes_on_as_alone(name: str, strategy: dict) -> None:
    trained = modules()
    handle = build(trained, {"optimizer.name": name} | strategy)
    for step in range(2):
        do_step(handle, trained, step)
    trained["text_encoder"].requires_grad_(False)
    handle.remove_group("text_encoder")
    before = weights_of(trained)
    for step in range(2, 4):
        do_step(handle, trained, step)
    assert_equal(weights_of(trained)[6:], before[6:])
    assert not torch.equal(weights_of(trained)[0], before[0])
    assert handle.group_names() == ["unet"]
    assert all(key.startswith("unet.") for key in handle.state_dict()["parameters"])

    again = modules()
    restored = build(again, {"optimizer.name": name} | strategy)
    again["text_encoder"].requires_grad_(False)
    restored.remove_group("text_encoder")
    restored.load_state_dict(copy.deepcopy(handle.state_dict()))
    for component, module in again.items():
        module.load_state_dict(trained[component].state_dict())
    do_step(handle, trained, 4)
    do_step(restored, again, 4)
    assert_equal(weights_of(again), weights_of(trained))


def test_each_parameter_is_rounded_with_a_seed_of_its_own() -> None:
    fields = {"memory.weights": "bf16_stochastic"}
    seeds = [unit.rounding_seed for run in (0, 1) for unit in build(modules(), fields | {"seed": run}).units]
    assert None not in seeds
    assert len(set(seeds)) == len(seeds) == 2 * 6  # four large parameters and two rows


@pytest.mark.parametrize("strategy", [IN_BACKWARD, STREAMED, ON_HOST], ids=["in backward", "streamed", "on the host"])
def test_gradients_of_a_removed_group_are_left_alone(strategy: dict) -> None:
    trained = modules()
    handle = build(trained, strategy)
    handle.remove_group("text_encoder")
    before = weights_of(trained)
    do_step(handle, trained, 0)
    assert all(parameter.grad is not None for parameter in trained["text_encoder"].parameters())
    assert_equal(weights_of(trained)[6:], before[6:])


@pytest.mark.parametrize("strategy", [IN_BACKWARD, STREAMED, ON_HOST], ids=["in backward", "streamed", "on the host"])
def test_24_bit_weights_of_a_removed_group_stay_whole(strategy: dict) -> None:
    """Also in a run that goes on after the group was removed, where the optimizer is built with it at first."""
    fields = {"memory.weights": "bf16_extra_bits", "optimizer.name": "adamw8bit"} | strategy
    trained = modules()
    handle = build(trained, fields)
    do_step(handle, trained, 0)
    before = {name: bits.clone() for name, bits in handle.extra_bits().items()}
    trained["text_encoder"].requires_grad_(False)
    handle.remove_group("text_encoder")
    do_step(handle, trained, 1)
    restored = build(modules(), fields)
    restored.remove_group("text_encoder")
    restored.load_state_dict(copy.deepcopy(handle.state_dict()))
    for each in (handle, restored):
        assert each.extra_bits().keys() == before.keys()
        assert torch.equal(each.extra_bits()["text_encoder.weight"], before["text_encoder.weight"])
        assert not torch.equal(each.extra_bits()["unet.2.weight"], before["unet.2.weight"])
        assert each.group_names() == ["unet"]


class Elementwise(nn.Module):
    """A convolution's weight whose gradient does not depend on how it lies in memory."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        super().__init__()
        weight = torch.randn(32, 20, 3, 3, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight.contiguous(memory_format=memory_format))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("kind", ["fp32", "bf16_extra_bits"])
@pytest.mark.parametrize("clipping", ["none", "update_rms"])
@pytest.mark.parametrize("strategy", [{}, STREAMED], ids=["after", "streamed"])
def test_order_of_the_weights_in_memory_changes_no_bit(name: str, kind: str, clipping: str, strategy: dict) -> None:
    fields = {"optimizer.name": name, "memory.weights": kind, "training.clipping": clipping} | strategy
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        trained: Modules = {"unet": Elementwise(memory_format)}
        handle = build(trained, fields)
        for step in range(3):
            handle.set_learning_rates({"unet": 1e-2})
            factor = torch.randn(32, 20, 3, 3, generator=torch.Generator().manual_seed(step))
            handle.backward((trained["unet"].weight.float() * factor).square().sum())
            handle.step()
        assert trained["unet"].weight.is_contiguous(memory_format=memory_format)
        found.append([*weights_of(trained), *handle.extra_bits().values()])
    if name == "adamw" and clipping == "none":
        assert_equal(*found)
    for one, other in zip(*found, strict=True):  # sums over a tensor have another order
        torch.testing.assert_close(one.float(), other.float(), atol=1.0 if one.dtype == torch.int8 else 1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bf16_extra_bits", "bf16_stochastic"])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_rounding_part_by_part_changes_no_bit(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (1 << 22, 1000):
        monkeypatch.setattr(weights, "_CHUNK", chunk)
        trained = modules()
        handle = build(trained, {"optimizer.name": name, "memory.weights": kind})
        for step in range(2):
            do_step(handle, trained, step)
        found.append([*weights_of(trained), *handle.extra_bits().values()])
    assert_equal(*found)


@pytest.mark.parametrize(
    "strategy", [{}, IN_BACKWARD, STREAMED, ON_HOST], ids=["after", "in backward", "streamed", "on the host"]
)
@pytest.mark.parametrize("bias", [True, False], ids=["no large", "no small"])
def test_module_without_large_or_without_small_parameters_trains(strategy: dict, bias: bool) -> None:
    trained: Modules = {"unet": nn.Linear(*((8, 8) if bias else (80, 80)), bias=bias)}
    handle = build(trained, strategy)
    handle.set_learning_rates({"unet": 1e-2})
    before = weights_of(trained)
    for _ in range(2):
        handle.backward(trained["unet"](torch.ones(1, before[0].shape[1])).sum())
        assert handle.step() > 0
    assert all(not torch.equal(one, other) for one, other in zip(weights_of(trained), before, strict=True))
    restored = build(trained, strategy)
    restored.load_state_dict(copy.deepcopy(handle.state_dict()))


def test_weight_that_is_used_twice_is_stepped_once() -> None:
    trained, reference = {"unet": nn.Linear(80, 80)}, {"unet": nn.Linear(80, 80)}
    reference["unet"].load_state_dict(trained["unet"].state_dict())
    handle, after = (
        build(trained, IN_BACKWARD | {"training.clipping": "none"}),
        build(reference, {"training.clipping": "none"}),
    )
    for each, layer in ((handle, trained["unet"]), (after, reference["unet"])):
        each.set_learning_rates({"unet": 1e-2})
        each.backward(layer(layer(torch.linspace(0, 1, 80)).tanh()).square().sum())
        each.step()
    assert_equal(weights_of(trained), weights_of(reference))
    assert handle.num_steps == 1


def test_bitsandbytes_is_not_used_where_it_would_step_with_an_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient scale of NaN leaves a parameter as it is; bitsandbytes would write NaN into it."""
    monkeypatch.setattr(adamw8bit, "_bitsandbytes_for", lambda device: object())
    fields = {"optimizer.name": "adamw8bit"}
    uses = {
        name: build(modules(), fields | more).rule._bitsandbytes is not None
        for name, more in {"fp32": IN_BACKWARD, "after": FP16, "overflow": FP16 | IN_BACKWARD}.items()
    }
    assert uses == {"fp32": True, "after": True, "overflow": False}


FP16 = {"training.mixed_precision": "fp16", "training.max_grad_norm": 0.5}


@pytest.mark.parametrize(
    "strategy", [{"training.clipping": "global"}, IN_BACKWARD | {"training.clipping": "per_tensor"}]
)
def test_scaled_loss_gives_the_same_step(strategy: dict) -> None:
    trained, scaled = modules(), modules()
    plain = build(trained, {"optimizer.name": "adamw8bit", "training.max_grad_norm": 0.5} | strategy)
    scaling = build(scaled, {"optimizer.name": "adamw8bit"} | FP16 | strategy)
    for step in range(3):
        assert do_step(scaling, scaled, step) == pytest.approx(do_step(plain, trained, step), rel=1e-4)
    for one, other in zip(weights_of(scaled), weights_of(trained), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_overflow_leaves_a_step_out_and_halves_the_scale(bad: float, max_grad_norm: float | None) -> None:
    trained = modules()
    handle = build(trained, FP16 | {"training.max_grad_norm": max_grad_norm})
    do_step(handle, trained, 0)
    before, scale = weights_of(trained), handle.loss_scale.value.item()
    handle.backward(loss_of(trained, 1))
    next(trained["unet"].parameters()).grad[0, 0] = bad
    assert not math.isfinite(handle.step())
    assert_equal(weights_of(trained), before)
    assert handle.loss_scale.value.item() == scale / 2
    assert handle.num_steps == 1
    do_step(handle, trained, 2)
    assert not torch.equal(weights_of(trained)[0], before[0])
    assert all(torch.isfinite(weight).all() for weight in weights_of(trained))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("clipping", ["none", "update_rms", "lagged", "per_tensor"])
def test_overflow_in_the_backward_pass_leaves_that_parameter_out_alone(bad: float, clipping: str) -> None:
    trained = modules()
    handle = build(trained, FP16 | IN_BACKWARD | {"optimizer.name": "adamw8bit", "training.clipping": clipping})
    do_step(handle, trained, 0)
    before, state = weights_of(trained), copy.deepcopy(handle.state_dict()["parameters"]["unet.2.weight"])
    scale = handle.loss_scale.value.item()
    spoil = trained["unet"][2].weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), bad))
    assert not math.isfinite(do_step(handle, trained, 1))
    spoil.remove()
    after = weights_of(trained)
    assert torch.equal(after[2], before[2])
    for key, tensor in handle.state_dict()["parameters"]["unet.2.weight"].items():
        assert torch.equal(tensor, state[key]), key
    assert not torch.equal(after[0], before[0])
    assert handle.loss_scale.value.item() == scale / 2
    assert math.isfinite(do_step(handle, trained, 2))
    assert not torch.equal(weights_of(trained)[2], before[2])


@pytest.mark.parametrize("strategy", [{}, IN_BACKWARD], ids=["after", "in backward"])
@pytest.mark.parametrize("name", RULES)
def test_gradient_that_is_not_finite_is_refused(name: str, strategy: dict) -> None:
    trained = modules()
    handle = build(trained, {"optimizer.name": name} | strategy)
    trained["unet"][2].weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights_of(trained)
    with pytest.raises(NonFiniteError, match=r"the gradient of unet\.(2\.weight|small) is"):
        do_step(handle, trained, 0)
    if not strategy:
        assert_equal(weights_of(trained), before)


def test_scale_of_the_loss_is_restored() -> None:
    handle = build(modules(), FP16)
    handle.loss_scale.value.fill_(128.0)
    restored = build(modules(), FP16)
    restored.load_state_dict(copy.deepcopy(handle.state_dict()))
    assert restored.loss_scale.value.item() == 128.0


@pytest.mark.parametrize(("before", "after"), [(FP16, {}), ({}, FP16)])
def test_run_may_go_on_with_another_precision(before: dict, after: dict) -> None:
    trained = modules()
    handle = build(trained, before)
    do_step(handle, trained, 0)
    restored = build(trained, after)
    restored.load_state_dict(copy.deepcopy(handle.state_dict()))
    assert restored.num_steps == 1


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("adamw", "fp32", 8.0),
        ("adamw8bit", "fp32", 2 + 8 / 256),
        ("adamw8bit", "bf16_extra_bits", 3 + 8 / 256),
        ("adamw8bit", "bf16_stochastic", 2 + 8 / 256),
        ("adafactor", "bf16_stochastic", 4 * 512 / 65536),
    ],
)
def test_bytes_of_state_per_parameter(name: str, kind: str, expected: float) -> None:
    handle = build({"unet": nn.Linear(256, 256, bias=False)}, {"optimizer.name": name, "memory.weights": kind})
    assert handle.bytes_per_parameter() == pytest.approx(expected)


def test_module_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="unet: no parameter is trainable"):
        build({"unet": nn.Linear(2, 2).requires_grad_(False)}, {})


def test_resumed_optimizer_keeps_the_settings_of_its_run() -> None:
    before = build(modules(), {"optimizer.weight_decay": 0.1})
    after = build(modules(), {"optimizer.weight_decay": 0.3})
    after.load_state_dict(before.state_dict())
    assert after.rule.config.weight_decay == 0.3


@pytest.mark.parametrize("strategy", [{}, IN_BACKWARD], ids=["after", "in backward"])
def test_small_parameter_without_a_gradient_stays(strategy: dict) -> None:
    trained = modules()
    handle = build(trained, strategy)
    spare = trained["unet"][0].bias
    spare.requires_grad_(False)
    before = spare.detach().clone()
    do_step(handle, trained, 0)
    assert torch.equal(spare, before)
    assert not torch.equal(trained["unet"][4].bias, modules()["unet"][4].bias)
