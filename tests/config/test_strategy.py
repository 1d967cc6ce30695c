"""The declaration of what a strategy is, and what follows from it."""

from dataclasses import MISSING, replace
from dataclasses import fields as dataclass_fields

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import create_model

from lowmem_db.config import strategy
from lowmem_db.config.loading import field_paths, load_config, to_yaml
from lowmem_db.config.schema import Config, LoraConfig, MemoryConfig, Section, TrainingConfig
from lowmem_db.config.strategy import (
    FIELDS,
    StrategyField,
    autocast,
    changed,
    check_resolved,
    describe,
    effort_of,
    key_of,
    open_paths,
    overhead_of,
    resolve,
    values_of,
)
from lowmem_db.errors import ConfigError
from tests.config.test_rules import NEEDED

CHOICES = {
    "memory.weights": ("fp32", "bf16_extra_bits", "bf16_stochastic"),
    "lora.base_weights": ("fp32", "fp16", "bf16", "int8", "nf4"),
    "training.mixed_precision": ("no", "fp16", "bf16"),
    "memory.checkpointing": ("none", "layers", "segments", "nested", {"unet.mid_block": "segments"}),
    "memory.optimizer_step": ("device", "host"),
    "memory.micro_batches": (0, 2, 4),
    "training.clipping": ("global", "update_rms", "lagged", "per_tensor", "none"),
}
DECIDED_BY_THE_USER = {"memory.budget", "memory.attention", "memory.techniques"}


def config_of(fields):
    return load_config(None, list((NEEDED | fields).items()))


def undeclared(section: type[Section], name: str) -> set[str]:
    """Return the fields of a section that can be left open and that no strategy declares."""
    declared = {field.path for field in FIELDS}
    paths = {f"{name}.{key}" for key, field in section.model_fields.items() if field.default is None}
    return paths - declared


def test_every_field_that_memory_leaves_open_is_declared():
    assert undeclared(MemoryConfig, "memory") == set()
    assert {f"memory.{name}" for name in MemoryConfig.model_fields} - {field.path for field in FIELDS} == (
        DECIDED_BY_THE_USER
    )
    dummy = create_model("Dummy", __base__=MemoryConfig, dummy=(bool | None, None))
    assert undeclared(dummy, "memory") == {"memory.dummy"}, "the check finds nothing"


def test_no_part_of_a_declaration_can_be_left_out():
    needed = {part.name for part in dataclass_fields(StrategyField) if part.default is MISSING}
    assert needed == {"path", "choices", "plain", "words", "rank", "effort", "overhead", "traced"}
    for part in needed:
        with pytest.raises(TypeError, match=part):
            StrategyField(**{name: getattr(FIELDS[0], name) for name in needed - {part}})


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.path)
def test_each_field_has_all_its_parts(field):
    assert field.path in set(field_paths())
    config = resolve(config_of({"lora.enabled": field.path == "lora.base_weights"}))
    assert field.of(config) == field.plain(config)
    assert field.traced, "nothing depends on it"
    for value in CHOICES.get(field.path, (False, True)):
        there = changed(config, {field.path: value})
        assert field.of(there) == value
        assert isinstance(field.effort(value), int)
        assert isinstance(field.overhead(value), float)
        for trace, alike in field.traced.items():
            hash(alike(value))
            if trace == "train":
                assert (key_of(there, "train") == key_of(config, "train")) == (value == field.of(config))
    if field.path not in CHOICES:
        assert field.words(changed(config, {field.path: True})) in describe(changed(config, {field.path: True}))


def test_json_of_a_strategy_has_every_field_once():
    names = list(values_of(resolve(config_of({}))))
    assert len(set(names)) == len(FIELDS)


def test_what_nobody_planned_is_plain():
    config = resolve(config_of({}))
    assert (config.memory.weights, config.training.mixed_precision, config.memory.checkpointing) == (
        "fp32", "no", "none",
    )  # fmt: skip
    switches = (
        "optimizer_in_backward",
        "stream_optimizer_state",
        "stream_weights",
        "offload_checkpoints",
        "fused_layers",
        "channels_last",
    )
    assert not any(getattr(config.memory, name) for name in switches)
    assert config.memory.optimizer_step == "device"
    assert config.training.clipping == "global"
    assert overhead_of(config) == 0.0
    assert describe(config) == "fp32, no checkpointing"


def test_bf16_weights_compute_in_bf16_without_autocast():
    config = resolve(config_of({"memory.weights": "bf16_extra_bits"}))
    assert (config.training.mixed_precision, autocast(config)) == ("bf16", "no")
    config = resolve(config_of({"training.mixed_precision": "bf16"}))
    assert (config.memory.weights, autocast(config)) == ("fp32", "bf16")


