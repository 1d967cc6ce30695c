"""``make torture``: every attack on a run, part by part; parts that are done for this version are not repeated.

    python -m tools.torture [PART ...]

The results go to ``benchmarks/results/torture/``, a file for each part, as soon as it is done.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CODE = ["lowmem_db", "kernels", "tests", "tools/torture"]
RESULTS = Path("benchmarks/results/torture")
ALL = ["-m", "slow or not slow"]
PARTS: dict[str, list[str]] = {
    "bad_input": ["tests/config/test_bad_input.py", "tests/cli/test_inputs.py", "tests/models/test_configurations.py",
                  "tests/models/test_whole_weights.py", "tests/models/test_suggested_base.py"],
    "numbers": ["tests/test_finite.py", "tests/preparation/test_not_finite.py"],
    "bit_rot": ["tests/storage/test_checksums.py", "tests/run/test_final.py", "tests/training/test_checkpoint.py"],
    "disk": ["tests/storage/test_atomic.py", "tests/storage/test_leftovers.py", "tests/training/test_rescue.py"],
    "signals": ["tests/test_interruption.py", "tests/training/test_signals.py", "tests/cli/test_train.py"],
    "concurrent": ["tests/storage/test_locks.py", "tests/preparation/test_shared_cache.py"],
    "sockets": ["tests/cli/test_sockets.py"],
    "out_of_memory": ["tests/run/test_running_out_of_memory.py", "tests/planning/test_ladder.py",
                      "tests/engine/test_draw.py"],
    "kills": ["tests/integration/test_resume.py"],
    "kills_of_families": ["tests/integration/test_buckets.py", "tests/integration/test_families.py",
                          "tests/integration/test_sdxl.py", "tests/integration/test_toy_family.py"],
}  # fmt: skip
KILLS_PER_VARIANT = 22  # some are not reached, because the run has passed their step
FAULTS_PER_PHASE = 8
PROCESSES = str(os.cpu_count() or 1)
LONG_RUN_STEPS = 20_000


def torture(part: str) -> dict[str, Any]:
    """Run the tests of a part; return what came of them."""
    amounts = {"LOWMEM_DB_KILLS": str(KILLS_PER_VARIANT), "LOWMEM_DB_FAULTS": str(FAULTS_PER_PHASE)} | os.environ
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "attacks.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-n", PROCESSES, f"--junitxml={report}", *ALL, *PARTS[part]]
        started = time.monotonic()
        subprocess.run(command, check=False, env=amounts | {"LOWMEM_DB_TORTURE_LOG": str(log)})
        counts = counts_of(report)
        noted = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    found = {"part": part, "version": version(), **counts, "seconds": round(time.monotonic() - started)}
    return found | ({"attacks": attacks_of(noted)} if noted else {})


def attacks_of(noted: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return how many attacks there were, by what the process was at, by variant, and by how the run ended."""
    counts = {
        f"by_{name}": dict(Counter(each[name] for each in noted if name in each).most_common())
        for name in ("place", "variant", "end")
    }
    return {"in_all": len(noted)} | {name: count for name, count in counts.items() if count}


def counts_of(report: Path) -> dict[str, Any]:
    """Return how many tests passed, failed and were skipped according to a report of pytest, and which failed.

    Without a report, because pytest itself was killed, that is the failure.
    """
    if not report.is_file():
        return {"passed": 0, "skipped": 0, "failed": ["pytest wrote no report"], "passed_by_file": {}}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    passed = [case for case in cases if case not in failed and case not in skipped]
    return {
        "passed": len(passed),
        "skipped": len(skipped),
        "failed": [case.get("name") for case in failed],
        "passed_by_file": dict(Counter(str(case.get("classname")).rpartition(".")[2] for case in passed)),
    }


def version() -> str:
    """Return the last commit that changed the code or the tests: results that are committed repeat nothing."""
    command = ["git", "log", "-1", "--format=%H", "--", *CODE]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def is_done(file: Path) -> bool:
    """Return whether a part has passed for this version."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found.get("version") == version() and not found.get("failed") and not found.get("grows")


def main(parts: list[str]) -> int:
    """Run the parts that are left; return 1 if something failed."""
    failed = 0
    for part in parts or [*PARTS, "long_run"]:
        file = RESULTS / f"{part}.json"
        if is_done(file):
            continue
        if part == "long_run":
            steps = os.environ.get("LOWMEM_DB_STEPS", str(LONG_RUN_STEPS))
            command = [sys.executable, "-m", "tools.torture.long_run", "--steps", steps, "--output", str(file)]
            command += ["--version", version()]
            failed += subprocess.run(command, check=False).returncode != 0
            continue
        found = torture(part)
        failed += bool(found["failed"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
