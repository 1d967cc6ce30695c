"""Which settings a resumed run may change, and what it takes over where its configuration leaves that open."""

from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config, write_yaml
from lowmem_db.config.schema import Config
from lowmem_db.errors import CheckpointError, ConfigError
from lowmem_db.run.resuming import check_run_folder, with_choices_of_run
from lowmem_db.storage.run_folder import RunFolder
from tests.config.test_rules import NEEDED

PLANNED = {
    "memory.weights": "bf16_extra_bits",
    "memory.optimizer_in_backward": True,
    "memory.checkpointing": {"unet.mid_block": "nested"},
    "memory.tiled_samples": True,
    "training.clipping": "lagged",
    "training.mixed_precision": "bf16",
}


def config_of(fields: dict[str, object]) -> Config:
    return load_config(None, list((NEEDED | fields).items()))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was planned, with a checkpoint."""
    run = RunFolder(tmp_path / "run")
    run.write_checkpoint(3, lambda folder: None)
    write_yaml(config_of(PLANNED), run.config_file)
    return run


def test_open_choices_are_those_of_the_run(run: RunFolder) -> None:
    config = with_choices_of_run(run, config_of({}))
    assert config.memory.weights == "bf16_extra_bits"
    assert config.memory.optimizer_in_backward is True
    assert config.memory.checkpointing == {"unet.mid_block": "nested"}
    assert config.memory.stream_optimizer_state is False
    assert config.memory.tiled_samples is True
    assert (config.training.clipping, config.training.mixed_precision) == ("lagged", "bf16")
    check_run_folder(run, config, resume=True)


def test_what_is_given_stays(run: RunFolder) -> None:
    config = with_choices_of_run(run, config_of({"memory.checkpointing": "none", "memory.weights": "fp32"}))
    assert config.memory.checkpointing == "none"
    with pytest.raises(CheckpointError, match=r"memory\.weights from 'bf16_extra_bits' to 'fp32'"):
        check_run_folder(run, config, resume=True)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"training.mixed_precision": "fp16"}, r"memory\.weights: 'bf16_extra_bits' computes in bf16"),
        ({"training.gradient_accumulation_steps": 2}, r"memory\.optimizer_in_backward: true frees each gradient"),
        ({"training.clipping": "global"}, r"training\.clipping: 'global' needs all gradients at once"),
    ],
)
def test_what_cannot_be_combined_with_the_choices_of_the_run_is_refused(
    run: RunFolder, fields: dict, problem: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{problem}.*fields left open are taken from"):
        with_choices_of_run(run, config_of(fields))


def test_a_run_without_a_checkpoint_leaves_open_what_is_open(tmp_path: Path) -> None:
    config = config_of({})
    assert with_choices_of_run(RunFolder(tmp_path), config) == config


def test_fields_that_are_newer_than_the_run_have_not_changed(run: RunFolder) -> None:
    before = run.config_file.read_text()
    assert "  aspect_ratio_buckets: false\n" in before
    run.config_file.write_text(before.replace("  aspect_ratio_buckets: false\n", ""))
    check_run_folder(run, with_choices_of_run(run, config_of({})), resume=True)
    with pytest.raises(CheckpointError, match=r"data\.resolution from 512 to 64"):
        check_run_folder(run, with_choices_of_run(run, config_of({"data.resolution": 64})), resume=True)


def test_a_run_does_not_go_on_to_fewer_steps_than_it_has(run: RunFolder) -> None:
    """It would never end."""
    run.write_checkpoint(5, lambda folder: None)
    fewer = with_choices_of_run(run, config_of({"training.max_train_steps": 4}))
    with pytest.raises(ConfigError, match=r"max_train_steps: 4, .*allowed: 5 or more.*--step N; .* checkpoint-3$"):
        check_run_folder(run, fewer, resume=True)
    check_run_folder(run, fewer, resume=True, step=3)
    check_run_folder(run, with_choices_of_run(run, config_of({"training.max_train_steps": 5})), resume=True)
