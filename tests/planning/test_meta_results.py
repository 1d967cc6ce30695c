"""Results from memory are those the operators give."""

import torch

from lowmem_db.planning import meta_results
from lowmem_db.planning.tracker import AllocationTracker

aten = torch.ops.aten


def description(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def test_second_call_returns_the_same_shapes_in_a_new_storage():
    left = torch.empty(3, 4, device="meta", dtype=torch.bfloat16).t()
    right = torch.empty(3, device="meta")
    first, row = meta_results.run(aten.mul.Tensor, (left, right), {})
    second, again = meta_results.run(aten.mul.Tensor, (left, right), {})
    assert description(first) == description(second) == description(left * right)
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    assert row == again
    assert row.moved_bytes == 12 * 2 + 3 * 4 + 12 * 4


def test_other_strides_types_and_numbers_are_other_calls():
    tensor = torch.empty(4, 4, device="meta")
    for argument in (tensor, tensor.t(), tensor.half()):
        made, _ = meta_results.run(aten.relu.default, (argument,), {})
        assert description(made) == description(argument.relu())
    for number in (2, 2.0, True):
        made, _ = meta_results.run(aten.add.Tensor, (torch.empty(3, dtype=torch.int64, device="meta"), number), {})
        assert made.dtype == torch.add(torch.ones(3, dtype=torch.int64), number).dtype


def test_change_in_place_returns_its_argument():
    for _ in range(2):
        tensor = torch.empty(5, device="meta")
        made, _ = meta_results.run(aten.add_.Tensor, (tensor, 1), {})
        assert made is tensor


def test_result_that_shares_its_argument_is_never_made_anew():
    tracker = AllocationTracker()
    with tracker.tracking():
        tensor = torch.empty(256, device="meta")
        views = [aten._unsafe_view.default(tensor, [16, 16]) for _ in range(3)]
        assert tracker.live_bytes == 1024
    del views


def test_tensors_on_the_host_are_looked_at_every_time():
    for value in (1, 5):
        made, _ = meta_results.run(aten.add.Tensor, (torch.tensor(value), 1), {})
        assert made.item() == value + 1
