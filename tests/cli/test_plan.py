"""``lowmem-db plan``: the contract of its JSON, its exit codes, and what needs neither weights nor a GPU."""

import json
from pathlib import Path

import pytest

from lowmem_db.storage.places import DEMO_DIR
from tests.cli.conftest import REPOSITORY, Run

PARTS = {"weights", "optimizer_state", "gradients", "activations", "other"}
SD15 = REPOSITORY / "configs" / "sd15_full_12gb.yaml"


def test_json_keeps_its_contract(run: Run, config_file: Path) -> None:
    outcome = run("plan", config_file, "--json", "--budget", "2GiB", "prior.enabled=true", 'sampling.prompts=["a dog"]')
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert {"peak_bytes", "phases", "strategy", "refused", "seconds_to_plan"} <= found.keys()
    assert [phase["name"] for phase in found["phases"]] == [
        "class_images", "encode_images", "train", "sample",
    ] or [phase["name"] for phase in found["phases"]] == [
        "class_images", "encode_images", "encode_text", "train", "sample",
    ]  # fmt: skip
    for phase in found["phases"]:
        assert set(phase["parts"]) == PARTS
        assert phase["peak_bytes"] == sum(phase["parts"].values())
    largest = max(phase["peak_bytes"] for phase in found["phases"])
    assert found["peak_bytes"] == largest + found["allowance_bytes"] <= found["budget_bytes"] == 2 << 30
    assert found["tensor_bytes"] == largest < found["process_bytes"] == found["peak_bytes"]
    assert found["reserved_bytes"] is None
    assert found["strategy"]["checkpointing"] == "none"
    assert all(set(refusal) == {"strategy", "reason"} for refusal in found["refused"])


def test_plan_for_two_processes_says_what_crosses(run: Run, config_file: Path) -> None:
    alone, two = (json.loads(run("plan", config_file, "--json", *more).out) for more in ((), ("--num-processes", "2")))
    assert (alone["num_processes"], alone["sent_bytes_per_step"]) == (1, 0)
    assert two["num_processes"] == 2
    assert two["sent_bytes_per_step"] == two["received_bytes_per_step"] > 0
    assert two["seconds_per_step"] > alone["seconds_per_step"]
    assert two["peak_bytes"] == alone["peak_bytes"]
    assert any("2 processes: all figures are those of one" in note for note in two["notes"])


def test_screen_has_a_bar_for_each_phase(run: Run, config_file: Path) -> None:
    outcome = run("plan", config_file, "device=cpu")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == "fp32, no checkpointing"
    assert " GiB on CPU, including " in lines[1]
    train = next(line for line in lines if line.strip().startswith("train"))
    assert "█" in train


def test_verification_prints_both_figures(run: Run, config_file: Path) -> None:
    outcome = run("plan", config_file, "device=cpu", "--verify", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["predicted_train_bytes"] == pytest.approx(found["measured_train_bytes"], rel=0.02)


def test_budget_that_is_too_small_is_exit_code_3(run: Run, config_file: Path) -> None:
    outcome = run("plan", config_file, "--budget=10MiB")
    assert (outcome.code, outcome.out) == (3, "")
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("memory.budget: 0.0 GiB is less than any strategy needs; the smallest budget that is")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--gpu", "rtx 3600"), "--gpu: 'rtx 3600' is unknown; did you mean RTX 3"),
        (("--budget", "lots"), "--budget: 'lots' is not a size; allowed: 8, 8G, 8GiB"),
        (("--gpu", "T4", "--verify"), "--gpu: 'T4' cannot be verified here"),
        (
            ("model.base=nowhere/at-all",),
            "model.base: 'nowhere/at-all' is not a folder or a file, has not been downloaded",
        ),
    ],
)
def test_mistakes_are_named(
    run: Run, config_file: Path, arguments: tuple[str, ...], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = run("plan", config_file, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert part in errors[0]


def test_card_that_is_named_is_planned_for_with_its_memory(run: Run, config_file: Path) -> None:
    found = json.loads(run("plan", config_file, "--gpu", "t4", "--json").out)
    assert found["device"] == "T4"
    assert found["tensor_bytes"] < found["reserved_bytes"] < found["process_bytes"] == found["peak_bytes"]
    assert found["budget_bytes"] == int(15 * 0.97 * 2**30)
    assert (found["strategy"]["weights"], found["strategy"]["mixed_precision"]) == ("fp32", "fp16")


def test_configuration_files_are_enough(run: Run, config_file: Path, tmp_path: Path) -> None:
    for component in ("unet", "text_encoder", "vae", "scheduler"):
        (tmp_path / "bare" / component).mkdir(parents=True)
        for file in (DEMO_DIR / component).glob("*.json"):
            (tmp_path / "bare" / component / file.name).write_bytes(file.read_bytes())
    outcome = run("plan", config_file, f"model.base={tmp_path / 'bare'}", "--json", "--budget", "8GiB")
    assert outcome.code == 0, outcome.err
    assert run("plan", config_file, f"model.base={tmp_path / 'bare'}", "--verify").code == 2


def test_sd15_is_planned_without_weights_and_spends_the_budget_on_speed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    opened = ("training.train_text_encoder=true", "memory.checkpointing=null")
    outcome = run("plan", SD15, "--json", "--budget", "24GiB", *opened)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    train = next(phase for phase in found["phases"] if phase["name"] == "train")
    assert train["parts"]["weights"] == pytest.approx(2 * (859_520_964 + 123_060_480), rel=0.001)
    strategy = found["strategy"]
    assert (strategy["checkpointing"], strategy["optimizer_in_backward"], strategy["stream_optimizer_state"]) == (
        "none", False, False,
    )  # fmt: skip
