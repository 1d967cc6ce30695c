"""The paths a trace takes on the meta device are those of the real one."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowmem_db.config.strategy import resolve
from lowmem_db.errors import ConfigError
from lowmem_db.planning.cards import CPU
from lowmem_db.planning.phases import trace_train
from lowmem_db.planning.plan import Planner
from lowmem_db.planning.tracing import real_paths
from lowmem_db.planning.tracker import AllocationTracker
from tests.planning.conftest import make_config, make_run


def attend_and_fail(tracker: AllocationTracker) -> None:
    query = torch.empty(1, 2, 1024, 64, device="meta", requires_grad=True)
    assert functional.scaled_dot_product_attention(query, query, query).shape == query.shape
    assert tracker.peak.total < 2 * 1024 * 1024 * 4, "a matrix of all pairs has been made"
    raise ValueError("inside")


def test_attention_matrix_is_never_made_and_everything_is_put_back():
    attention, autocast = functional.scaled_dot_product_attention, torch.autocast
    tracker = AllocationTracker()
    with pytest.raises(ValueError, match="inside"), real_paths(on_cpu=False, autocast=True), tracker.tracking():
        attend_and_fail(tracker)
    assert functional.scaled_dot_product_attention is attention
    assert torch.autocast is autocast


def low_precision_step(device: str, tracker: AllocationTracker) -> None:
    layers = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 64)).to(device)
    with tracker.tracking():
        tracker.register(layers.parameters(), "weights")
        rows = torch.empty(128, 64, device=device).zero_()
        tracker.reset_peak()
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            loss = layers(rows).float().sum()
        loss.backward()


def test_autocast_on_meta_needs_what_it_needs_on_the_cpu():
    real = AllocationTracker(device_type="cpu", rounding=1)
    low_precision_step("cpu", real)
    traced = AllocationTracker(rounding=1)
    with real_paths(on_cpu=True, autocast=True):
        low_precision_step("meta", traced)
    assert traced.peak.total == pytest.approx(real.peak.total, rel=0.01)


def test_autocast_casts_products_down_and_norms_up_and_only_inside():
    weight = torch.empty(8, 8, device="meta")
    with real_paths(on_cpu=False, autocast=True):
        with torch.autocast("meta", torch.float16):
            product = functional.linear(weight, weight)
            assert product.dtype == torch.float16
            assert functional.layer_norm(product, (8,)).dtype == torch.float32
            assert functional.silu(product).dtype == torch.float16
        assert functional.linear(weight, weight).dtype == torch.float32


def test_xformers_is_planned_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    traced = {
        name: trace_train(make_run(resolve(make_config(memory__attention=name)))) for name in ("sdpa", "xformers")
    }
    assert traced["xformers"].costs.attentions == traced["sdpa"].costs.attentions != frozenset()
    kept = {name: sum(block.left for block in each.blocks.values()) for name, each in traced.items()}
    assert 1.0 < kept["xformers"] / kept["sdpa"] < 1.1, "diffusers copies what is attended to"


def test_xformers_is_not_planned_for_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"memory\.attention: 'xformers' needs a CUDA device"):
        Planner(make_run(make_config(memory__attention="xformers"), CPU))
