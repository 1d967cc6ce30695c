"""Every script in ``benchmarks/`` says what it does, and those that measure can be tried on a small model."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(file for file in BENCHMARKS.rglob("*.py") if "__main__" in file.read_text(encoding="utf-8"))
TRIED = {
    "speed/hook_overhead": [],
    "weights_moved": [],
    "speed/step_overhead": ["--rounds", "1"],
    "memory_ladder": [],
}
MEASURING = (*TRIED, "memory/prediction", "memory/sd15_step", "memory/sdxl_lora_step", "demo/picture")


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_says_what_it_does(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(script, monkeypatch, "--help")
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "usage:" in said
    assert len(said.splitlines()) > 6
    if str(script.relative_to(BENCHMARKS).with_suffix("")) in MEASURING:
        assert "--tiny" in said
        assert "--device" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_measurement_can_be_tried_on_the_cpu(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(BENCHMARKS / f"{name}.py", monkeypatch, "--tiny", "--device", "cpu", *TRIED[name])
    assert len(capsys.readouterr().out.splitlines()) >= 2
