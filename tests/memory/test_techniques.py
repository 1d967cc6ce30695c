"""The list of techniques: put on a model together, taken off again, refused where they cannot serve."""

from collections.abc import Callable

import pytest
import torch

from lowmem_db import environment
from lowmem_db.config.loading import field_paths
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import changed, resolve
from lowmem_db.engine.build import build_step
from lowmem_db.errors import ConfigError, DependencyError
from lowmem_db.memory import techniques
from lowmem_db.memory.techniques import TECHNIQUES
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.finding import model_of

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def plain(tiny_config: Config) -> Config:
    return resolve(tiny_config)


@pytest.fixture
def denoiser(plain: Config) -> Denoiser:
    return build_step(plain, model_of(plain), META)[0]


def attributes(denoiser: Denoiser) -> list[tuple[str, dict[str, object]]]:
    return [(name, dict(module.__dict__)) for name, module in denoiser.module.named_modules()]


def test_every_field_of_a_technique_is_one_of_the_configuration() -> None:
    paths = [path for technique in TECHNIQUES for path in technique.fields]
    assert len(set(paths)) == len(paths)
    assert set(paths) <= set(field_paths())


@pytest.mark.parametrize("field", ["memory.fused_layers", "memory.checkpointing"])
def test_each_changes_the_model_and_is_taken_off_again(field: str, denoiser: Denoiser, plain: Config) -> None:
    before = attributes(denoiser)
    value = "segments" if field == "memory.checkpointing" else True
    undo = techniques.apply(denoiser, changed(plain, {field: value}), META)
    assert attributes(denoiser) != before
    undo()
    assert attributes(denoiser) == before


def test_all_are_taken_off_in_the_order_that_leaves_nothing(denoiser: Denoiser, plain: Config) -> None:
    before = attributes(denoiser)
    on = {"memory.fused_layers": True, "memory.checkpointing": "nested", "memory.offload_checkpoints": True}
    for _ in range(2):  # the second time is refused where something was left
        techniques.apply(denoiser, changed(plain, on), META)()
    assert attributes(denoiser) == before


def test_a_block_that_is_not_there_is_named(denoiser: Denoiser, plain: Config) -> None:
    config = changed(plain, {"memory.checkpointing": {"unet.up_blocks.9": "segments"}})
    with pytest.raises(ConfigError, match=r"memory\.checkpointing: 'unet\.up_blocks\.9'"):
        techniques.apply(denoiser, config, META)


def test_fused_layers_are_refused_where_no_layer_can_be_fused(denoiser: Denoiser, plain: Config) -> None:
    config = changed(plain, {"memory.fused_layers": True})
    techniques.apply(denoiser, config, META)
    with pytest.raises(
        ConfigError, match=r"memory\.fused_layers: .* are already fused; set memory\.fused_layers=false"
    ):
        techniques.apply(denoiser, config, META)


def test_fused_layers_need_compiled_kernels_on_a_card(monkeypatch: pytest.MonkeyPatch, plain: Config) -> None:
    config, cuda = changed(plain, {"memory.fused_layers": True}), torch.device("cuda")
    monkeypatch.setattr(environment, "why_not_compiled", lambda operators, device: "geglu: Triton cannot be imported")
    with pytest.raises(
        DependencyError, match=r"fused_layers: true needs compiled kernels on cuda: geglu: Triton .* out"
    ):
        techniques.check(config, cuda)
    techniques.check(config, CPU)
    techniques.check(plain, cuda)


def test_the_machine_says_what_serves_its_kernels() -> None:
    reason = environment.why_not_compiled(("geglu",), CPU)
    assert reason is not None
    assert reason.startswith("geglu: ")
    assert environment.why_not_compiled((), CPU) is None


def test_fused_layers_keep_fewer_activations(plain: Config, kept_bytes: Callable[[Config], int]) -> None:
    assert kept_bytes(changed(plain, {"memory.fused_layers": True})) < 0.95 * kept_bytes(plain)


@pytest.fixture
def kept_bytes() -> Callable[[Config], int]:
    """Bytes of activations at the peak of a step, as the planner traces it."""
    from lowmem_db.planning.cards import ASSUMED
    from lowmem_db.planning.phases import TracedRun, trace_train

    return lambda config: trace_train(TracedRun(config=config, model=model_of(config), card=ASSUMED)).peak.activations
