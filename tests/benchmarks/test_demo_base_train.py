import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.demo_base.captions import Attributes
from benchmarks.demo_base.train import Trainer, draw_timesteps

TOKENIZER = Path(__file__).parents[2] / "lowmem_db" / "models" / "demo" / "base" / "tokenizer"


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "0000.npy", generator.standard_normal((8, 32, 16, 16)).astype(np.float16))
    shown = [asdict(Attributes(random.Random(index).choice(("dog", "cat")))) for index in range(8)]
    (tmp_path / "0000.json").write_text(json.dumps(shown))
    return argparse.Namespace(
        latents=tmp_path, tokenizer=TOKENIZER, out=tmp_path, start_from=None, minutes=1.0, channels=[16, 16, 32],
        text_layers=1, batch=4, lr=1e-3, ema=0.9, shift=2.0, final_shift=1.0, zero_snr=True, min_snr=0.0,
        save_every=100.0, threads=1, seed=0, device="cpu", bf16=False,
    )  # fmt: skip


def losses(arguments: argparse.Namespace, steps: int = 6) -> list[float]:
    trainer = Trainer(arguments)
    return [trainer.update(0.0) for _ in range(steps)]


def test_bfloat16_gives_nearly_the_same_losses(arguments: argparse.Namespace) -> None:
    exact = losses(arguments)
    arguments.bf16 = True
    rounded = losses(arguments)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_training_goes_on_where_it_stopped(arguments: argparse.Namespace) -> None:
    trainer = Trainer(arguments)
    for _ in range(3):
        trainer.update(0.0)
    trainer.save()
    resumed = Trainer(arguments)
    assert (resumed.step, resumed.seconds) == (3, trainer.seconds)
    for name in ("model", "ema"):
        for old, new in zip(getattr(trainer, name).parameters(), getattr(resumed, name).parameters(), strict=True):
            assert torch.equal(old, new)
    arguments.seed = 1
    assert Trainer(arguments).update(0.0) != resumed.update(0.0)


def test_a_planned_time_that_is_over_takes_no_step(arguments: argparse.Namespace) -> None:
    arguments.minutes = 0.0
    trainer = Trainer(arguments)
    trainer.run()
    assert trainer.step == 0
    assert (arguments.out / "state.pt").is_file()


def test_shift_moves_timesteps_towards_noise() -> None:
    torch.manual_seed(0)
    plain, shifted = (draw_timesteps(4000, shift).double() for shift in (1.0, 2.0))
    assert plain.mean() == pytest.approx(499.5, abs=2)
    assert shifted.mean() == pytest.approx(614, abs=5)  # 1000 * (2 - 2 ln 2)
    assert shifted.max() <= 999
