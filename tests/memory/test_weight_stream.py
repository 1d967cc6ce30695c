"""Weights that pass through slots: the same bits as weights that stay, wherever the order of segments leads."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lowmem_db.host_memory import to_device
from lowmem_db.memory import boundary_offload, checkpointing, weight_stream
from lowmem_db.memory.weight_stream import SLOTS, WeightStream
from lowmem_db.models.families.unet_blocks import find_blocks
from tests.memory.models import assert_same_bits, build, clones, loss_and_gradients, loss_of, step_in_backward

CPU = torch.device("cpu")
MIN_NUMEL = 64


@pytest.fixture(autouse=True)
def _tiny_tensors_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stream, "MIN_NUMEL", MIN_NUMEL)
    monkeypatch.setattr(boundary_offload, "MIN_BYTES", 4096)


def stream_of(
    modules: dict[str, nn.Module], placement: str = "segments", *, trained: bool = True, offload: bool = False
) -> WeightStream:
    stream = WeightStream(CPU, trained=trained)
    checkpointing.apply(find_blocks(modules), placement, offload=offload, stream=stream)
    stream.begin(modules)
    return stream


def streamed(stream: WeightStream) -> Iterator[nn.Parameter]:
    return (parameter for group in stream._groups for parameter in group.parameters)


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("placement", ["layers", "segments", "nested"])
@pytest.mark.parametrize("name", ["tiny", "sdxl_like"])
def test_the_same_weights_where_parameters_step_in_backward(name: str, placement: str, offload: bool) -> None:
    modules = build(name)
    plain = clones(modules)
    stream = stream_of(modules, placement, offload=offload)
    assert sum(weight.numel() for weight in streamed(stream)) > 0.6 * sum(
        weight.numel() for module in modules.values() for weight in module.parameters()
    )
    for either in (modules, plain):
        step_in_backward(either)
    for step in range(3):
        if step == 2:  # another order from here on
            for either in (modules, plain):
                either["unet"].down_blocks[0].resnets[0].requires_grad_(False)
        losses = [loss_of(either, step) for either in (modules, plain)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for component, module in modules.items():
            assert_same_bits(module.state_dict(), plain[component].state_dict())


def test_each_segment_lets_its_weights_go_at_the_end_of_its_own_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they would fill the slots; the last callback of a backward pass finds none that are still held."""
    modules = build("sdxl_like")
    stream = stream_of(modules, "nested")
    step_in_backward(modules)
    for name, parameter in modules["text_encoder"].named_parameters():  # no input of the first segment has a gradient
        parameter.requires_grad_("embeddings" not in name)
    at_end: list[int] = []
    end = stream._end_backward
    monkeypatch.setattr(stream, "_end_backward", lambda: at_end.append(len(stream._held)) or end())
    most = 0
    enter = stream.enter

    def counting(group) -> None:
        nonlocal most
        enter(group)
        most = max(most, sum(each.num_users > 0 for each in stream._groups))

    monkeypatch.setattr(stream, "enter", counting)
    for step in range(2):
        loss_of(modules, step).backward()
    assert at_end == [0, 0]
    assert most == 2, "an outer segment and one inside it"


