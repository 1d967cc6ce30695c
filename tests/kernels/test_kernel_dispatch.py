import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from lowmem_db_kernels import KernelUnavailableError, adamw8bit_triton, dispatch, registry, status, will_compile

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def forget_choices(monkeypatch):
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.delenv("LOWMEM_DB_KERNELS", raising=False)


@pytest.fixture
def card(monkeypatch):
    """Pretend to have a card whose kernels pass; return a function that changes the card."""

    def become(capability=(8, 6), verdict=None, has_triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(dispatch, "HAS_TRITON", has_triton)
        monkeypatch.setattr(dispatch, "INTERPRETED", False)

        def self_test(device):
            assert verdict is None, verdict

        monkeypatch.setitem(registry, "noise", dispatch.Operator("noise", self_test))

    become()
    return become


def test_every_public_operator_is_listed_with_a_reason():
    rows = {row.op: row for row in status("cpu")}
    assert set(rows) == set(registry)
    assert {"noise", "diffusion_loss"} <= set(rows)
    optimizer = rows.pop("adamw8bit_step")
    assert optimizer.backend == "native" or "compile" in optimizer.reason
    assert all(row.backend == "eager" and "not on a CUDA device" in row.reason for row in rows.values())


def test_automatic_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="lowmem_db_kernels"):
        dispatch.choose("noise", CPU)
        dispatch.choose("noise", CPU)
    assert len(caplog.records) == 1
    assert "noise on cpu" in caplog.text


def test_a_card_that_passes_its_self_test_gets_triton(card):
    assert dispatch.choose("noise", CUDA).backend == "triton"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"capability": (7, 0)}, "compute capability 7.0 is below 7.5"),
        ({"verdict": "0.5 is not 0.7"}, "self-test failed .* 0.5 is not 0.7"),
        ({"has_triton": False}, "Triton cannot be imported"),
    ],
)
def test_what_cannot_serve_falls_back_or_fails_by_name(card, monkeypatch, change, reason):
    card(**change)
    choice = dispatch.choose("noise", CUDA)
    assert choice.backend == "eager"
    assert re.search(reason, choice.reason)
    monkeypatch.setenv("LOWMEM_DB_KERNELS", "triton")
    with pytest.raises(KernelUnavailableError, match=f"this is not possible for noise: .*{reason}"):
        dispatch.choose("noise", CUDA)


def test_a_native_form_that_fails_its_self_test_is_not_used(monkeypatch, caplog):
    def self_test(device):
        raise AssertionError("weight: 0.5 is not 0.7")

    operator = dispatch.Operator("noise", self_test, native_self_test=self_test)
    monkeypatch.setitem(registry, "noise", operator)
    choice = dispatch.choose("noise", CPU)
    assert choice.backend == "eager"
    assert "self-test failed on cpu: AssertionError: weight: 0.5 is not 0.7" in choice.reason
    assert any(record.levelno == logging.WARNING for record in caplog.records)


def test_a_native_form_serves_the_cpu_alone(card, monkeypatch):
    operator = dispatch.Operator("noise", lambda device: None, native_self_test=lambda device: None)
    monkeypatch.setitem(registry, "noise", operator)
    assert dispatch.choose("noise", CPU).backend == "native"
    assert dispatch.choose("noise", CUDA).backend == "triton"
    monkeypatch.setenv("LOWMEM_DB_KERNELS", "native")
    with pytest.raises(KernelUnavailableError, match="native form needs a CPU tensor, but this one is on cuda:0"):
        dispatch.choose("noise", CUDA)


def test_a_failed_self_test_is_loud(card, caplog):
    card(verdict="wrong")
    dispatch.choose("noise", CUDA)
    assert any(record.levelno == logging.WARNING and "noise is disabled" in record.message for record in caplog.records)


def test_a_dtype_without_kernel_is_served_by_the_twin(card):
    assert dispatch.choose("noise", CUDA, torch.float64).backend == "eager"


def test_eager_can_be_asked_for(card, monkeypatch):
    monkeypatch.setenv("LOWMEM_DB_KERNELS", "eager")
    assert dispatch.choose("noise", CUDA) == ("eager", "LOWMEM_DB_KERNELS=eager")


@pytest.mark.parametrize("mode", ["triton", "interpret"])
def test_explicit_request_that_cannot_be_met_is_an_error(mode, monkeypatch):
    monkeypatch.setenv("LOWMEM_DB_KERNELS", mode)
    with pytest.raises(KernelUnavailableError, match=f"LOWMEM_DB_KERNELS={mode}, but this is not possible for noise"):
        dispatch.choose("noise", CPU)
    assert {row.backend for row in status("cpu")} == {"unavailable"}


def test_unknown_mode_names_the_allowed_ones(monkeypatch):
    monkeypatch.setenv("LOWMEM_DB_KERNELS", "fast")
    with pytest.raises(
        KernelUnavailableError, match="LOWMEM_DB_KERNELS=fast; allowed: auto, triton, native, eager, interpret"
    ):
        dispatch.choose("noise", CPU)


def test_package_works_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, lowmem_db_kernels as k\n"
        "coefficients = k.NoiseCoefficients(*torch.ones(4, 1))\n"
        "k.noise(torch.ones(1, 4, 2, 2), coefficients, seed=1, step=1, sample_ids=torch.tensor([0]))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)


def test_kernels_are_compiled_once(card, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert will_compile(CUDA)
    assert not will_compile(CPU)
    of_another_program = tmp_path / "ABC" / "_other_kernel.json"
    of_another_program.parent.mkdir()
    of_another_program.touch()
    assert will_compile("cuda")
    (tmp_path / "ABC" / f"{dispatch._LARGEST_KERNEL}.json").touch()
    assert not will_compile(CUDA)
    assert hasattr(adamw8bit_triton, dispatch._LARGEST_KERNEL)


@pytest.mark.parametrize(
    ("mode", "has_triton", "compiles"), [("eager", True, False), ("auto", False, False), ("triton", True, True)]
)
def test_nothing_is_compiled_that_is_not_used(card, monkeypatch, tmp_path, mode, has_triton, compiles):
    card(has_triton=has_triton)
    monkeypatch.setenv("LOWMEM_DB_KERNELS", mode)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert will_compile(CUDA) is compiles
