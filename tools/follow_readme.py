"""Follow README.md and the notebook's installation word by word in an empty folder: ``python -m tools.follow_readme``.

Builds the wheel, makes a fresh environment, and runs every command of the README in it, without the clone on any path.
Commands in blocks run as they are, and those within sentences as ``INLINE`` says, or are skipped for the reason in
``SKIPPED``; a command that is in none of them is an error. What would take hours or needs the hub is made small by
appended options, see ``APPENDED``: every model is the demo's, and training takes two steps.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "lowmem_db_colab.ipynb"
CONSTRAINTS = ROOT / "constraints.txt"
BUILD = ("setuptools>=77", "build")
APPENDED: Mapping[str, Sequence[str]] = {
    "train": (
        "model.base=demo", "data.resolution=128", "data.num_crops=1", "prior.num_class_images=2",
        "prior.class_prompts=[]", "prior.num_inference_steps=2", "training.max_train_steps=2",
        "training.lr_warmup_steps=0", "sampling.num_images=1", "sampling.num_inference_steps=2", "device=cpu",
    ),
    "generate": ("--num-images", "1", "--num-inference-steps", "2", "--device", "cpu"),
}  # fmt: skip
INLINE: Mapping[str, str] = {
    "lowmem-db doctor": "lowmem-db doctor",
    "lowmem-db configs": "lowmem-db configs",
    # The demo's decoder has no place in the single file of Stable Diffusion.
    "lowmem-db export runs/teapot --precision fp16": (
        "lowmem-db export runs/teapot --precision fp16 --format diffusers"
    ),
    "lowmem-db train": (
        "lowmem-db train accelerate launch train_dreambooth.py --pretrained_model_name_or_path=demo "
        '--instance_data_dir=photos/teapot --instance_prompt="a sks dog" --output_dir=runs/pasted'
    ),
}
"""What is run for a command within a sentence."""
SKIPPED: Mapping[str, str] = {
    "pip install torch --index-url https://download.pytorch.org/whl/cu128": "is for Windows with an NVIDIA card",
    "lowmem-db plan sdxl_lora --all-gpus": "takes minutes; tests/planning/test_survey.py has a small one",
    "lowmem-db bench --share": "measures a card",
    "lowmem-db ui": "serves until it is ended; tests/ui drives it",
}
"""Why a command within a sentence is not run."""
AFTERWARDS = (
    "lowmem-db --version",
    "lowmem-db identifiers demo",
    "lowmem-db prepare demo output_dir=runs/prepared data.num_crops=1 prior.num_class_images=2 prior.class_prompts=[] "
    "prior.num_inference_steps=2 device=cpu",
    "lowmem-db evaluate runs/teapot --prompts 1 --images 1 --num-class-images 2 --num-inference-steps 2",
    'lowmem-db train sdxl_lora subject.instance_dir=photos/teapot subject.class_prompt="a photo of teapot" '
    "output_dir=runs/lora",
    "lowmem-db generate runs/lora",
    "lowmem-db export runs/lora",
    "pip install --quiet lowmem-db[lora]",
)
"""What error messages and tables say instead of commands."""
_BLOCK = re.compile(r"^```\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the commands in the blocks of a Markdown text, as words."""
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def inline_commands(text: str) -> Iterator[list[str]]:
    """Yield what is to be run for the commands within the sentences of a Markdown text, as words.

    Raises:
        SystemExit: Neither ``INLINE`` nor ``SKIPPED`` knows one.
    """
    for found in re.findall(r"`((?:lowmem-db|pip|python)\s[^`]*)`", _BLOCK.sub("", text)):
        command = " ".join(found.split())
        if command in INLINE:
            yield shlex.split(INLINE[command])
        elif command not in SKIPPED:
            raise SystemExit(f"README.md: {command!r} is in neither INLINE nor SKIPPED of tools/follow_readme.py")


def made_small(words: Sequence[str]) -> list[str]:
    """Return a command with its options of ``APPENDED``."""
    return [*words, *APPENDED.get(words[1], ())]


def installation_of(words: Sequence[str], wheel: Path) -> list[str]:
    """Return an installation from the repository as one of the wheel, without what only CUDA devices can use."""
    extras = "[8bit,evaluation,lora]"
    return [f"lowmem-db{extras} @ {wheel.as_uri()}" if "git+" in word else word for word in words]