@pytest.mark.parametrize(
    ("fields", "after", "in_backward"),
    [
        ({}, "global", "update_rms"),
        ({"training.max_grad_norm": 1.0}, "global", "update_rms"),
        ({"training.max_grad_norm": 0.5}, "global", "lagged"),
        ({"training.max_grad_norm": None}, "none", "none"),
        ({"training.clipping": "per_tensor"}, "per_tensor", "per_tensor"),
    ],
)
def test_clipping_follows_the_largest_norm_and_not_who_wrote_it(fields, after, in_backward):
    assert resolve(config_of(fields)).training.clipping == after
    assert resolve(config_of(fields | {"memory.optimizer_in_backward": True})).training.clipping == in_backward


FLAT = {path: values for path, values in CHOICES.items() if path.startswith("memory")}
SWITCHES = {field.path: (False, True) for field in FIELDS if field.path not in CHOICES}
GIVEN = st.fixed_dictionaries(
    {}, optional={path: st.sampled_from(values) for path, values in (FLAT | SWITCHES).items()}
)


@given(fields=GIVEN)
def test_defaults_that_are_typed_out_are_the_defaults(fields, tmp_path_factory):
    """What a file leaves out and what it writes as the default give the same strategy, of every section."""
    config = changed(config_of({}), fields)
    file = tmp_path_factory.mktemp("typed") / "config.yaml"
    file.write_text(to_yaml(config))
    typed = Config.model_validate(yaml.safe_load(file.read_text()))
    assert typed == config
    assert resolve(typed) == resolve(config)
    assert open_paths(typed) == open_paths(config)
    assert TrainingConfig().model_fields_set != typed.training.model_fields_set


@given(fields=GIVEN)
def test_what_is_resolved_stays_as_it_is(fields):
    config = changed(config_of({}), fields)
    resolved = resolve(config)
    check_resolved(resolved)
    assert resolve(resolved, {path: values[-1] for path, values in (FLAT | SWITCHES).items()}) == resolved
    assert all(field.of(resolved) == fields[field.path] for field in FIELDS if field.path in fields)


def test_choices_fill_what_is_open_alone():
    config = config_of({"memory.weights": "bf16_extra_bits"})
    choices = {"memory.weights": "fp32", "memory.checkpointing": {"unet.mid_block": "nested"}}
    resolved = resolve(config, choices)
    assert resolved.memory.weights == "bf16_extra_bits"
    assert resolved.memory.checkpointing == {"unet.mid_block": "nested"}
    with pytest.raises(ValueError, match=r"leaves open memory\.channels_last, .*resolve it first"):
        check_resolved(config)


def test_frozen_weights_of_a_lora_run_are_part_of_the_strategy():
    config = resolve(config_of({"lora.enabled": True, "lora.base_weights": "nf4"}))
    assert (config.memory.weights, config.lora.base_weights, autocast(config)) == ("fp32", "nf4", "bf16")
    assert describe(config).startswith("LoRA on nf4 weights with bf16 autocast, ")
    assert resolve(config_of({"lora.enabled": True})).lora.base_weights == "fp32"
    assert resolve(config_of({})).lora == LoraConfig()


def test_more_measures_are_more_effort():
    plain = resolve(config_of({}))
    steps = [
        {"memory.checkpointing": "layers"},
        {"memory.checkpointing": {"unet.mid_block": "segments"}},
        {"memory.checkpointing": "segments"},
        {"memory.checkpointing": "nested"},
        {"memory.optimizer_in_backward": True},
        {"memory.optimizer_in_backward": True, "memory.stream_optimizer_state": True},
        {"memory.fused_layers": True},
        {"memory.weights": "bf16_extra_bits"},
        {"memory.weights": "bf16_stochastic"},
    ]
    efforts = [effort_of(changed(plain, fields)) for fields in [{}, *steps]]
    assert efforts == sorted(efforts)
    assert len({*efforts[:1], *efforts[2:]}) == len(efforts) - 1


def test_a_registered_field_is_planned_like_those_of_the_package():
    field = replace(FIELDS[-2], path="memory.techniques.toy", words=lambda config: "toy")
    forget = strategy.register(field)
    try:
        resolved = resolve(config_of({}))
        assert resolved.memory.techniques == {"toy": False}
        assert list(values_of(resolved))[-1] == "toy"
        assert config_of({"memory.techniques": {"toy": True}}).memory.techniques == {"toy": True}
    finally:
        forget()
    with pytest.raises(
        ConfigError, match=r"memory\.techniques: \{'toy': True\} names a technique that is not registered"
    ):
        config_of({"memory.techniques": {"toy": True}})


def test_plainly_rounded_weights_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"memory\.weights: 'bf16'.*lose small updates.*bf16_extra_bits"):
        config_of({"memory.weights": "bf16"})


def test_the_budget_is_a_size_or_auto():
    assert config_of({}).memory.budget == "auto"
    assert config_of({"memory.budget": "8GiB"}).memory.budget == 8 << 30
    with pytest.raises(ConfigError, match=r"memory\.budget.*'8 gigs'.*allowed: 8, 8G, 8GiB"):
        config_of({"memory.budget": "8 gigs"})
