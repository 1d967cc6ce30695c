"""A run is asked for things by files in its folder, from any process."""

from pathlib import Path

import pytest

import lowmem_db
from lowmem_db.config.schema import Config
from lowmem_db.errors import CheckpointError, ConfigError, RunInterrupted
from lowmem_db.storage import asking
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training.observers import Observer


class AskAt(Observer):
    """Asks for something when a step is done, as another process would."""

    def __init__(self, root: Path, requests: dict[int, asking.Request]) -> None:
        self.root, self.requests = root, requests
        self.doing: list[str] = []

    def step(self, row) -> None:
        if (request := self.requests.get(row["step"])) is not None:
            lowmem_db.ask(self.root, request)


@pytest.fixture
def config(tiny_config: Config) -> Config:
    changes = {"sampling.prompts": ["a zx dog"], "sampling.num_inference_steps": 1, "sampling.num_images": 1}
    tree = tiny_config.model_dump()
    for field, value in changes.items():
        section, name = field.split(".")
        tree[section][name] = value
    tree["prior"]["enabled"] = False
    return Config.model_validate(tree)


def test_run_saves_samples_and_stops_where_asked_and_ends_with_the_same_bits(config: Config, tmp_path: Path) -> None:
    run = RunFolder(config.output_dir)
    with pytest.raises(RunInterrupted, match="asked to stop: stopped after step 3; continue with --resume"):
        lowmem_db.train(config, observers=[AskAt(run.root, {1: "save", 2: "sample", 3: "stop"})])
    assert run.complete_steps() == [2, 3]  # as many as are kept
    assert (run.samples_dir(2) / "00-00.png").is_file()
    assert not run.samples_dir(1).exists()
    assert not run.samples_dir(3).exists()
    lowmem_db.train(config, resume=True)
    other = config.model_copy(update={"output_dir": tmp_path / "whole"})
    lowmem_db.train(other)
    weights = "final/unet/diffusion_pytorch_model.safetensors"
    assert (run.root / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_run_that_is_asked_to_stop_at_its_last_step_is_finished(config: Config) -> None:
    run = lowmem_db.train(config, observers=[AskAt(config.output_dir, {4: "stop"})])
    assert run.final_dir.is_dir()
    assert not asking.asked(run)


def test_run_is_in_use_and_tells_its_progress_only_while_it_runs(config: Config) -> None:
    run = RunFolder(config.output_dir)
    assert not run.is_in_use()
    with run.locked(), asking.progress_told(run):
        assert run.is_in_use()
        for _ in asking.console.track(range(3), "class images", 3):
            found = asking.progress_of(run)
            assert found is not None
            assert (found["doing"], found["total"]) == ("class images", 3)
    assert asking.progress_of(run) is None
    with pytest.raises(CheckpointError, match="nothing trains in"):
        lowmem_db.ask(run.root, "save")
    with pytest.raises(ConfigError, match="allowed: stop, save, sample"):
        lowmem_db.ask(run.root, "pause")  # type: ignore[arg-type]


def test_request_before_training_stops_before_the_first_step(config: Config) -> None:
    class Early(Observer):
        def start(self, trainer) -> None:
            lowmem_db.ask(config.output_dir, "stop")

    run = RunFolder(config.output_dir)
    with pytest.raises(RunInterrupted, match="stopped after step 1"):
        lowmem_db.train(config, observers=[Early()])
    assert run.complete_steps() == [1]
