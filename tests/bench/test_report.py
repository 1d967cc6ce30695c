"""What people see of a report, and what others may see."""

import json

from lowmem_db.bench.report import file_name, shareable, table

REPORT = {
    "card": {"name": "NVIDIA GeForce RTX 3060", "memory_bytes": 12 << 30, "capability": "8.6", "driver": "580.1"},
    "versions": {"torch": "2.13.0"},
    "tiny": False,
    "quick": True,
    "stages": [
        {
            "name": "kernels",
            "ok": False,
            "seconds": 1.0,
            "kernels": [{"name": "noise", "backend": "eager", "reason": "/home/mina/.cache/noise.so: cannot open"}],
            "error": "geglu: OSError: /home/mina/x on workstation-7",
        },
        {
            "name": "memory",
            "ok": True,
            "seconds": 2.0,
            "strategies": [{"name": "streamed", "predicted_bytes": 1 << 30, "reserved_bytes": None}],
            "left_out": ["nested"],
        },
    ],
    "dropped": ["capped"],
}


def test_table_has_a_line_for_each_measurement() -> None:
    text = table(REPORT)
    assert "NVIDIA GeForce RTX 3060, driver 580.1, torch 2.13.0, lowmem-db bench --quick" in text
    assert "|  | streamed | yes | predicted 1.000 GiB, reserved not measured |" in text
    assert "|  | left out | - | nested |" in text
    assert "| capped |  | - | left out: more --minutes are needed |" in text
    assert {line.count("|") for line in text.splitlines()[2:]} == {5}


def test_what_is_shared_has_numbers_and_no_path_user_or_host() -> None:
    shared = shareable(REPORT)
    text = json.dumps(shared)
    assert all(word not in text for word in ("mina", "home", "workstation", "/"))
    assert shared["stages"][0]["error"] == "OSError"
    assert shared["stages"][1]["strategies"] == REPORT["stages"][1]["strategies"]
    assert shared["card"] == REPORT["card"]


def test_file_to_be_shared_is_named_after_the_card() -> None:
    assert file_name(REPORT) == "nvidia-geforce-rtx-3060-shared.json"
