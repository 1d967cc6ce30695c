"""A whole local run opens no connection: plan, train, generate and export of models on the disk, with any metadata."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config, write_yaml

WATCHED = """
import json, sys
from pathlib import Path
asked = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        asked.append(f"{event} {arguments[1:] if event == 'socket.connect' else arguments}")
sys.addaudithook(watch)
import socket
if len(sys.argv) > 2:
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    except OSError:
        pass
from lowmem_db import api
fields = json.loads(Path(sys.argv[1]).read_text())
for number, each in enumerate(fields):
    config = api.load_config(Path(each["config"]))
    api.plan(config)
    run = api.train(config)
    api.generate(run.root, ["a dog"], num_images=1, num_inference_steps=2)
    api.export(run.root, Path(each["out"]), layout=each["layout"])
print(json.dumps(asked))
"""


def asked(tmp_path: Path, environment: dict[str, str], fields: list[dict[str, str]], *more: str) -> list[str]:
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    without = {name: value for name, value in environment.items() if name not in {"HF_HUB_OFFLINE", "HF_TOKEN"}}
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "fields.json"), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=without, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_watch_sees_a_connection(tmp_path: Path, environment_of_commands: dict[str, str]) -> None:
    assert any("socket.connect" in each for each in asked(tmp_path, environment_of_commands, [], "connect"))


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.long)])
def test_local_run_opens_no_connection(
    kind: str, tiny_fields: dict[str, object], tmp_path: Path, environment_of_commands: dict[str, str]
) -> None:
    lora = {"lora.enabled": True, "lora.rank": 2, "training.train_text_encoder": True}
    small = {"training.max_train_steps": 1, "prior.num_class_images": 1, "output_dir": str(tmp_path / kind)}
    config = load_config(None, list((tiny_fields | small | (lora if kind == "lora" else {})).items()))
    write_yaml(config, tmp_path / "run.yaml")
    layout = "lora-kohya" if kind == "lora" else "diffusers"
    fields = {"config": str(tmp_path / "run.yaml"), "out": str(tmp_path / "out"), "layout": layout}
    assert asked(tmp_path, environment_of_commands, [fields]) == []
