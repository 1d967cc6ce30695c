"""Predicted peaks in the headers of configs/ are what the planner says, on a card of the size in the file's name."""

import re
from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import resolve
from lowmem_db.models.finding import model_of
from lowmem_db.planning.phases import TracedRun, trace_train
from lowmem_db.planning.plan import plan
from lowmem_db.planning.target import find_target

GIB = 1 << 30
CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted([*CONFIGS.glob("*gb.yaml"), CONFIGS / "sd15_full_t4.yaml"])
HEADER = re.compile(r"# Predicted peak: (\d+\.\d\d) GiB in training, (\d+\.\d\d) GiB for the whole run")
# Training phase, GiB: what these configurations were made for.
LIMITS = {
    "sd15_full_8gb": 5.6,
    "sd15_full_6gb": 4.6,
    "sd15_full_4gb": 2.9,
    "sd15_full_2gb": 0.9,
    "sd15_full_t4": 11.0,
    "sd21_full_12gb": 10.0,
    "sdxl_full_24gb": 20.0,
    "sdxl_full_16gb": 15.3,
    "sdxl_full_12gb": 9.2,
    "sdxl_full_8gb": 6.6,
    "sdxl_full_4gb": 2.1,
    "sdxl_lora_8gb": 6.4,
    "sdxl_lora_6gb": 4.0,
    "sd15_lora_4gb": 2.6,
    "if_i_xl_full_12gb": 9.4,
    "if_i_xl_full_6gb": 2.6,
    "if_ii_m_full_6gb": 2.8,
}

QUICK = "sd15_full_4gb"


def in_header(file: Path) -> tuple[float, float]:
    match = HEADER.search(file.read_text())
    assert match is not None, f"{file} has no predicted peak"
    return float(match[1]), float(match[2])


def card_of(file: Path) -> str:
    if file.stem.endswith("t4"):
        return "T4"
    size = re.search(r"(\d+)gb", file.name)
    assert size is not None
    return f"rtx 3060 {size[1]}GB"


def test_there_are_configurations() -> None:
    assert {file.stem for file in FILES} >= LIMITS.keys()


@pytest.mark.parametrize("name", ["sd15", "sd15_lora", "sd21", "sdxl", "sdxl_unet", "sdxl_lora", "sdxl_anime"])
def test_configuration_for_every_card_leaves_memory_to_the_planner(name: str) -> None:
    assert load_config(CONFIGS / f"{name}.yaml").memory.model_fields_set == set()


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.long) for name in LIMITS]
)
def test_training_stays_within_what_the_configuration_was_made_for(name: str) -> None:
    file = next(file for file in FILES if file.stem == name)
    config = resolve(load_config(file))
    target = find_target(config, gpu=card_of(file))
    run = TracedRun(config=config, model=model_of(config, weights=False), card=target.card)
    peak = trace_train(run).peak.total / GIB
    assert peak <= LIMITS[name]
    assert round(peak, 2) == in_header(file)[0]


def test_the_papers_configuration_has_its_numbers() -> None:
    config = load_config(CONFIGS / "sd15_paper.yaml")
    assert (config.training.max_train_steps, config.training.learning_rate) == (1000, 5e-6)
    assert (config.prior.enabled, config.prior.loss_weight, config.prior.num_class_images) == (True, 1, 1000)
    assert (config.prior.sampler, config.training.train_text_encoder) == ("ddpm", True)


@pytest.mark.long
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_header_is_what_the_planner_says_and_fits_the_card(file: Path) -> None:
    config = load_config(file)
    found = plan(config, find_target(config, gpu=card_of(file)))
    training = next(phase.parts.total for phase in found.phases if phase.name == "train")
    assert (round(training / GIB, 2), round(found.peak_bytes / GIB, 2)) == in_header(file)
