"""A model that is shared out between two processes (FSDP2) trains the bits of one process, in half the memory."""

import json
import signal
from pathlib import Path

import pytest
import torch

from lowmem_db.config.loading import load_config
from lowmem_db.distributed.shards import own
from lowmem_db.errors import ConfigError, DependencyError
from lowmem_db.memory import sharding
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.planning.phases import weights_of
from lowmem_db.run.run import train
from lowmem_db.storage.run_folder import RunFolder, read_rows
from lowmem_db.storage.tensors import read_state
from lowmem_db.training.trainer import Trainer
from tests.distributed.ranks import Fields, folder_bytes, kill_myself, rank, run_ranks, skip_without_fsdp2
from tests.distributed.test_ends import _terminate_me as terminate_me
from tests.distributed.test_ends import _train as train_until
from tests.distributed.test_ends import assert_same_final
from tests.distributed.test_law import SAME_NORM, SAME_NORM_OF_TENSORS, assert_same_run, one_process

_FULL = {"distributed.sharding": "full"}
_COMMON = {
    "training.max_train_steps": 3,
    "training.train_text_encoder": True,
    "checkpointing.every": 2,
    "checkpointing.keep": None,
}
_SAMPLES = {
    "sampling.prompts": ["a dog", "a cat", "a zx dog"],
    "sampling.num_images": 1,
    "sampling.num_inference_steps": 2,
}
_8_BITS = {
    "optimizer.name": "adamw8bit",
    "memory.weights": "bf16_extra_bits",
    "memory.optimizer_in_backward": True,
    "training.clipping": "none",
}
VARIANTS = {
    "adamw, average, samples": {"ema.enabled": True, **_SAMPLES},
    "8-bit in the backward pass, 24-bit weights": _8_BITS,
    "8-bit in the backward pass, 24-bit weights, average, samples": {**_8_BITS, "ema.enabled": True, **_SAMPLES},
    "scores, the best step is kept": {
        "evaluation.every": 1,
        "evaluation.keep_best": True,
        "training.learning_rate": 0.1,
        **_SAMPLES,
    },
    "two batches each": {"training.gradient_accumulation_steps": 2},
    "adamw in the backward pass": {"memory.optimizer_in_backward": True, "training.clipping": "none"},
    "norm of each tensor": {"memory.optimizer_in_backward": True, "training.clipping": "per_tensor"},
    "segments": {"memory.checkpointing": "segments", "training.mixed_precision": "bf16"},
    "nested": {"memory.checkpointing": "nested", **_8_BITS},
    "fp16 autocast, 8 bits in the backward pass": {
        "training.mixed_precision": "fp16",
        "optimizer.name": "adamw8bit",
        "memory.optimizer_in_backward": True,
        "training.clipping": "per_tensor",
    },
    "some layers, 24-bit weights": {
        **_8_BITS,
        "training.layers": ["unet.*attn*", "text_encoder.*mlp*"],
        "ema.enabled": True,
    },
}
QUICK = {"8-bit in the backward pass, 24-bit weights, average, samples"}  # adamw is killed below


@pytest.fixture
def fields(tiny_fields: Fields, wide_model: Path) -> Fields:
    skip_without_fsdp2()
    return {**tiny_fields, **_COMMON, "model.base": str(wide_model)}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in VARIANTS]
)
def test_model_that_is_shared_out_trains_the_bits_of_one_process(variant: str, fields: Fields, tmp_path: Path) -> None:
    fields = {**fields, **VARIANTS[variant]}
    assert run_ranks(2, _train, {**fields, **_FULL, "output_dir": str(tmp_path / "two" / "run")}) == [0, 0]
    batches = 2 * int(str(fields.get("training.gradient_accumulation_steps", 1)))
    one = one_process(fields, tmp_path / "one" / "run", accumulation=batches)
    is_of_tensors = "memory.optimizer_in_backward" in fields and "memory.weights" not in fields
    assert_same_run(tmp_path / "two" / "run", one, norm=SAME_NORM_OF_TENSORS if is_of_tensors else SAME_NORM)
    if "sampling.prompts" in fields:
        assert folder_bytes(tmp_path / "two" / "run" / "samples") == folder_bytes(one / "samples") != {}
    if "evaluation.every" in fields:
        scores = [(folder / "scores.jsonl").read_text() for folder in (tmp_path / "two" / "run", one)]
        assert scores[0] == scores[1]


