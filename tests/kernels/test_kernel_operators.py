"""The dispatcher is bypassed only when nothing observes operators, and the result has the same bits."""

import pytest
import torch
from lowmem_db_kernels import adamw8bit_step, init_state
from lowmem_db_kernels.adamw8bit_state import StepOperands
from lowmem_db_kernels.operators import runs_plainly
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def draw(seed, size=5000):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def step(param, grad, state, number=1):
    return adamw8bit_step(param, grad, state, lr=1e-3, step=number)


def test_flat_schema_is_that_of_the_operands():
    schema = torch.ops.lowmem_db_kernels.adamw8bit_step.default._schema
    assert tuple(argument.name for argument in schema.arguments) == StepOperands._fields
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert written == ["param", "extra_bits", "state1", "state2", "absmax1", "absmax2"]


def test_plain_tensors_run_plainly():
    assert runs_plainly(torch.ones(2))
    assert runs_plainly(torch.nn.Parameter(torch.ones(2)))
    assert not runs_plainly(torch.ones(2, device="meta"))


def test_watched_and_transformed_tensors_go_through_the_operator():
    def inside(x):
        seen.append(runs_plainly(x))
        return x + 1

    seen = []
    with Names():
        inside(torch.ones(2))
    with FakeTensorMode() as mode:
        inside(torch.ones(2))
    inside(mode.from_tensor(torch.ones(2)))
    make_fx(inside)(torch.ones(2))
    torch.func.vmap(inside)(torch.ones(3, 2))
    torch.func.grad(lambda x: inside(x).sum())(torch.ones(2))
    assert seen == [False] * len(seen)
    assert len(seen) >= 6


def test_compiled_code_has_the_operator():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    param, state = draw(0), init_state(draw(0))
    torch.compile(step, backend=keep, fullgraph=True)(param, draw(1), state)
    assert "lowmem_db_kernels.adamw8bit_step" in graphs[0].code


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_both_ways_write_the_same_bits(weights):
    plain, watched = (draw(0).to(weights) for _ in range(2))
    states = [init_state(plain) for _ in range(2)]
    options = {"lr": 1e-3} | ({"rounding_seed": 3} if weights == torch.bfloat16 else {})
    for number in range(1, 4):
        sums = adamw8bit_step(plain, draw(number), states[0], step=number, **options)
        with Names() as ran:
            expected = adamw8bit_step(watched, draw(number), states[1], step=number, **options)
        assert "lowmem_db_kernels::adamw8bit_step" in ran.names
        assert torch.equal(sums, expected)
    assert torch.equal(plain, watched)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_a_weight_that_backward_needs_and_that_was_stepped_is_an_error():
    """What is written around the dispatcher is written all the same."""
    param = draw(0).requires_grad_()
    loss = (param * param).sum()
    with torch.no_grad():
        step(param, draw(1), init_state(param))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
