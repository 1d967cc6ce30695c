"""The whole road of every family: a run with prior preservation is killed, resumed, drawn from, exported, and loaded by
diffusers, which draws the images of the model that was trained.
"""

import json
import multiprocessing
import signal
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from lowmem_db.cli.main import main
from lowmem_db.training import trainer as trainer_module
from tests.integration.test_resume import die
from tests.original_models import write_original_model

PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
KILLED_IN_STEP = 2
LORA = {
    "lora.enabled": True, "lora.rank": 2, "lora.alpha": 64, "lora.targets": ["attention", "feed_forward"],
    "training.learning_rate": 0.1,
}  # fmt: skip


def command(*arguments: object, kill_in_step: int | None = None) -> int:
    """Run a command in a child process; return its exit code, or minus the signal that killed it."""

    def child() -> None:
        if kill_in_step is not None:
            original = trainer_module.train_step

            def killing(*given):
                if given[-1] == kill_in_step:
                    die("from a single file", "step")
                return original(*given)

            trainer_module.train_step = killing
        sys.argv = ["lowmem-db", *map(str, arguments)]
        main()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def draw(pipeline: DiffusionPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    noise = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
    return torch.as_tensor(pipeline("a zx dog", generator=noise, **options).images)


def load(family: str, folder: Path) -> DiffusionPipeline:
    return PIPELINES[family].from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd1", "full"),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in [("sd1", "LoRA"), ("sd2", "full"), ("sd2", "LoRA"), ("sdxl", "full"), ("sdxl", "LoRA")]
        ),
    ],
)
def test_from_the_photos_to_another_program(
    family: str, kind: str, tiny_fields: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_original_model(tmp_path / "base", family)
    fields = tiny_fields | {
        "model.base": str(base), "output_dir": "run", "training.train_text_encoder": True, "checkpointing.every": 1,
        "training.max_train_steps": 4, "prior.num_class_images": 2, "training.learning_rate": 1e-2,
    }  # fmt: skip
    train = [
        "train",
        *(f"{field}={json.dumps(value)}" for field, value in (fields | (LORA if kind == "LoRA" else {})).items()),
    ]
    assert command("prepare", *train[1:]) == 0
    assert command(*train, kill_in_step=KILLED_IN_STEP) == -signal.SIGKILL
    assert command(*train, "--resume") == 0
    assert command("generate", "run", "--prompt=a zx dog", "--num-images=1", "--num-inference-steps=2") == 0
    assert (tmp_path / "images" / "grid.png").is_file()
    before = draw(load(family, base))
    if kind == "full":
        expected = draw(load(family, tmp_path / "run" / "final"))
        assert command("export", "run") == 0
        file = str(tmp_path / "run.safetensors")
        found = PIPELINES[family].from_single_file(
            file, config=str(tmp_path / "run" / "final"), local_files_only=True, torch_dtype=torch.float32
        )
        assert torch.equal(draw(found), expected)
    else:
        drawn = []
        for layout in ("lora-diffusers", "lora-kohya"):
            assert command("export", "run", f"--format={layout}", f"--out={layout}.safetensors") == 0
            found = load(family, base)
            found.load_lora_weights(tmp_path / f"{layout}.safetensors")
            drawn.append(draw(found))
        expected = drawn[0]
        assert torch.equal(*drawn)
        assert command("export", "run", "--merge", "--format=diffusers", "--out=merged") == 0
        torch.testing.assert_close(draw(load(family, tmp_path / "merged")), expected, atol=1e-3, rtol=0)
    assert (expected - before).abs().max() > 1e-3
