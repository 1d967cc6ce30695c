"""Plans of a tiny model on a card: bytes beside the allowance decide."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lowmem_db import environment
from lowmem_db.config.strategy import autocast, open_paths, resolve
from lowmem_db.errors import BudgetError, ConfigError, ModelError
from lowmem_db.models.finding import model_of
from lowmem_db.planning import calibration
from lowmem_db.planning.candidates import candidates, open_choices
from lowmem_db.planning.cards import ASSUMED, CPU, find_card
from lowmem_db.planning.costs import Attention
from lowmem_db.planning.phases import trace_train
from lowmem_db.planning.plan import Plan, Planner, plan
from lowmem_db.planning.predictor import Predictor
from lowmem_db.planning.target import Target
from tests.planning.conftest import make_config, make_run

GIB = 1 << 30


@pytest.fixture(scope="module")
def tiny(tiny_model) -> dict[str, object]:
    return {
        "model__base": str(tiny_model), "data__resolution": 32, "optimizer__name": "adamw8bit",
        "training__train_batch_size": 8, "prior__enabled": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def plan_for(tiny) -> Callable[..., Plan]:
    def make(budget_bytes: int, card=ASSUMED, **fields) -> Plan:
        return plan(make_config(**tiny | fields), Target(card=card, budget_bytes=budget_bytes))

    return make


@pytest.fixture(scope="module")
def planner(tiny) -> Planner:
    """A planner that leaves everything open; its traces serve several tests."""
    return Planner(make_run(make_config(**tiny)))


@pytest.fixture(scope="module")
def plans(planner) -> list[Plan]:
    """Plans for ever smaller budgets: each is a byte less than the plan before needs."""
    found = [planner.plan(GIB)]
    while len(found) < 8:
        try:
            found.append(planner.plan(found[-1].peak_bytes - 1))
        except BudgetError:
            break
    return found


def test_workspace_of_attention_is_part_of_training_alone(planner, monkeypatch):
    before = planner.plan(4 * GIB)
    large = frozenset({Attention(ASSUMED.multiprocessors, 65536, 64, torch.bfloat16)})
    monkeypatch.setattr(Predictor, "attentions", large)
    planner = Planner(planner.run, planner.traces)
    after, of_attention = planner.plan(4 * GIB), 4 * ASSUMED.multiprocessors * 65536 * 64
    assert after.peak_bytes - before.peak_bytes == 32 * 2**20 + of_attention - 150 * 2**20
    assert after.peak_bytes == after.tensor_bytes + after.allowance_bytes
    assert after.reserved_bytes - before.reserved_bytes == after.peak_bytes - before.peak_bytes
    assert planner.needs.before_training(after.config) == planner.needs.before_training(before.config)
    assert planner.find(after.peak_bytes // 2) is None


def test_plain_step_on_a_card_is_planned_with_its_temporaries(tiny):
    plain = replace(ASSUMED, eager_step=True)
    config = resolve(make_config(**tiny, memory__weights="bf16_extra_bits", memory__optimizer_in_backward=False))
    with_triton, without = (trace_train(make_run(config, card)).peak.total for card in (ASSUMED, plain))
    assert with_triton < without < with_triton + 80 * 2**20


@pytest.mark.parametrize(("ratio", "chosen"), [(0.85, True), (0.99, False), (1.2, False)])
def test_channels_last_is_chosen_where_a_card_was_measured_to_gain_by_it(tiny, planner, monkeypatch, ratio, chosen):
    without = planner.plan(4 * GIB)
    assert not without.config.memory.channels_last
    ratios = {"memory.fused_layers": 1.1, "memory.channels_last": ratio}
    monkeypatch.setattr(calibration, "RATIOS", {ASSUMED.name: ratios})
    found = Planner(planner.run, planner.traces).plan(4 * GIB)
    assert (found.config.memory.channels_last, found.config.memory.fused_layers) == (chosen, chosen)
    assert found.seconds_per_step == pytest.approx(without.seconds_per_step * (ratio if chosen else 1.0))
    other = find_card("RTX 4090")
    assert not other.faster_with
    fixed = make_config(**tiny, memory__fused_layers=False)
    assert not any(each.memory.channels_last for each in candidates(fixed, ASSUMED, [])[0])


def test_larger_budget_is_never_slower(plans):
    assert len(plans) >= 4
    for weights in ("bf16_extra_bits", "bf16_stochastic"):
        seconds = [each.seconds_per_step for each in plans if each.config.memory.weights == weights]
        assert seconds == sorted(seconds)
    weights = [each.config.memory.weights for each in plans]
    assert weights == sorted(weights), "stochastic rounding comes last"


def test_enough_memory_is_spent_on_speed(plans):
    memory = plans[0].config.memory
    assert (memory.checkpointing, memory.stream_optimizer_state, memory.offload_checkpoints) == (
        "none", False, False,
    )  # fmt: skip
    assert not memory.optimizer_in_backward
    assert plans[0].config.training.clipping == "global"
    assert plans[0].refused == ()


def test_plans_fit_and_say_why_faster_ones_do_not(plans):
    for each in plans:
        assert each.peak_bytes <= each.budget_bytes
        names = [refusal.strategy for refusal in each.refused]
        assert len(set(names)) == len(names)
        assert all("more than the budget" in refusal.reason for refusal in each.refused)
    assert len(plans[-1].refused) > len(plans[1].refused) > 0


def test_figure_is_that_of_a_trace_of_exactly_this_strategy(plans, tiny):
    for each in plans[1:3]:
        train = next(phase for phase in each.phases if phase.name == "train")
        assert train.parts == trace_train(make_run(each.config)).peak


def test_plan_is_the_configuration_with_nothing_left_open(plans, tiny):
    for each in plans:
        assert not open_paths(each.config)
        assert resolve(each.config) == each.config
        assert each.config.optimizer == make_config(**tiny).optimizer


def test_budget_that_is_too_small_names_one_that_is_enough(planner):
    with pytest.raises(BudgetError, match="the smallest budget that is enough is") as raised:
        planner.plan(100 << 20)
    assert raised.value.exit_code == 3
    named = float(str(raised.value).partition("is enough is ")[2].partition("GiB")[0])
    assert planner.plan(int(named * GIB)).peak_bytes <= named * GIB


def test_given_fields_are_constraints(plan_for):
    found = plan_for(
        GIB, memory__checkpointing="layers", memory__weights="bf16_stochastic", memory__optimizer_in_backward=True
    )
    strategy = found.config
    assert (strategy.memory.checkpointing, strategy.memory.weights, strategy.memory.optimizer_in_backward) == (
        "layers", "bf16_stochastic", True,
    )  # fmt: skip
    assert strategy.training.clipping == "update_rms"


def test_accumulation_rules_the_backward_pass_out():
    config = make_config(training__gradient_accumulation_steps=2)
    kept, refused = candidates(config, ASSUMED, [])
    assert not any(strategy.memory.optimizer_in_backward for strategy in kept)
    assert any("gradient_accumulation_steps is 2" in refusal.reason for refusal in refused)


def test_rule_that_refuses_every_strategy_is_an_error():
    fields = {"memory__stream_optimizer_state": True, "memory__optimizer_in_backward": True}
    config = make_config(ema__enabled=True, memory__stream_weights=False, **fields)
    memory = config.memory.model_copy(update={"weights": "bf16_extra_bits"})  # what load_config refuses by itself
    with pytest.raises(ConfigError, match=r"ema\.enabled: true averages complete weights"):
        plan(config.model_copy(update={"memory": memory}), Target(card=ASSUMED, budget_bytes=GIB))


@pytest.mark.parametrize(
    ("card", "weights", "precision"),
    [(CPU, "fp32", "no"), (find_card("T4"), "fp32", "fp16"), (ASSUMED, "bf16_extra_bits", "bf16")],
)
def test_weights_follow_the_card(card, weights, precision):
    kept, _ = candidates(make_config(), card, [])
    assert {strategy.memory.weights for strategy in kept} <= {weights, "bf16_stochastic"}
    assert (kept[0].memory.weights, kept[0].training.mixed_precision) == (weights, precision)
    streams = any(strategy.memory.stream_optimizer_state or strategy.memory.offload_checkpoints for strategy in kept)
    assert streams == (card is not CPU)


def test_loss_scaling_on_a_card_without_bf16_steps_too(tiny):
    config, card = make_config(**tiny), find_card("T4")
    strategy = candidates(config, card, [])[0][0]
    found = trace_train(make_run(strategy, card))
    assert not strategy.memory.optimizer_in_backward
    assert autocast(strategy) == "fp16"
    assert found.costs.flops[found.costs.compute_type == 1].sum() > 0.9 * found.costs.flops.sum(), "not in fp16"


def test_phases_are_those_the_configuration_has(plan_for):
    full = plan_for(8 * GIB, prior__enabled=True, sampling__prompts=["a dog"], prior__num_class_images=2)
    assert [phase.name for phase in full.phases] == ["class_images", "encode_images", "encode_text", "train", "sample"]
    assert full.phases[-1].parts.optimizer_state > 0, "the optimizer stays in memory while samples are drawn"
    few = plan_for(8 * GIB, training__train_text_encoder=True)
    assert [phase.name for phase in few.phases] == ["encode_images", "train"]


@pytest.mark.long
def test_samples_are_tiled_where_they_would_be_the_peak(plan_for):
    fields = {
        "sampling__prompts": ["a dog"], "sampling__num_images": 64, "training__train_batch_size": 1,
        "memory__optimizer_in_backward": True, "memory__stream_optimizer_state": True,
        "memory__checkpointing": "nested", "memory__weights": "bf16_stochastic", "memory__offload_checkpoints": False,
        "memory__fused_layers": False, "memory__stream_weights": False,
    }  # fmt: skip
    roomy = plan_for(8 * GIB, **fields)
    tight = plan_for(roomy.peak_bytes - 1, **fields)
    assert (roomy.config.memory.tiled_samples, tight.config.memory.tiled_samples) == (False, True)
    assert roomy.notes == ("the peak of the run is in the phase sample, not in train",)
    assert tight.peak_bytes < roomy.peak_bytes
    with pytest.raises(BudgetError, match="phase sample"):
        plan_for(tight.budget_bytes, memory__tiled_samples=False, **fields)


LORA = {"lora__enabled": True, "optimizer__name": "adamw"}


def test_lora_weights_follow_the_card_and_nf4_comes_last(monkeypatch):
    monkeypatch.setattr(environment, "is_installed", lambda name: True)
    for card, types, precision in (
        (CPU, ["fp32"], "no"), (find_card("T4"), ["fp16", "nf4"], "fp16"), (ASSUMED, ["bf16", "nf4"], "bf16"),
    ):  # fmt: skip
        kept, _ = candidates(make_config(**LORA), card, [])
        assert list(dict.fromkeys(each.lora.base_weights for each in kept)) == types
        assert {(each.memory.weights, each.training.mixed_precision) for each in kept} == {("fp32", precision)}
    kept, _ = candidates(make_config(**LORA, lora__dora=True), ASSUMED, [])
    assert {each.lora.base_weights for each in kept} == {"bf16"}


def test_nf4_is_not_chosen_where_bitsandbytes_is_missing(monkeypatch):
    monkeypatch.setattr(environment, "is_installed", lambda name: False)
    kept, refused = candidates(make_config(**LORA), ASSUMED, [])
    assert {each.lora.base_weights for each in kept} == {"bf16"}
    assert refused[0].reason.startswith("bitsandbytes is missing")
    asked, _ = candidates(make_config(**LORA, lora__base_weights="nf4"), ASSUMED, [])
    assert {each.lora.base_weights for each in asked} == {"nf4"}


def test_lora_is_planned_with_the_bytes_of_its_adapters_and_frozen_weights(plan_for):
    full = plan_for(GIB, memory__weights="fp32", memory__checkpointing="none", memory__optimizer_in_backward=False)
    by_type = {
        kind: plan_for(GIB, lora__enabled=True, lora__rank=4, lora__base_weights=kind, memory__checkpointing="none")
        for kind in ("fp32", "bf16", "nf4")
    }
    parts = {
        kind: next(phase.parts for phase in found.phases if phase.name == "train") for kind, found in by_type.items()
    }
    whole = next(phase.parts for phase in full.phases if phase.name == "train")
    assert parts["fp32"].weights > parts["bf16"].weights
    assert parts["bf16"].gradients < whole.gradients
    assert parts["bf16"].optimizer_state < whole.optimizer_state
    assert all(found.config.lora.base_weights == kind for kind, found in by_type.items())


def test_quantized_weights_and_low_precision_are_refused_where_the_card_has_none():
    with pytest.raises(ConfigError, match=r"lora\.base_weights: 'nf4' needs a CUDA device"):
        open_choices(make_config(**LORA, lora__base_weights="nf4"), CPU)
    with pytest.raises(ConfigError, match=r"lora\.base_weights: T4 does not support 'bf16'"):
        open_choices(make_config(**LORA, lora__base_weights="bf16"), find_card("t4"))


def test_unknown_hub_id_says_what_to_do():
    config = make_config(model__base="somebody/something")
    with pytest.raises(ModelError, match=r"somebody/something.*download it .*demo, stable-diffusion-v1-5/"):
        model_of(config, weights=False)


def test_folder_without_a_denoiser_is_refused(tmp_path):
    with pytest.raises(ModelError, match="lacks unet"):
        model_of(make_config(model__base=str(tmp_path)), weights=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"memory__weights": "bf16_extra_bits"},
            r"memory\.weights: 'bf16_extra_bits' computes in bf16, which T4 does not support; set",
        ),
        (
            {"training__mixed_precision": "bf16"},
            r"training\.mixed_precision: T4 does not support 'bf16'; allowed there",
        ),
    ],
)
def test_what_the_card_cannot_compute_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        open_choices(make_config(**fields), find_card("t4"))
    assert open_choices(make_config(**fields), find_card("rtx 3060"))


def test_weights_stream_where_nothing_else_fits_and_the_host_is_large_enough():
    config = make_config(
        training__train_text_encoder=True, optimizer__name="adamw8bit", prior__enabled=False,
        memory__weights="bf16_extra_bits", memory__optimizer_in_backward=True, memory__stream_optimizer_state=True,
        memory__checkpointing="segments", memory__offload_checkpoints=False, memory__fused_layers=False,
    )  # fmt: skip
    planner = Planner(make_run(config))
    kept = [each for each in planner.candidates()[0] if each.memory.optimizer_step == "device"]
    by_place = {bool(each.memory.stream_weights): each for each in kept}
    needed = {streams: planner.needs.whole_run(each) for streams, each in by_place.items()}
    assert needed[True] < needed[False]
    assert planner.plan(needed[False]).config.memory.stream_weights is False
    found = planner.plan(needed[False] - 1)
    assert found.config.memory.stream_weights is True
    assert "of the host are pinned" in found.notes[-1]
    assert found.host_peak_bytes > max(phase.host_bytes for phase in found.phases)
    assert planner.predictor.seconds(by_place[True]) > planner.predictor.seconds(by_place[False])
    with pytest.raises(BudgetError, match="memory of the host"):
        planner.find(needed[False] - 1, host_bytes=1 << 20)


def test_step_is_on_the_host_behind_few_lanes_where_nothing_else_fits_or_where_asked_for(monkeypatch):
    fields = {
        "training__train_text_encoder": True, "optimizer__name": "adamw8bit", "prior__enabled": False,
        "memory__weights": "bf16_extra_bits", "memory__optimizer_in_backward": True,
        "memory__stream_optimizer_state": True, "memory__stream_weights": True, "memory__checkpointing": "segments",
        "memory__offload_checkpoints": False, "memory__fused_layers": False,
    }  # fmt: skip
    few = replace(ASSUMED, pcie_generation=3, pcie_lanes=1)
    planner = Planner(make_run(make_config(**fields)))
    behind_few = Planner(replace(planner.run, card=few), planner.traces)
    assert planner.plan(GIB).config.memory.optimizer_step == "device"
    assert behind_few.plan(GIB).config.memory.optimizer_step == "host"
    by_place = {each.memory.optimizer_step: each for each in planner.candidates()[0]}
    assert behind_few.predictor.seconds(by_place["host"]) < behind_few.predictor.seconds(by_place["device"])
    assert planner.needs.training(by_place["host"]) < planner.needs.training(by_place["device"])
    kept = {place: planner.predictor.resident(each) for place, each in by_place.items()}
    assert kept["host"].pinned_bytes < 0.7 * kept["device"].pinned_bytes
    assert kept["host"].host_bytes > kept["device"].host_bytes
    traced, crossing = planner.predictor.train(by_place["host"]).costs, planner.predictor.crossing(by_place["host"])
    assert traced.device_to_host_bytes == pytest.approx(crossing.back, rel=0.02)
    assert traced.host_to_device_bytes <= crossing.forward + crossing.backward
    monkeypatch.setattr(environment, "pinnable_host_bytes", lambda free: kept["device"].pinned_bytes - 1)
    found = planner.plan(GIB, host_bytes=9 * GIB)  # Windows pins a part of the memory alone
    assert found.config.memory.optimizer_step == "host"
    asked = Planner(make_run(make_config(**fields, memory__optimizer_step="device")), planner.traces)
    with pytest.raises(BudgetError, match="memory of the host"):
        asked.plan(GIB, host_bytes=9 * GIB)


def test_step_on_the_host_is_predicted_from_a_step_that_streams():
    """That of rounded weights is composed from the trace of 24-bit ones; if those did not stream, it would be less."""
    fields = {"memory__checkpointing": "nested", "memory__offload_checkpoints": False, "memory__fused_layers": False}
    planner = Planner(make_run(make_config(optimizer__name="adamw8bit", prior__enabled=False, **fields)))
    kept = {each.memory.weights: each for each in planner.candidates()[0] if each.memory.optimizer_step == "host"}
    exact = {weights: trace_train(make_run(each)).peak.total for weights, each in kept.items()}
    assert exact["bf16_stochastic"] < exact["bf16_extra_bits"]
    for weights, each in kept.items():
        assert planner.predictor.train_bytes(each) == pytest.approx(exact[weights], rel=1e-3)