def test_each_of_two_processes_holds_half_and_one_that_holds_all_goes_on_when_one_is_killed(
    fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = {**fields, "output_dir": str(tmp_path / "run"), "training.max_train_steps": 4}
    assert run_ranks(2, _count_and_train_until_killed, fields | _FULL, 3, tmp_path) == [2, -signal.SIGKILL]
    said = capfd.readouterr().err
    _assert_halves([json.loads((tmp_path / f"held-{rank}.json").read_text()) for rank in range(2)], tmp_path / "run")
    assert "rank 0: ended, because rank 1 did: it died without a word: it was killed" in said
    run = RunFolder(tmp_path / "run")
    assert f"the last good checkpoint is {run.checkpoint_dir(2)}, continue with --resume" in said
    assert run.complete_steps() == [2]  # the third step was lost with half of its weights
    fields = fields | {"training.gradient_accumulation_steps": 2}
    train(load_config(None, list(fields.items())), resume=True)
    assert_same_final(tmp_path / "run", one_process(fields, tmp_path / "one", accumulation=2))


@pytest.mark.long
def test_signal_to_one_process_saves_what_all_hold(fields: Fields, tmp_path: Path) -> None:
    fields = {**fields, **VARIANTS["8-bit in the backward pass, 24-bit weights"], "output_dir": str(tmp_path / "run")}
    assert run_ranks(2, _train_until_asked_to_stop, {**fields, **_FULL}, 1) == [130, 130]
    assert RunFolder(tmp_path / "run").complete_steps() == [2]
    assert run_ranks(2, _resume, {**fields, **_FULL}) == [0, 0]
    assert_same_final(tmp_path / "run", one_process(fields, tmp_path / "one", accumulation=2))


@pytest.mark.long
def test_checkpoint_that_does_not_fit_ends_all_with_its_line(
    fields: Fields, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = {**fields, **_FULL, "output_dir": str(tmp_path / "run"), "training.max_train_steps": 1}
    assert run_ranks(2, _train, fields) == [0, 0]
    file = RunFolder(tmp_path / "run").checkpoint_dir(1) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert run_ranks(2, _resume, {**fields, "training.max_train_steps": 2}) == [2, 2]
    said = capfd.readouterr().err
    assert f"rank 0: {file}" in said
    assert f"rank 1: ended, because rank 0 did: {file}" in said


@pytest.mark.long
def test_checkpoints_pass_between_both_ways_to_share_a_run(fields: Fields, tmp_path: Path) -> None:
    fields = {**fields, **VARIANTS["adamw, average, samples"], "training.max_train_steps": 1}
    folder = {"output_dir": str(tmp_path / "run")}
    train(load_config(None, list((fields | folder | {"training.gradient_accumulation_steps": 2}).items())))
    assert run_ranks(2, _resume, fields | folder | _FULL | {"training.max_train_steps": 2}) == [0, 0]
    assert run_ranks(2, _resume, fields | folder | {"training.max_train_steps": 3}) == [0, 0]
    assert run_ranks(2, _resume, fields | folder | _FULL | {"training.max_train_steps": 4}) == [0, 0]
    fields = fields | {"training.max_train_steps": 4}
    assert_same_final(tmp_path / "run", one_process(fields, tmp_path / "one", accumulation=2))


@pytest.mark.long
def test_update_limited_over_all_processes_differs_in_the_last_bits(fields: Fields, tmp_path: Path) -> None:
    """The squares of an update are summed in each process first."""
    fields = {**fields, "memory.optimizer_in_backward": True, "training.clipping": "update_rms"}
    fields |= {"optimizer.beta1": 0.1, "training.learning_rate": 1e-4}  # with which updates are large enough
    assert run_ranks(2, _train, {**fields, **_FULL, "output_dir": str(tmp_path / "two")}) == [0, 0]
    one = one_process(fields, tmp_path / "one", accumulation=2)
    folders = [RunFolder(folder).checkpoint_dir(3) for folder in (tmp_path / "two", one)]
    for component in ("unet", "text_encoder"):
        found, expected = (read_state(folder / f"{component}.safetensors") for folder in folders)
        for name, weight in expected.items():
            assert torch.allclose(found[name], weight, rtol=1e-5, atol=1e-7), name


@pytest.mark.long
@pytest.mark.parametrize(("size", "reduce"), [(4, "ordered"), (3, "ordered"), (3, "sum")])
def test_any_number_of_processes_shares_a_model(size: int, reduce: str, fields: Fields, tmp_path: Path) -> None:
    fields = {**fields, "distributed.reduce": reduce}
    assert run_ranks(size, _train, {**fields, **_FULL, "output_dir": str(tmp_path / "many")}) == [0] * size
    one = one_process(fields, tmp_path / "one", accumulation=size)
    if reduce == "ordered":
        assert_same_run(tmp_path / "many", one)
    else:
        rows = [read_rows(folder / "metrics.jsonl") for folder in (tmp_path / "many", one)]
        for name in ("loss", "grad_norm"):
            found, expected = ([row[name] for row in each] for each in rows)
            assert found == pytest.approx(expected, rel=1e-5)


def test_one_process_has_nobody_to_share_with(fields: Fields) -> None:
    with pytest.raises(ConfigError, match=r"distributed.sharding: 'full' shares the model .* --num-processes 2"):
        train(load_config(None, [*fields.items(), *_FULL.items()]))


def test_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_fsdp2()
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, "set_custom_reduce_scatter")
    with pytest.raises(DependencyError, match=r"distributed.sharding: 'full' needs .* set distributed.sharding=none"):
        sharding.check()


def _assert_halves(held: list[dict[str, int]], run: Path) -> None:
    """Weights, gradients and states in fp32 are 16 bytes for every parameter of one process."""
    whole = 16 * held[0]["parameters"]
    for each in held:
        assert 0.5 * whole < each["weights"] + each["gradients"] + each["states"] <= 0.55 * whole
    planned = _parts(run)
    assert planned["weights"] == held[0]["weights"]
    assert held[0]["states"] <= planned["optimizer_state"] <= 1.02 * held[0]["states"]  # they begin at whole 256 bytes
    assert held[0]["gradients"] <= planned["gradients"] <= 1.05 * held[0]["gradients"]


def _parts(run: Path) -> dict[str, int]:
    (phase,) = (each for each in json.loads((run / "plan.json").read_text())["phases"] if each["name"] == "train")
    return phase["parts"]


def _train(fields: Fields) -> None:
    train(load_config(None, list(fields.items())))


def _resume(fields: Fields) -> None:
    train(load_config(None, list(fields.items())), resume=True)


def _train_until_asked_to_stop(fields: Fields, in_step: int) -> None:
    train_until(fields, 1, in_step, terminate_me)


def _count_and_train_until_killed(fields: Fields, in_step: int, folder: Path) -> None:
    """Train, and write down the bytes that this process holds when it is about to step; one is killed."""
    begin_step, step = OptimizerHandle._begin_step, Trainer._step
    training: list[Trainer] = []

    def counting(handle: OptimizerHandle) -> None:
        if training:
            parameters, states = handle.parameters(), handle._states_by_parameter().values()
            held = {
                "parameters": sum(each.numel() for each in parameters),
                "weights": sum(own(each).nbytes for each in weights_of(training[0].denoiser.modules().values())),
                "gradients": sum(own(each.grad).nbytes for each in parameters if each.grad is not None),
                "states": sum(each.nbytes for state in states for each in state.values()),
            }
            (folder / f"held-{rank()}.json").write_text(json.dumps(held))
        begin_step(handle)

    def stepping(trainer: Trainer) -> object:
        training.append(trainer)
        return step(trainer)

    OptimizerHandle._begin_step = counting  # type: ignore[method-assign]
    Trainer._step = stepping  # type: ignore[method-assign, assignment]
    train_until(fields, 1, in_step, kill_myself)
