"""The contract tests as a measurement of the bench; a small folder of tests stands in for theirs."""

from pathlib import Path

import pytest
import torch

from lowmem_db.bench import contract
from lowmem_db.bench.contract import contract_tests
from lowmem_db.bench.setting import Setting

CARD = Setting(torch.device("cuda"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tests" / "kernels" / "contract"
    folder.mkdir(parents=True)
    monkeypatch.setattr(contract, "FOLDER", folder)
    monkeypatch.setattr(contract, "find_spec", lambda name: object())
    return folder


def test_what_passed_is_counted(folder: Path) -> None:
    (folder / "test_noise.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    assert contract_tests(CARD) == {"passed": 2}


def test_what_failed_is_named(folder: Path) -> None:
    (folder / "test_noise.py").write_text("def test_one(): assert 1 == 2\ndef test_two(): pass\n")
    with pytest.raises(AssertionError, match=r"^test_one$"):
        contract_tests(CARD)


def test_tests_that_cannot_be_collected_fail(folder: Path) -> None:
    (folder / "test_noise.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(AssertionError, match="test_noise"):
        contract_tests(CARD)


def test_a_run_without_a_test_is_no_success(folder: Path) -> None:
    (folder / "test_noise.py").write_text("import pytest\n@pytest.mark.skip\ndef test_one(): pass\n")
    with pytest.raises(AssertionError, match=r"no test was run: .*1 skipped"):
        contract_tests(CARD)


def test_too_slow_is_not_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "_LIMIT_SECONDS", 0.01)
    (folder / "test_noise.py").write_text("import time\ndef test_one(): time.sleep(60)\n")
    assert "tests/kernels/contract" in contract_tests(CARD)["skipped"]


def test_where_there_is_no_card_it_is_said_who_runs_them() -> None:
    assert "make kernels-contract" in contract_tests(Setting(torch.device("cpu")))["skipped"]


def test_the_wheel_has_none(folder: Path) -> None:
    folder.rmdir()
    assert "clone" in contract_tests(CARD)["skipped"]


def test_what_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "find_spec", lambda name: None if name == "pytest" else object())
    assert "pip install pytest" in contract_tests(CARD)["skipped"]
