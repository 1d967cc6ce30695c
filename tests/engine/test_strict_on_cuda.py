"""After a run on CUDA, torch stays strict in its process: nothing that may follow uses what torch then refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowmem_db import api
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.steps import Steps
from lowmem_db.bench.strategies import TECHNIQUES, strategy
from lowmem_db.evaluation import captions
from lowmem_db.evaluation.encoders import find_encoders, load_encoder
from tests.evaluation.conftest import alexnet_weights, random_picture
from tests.strict import StrictAsOnCuda

CPU = torch.device("cpu")
PICTURES = [random_picture(index) for index in range(2)]


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: x.median(dim=-1),
        lambda x: x.kthvalue(1),
        lambda x: x.cumsum(0),
        lambda x: torch.bincount(x.long(), weights=x),
        lambda x: torch.histc(x),
        lambda x: functional.interpolate(x.view(1, 1, 1, -1), scale_factor=2, mode="bilinear").sum().backward(),
        lambda x: functional.adaptive_avg_pool2d(x.view(1, 2, -1), 2).sum().backward(),
    ],
)
def test_what_cuda_refuses_is_refused_here(refused: Callable[[Tensor], object]) -> None:
    with StrictAsOnCuda(), pytest.raises(RuntimeError, match="deterministic"):
        refused(torch.ones(8, requires_grad=True))


def test_captions_are_read_from_pictures() -> None:
    with StrictAsOnCuda():
        named = load_encoder(find_encoders(["captions"])[0], CPU).name_images(PICTURES)
        captions.foreground_centre(torch.rand(2, 3, 64, 64) * 255)
    assert len(named) == 2


def test_border_is_the_median_of_torch() -> None:
    values = torch.rand(2, 3, 16, 16)
    border = torch.cat((values[..., :6], values[..., -6:]), dim=-1).median(dim=-1, keepdim=True).values
    expected = ((values - border).abs().amax(dim=1) > captions._DIFFERS).float()
    assert torch.equal(captions._foreground(values), expected)


def test_pictures_are_compared(tmp_path: Path) -> None:
    torch.save(alexnet_weights(), tmp_path / "lpips.pth")
    pictures = [random_picture(index, 96) for index in range(2)]
    with StrictAsOnCuda():
        for request in ("en0", f"lpips={tmp_path / 'lpips.pth'}"):
            assert load_encoder(find_encoders([request])[0], CPU).distances(pictures).shape == (1,)


@pytest.mark.parametrize("name", ["segments", "stochastic", "fp32", "lora"])
def test_a_step_is_done(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels in plain PyTorch, as on a card without Triton."""
    monkeypatch.setenv("LOWMEM_DB_KERNELS", "eager")
    if name == "lora":
        pytest.importorskip("peft")
    step = Steps(strategy(Setting(CPU, tiny=True), name, TECHNIQUES[name]), CPU)
    with StrictAsOnCuda():
        step()


def test_a_run_is_prepared_trained_and_drawn(tiny_fields: dict[str, object]) -> None:
    config = api.load_config(None, tiny_fields | {"training.max_train_steps": 1})
    with StrictAsOnCuda():
        api.train(config)
