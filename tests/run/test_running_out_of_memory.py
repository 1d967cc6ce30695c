"""Memory runs out somewhere in a run: it continues with less and ends with the bits of an undisturbed one."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config, read_yaml
from lowmem_db.errors import BudgetError
from lowmem_db.run.run import train
from lowmem_db.storage.run_folder import RunFolder
from tests.faults import ERRORS, Fault

AFTER = {"sampling.prompts": ["a zx dog"], "sampling.num_inference_steps": 2, "sampling.num_images": 2}
IN_BACKWARD = {
    "optimizer.name": "adamw8bit",
    "memory.weights": "bf16_extra_bits",
    "memory.optimizer_in_backward": True,
    "training.train_text_encoder": True,
}
QUICK = {
    "after": ["forward pass", "optimizer step", "sampling samples", "saving", "final model"],
    "in backward": ["loading", "forward pass", "backward pass"],
}
Run = Callable[..., RunFolder]


class Runs:
    """Runs of one configuration that share what is prepared; the first two are undisturbed."""

    def __init__(self, fields: Mapping[str, object], folder: Path) -> None:
        self._fields, self._folder = dict(fields), folder
        self.first = self.run("first", None)
        with Fault() as counting:
            self.run("counted", None)
        self.phases = counting.phases

    def run(
        self, name: str, fault: Fault | None, *, fresh: bool = False, resume: bool = False, **more: object
    ) -> RunFolder:
        cache = self._folder / (f"cache of {name}" if fresh else "cache")
        own = {"output_dir": str(self._folder / name), "cache_dir": str(cache)}
        config = load_config(None, list((self._fields | own | more).items()))
        if fault is None:
            return train(config, resume=resume)
        with fault:
            return train(config, resume=resume)

    def sites(self, phase: str) -> list[int]:
        return [number for number, found in enumerate(self.phases) if found == phase]


def weights_and_losses(run: RunFolder) -> tuple[dict[str, bytes], list[tuple[float, ...]]]:
    files = {str(file.relative_to(run.final_dir)): file.read_bytes() for file in run.final_dir.rglob("*.safetensors")}
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return files, [(row["step"], row["loss"], row["loss_instance"]) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out of memory")


@pytest.fixture(scope="module")
def fields(tiny_model: Path, photos_dir: Path) -> dict[str, object]:
    return {
        "model.base": str(tiny_model),
        "subject.instance_dir": str(photos_dir),
        "subject.instance_prompt": "a zx dog",
        "subject.class_prompt": "a dog",
        "device": "cpu",
        "data.resolution": 32,
        "prior.num_class_images": 3,
        "prior.sample_batch_size": 3,
        "prior.num_inference_steps": 2,
        "training.max_train_steps": 3,
        "training.learning_rate": 1e-3,
        "checkpointing.every": 2,
        "logging.tensorboard": False,
    }


@pytest.fixture(scope="module")
def runs(folder: Path, fields: dict[str, object]) -> dict[str, Runs]:
    return {
        "after": Runs(fields | AFTER, folder / "after"),
        "in backward": Runs(fields | IN_BACKWARD, folder / "in backward"),
    }


@pytest.mark.parametrize(("kind", "phase"), [(kind, phase) for kind, phases in QUICK.items() for phase in phases])
def test_run_goes_on_with_less_and_ends_with_the_same_bits(runs: dict[str, Runs], kind: str, phase: str) -> None:
    of_kind = runs[kind]
    sites = of_kind.sites(phase)
    error = ERRORS[len(phase) % len(ERRORS)]
    run = of_kind.run(phase, Fault(sites[len(sites) // 2], error))
    assert weights_and_losses(run) == weights_and_losses(of_kind.first)
    plan = json.loads((run.root / "plan.json").read_text())
    if phase == "sampling samples":
        assert read_yaml(run.config_file)["memory"]["tiled_samples"] is True
    else:
        (stepped,) = plan["stepped_down"]
        assert "out of memory" in stepped["reason"]
        assert read_yaml(run.config_file)["memory"]["checkpointing"] == stepped["strategy"]["checkpointing"] != "none"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["after", "in backward"])
def test_sweep(runs: dict[str, Runs], kind: str) -> None:
    """Sites spread over every phase; prints how many of each were tried."""
    of_kind = runs[kind]
    wanted = weights_and_losses(of_kind.first)
    for phase in dict.fromkeys(of_kind.phases):
        sites = of_kind.sites(phase)
        tried = sites[:: max(1, len(sites) // 8)]
        ended = {"same": 0, "refused": 0}
        for number, site in enumerate(tried):
            try:
                run = of_kind.run(f"{phase} {site}", Fault(site, ERRORS[number % len(ERRORS)]))
            except BudgetError:
                ended["refused"] += 1
            else:
                assert weights_and_losses(run) == wanted, (phase, site)
                ended["same"] += 1
        sys.stdout.write(f"{kind}: {phase}: {len(tried)} of {len(sites)} sites: {ended}\n")
        assert phase in {"other", "encoding pictures", "encoding prompts"} or not ended["refused"]


def test_nothing_smaller_saves_what_is_whole_and_names_it(runs: dict[str, Runs]) -> None:
    of_kind = runs["in backward"]
    given = {
        "memory.checkpointing": "nested",
        "memory.stream_optimizer_state": False,
        "memory.offload_checkpoints": False,
        "memory.tiled_samples": False,
    }
    site = of_kind.sites("forward pass")
    with pytest.raises(
        BudgetError, match=r"step 2: out of memory on the host .*step-000001.* smallest budget"
    ) as raised:
        of_kind.run("refused", Fault(site[len(site) // 2], ERRORS[1]), **given)
    assert "--resume" in str(raised.value)
    run = of_kind.run("refused", None, resume=True, **given)
    assert weights_and_losses(run) == weights_and_losses(of_kind.first)


def test_strategy_that_worked_is_used_when_the_run_is_resumed(
    runs: dict[str, Runs], capsys: pytest.CaptureFixture[str]
) -> None:
    of_kind = runs["after"]
    sites = of_kind.sites("forward pass")
    short = {"training.max_train_steps": 2}
    run = of_kind.run("resumed", Fault(sites[len(sites) // 3]), **short)
    used = read_yaml(run.config_file)["memory"]
    assert used["checkpointing"] != "none"
    capsys.readouterr()
    (run.final_dir / "model_index.json").unlink()
    of_kind.run("resumed", None, resume=True)
    assert read_yaml(run.config_file)["memory"] == used
    assert "out of memory" not in capsys.readouterr().err


@pytest.mark.parametrize("phase", ["sampling class images", "decoding class images"])
def test_class_images_are_drawn_with_less(
    runs: dict[str, Runs], phase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    of_kind = runs["after"]
    with Fault() as counting:
        of_kind.run(f"counted {phase}", None, fresh=True, **{"training.max_train_steps": 1})
    sites = [number for number, found in enumerate(counting.phases) if found == phase]
    capsys.readouterr()
    of_kind.run(phase, Fault(sites[len(sites) // 2], ERRORS[2]), fresh=True, **{"training.max_train_steps": 1})
    said = capsys.readouterr().err
    assert ("with 2 images at a time" if phase.startswith("sampling") else "in tiles") in said
