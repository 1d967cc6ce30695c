"""Sampling steps are held to the model's noise schedule before anything is drawn."""

from pathlib import Path

import pytest
import torch

from lowmem_db.config.loading import load_config
from lowmem_db.engine.fitting import check_fits
from lowmem_db.errors import ConfigError, LowmemDbError
from lowmem_db.models.finding import find_model
from lowmem_db.planning.plan import plan
from lowmem_db.planning.target import target_of_device
from lowmem_db.run.run import prepare_data


def config_of(fields: dict[str, object], **changes: object):
    return load_config(
        None, list((fields | {name.replace("__", "."): value for name, value in changes.items()}).items())
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver"])
def test_steps_beyond_the_schedule_are_refused(tiny_fields: dict[str, object], tiny_model: Path, sampler: str) -> None:
    model = find_model(str(tiny_model))
    check_fits(config_of(tiny_fields, prior__sampler=sampler, prior__num_inference_steps=1000), model)
    config = config_of(
        tiny_fields, prior__sampler=sampler, prior__num_inference_steps=1001, sampling__sampler=sampler,
        sampling__prompts=["a dog"], sampling__num_inference_steps=5000,
    )  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        check_fits(config, model)
    first, second = str(refused.value).splitlines()
    assert first.startswith("prior.num_inference_steps: 1001 is more than the noise schedule of ")
    assert second.startswith("sampling.num_inference_steps: 5000 is more than")
    assert first.endswith("; allowed: 1 to 1000")


def test_plan_and_preparation_ask(tiny_fields: dict[str, object]) -> None:
    config = config_of(tiny_fields, prior__num_inference_steps=1001)
    with pytest.raises(ConfigError, match="is more than the noise schedule"):
        prepare_data(config)
    assert not config.cache_dir.exists() or not list(config.cache_dir.rglob("*.png"))
    with pytest.raises(ConfigError, match="is more than the noise schedule"):
        plan(config, target_of_device(config, torch.device("cpu")))


@pytest.mark.parametrize(
    "field",
    [
        "training.train_batch_size=100000", "lora.rank=10000000", "prior.num_class_images=20000000",
        "prior.sample_batch_size=1000000", "data.num_crops=10000000", "data.resolution=1000000",
        "sampling.num_images=1000000", "training.gradient_accumulation_steps=100000000",
        "training.max_train_steps=100000000000", "prior.num_inference_steps=1000000000",
        "sampling.num_inference_steps=1000000000", "data.max_bucket_side=10000000",
    ],
)  # fmt: skip
def test_sizes_that_nobody_means_are_refused_with_the_bound(tiny_fields: dict[str, object], field: str) -> None:
    name, _, value = field.partition("=")
    with pytest.raises(LowmemDbError, match=rf"{name}: {value} is not allowed: .*less than or equal to \d+"):
        config_of(tiny_fields, **{name: int(value)})
