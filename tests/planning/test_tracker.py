"""Bytes of tensors, by hand and against the profiler."""

import pytest
import torch
from lowmem_db_kernels import adamw8bit_step, init_state
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from lowmem_db.host_memory import empty_on_host
from lowmem_db.planning.costs import Attention, CostRecorder
from lowmem_db.planning.tracing import real_paths
from lowmem_db.planning.tracker import AllocationTracker

KIB = 1024


def floats(kib: int, device: str = "meta") -> torch.Tensor:
    return torch.empty(kib * KIB // 4, device=device)


def test_storages_count_until_nobody_refers_to_them():
    tracker = AllocationTracker()
    with tracker.tracking():
        first = floats(4)
        second = first + 1
        assert tracker.live_bytes == 8 * KIB
        del first
        assert tracker.live_bytes == 4 * KIB
        third = second * 2
        del second, third
    assert tracker.live_bytes == 0
    assert tracker.peak.total == 8 * KIB


def test_views_and_changes_in_place_cost_nothing():
    tracker = AllocationTracker()
    with tracker.tracking():
        base = floats(4)
        view = base.view(32, 32)[3:7].t()
        base.add_(1)
        base.detach().copy_(base)
        del base
        assert tracker.live_bytes == 4 * KIB, "a view keeps the whole storage"
        del view
        assert tracker.live_bytes == 0


def test_every_storage_is_rounded_up():
    tracker = AllocationTracker()
    with tracker.tracking():
        kept = [torch.empty(1, device="meta"), torch.empty(129, device="meta")]
        assert tracker.live_bytes == 512 + 1024
    del kept


def test_other_devices_do_not_count():
    tracker = AllocationTracker()
    with tracker.tracking():
        kept = [floats(4), floats(8, "cpu")]
    assert tracker.live_bytes == 4 * KIB
    del kept


def test_host_memory_is_told_apart_and_makes_no_peak():
    costs = CostRecorder()
    tracker = AllocationTracker(costs=costs)
    with tracker.tracking():
        on_device = floats(4)
        on_host = empty_on_host((KIB,), torch.float32, device=torch.device("meta"))
        assert (tracker.live_bytes, tracker.peak.total, tracker.peak_host_bytes) == (4 * KIB, 4 * KIB, 4 * KIB)
        on_device.copy_(on_host)
        on_host.copy_(on_device)
        on_device.copy_(on_device + 1)
    found = costs.costs()
    assert (found.host_to_device_bytes, found.device_to_host_bytes) == (4 * KIB, 4 * KIB)


def step_plainly(size, *, dry_run=False, **options):
    """Take one step of 24-bit weights; return what it takes at its peak."""
    tracker = AllocationTracker(rounding=1, **options)
    with tracker.tracking():
        weight = torch.empty(size, dtype=torch.bfloat16, device="meta")
        bits, gradient = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
        scalar, pair, state = torch.empty((), device="meta"), torch.empty(2, device="meta"), init_state(weight)
        step = torch.empty((), dtype=torch.int64, device="meta")
        scales = {"grad_scale": scalar, "update_scale": scalar}
        tracker.reset_peak()
        options.get("costs", CostRecorder()).clear()
        before = tracker.live_bytes
        adamw8bit_step(
            weight, gradient, state, lr=scalar, step=step, extra_bits=bits, corrections=pair, dry_run=dry_run, **scales
        )  # fmt: skip
    return tracker.peak.total - before


@pytest.mark.parametrize("size", [300 * KIB, 300 * KIB + 77, 3 * 2**20, 2**20 - 77])
def test_plain_step_of_a_card_counts_what_its_twin_takes_for_a_moment(size, monkeypatch):
    monkeypatch.setenv("LOWMEM_DB_KERNELS", "eager")
    opened = step_plainly(size, cpu_kernels=True)
    assert opened <= step_plainly(size, eager_step=True) <= 1.08 * opened
    assert step_plainly(size) < 100


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("size", [2**20, 3 * 2**20])
def test_plain_step_of_a_card_takes_the_time_of_what_its_twin_launches(size, dry_run, monkeypatch):
    monkeypatch.setenv("LOWMEM_DB_KERNELS", "eager")

    def costs_of(**options):
        recorder = CostRecorder()
        step_plainly(size, dry_run=dry_run, costs=recorder, **options)
        found = recorder.costs()
        return len(found.flops), found.moved_bytes.sum()

    assert costs_of(eager_step=True) == pytest.approx(costs_of(cpu_kernels=True), rel=0.02)
    assert costs_of()[0] == 1


def test_attention_of_the_backward_pass_is_known():
    costs = CostRecorder()
    with real_paths(on_cpu=False, autocast=False), AllocationTracker(costs=costs).tracking():
        queries = torch.empty(2, 5, 300, 40, dtype=torch.float16, device="meta", requires_grad=True)
        keys = torch.empty(2, 5, 77, 40, dtype=torch.float16, device="meta")
        made = functional.scaled_dot_product_attention(queries, keys, keys)
        assert not costs.costs().attentions
        made.sum().backward()
    assert costs.costs().attentions == {Attention(10, 300, 40, torch.float16)}


@pytest.mark.parametrize("frees", [False, True])
def test_parts_of_a_training_step(frees):
    layers = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False)).to("meta")
    if frees:
        for parameter in layers.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    matrix = 64 * 64 * 4
    tracker = AllocationTracker()
    with tracker.tracking():
        tracker.register(layers.parameters(), "weights")
        with tracker.new_tensors_are("activations"), tracker.gradients_of(layers.parameters()):
            loss = layers(torch.empty(64, 64, device="meta")).sum()
            assert tracker.live.weights == 2 * matrix
            assert tracker.live.activations == 3 * matrix + 512 - matrix, "the last output is not kept"
            loss.backward()
    assert tracker.live.gradients == (0 if frees else 2 * matrix)
    assert tracker.live.weights == 2 * matrix


def test_peak_names_the_parts_of_its_moment():
    tracker = AllocationTracker()
    with tracker.tracking():
        with tracker.new_tensors_are("weights"):
            weights = floats(2)
        with tracker.new_tensors_are("activations"):
            large = floats(16)
        del large
        other = floats(4)
    assert (tracker.peak.weights, tracker.peak.activations, tracker.peak.other) == (2 * KIB, 16 * KIB, 0)
    del weights, other


def test_intervals_have_peaks_of_their_own():
    tracker = AllocationTracker()
    with tracker.tracking():
        large = floats(16)
        del large
        assert tracker.end_interval() == 16 * KIB
        small = floats(4)
        assert tracker.end_interval() == 4 * KIB
    del small


def test_scalars_of_a_trace_are_those_of_a_step_that_goes_well():
    with AllocationTracker().tracking():
        assert bool(torch.empty((), dtype=torch.bool, device="meta")) is True
        assert torch.empty((), device="meta").item() == 1.0


def test_agrees_with_the_profiler_on_real_tensors():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64), nn.SiLU())
    pictures = torch.randn(256, 64)

    def step() -> None:
        layers(pictures).square().mean().backward()
        layers.zero_grad()

    step()
    tracker = AllocationTracker(device_type="cpu", rounding=1)
    with tracker.tracking():
        tracker.register([pictures, *layers.parameters()], "weights")
        before = tracker.live_bytes
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    allocated = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        allocated += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, allocated)
    assert tracker.peak.total - before == pytest.approx(peak, rel=0.02)