class Follower:
    """Runs commands in a fresh environment and an empty folder.

    Args:
        work: A folder to use.
    """

    def __init__(self, work: Path) -> None:
        self.venv, self.home = work / "venv", work / "home"
        self.home.mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.environment = kept | {
            "PATH": f"{self.venv / 'bin'}:/usr/bin:/bin",
            "PIP_CONSTRAINT": str(CONSTRAINTS),
            "LOWMEM_DB_CACHE": str(work / "cache"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "100",
        }

    def run(self, words: Sequence[str]) -> str:
        """Run a command; return its standard output.

        Raises:
            SystemExit: It failed.
        """
        started = time.monotonic()
        done = subprocess.run(words, cwd=self.home, env=self.environment, stdout=subprocess.PIPE, text=True)
        print(f"{time.monotonic() - started:6.1f} s  {shlex.join(words)[:150]}", flush=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(words)}\n{done.stdout}\nended with {done.returncode}")
        return done.stdout

    def python(self, program: str) -> str:
        """Run a program in the environment; return what it prints."""
        return self.run(["python", "-c", program]).strip()


def build_wheel(follower: Follower, folder: Path) -> Path:
    """Build the wheel from a copy of what git knows, and return it."""
    copy = folder / "source"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(copy)], check=True)
    follower.run(["python", "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(copy)])
    return next(folder.glob("*.whl"))


def install_as_on_colab(follower: Follower) -> None:
    """Run the notebook's cell that installs, with torch and an old torchao already there."""
    folder = Path(follower.python("import sysconfig; print(sysconfig.get_path('purelib'))"))
    old = folder / "torchao-0.10.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n", encoding="utf-8")
    (old / "RECORD").write_text("torchao-0.10.0.dist-info/METADATA,,\ntorchao-0.10.0.dist-info/RECORD,,\n", "utf-8")
    (follower.home / "lowmem_db").mkdir()  # a folder of that name is no installation
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]]
    install = next(cell for cell in cells if "%pip install" in cell)
    script = follower.home / "install.ipy"
    script.write_text(f"REPOSITORY = {f'file://localhost{ROOT}'!r}\n{install}", encoding="utf-8")
    follower.run(["ipython", script.name])
    if old.exists():
        raise SystemExit("the notebook left torchao 0.10 in place")
    follower.run(["lowmem-db", "doctor"])
    shutil.rmtree(follower.home / "lowmem_db")


def follow(work: Path) -> None:
    """Build, install and run everything.

    Raises:
        SystemExit: A command failed or is unknown, or the clone was used.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks, sentences = list(commands_of(readme)), list(inline_commands(readme))
    follower = Follower(work)
    subprocess.run([sys.executable, "-m", "venv", str(follower.venv)], check=True)
    follower.run(["pip", "install", "--quiet", "ipython", "torch", *BUILD])
    install_as_on_colab(follower)
    follower.run(["pip", "uninstall", "--quiet", "--yes", "lowmem-db"])
    wheel = build_wheel(follower, work)
    for words in blocks:
        if words[0] == "pip":
            follower.run(installation_of(words, wheel))
            check_package(follower)
        else:
            follower.run(made_small(words))
    for words in [*sentences, *map(shlex.split, AFTERWARDS)]:
        follower.run(made_small(words))
    for command, reason in SKIPPED.items():
        print(f"skipped  {command}: {reason}")


def check_package(follower: Follower) -> None:
    """Check that the installed package is the one of the wheel, and put photos where the README's are.

    Raises:
        SystemExit: It is not.
    """
    where = Path(follower.python("import lowmem_db; print(lowmem_db.__file__)"))
    if follower.venv.resolve() not in where.resolve().parents:
        raise SystemExit(f"{where}: is not the installed package")
    follower.run(["lowmem-db", "configs", "demo", "--output", "copied"])
    shutil.copytree(follower.home / "copied" / "examples" / "drawn_dog", follower.home / "photos" / "teapot")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder that does not exist yet; a temporary one by default")
    given = parser.parse_args().work
    if given is not None:
        follow(given.absolute())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            follow(Path(temporary))
    print("README.md can be followed")
