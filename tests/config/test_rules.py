"""Each refused combination, and its nearest neighbour that is accepted."""

from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.config.rules import RULES, refusals
from lowmem_db.errors import ConfigError

NEEDED = {
    "model.base": "demo",
    "subject.instance_dir": "photos",
    "subject.instance_prompt": "a sks dog",
    "subject.class_prompt": "a dog",
    "output_dir": "runs/dog",
}
CAT = {"instance_dir": "cats", "instance_prompt": "a qy cat", "class_prompt": "a cat"}
# What is refused, the field that the message begins with, and a change that makes it acceptable.
_LEARNS = {
    "textual_inversion.enabled": True,
    "textual_inversion.token": "<my-dog>",
    "subject.instance_prompt": "a <my-dog>",
}
_SHARED_OUT = {"distributed.sharding": "full"}
CASES = [
    (_SHARED_OUT | {"lora.enabled": True}, "distributed.sharding", {"lora.enabled": False}),
    *(
        (_SHARED_OUT | {field: True}, field, {field: False})
        for field in (
            "memory.stream_weights",
            "memory.stream_optimizer_state",
            "memory.channels_last",
            "training.compile",
        )
    ),
    (_SHARED_OUT | {"optimizer.name": "adafactor"}, "optimizer.name", {"optimizer.name": "adamw8bit"}),
    (_SHARED_OUT | {"memory.weights": "bf16_stochastic"}, "memory.weights", {"memory.weights": "bf16_extra_bits"}),
    (
        _SHARED_OUT | {"training.train_text_encoder": True, "training.stop_text_encoder_training": 3},
        "training.stop_text_encoder_training",
        {"training.stop_text_encoder_training": None},
    ),
    ({"textual_inversion.num_vectors": 2}, "textual_inversion.enabled", {"textual_inversion.num_vectors": 1}),
    (_LEARNS | {"lora.enabled": True}, "lora.enabled", {"lora.enabled": False}),
    (_LEARNS | {"prior.enabled": True}, "prior.enabled", {"prior.enabled": False}),
    (
        _LEARNS | {"training.train_text_encoder": True},
        "training.train_text_encoder",
        {"training.train_text_encoder": False},
    ),
    (_LEARNS | {"training.layers": ["unet.*"]}, "training.layers", {"training.layers": []}),
    (_LEARNS | {"training.learning_rate": 1e-3}, "training.learning_rate", {"training.learning_rate": 5e-6}),
    (
        _LEARNS | {"subject.class_prompt": None},
        "textual_inversion.initializer",
        {"textual_inversion.initializer": "dog"},
    ),
    (
        _LEARNS | {"subject.instance_prompt": "a sks dog"},
        "subject.instance_prompt",
        {"subject.instance_prompt": "a <my-dog>"},
    ),
    (_LEARNS | {"lora.rank": 4}, "lora.enabled", {"lora.rank": 16, "lora.base_weights": "bf16"}),
    ({"memory.techniques": {"toy": True}}, "memory.techniques", {"memory.techniques": {}}),
    ({"subject.class_prompt": None}, "prior.enabled", {"prior.enabled": False}),
    ({"subject.class_prompt": ""}, "prior.enabled", {"subject.class_prompt": "a dog"}),
    (
        {"prior.enabled": False, "prior.class_prompts": ["a cat"]},
        "prior.class_prompts",
        {"prior.class_prompts": []},
    ),
    (
        {"prior.class_prompts": ["a cat"], "subject.concepts": [CAT]},
        "prior.class_prompts",
        {"subject.concepts": []},
    ),
    (
        {"prior.class_prompts": ["a cat"], "prior.num_class_images": 1},
        "prior.num_class_images",
        {"prior.num_class_images": 2},
    ),
    ({"subject.concepts": [CAT | {"class_prompt": None}]}, "subject.concepts", {"prior.enabled": False}),
    (
        {"subject.concepts": [CAT | {"instance_prompt": "a sks dog"}]},
        "subject.concepts",
        {"subject.concepts": [CAT]},
    ),
    (
        {"subject.concepts": [CAT | {"class_dir": "more"}], "prior.enabled": False},
        "subject.concepts",
        {"prior.enabled": True},
    ),
    ({"training.compile": True, "lora.enabled": True}, "training.compile", {"training.compile": False}),
    ({"data.resolution": 500}, "data.resolution", {"data.resolution": 504}),
    ({"evaluation.prompts": ["a sks dog"]}, "evaluation.prompts", {"evaluation.every": 100}),
    ({"evaluation.patience": 3}, "evaluation.patience", {"evaluation.every": 100}),
    ({"data.bucket_step": 32}, "data.bucket_step", {"data.aspect_ratio_buckets": True}),
    ({"data.min_bucket_side": 256}, "data.min_bucket_side", {"data.aspect_ratio_buckets": True}),
    ({"data.max_bucket_side": 768}, "data.max_bucket_side", {"data.aspect_ratio_buckets": True}),
    ({"data.keep_tags": 1}, "data.keep_tags", {"data.shuffle_tags": True}),
    ({"data.num_caption_variants": 4}, "data.num_caption_variants", {"data.tag_dropout": 0.1}),
    ({"sampling.negative_prompt": "blurry"}, "sampling.negative_prompt", {"evaluation.every": 100}),
    ({"sampling.at_start": True}, "sampling.at_start", {"sampling.prompts": ["a sks dog"]}),
    (
        {"objective.zero_terminal_snr": True, "objective.prediction_type": "epsilon"},
        "objective.zero_terminal_snr",
        {"objective.prediction_type": "v_prediction"},
    ),
    ({"objective.vlb_weight": 0.01}, "objective.vlb_weight", {"objective.variance": "hybrid"}),
    *(
        ({"objective.variance": "hybrid", f"objective.{name}": 0.1}, f"objective.{name}", {f"objective.{name}": 0})
        for name in ("noise_offset", "input_perturbation")
    ),
    (
        {"objective.snr_gamma": 5, "objective.debiased": True},
        "objective.debiased",
        {"objective.snr_gamma": None},
    ),
    (
        {"training.learning_rate_text_encoder": 1e-6},
        "training.learning_rate_text_encoder",
        {"training.train_text_encoder": True},
    ),
    (
        {"training.learning_rate_text_encoder_2": 1e-6},
        "training.learning_rate_text_encoder_2",
        {"training.train_text_encoder": True},
    ),
    (
        {"training.stop_text_encoder_training": 5},
        "training.stop_text_encoder_training",
        {"training.train_text_encoder": True},
    ),
    (
        {"memory.optimizer_in_backward": True, "training.gradient_accumulation_steps": 2},
        "memory.optimizer_in_backward",
        {"memory.optimizer_in_backward": False},
    ),
    (
        {"memory.optimizer_in_backward": True, "training.clipping": "global"},
        "training.clipping",
        {"training.clipping": "update_rms"},
    ),
    (
        {"training.clipping": "lagged", "training.max_grad_norm": None},
        "training.clipping",
        {"training.clipping": "none"},
    ),
    (
        {"memory.weights": "bf16_extra_bits", "training.mixed_precision": "fp16"},
        "memory.weights",
        {"training.mixed_precision": "bf16"},
    ),
    (
        {"memory.optimizer_in_backward": True, "training.mixed_precision": "fp16"},
        "training.mixed_precision",
        {"optimizer.name": "adamw8bit"},
    ),
    (
        {"memory.stream_optimizer_state": True, "ema.enabled": True, "memory.weights": "bf16_extra_bits"},
        "ema.enabled",
        {"memory.weights": "fp32"},
    ),
    (
        {"memory.stream_optimizer_state": True, "ema.enabled": True, "memory.weights": "bf16_extra_bits"},
        "ema.enabled",
        {"memory.stream_weights": True},
    ),
    (
        {"memory.stream_weights": True, "memory.checkpointing": "none"},
        "memory.stream_weights",
        {"memory.checkpointing": "segments"},
    ),
    (
        {"memory.stream_weights": True, "memory.optimizer_in_backward": False},
        "memory.stream_weights",
        {"memory.optimizer_in_backward": True},
    ),
    (
        {"memory.optimizer_step": "host", "memory.stream_weights": False},
        "memory.optimizer_step",
        {"memory.stream_weights": True},
    ),
    (
        {"memory.optimizer_step": "host", "memory.stream_optimizer_state": False},
        "memory.optimizer_step",
        {"memory.stream_optimizer_state": True},
    ),
    ({"memory.optimizer_step": "host", "lora.enabled": True}, "memory.optimizer_step", {"lora.enabled": False}),
    ({"memory.stream_weights": True, "training.compile": True}, "training.compile", {"training.compile": False}),
    (
        {"memory.stream_weights": True, "lora.enabled": True, "lora.base_weights": "nf4"},
        "lora.base_weights",
        {"lora.base_weights": "bf16"},
    ),
    (
        {"memory.offload_checkpoints": True, "memory.checkpointing": {"unet.mid_block": "none"}},
        "memory.offload_checkpoints",
        {"memory.checkpointing": {"unet.mid_block": "layers"}},
    ),
    (
        {"training.lr_num_cycles": 2, "training.lr_scheduler": "cosine"},
        "training.lr_num_cycles",
        {"training.lr_scheduler": "cosine_with_restarts"},
    ),
    ({"training.lr_power": 2.0}, "training.lr_power", {"training.lr_scheduler": "polynomial"}),
    (
        {"training.learning_rate": 1e-7, "training.lr_scheduler": "polynomial"},
        "training.learning_rate",
        {"training.lr_scheduler": "linear"},
    ),
    (
        {"training.lr_warmup_steps": 10, "training.max_train_steps": 10, "training.lr_scheduler": "cosine"},
        "training.lr_warmup_steps",
        {"training.lr_warmup_from_zero": True},
    ),
    (
        {"training.lr_warmup_steps": 10, "training.max_train_steps": 10},
        "training.lr_warmup_steps",
        {"training.max_train_steps": 11},
    ),
    ({"checkpointing.copy_to": Path("runs/dog")}, "checkpointing.copy_to", {"checkpointing.copy_to": "drive/dog"}),
    ({"sampling.every": 5}, "sampling.every", {"sampling.prompts": ["a sks dog"]}),
    ({"memory.micro_batches": 3}, "memory.micro_batches", {"training.train_batch_size": 6}),
    ({"lora.rank": 8}, "lora.enabled", {"lora.enabled": True}),
    ({"lora.enabled": True, "memory.weights": "bf16_extra_bits"}, "memory.weights", {"memory.weights": "fp32"}),
    ({"lora.enabled": True, "training.layers": ["unet.*"]}, "training.layers", {"training.layers": []}),
    (
        {"lora.enabled": True, "lora.dora": True, "lora.base_weights": "nf4"},
        "lora.dora",
        {"lora.base_weights": "bf16"},
    ),
    (
        {"lora.enabled": True, "lora.base_weights": "int8", "training.mixed_precision": "no"},
        "training.mixed_precision",
        {"training.mixed_precision": "bf16"},
    ),
    (
        {"lora.enabled": True, "lora.base_weights": "fp16", "training.mixed_precision": "bf16"},
        "training.mixed_precision",
        {"lora.base_weights": "bf16"},
    ),
    ({"final.hub_model_id": "me/dog"}, "final.hub_model_id", {"final.push_to_hub": True}),
]


def test_every_rule_has_a_case() -> None:
    used = set()
    for fields, _, _ in CASES:
        config = load_config(None, list(NEEDED.items()))
        for path, value in fields.items():
            section, _, name = path.partition(".")
            before = getattr(config, section)
            part = type(before).model_validate(before.model_dump() | {name: value})
            config = config.model_copy(update={section: part})
        used |= {number for number, rule in enumerate(RULES) if rule.refuses(config)}
    assert used == set(range(len(RULES)))


@pytest.mark.parametrize(("fields", "named", "mended"), CASES)
def test_combination_is_refused_and_its_neighbour_is_not(
    fields: dict[str, object], named: str, mended: dict[str, object]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, list((NEEDED | fields).items()))
    (problem,) = str(refused.value).splitlines()
    assert problem.startswith(f"{named}: ")
    assert "{config" not in problem
    assert refusals(load_config(None, list((NEEDED | fields | mended).items()))) == []


def test_all_refused_combinations_are_shown_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, list((NEEDED | {"data.resolution": 500, "sampling.every": 5}).items()))
    assert len(str(refused.value).splitlines()) == 2
