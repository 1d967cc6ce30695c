"""Missing folders and typos are told before anything heavy is imported."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.errors import DataError
from lowmem_db.run.inputs import check_inputs

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "safetensors")
PROGRAM = (
    "import sys\nfrom lowmem_db.cli.main import main\nsys.argv = ['lowmem-db', *sys.argv[1:]]\n"
    f"try:\n    main()\nexcept SystemExit as ended:\n    print(ended.code, sorted(set({HEAVY}) & set(sys.modules)))"
)


@pytest.fixture
def answer(environment_of_commands: dict[str, str], tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Run a command in a process of its own; return its exit code with what it imported, and what it said."""

    def run(*arguments: object) -> tuple[str, str]:
        command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        ended = subprocess.run(command, env=environment_of_commands, cwd=tmp_path, capture_output=True, text=True)
        return ended.stdout, ended.stderr

    return run


@pytest.mark.parametrize("command", ["train", "prepare"])
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "subject.instance_dir=photso",
            "subject.instance_dir: photso does not exist; allowed: a folder of pictures; did you",
        ),
        ("subject.instance_dir=empty", "subject.instance_dir: empty is empty; allowed: JPEG"),
        ("subject.instance_dir=tiny.yaml", "subject.instance_dir: tiny.yaml is a file; allowed: a folder"),
        ("trainin.x=1", "trainin: unknown field; did you mean training?"),
        ("subject.instance_dir=\x1b[31mred[/bold]", "subject.instance_dir: \\x1b[31mred[/bold] does not exist"),
    ],
)
def test_is_told_in_one_line_and_at_once(
    answer: Callable[..., tuple[str, str]], config_file: Path, tmp_path: Path, command: str, argument: str, said: str
) -> None:
    for name in ("photos", "empty"):
        (tmp_path / name).mkdir()
    out, err = answer(command, config_file, argument)
    assert out == "2 []\n"
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_configuration_is_told_at_once(answer: Callable[..., tuple[str, str]], config_file: Path) -> None:
    out, err = answer("train", "tny.yaml")
    assert (out, err) == ("2 []\n", "error: tny.yaml: the configuration file does not exist; did you mean tiny.yaml?\n")


def test_photos_that_serve_as_class_images_are_refused(tiny_config: Config, tmp_path: Path) -> None:
    photos = tiny_config.subject.instance_dir
    link = tmp_path / "link"
    link.symlink_to(photos)
    for folder in (photos, link, photos / ".." / photos.name):
        tree = tiny_config.model_dump(mode="json")
        config = load_config(None, [*tree.items(), ("prior", {**tree["prior"], "class_dir": str(folder)})])
        with pytest.raises(DataError, match=r"prior\.class_dir: .* is also the photo folder"):
            check_inputs(config)
    check_inputs(tiny_config)
