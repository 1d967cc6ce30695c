"""The step on the host: what fails in its thread is raised where it was started, and no thread is left."""

import threading

import pytest
import torch

from lowmem_db.optimizers import on_host
from lowmem_db.out_of_memory import place_of
from tests.optimizers.test_handle import ON_HOST, RATES, build, do_step, loss_of, modules, weights_of

FIELDS = {"optimizer.name": "adamw8bit"} | ON_HOST


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("optimizer_step")]


@pytest.mark.parametrize("error", [ValueError("no such state"), MemoryError()], ids=["value", "memory"])
def test_what_fails_on_the_host_is_raised_in_the_step_and_names_the_field(error: Exception, monkeypatch) -> None:
    trained = modules()
    handle = build(trained, FIELDS)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(handle._on_host.rule, "step", fail)
        with pytest.raises(RuntimeError, match=r"memory\.optimizer_step: .* failed .*optimizer_step=device") as caught:
            do_step(handle, trained, 0)
    assert caught.value.__cause__ is error
    assert place_of(caught.value) == ("host" if isinstance(error, MemoryError) else None)
    assert threads() == []
    assert do_step(handle, trained, 1) > 0.0


def test_after_an_error_in_the_backward_pass_no_thread_is_left_and_the_next_step_is_whole() -> None:
    trained, other = modules(), modules()
    handle, plain = build(trained, FIELDS), build(other, FIELDS | {"memory.optimizer_step": "device"})

    def fail(_: torch.Tensor) -> None:
        assert threads() != []
        raise MemoryError

    hook = trained["unet"][0].weight.register_hook(fail)
    with pytest.raises(MemoryError):
        do_step(handle, trained, 0)
    hook.remove()
    assert threads() == []
    for module, like in zip(trained.values(), other.values(), strict=True):
        module.load_state_dict(like.state_dict())
    handle.load_state_dict(plain.state_dict())
    for step in (1, 2):
        assert do_step(handle, trained, step) == do_step(plain, other, step)
    for one, two in zip(weights_of(trained), weights_of(other), strict=True):
        assert torch.equal(one, two)


def test_steps_run_beside_the_backward_pass(monkeypatch) -> None:
    """The last layer is stepped while the first one has no gradient yet."""
    trained = modules()
    handle = build(trained, FIELDS)
    handle.set_learning_rates(RATES[0])
    stepped, order = threading.Event(), []
    finished = on_host._once_arrived

    def once_arrived(arrived, step):
        found = finished(arrived, step)
        order.append(threading.current_thread().name)
        stepped.set()
        return found

    monkeypatch.setattr(on_host, "_once_arrived", once_arrived)
    trained["unet"][0].weight.register_hook(lambda gradient: order.append(stepped.wait(60)))
    handle.backward(loss_of(trained, 0))
    assert True in order
    assert {name for name in order if name is not True} == {"optimizer_step_0"}
    assert order.index(True) > 0
    assert threads() == []


def test_gradients_that_leave_take_no_more_than_the_largest_weight_that_streams() -> None:
    trained = modules()
    handle = build(trained, FIELDS)
    step = handle._on_host
    step._most_leaving = 2 * trained["unet"][2].weight.nbytes
    most: list[int] = []
    send = step.send
    step.send = lambda *args: (send(*args), most.append(sum(each.nbytes for each, _ in step._leaving)))
    do_step(handle, trained, 0)
    assert len(most) == 4
    assert max(most) <= step._most_leaving
    assert not step._leaving
