import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import plain_strategy, resolve_clipping, with_strategy
from lowmem_db.errors import ConfigError
from tests.config.test_rules import NEEDED


def config_of(fields):
    return load_config(None, list((NEEDED | fields).items()))


def test_what_nobody_planned_is_plain():
    strategy = plain_strategy(config_of({}))
    assert (strategy.weights, strategy.mixed_precision, strategy.checkpointing) == ("fp32", "no", "none")
    assert not strategy.optimizer_in_backward
    assert not strategy.stream_optimizer_state
    assert not strategy.offload_checkpoints
    assert strategy.clipping == "global"


def test_bf16_weights_compute_in_bf16_without_autocast():
    strategy = plain_strategy(config_of({"memory.weights": "bf16_extra_bits"}))
    assert (strategy.mixed_precision, strategy.autocast) == ("bf16", "no")
    strategy = plain_strategy(config_of({"training.mixed_precision": "bf16"}))
    assert (strategy.weights, strategy.autocast) == ("fp32", "bf16")


@pytest.mark.parametrize(
    ("fields", "after", "in_backward"),
    [
        ({}, "global", "update_rms"),
        ({"training.max_grad_norm": 1.0}, "global", "lagged"),
        ({"training.max_grad_norm": None}, "none", "none"),
        ({"training.clipping": "per_tensor"}, "per_tensor", "per_tensor"),
    ],
)
def test_clipping_follows_what_the_user_gave(fields, after, in_backward):
    config = config_of(fields)
    assert resolve_clipping(config, optimizer_in_backward=False) == after
    assert resolve_clipping(config, optimizer_in_backward=True) == in_backward


def test_a_strategy_written_into_a_configuration_comes_out_of_it_again():
    fields = {
        "memory.weights": "bf16_stochastic",
        "memory.optimizer_in_backward": True,
        "memory.stream_optimizer_state": True,
        "memory.checkpointing": {"unet.mid_block": "nested"},
        "memory.offload_checkpoints": True,
        "memory.tiled_samples": True,
    }
    strategy = plain_strategy(config_of(fields))
    written = with_strategy(config_of({}), strategy)
    assert plain_strategy(written) == strategy
    assert written.training.clipping == "update_rms"


def test_frozen_weights_of_a_lora_run_are_part_of_the_strategy():
    strategy = plain_strategy(config_of({"lora.enabled": True, "lora.base_weights": "nf4"}))
    assert (strategy.weights, strategy.base_weights, strategy.autocast) == ("fp32", "nf4", "bf16")
    assert plain_strategy(with_strategy(config_of({"lora.enabled": True}), strategy)) == strategy
    assert plain_strategy(config_of({"lora.enabled": True})).base_weights == "fp32"
    assert plain_strategy(config_of({})).base_weights is None


def test_plainly_rounded_weights_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"memory\.weights: 'bf16'.*lose small updates.*bf16_extra_bits"):
        config_of({"memory.weights": "bf16"})


def test_the_budget_is_a_size_or_auto():
    assert config_of({}).memory.budget == "auto"
    assert config_of({"memory.budget": "8GiB"}).memory.budget == 8 << 30
    with pytest.raises(ConfigError, match=r"memory\.budget.*'8 gigs'.*allowed: for instance 8GiB"):
        config_of({"memory.budget": "8 gigs"})
