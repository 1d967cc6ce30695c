"""Write ``before.tar.xz`` and ``record.json``: tiny runs as people have them, and what became of them.

``python -m tests.before.make`` from the repository's root, with one thread. It was run once, on commit 3706736, before
the code was rearranged; it is kept for the record, uses modules of that commit, and need not run on a later one.

The archive holds, with paths relative to its root, in which every command is given:

* ``models``, ``photos`` and ``cache``: what all runs share;
* ``unfinished/CASE``: runs that were killed in their fifth step of six, with the checkpoint of the fourth;
* ``finished/CASE``: configuration and final model of runs that were not killed;
* ``expected``: pictures that ``generate`` drew, and the samples of a run. Those of ``finished/lora_xl`` were drawn
  again when the dropout of its adapters no longer changed what ``generate`` draws.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from lowmem_db.cli.main import main
from lowmem_db.models.saving import save_component
from lowmem_db.training import trainer as trainer_module
from tests.before.records import (
    ARCHIVE,
    DRAWN,
    EVALUATED,
    EXPORTED,
    GENERATED,
    RECORD,
    files_of,
    machine,
    metric_rows,
)
from tests.tiny_models import (
    RESOLUTION,
    tiny_sdxl_unet,
    tiny_text_encoder,
    tiny_unet,
    write_tiny_model,
    write_tiny_sdxl,
)

KILLED_IN = 4  # the fifth step
SHARED = {
    "model.base": "models/sd1",
    "subject.instance_dir": "photos",
    "subject.instance_prompt": "a zx dog",
    "subject.class_prompt": "a dog",
    "cache_dir": "cache",
    "device": "cpu",
    "data.resolution": RESOLUTION,
    "data.num_crops": 2,
    "prior.num_class_images": 4,
    "prior.num_inference_steps": 2,
    "training.max_train_steps": 6,
    "training.learning_rate": 1e-3,
    "training.lr_scheduler": "cosine",
    "training.lr_warmup_steps": 2,
    "objective.noise_offset": 0.1,
    "objective.conditioning_dropout": 0.2,
    "checkpointing.every": 2,
    "checkpointing.keep": 1,
    "logging.tensorboard": False,
}
CASES: dict[str, dict[str, Any]] = {
    "in_backward": {
        "training.train_text_encoder": True,
        "training.learning_rate_text_encoder": 5e-4,
        "training.clipping": "lagged",
        "optimizer.name": "adamw8bit",
        "memory.optimizer_in_backward": True,
        "memory.weights": "bf16_extra_bits",
    },
    "full": {
        "training.gradient_accumulation_steps": 2,
        "ema.enabled": True,
        "sampling.prompts": ["a zx dog"],
        "sampling.num_images": 2,
        "sampling.num_inference_steps": 2,
    },
    "lora_xl": {
        "model.base": "models/sdxl",
        "training.train_text_encoder": True,
        "lora.enabled": True,
        "lora.rank": 2,
        "lora.dropout": 0.2,
    },
    "lora": {
        "lora.enabled": True,
        "lora.rank": 2,
        "lora.targets": ["attention", "convolutions"],
        "optimizer.name": "adamw8bit",
        "ema.enabled": True,
    },
}


def write_models() -> None:
    """Write the bases; that of Stable Diffusion 1 knows as many tokens as CLIP, as single files need."""
    write_tiny_model(Path("models/sd1"))
    write_tiny_sdxl(Path("models/sdxl"))
    for family, unet in (("sd1", tiny_unet()), ("sdxl", tiny_sdxl_unet())):
        shutil.rmtree(f"models/{family}/unet")
        torch.manual_seed(3)
        narrow = UNet2DConditionModel.from_config({**unet.config, "block_out_channels": (4, 12)})
        save_component(Path(f"models/{family}/unet"), narrow, dtype=torch.float32)
    shutil.rmtree("models/sd1/text_encoder")
    torch.manual_seed(2)
    config = tiny_text_encoder().config
    config.vocab_size = 49408
    text_encoder = CLIPTextModel(config)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[514:] = 0  # no prompt has these tokens
    save_component(Path("models/sd1/text_encoder"), text_encoder, dtype=torch.float32)


def write_photos() -> None:
    random = np.random.default_rng(0)
    Path("photos").mkdir()
    for index, size in enumerate([(48, 48), (60, 40), (40, 64)]):
        pixels = random.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(f"photos/photo{index}.png")


def kill_in_fifth_step() -> None:
    """Make the process kill itself where the gradients are there and the weights untouched."""
    original = trainer_module.train_step

    def killing(*arguments: Any) -> Any:
        if arguments[-1] == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    trainer_module.train_step = killing


def command(*arguments: str, install: Callable[[], None] = lambda: None, out: Path | None = None) -> int:
    """Run a command in a child process; return its exit code, or minus the signal that killed it."""

    def run() -> None:
        install()
        sys.argv = ["lowmem-db", *arguments]
        if out is not None:
            os.dup2(os.open(out, os.O_CREAT | os.O_WRONLY), 1)
        main()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def make_runs() -> dict[str, Any]:
    cases = {}
    for case, changed in CASES.items():
        given = [f"{field}={json.dumps(value)}" for field, value in (SHARED | changed).items()]
        assert command("train", *given, f"output_dir=finished/{case}") == 0
        killed = command("train", *given, f"output_dir=unfinished/{case}", install=kill_in_fifth_step)
        assert killed == -signal.SIGKILL
        finished = Path("finished") / case
        cases[case] = {"final": files_of(finished / "final"), "metrics": metric_rows(finished)}
        if (samples := finished / "samples" / "step-000006").is_dir():
            shutil.copytree(samples, f"expected/samples/{case}")
    return cases


def make_pictures() -> None:
    for source in DRAWN:
        assert command("generate", source, *GENERATED, "-o", f"expected/generate/{source}") == 0


def evaluate(case: str) -> dict[str, Any]:
    out = Path("report.json").absolute()
    assert command("evaluate", f"finished/{case}", *EVALUATED, "-o", "evaluation", out=out) == 0
    report = json.loads(out.read_text())
    shutil.rmtree("evaluation")
    out.unlink()
    return report


def export() -> dict[str, Any]:
    found = {}
    for name, arguments in EXPORTED.items():
        assert command("export", *arguments, "--out", f"exported/{name}") == 0
        found |= files_of(Path("exported") / name)
    shutil.rmtree("exported")
    return found


def clean() -> None:
    """Leave what a run needs: no logs of this machine, and of finished runs the configuration and the model."""
    for file in [*Path().rglob("environment.json"), *Path().rglob(".lock"), *Path("expected").rglob("grid.png")]:
        file.unlink()
    for run in Path("finished").iterdir():
        for name in ("checkpoints", "samples"):
            shutil.rmtree(run / name, ignore_errors=True)
    shutil.rmtree("finished/in_backward")


def pack(root: Path) -> None:
    """Write the archive, in the order of the names and without owners; equal files are found by the compressor."""

    def neutral(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for path in sorted(root.iterdir()):
            archive.add(path, arcname=path.name, filter=neutral)


def make() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.chdir(root)
        write_models()
        write_photos()
        record = {"machine": machine(), "cases": make_runs()}
        make_pictures()
        record["evaluate"] = {case: evaluate(case) for case in ("full", "lora")}
        record["export"] = export()
        clean()
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        pack(root)
        os.chdir(RECORD.parent)


if __name__ == "__main__":
    make()
