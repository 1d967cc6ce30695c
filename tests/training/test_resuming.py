"""Which settings a resumed run may change, and what it takes over where its configuration leaves that open."""

from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config, write_yaml
from lowmem_db.config.schema import Config
from lowmem_db.errors import CheckpointError
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.resuming import check_run_folder, with_choices_of_run
from tests.config.test_rules import NEEDED

PLANNED = {
    "memory.weights": "bf16_extra_bits",
    "memory.optimizer_in_backward": True,
    "memory.checkpointing": {"unet.mid_block": "nested"},
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
    assert config.memory.stream_optimizer_state is None
    assert (config.training.clipping, config.training.mixed_precision) == ("lagged", "bf16")
    check_run_folder(run, config, resume=True)


def test_what_is_given_stays(run: RunFolder) -> None:
    config = with_choices_of_run(run, config_of({"memory.checkpointing": "none", "memory.weights": "fp32"}))
    assert config.memory.checkpointing == "none"
    with pytest.raises(CheckpointError, match=r"memory\.weights was 'bf16_extra_bits', is 'fp32'"):
        check_run_folder(run, config, resume=True)


def test_a_run_without_a_checkpoint_leaves_open_what_is_open(tmp_path: Path) -> None:
    config = config_of({})
    assert with_choices_of_run(RunFolder(tmp_path), config) == config
