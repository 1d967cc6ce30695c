"""Memory runs out somewhere in a run: it continues with less and ends with the bits of an undisturbed one."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from lowmem_db.api import train
from lowmem_db.config.loading import load_config, read_yaml
from lowmem_db.errors import BudgetError
from lowmem_db.planning.calibration import CUDA_CONTEXT
from lowmem_db.planning.measured import read_chosen
from lowmem_db.run import run as run_module
from lowmem_db.run.attempts import Attempts, PreparedRun, _Failure
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.training import trainer
from tests.faults import ERRORS, Fault, fault_in_saving, note

AFTER = {"sampling.prompts": ["a zx dog"], "sampling.num_inference_steps": 2, "sampling.num_images": 2}
IN_BACKWARD = {
    "optimizer.name": "adamw8bit",
    "memory.weights": "bf16_extra_bits",
    "memory.optimizer_in_backward": True,
    "training.train_text_encoder": True,
}
QUICK = {"forward pass": 100, "backward pass": 320}  # and a site inside a step
KINDS = {"after": AFTER, "in backward": IN_BACKWARD}
FAULTS_PER_PHASE = int(os.environ.get("LOWMEM_DB_FAULTS", "4"))


class Runs:
    """Runs of one configuration that share what is prepared; the first one is undisturbed."""

    def __init__(self, fields: Mapping[str, object], folder: Path) -> None:
        self._fields, self._folder = dict(fields), folder
        self.first = self.run("first", None)

    @cached_property
    def phases(self) -> list[str]:
        """The phase of each site of a fault."""
        with Fault() as counting:
            self.run("counted", None)
        return counting.phases

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
        """Sites spread evenly over those of a phase."""
        return spread([number for number, found in enumerate(self.phases) if found == phase])


def spread(sites: list[int]) -> list[int]:
    return sites[:: -(-len(sites) // FAULTS_PER_PHASE)]


def weights_and_losses(run: RunFolder) -> tuple[dict[str, bytes], list[tuple[float, ...]]]:
    files = {str(file.relative_to(run.final_dir)): file.read_bytes() for file in run.final_dir.rglob("*.safetensors")}
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return files, [(row["step"], row["loss"], row["loss_instance"]) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


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
def runs(folder: Path, fields: dict[str, object]) -> Callable[[str], Runs]:
    return cache(lambda kind: Runs(fields | KINDS[kind], folder / kind))


@pytest.mark.parametrize("phase", QUICK)
def test_run_goes_on_with_less_and_ends_with_the_same_bits(
    runs: Callable[[str], Runs], phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_kind = runs("in backward")
    faults = [Fault(QUICK[phase], ERRORS[len(phase) % len(ERRORS)])]
    steps: list[int] = []
    original = trainer.train_step

    def failing(denoiser: Any, objective: Any, optimizer: Any, batches: Any, step: int) -> Any:
        steps.append(step)
        with faults.pop() if step == 1 and faults else nullcontext():
            return original(denoiser, objective, optimizer, batches, step)

    monkeypatch.setattr(trainer, "train_step", failing)
    run = of_kind.run(phase, None)
    again = [1] if phase == "forward pass" else [0, 1]  # where the weights are whole, it goes on at the same step
    assert steps == [0, 1, *again, 2]
    assert weights_and_losses(run) == weights_and_losses(of_kind.first)
    (stepped,) = json.loads((run.root / "plan.json").read_text())["stepped_down"]
    assert "step 2: out of memory on the" in stepped["reason"]
    used = read_yaml(run.config_file)["memory"]  # which a resumed run takes over
    assert used["checkpointing"] == stepped["strategy"]["checkpointing"] != "none"
    assert "memory.checkpointing" in read_chosen(run)


@pytest.mark.parametrize("failures", [1, 2])
def test_preparation_is_tried_once_more(
    runs: Callable[[str], Runs], failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_kind, original, left = runs("in backward"), run_module.prepare, [ERRORS[0]] * failures

    def failing(*arguments: Any) -> Any:
        if left:
            raise left.pop()
        return original(*arguments)

    monkeypatch.setattr(run_module, "prepare", failing)
    if failures == 1:
        assert weights_and_losses(of_kind.run("prepared again", None)) == weights_and_losses(of_kind.first)
    else:
        with pytest.raises(BudgetError, match=r"^preparation: out of memory .* what is prepared so far is kept"):
            of_kind.run("not prepared", None)
    assert not left


def test_nothing_smaller_saves_what_is_whole_and_names_it(
    runs: Callable[[str], Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_kind = runs("in backward")
    given = {"memory.checkpointing": "nested", "memory.tiled_samples": False}
    original, save = trainer.train_step, trainer.Trainer._save_if_whole
    seen: list[str] = []

    def summarise(run: RunFolder, device: torch.device, place: str) -> bool:
        seen.append(f"{device}: {place}")
        return False

    def save_if_whole(self: trainer.Trainer, error: Exception) -> None:
        seen.append("freed")
        save(self, error)

    def failing(denoiser: Any, objective: Any, optimizer: Any, batches: Any, step: int) -> Any:
        if step == 1:
            raise ERRORS[1]
        return original(denoiser, objective, optimizer, batches, step)

    monkeypatch.setattr(trainer, "train_step", failing)
    monkeypatch.setattr(trainer, "write_memory_summary", summarise)
    monkeypatch.setattr(trainer.Trainer, "_save_if_whole", save_if_whole)
    with pytest.raises(
        BudgetError, match=r"step 2: out of memory on the host .*step-000001.* smallest budget"
    ) as raised:
        of_kind.run("refused", None, **given)
    assert "--resume" in str(raised.value)
    assert seen == ["cpu: host", "freed"]
    monkeypatch.undo()
    run = of_kind.run("refused", None, resume=True, **given)
    assert weights_and_losses(run) == weights_and_losses(of_kind.first)


def test_full_card_is_described_in_a_file_that_the_message_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With functions of torch's signatures in place of a card of 8 GiB, of which others hold 3."""
    device, gib = torch.device("cuda", 1), 1 << 30
    summary = create_autospec(torch.cuda.memory_summary, return_value="| allocated memory | 3 GiB |")
    monkeypatch.setattr(torch.cuda, "memory_summary", summary)
    monkeypatch.setattr(torch.cuda, "mem_get_info", create_autospec(torch.cuda.mem_get_info, return_value=(0, 8 * gib)))
    reserved = create_autospec(torch.cuda.memory_reserved, return_value=8 * gib - 3 * gib - CUDA_CONTEXT)
    monkeypatch.setattr(torch.cuda, "memory_reserved", reserved)
    run = RunFolder(tmp_path)
    attempts = Attempts.__new__(Attempts)
    attempts._prepared = create_autospec(PreparedRun, instance=True, run=run, device=device)
    assert attempts._seen_on_card("host", None) == {}
    failure = _Failure(4, "train", "device", "CUDA out of memory", **attempts._seen_on_card("device", None))
    assert run.memory_summary_file.read_text() == "| allocated memory | 3 GiB |"
    summary.assert_called_once_with(device)
    assert "out of memory on the device (CUDA out of memory; other programs hold 3.0 GiB of it)" in failure.describe()
    assert str(run.memory_summary_file) in failure.details
    of_trainer = create_autospec(trainer.Trainer, instance=True, has_memory_summary=True)  # before it freed anything
    assert attempts._seen_on_card("device", of_trainer) == attempts._seen_on_card("device", None)
    assert summary.call_count == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a whole run for each site