def test_weights_are_fetched_ahead_in_the_order_of_the_pass_before(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = build("sdxl_like")
    stream = stream_of(modules)
    step_in_backward(modules)
    late: list[object] = []
    take = stream._take
    monkeypatch.setattr(stream, "_take", lambda group: late.append(group not in stream._awaited) or take(group))
    loss_of(modules).backward()
    assert all(late), "nothing is known about the order"
    late.clear()
    loss_of(modules).backward()
    assert not any(late)


def test_frozen_weights_go_in_only_and_those_that_train_stay() -> None:
    modules = build("sdxl_like")
    for module in modules.values():
        module.requires_grad_(False)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(".to_q" in name or ".q_proj" in name)
    plain = clones(modules)
    before = {component: {k: v.clone() for k, v in module.state_dict().items()} for component, module in plain.items()}
    stream = stream_of(modules, trained=False)
    stream._send_back = None  # type: ignore[assignment, method-assign]
    assert not any(parameter.requires_grad for parameter in streamed(stream))
    for step in range(2):
        assert_same_bits(loss_and_gradients(modules, step), loss_and_gradients(plain, step))
    for component, module in modules.items():
        assert_same_bits(module.state_dict(), before[component])


def test_between_passes_weights_are_on_the_host_and_may_be_replaced() -> None:
    modules, other = build("tiny"), build("tiny")
    with torch.no_grad():
        for module in other.values():
            for parameter in module.parameters():
                parameter.mul_(0.5)
    stream = stream_of(modules)
    loss_of(modules).backward()
    for group in stream._groups:
        assert all(weight.data_ptr() == own.data_ptr() for weight, own in zip(group.parameters, group.own, strict=True))
    for component, module in modules.items():
        module.load_state_dict(other[component].state_dict())
    assert torch.equal(loss_of(modules), loss_of(other))
    weight = next(streamed(stream))
    own, weight.data = weight.data, torch.zeros_like(weight)  # as an average of the weights, for samples
    with torch.no_grad():
        other_loss = loss_of(modules)
    assert not weight.any()
    weight.data = own
    with torch.no_grad():
        assert not torch.equal(other_loss, loss_of(modules))
        assert torch.equal(loss_of(modules), loss_of(other))


def test_after_an_error_the_next_pass_begins_anew() -> None:
    modules = build("tiny")
    plain = clones(modules)
    stream_of(modules)
    layer = modules["unet"].mid_block.resnets[0].conv1

    def fail(*_: object) -> None:
        raise MemoryError

    for place in (layer.register_forward_hook(fail), layer.weight.register_hook(fail)):
        with pytest.raises(MemoryError):
            loss_of(modules).backward()
        place.remove()
    assert torch.equal(loss_of(modules), loss_of(plain))
    for component, module in modules.items():
        assert_same_bits(module.state_dict(), plain[component].state_dict())


def test_slots_are_free_until_the_next_pass() -> None:
    modules = build("tiny")
    plain = clones(modules)
    stream = stream_of(modules)
    step_in_backward(modules)
    step_in_backward(plain)
    for step in range(2):
        for either in (modules, plain):
            loss_of(either, step).backward()
        assert modules["unet"].get_buffer(SLOTS).nbytes > 0
        weight_stream.rest(modules.values())
        assert modules["unet"].get_buffer(SLOTS).nbytes == 0
    assert not stream._slots
    for component, module in modules.items():
        assert_same_bits(module.state_dict(), plain[component].state_dict())


def test_undone() -> None:
    modules = build("tiny")
    plain = clones(modules)
    stream = WeightStream(CPU, trained=True)
    undo = checkpointing.apply(find_blocks(modules), "segments", stream=stream)
    stream.begin(modules)
    loss_of(modules)
    stream.undo()
    assert not any(module._forward_pre_hooks for module in modules.values())
    assert torch.equal(loss_of(modules), loss_of(plain))
    undo()
    assert_same_bits(loss_and_gradients(modules), loss_and_gradients(plain))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("placement", ["layers", "segments", "nested"])
def test_the_same_weights_on_a_gpu(
    placement: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    device, modules = torch.device("cuda"), build("sdxl_like")
    plain = {name: module.to(device) for name, module in clones(modules).items()}
    checkpointing.apply(find_blocks(plain), placement)
    stream = WeightStream(device, trained=True)
    checkpointing.apply(find_blocks(modules), placement, stream=stream)
    stream.begin(modules)
    for module in modules.values():
        to_device(module, device)
    assert all(weight.is_pinned() for weight in streamed(stream))
    for either in (modules, plain):
        step_in_backward(either)
    for step in range(6):
        losses = [loss_of(either, step) for either in (modules, plain)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        if step == 3:
            stream.rest()
        torch.cuda.current_stream().synchronize()  # no more than a step's report waits for
        for component, module in modules.items():
            expected = {name: weight.cpu() for name, weight in plain[component].state_dict().items()}
            assert_same_bits({name: weight.cpu() for name, weight in module.state_dict().items()}, expected)