@pytest.mark.parametrize("kind", KINDS)
def test_sweep(runs: Callable[[str], Runs], kind: str) -> None:
    """Sites spread over every phase."""
    of_kind = runs(kind)
    wanted = weights_and_losses(of_kind.first)
    for phase in dict.fromkeys(of_kind.phases):
        for number, site in enumerate(of_kind.sites(phase)):
            fault = Fault(site, ERRORS[number % len(ERRORS)])
            try:
                run = of_kind.run(f"{phase} {site}", fault)
            except BudgetError:
                assert fault.place == "checks and plan", (phase, site)  # nothing is there yet that could be lost
                note(attack="out of memory", variant=kind, place=fault.place, end="refused")
            else:
                assert weights_and_losses(run) == wanted, (phase, site)
                note(attack="out of memory", variant=kind, place=fault.place, end="same bits")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sweep_of_saving(runs: Callable[[str], Runs], kind: str) -> None:
    of_kind = runs(kind)
    wanted = weights_and_losses(of_kind.first)
    with fault_in_saving(-1) as written:
        of_kind.run("written", None)
    for at in written:
        with fault_in_saving(at, ERRORS[at % len(ERRORS)]):
            assert weights_and_losses(of_kind.run(f"saving {at}", None)) == wanted
        note(attack="out of memory", variant=kind, place="saving", end="same bits")


@pytest.mark.slow
def test_sweep_of_preparation(runs: Callable[[str], Runs]) -> None:
    """Class images from smaller batches may differ in a level, so that only the end of the run is compared."""
    of_kind = runs("after")
    short = {"training.max_train_steps": 1}
    with Fault() as counting:
        of_kind.run("fresh", None, fresh=True, **short)
    preparing = ("class images", "encoding")
    for phase in dict.fromkeys(each for each in counting.phases if any(word in each for word in preparing)):
        sites = spread([number for number, found in enumerate(counting.phases) if found == phase])
        for number, site in enumerate(sites):
            fault = Fault(site, ERRORS[number % len(ERRORS)])
            run = of_kind.run(f"{phase} {site}", fault, fresh=True, **short)
            assert (run.final_dir / "model_index.json").is_file()
            note(attack="out of memory", variant="preparation", place=fault.place, end="done")
