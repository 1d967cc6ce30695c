"""The recipe of the small cascade: steps of both stages, resumed, and the models that they write, chained."""

import argparse
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from benchmarks.demo_base.captions import Attributes
from benchmarks.demo_cascade import figure_21
from benchmarks.demo_cascade.figure_21 import high_band, psnr
from benchmarks.demo_cascade.parts import ENTRIES, SIZES, build_text_encoder, build_unet, write_tokenizer
from benchmarks.demo_cascade.train import LEAST, MOST, Trainer
from lowmem_db.engine.enlarging import find_stages
from lowmem_db.models.finding import find_model
from tests.tiny_models import IF_RESOLUTION, write_tiny_if_super_resolution

T5 = Path(__file__).parents[1] / "assets" / "t5_tokenizer" / "tokenizer.json"


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    generator = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    np.save(pictures / "0000.npy", generator.integers(0, 256, (8, 3, 64, 64), dtype=np.uint8))
    shown = [asdict(Attributes(random.Random(index).choice(("dog", "cat")))) for index in range(8)]
    (pictures / "0000.json").write_text(json.dumps(shown))
    write_tokenizer(T5, tmp_path / "tokenizer")
    return argparse.Namespace(
        stage=1, pictures=pictures, tokenizer=tmp_path / "tokenizer", first=None, out=tmp_path / "one",
        minutes=0.0, piece=None, channels=(32, 32), batch=2, lr=1e-3, ema=0.9, bf16=False, crop=32,
        save_every=100.0, threads=1, seed=0,
    )  # fmt: skip


def test_stages_train_go_on_and_are_models_of_a_cascade(arguments: argparse.Namespace, tmp_path: Path) -> None:
    found = []
    for stage, name in ((1, "one"), (2, "two")):
        own = argparse.Namespace(
            **vars(arguments) | {"stage": stage, "out": tmp_path / name, "first": tmp_path / "one"}
        )
        own.out.mkdir()
        trainer = Trainer(own)
        assert all(np.isfinite(trainer.update(0.0)) for _ in range(2))
        trainer.save()
        resumed = Trainer(own)
        assert resumed.step == 2
        assert all(map(torch.equal, trainer.model.state_dict().values(), resumed.model.state_dict().values()))
        resumed.run()  # the planned time is over: it writes the model
        found.append(find_model(str(own.out / "base")))
    assert [(model.family.enlarges, model.resolution) for model in found] == [(False, SIZES[1]), (True, SIZES[2])]
    encoders = [model.load_whole("text_encoder").state_dict() for model in found]
    assert all(map(torch.equal, encoders[0].values(), encoders[1].values()))
    (stage,) = find_stages([str(found[1].path)])
    assert stage.low_resolution.resolution == SIZES[1]


def test_noise_of_the_second_stage_covers_what_the_paper_compares(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir()
    _, levels = Trainer(arguments).beside(torch.zeros(500, 3, 16, 16))
    assert LEAST <= 1e-5 < 1e-2 <= MOST
    assert levels.min() == 0
    assert levels.max() > 150


def test_blur_and_invention_are_told_by_the_high_band() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    truth = Image.fromarray(noise).convert("RGB")
    assert high_band(truth, truth, 16) == pytest.approx(1)
    assert high_band(truth.filter(ImageFilter.GaussianBlur(3)), truth, 16) < 0.1
    assert high_band(ImageOps.autocontrast(truth.resize((32, 32)).resize((64, 64), 0)), truth, 16) < 1
    assert psnr(truth, truth) > 100 > psnr(truth.filter(ImageFilter.GaussianBlur(1)), truth)


@pytest.mark.long
def test_figure_21_is_measured_on_every_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = write_tiny_if_super_resolution(tmp_path / "stage_2")
    side = 2 * IF_RESOLUTION
    for subject in ("drawn_dog", "rc_car"):
        (tmp_path / "subjects" / subject).mkdir(parents=True)
        for number in range(2):
            noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "subjects" / subject / f"{number}.png")
    out = tmp_path / "out"
    arguments = [stage, "--out", out, "--subjects", tmp_path / "subjects", "--resolution", side, "--steps", 1]
    monkeypatch.setattr(sys, "argv", ["figure_21", *map(str, arguments)])
    figure_21.main()
    rows = json.loads((out / "rows.json").read_text())
    assert {*rows} == {"drawn_dog", "rc_car"}
    assert {*rows["rc_car"]} == {"bilinear", "not fine-tuned", "1e-2", "1e-3", "1e-5"}
    assert len(capsys.readouterr().out.splitlines()) == 2 + 5
    assert (out / "sheet.png").is_file()


def test_sizes_are_those_of_the_recipe() -> None:
    sizes = [sum(weight.numel() for weight in build_unet(stage).parameters()) for stage in (1, 2)]
    assert [round(size / 1e6, 1) for size in sizes] == [1.6, 1.2]
    assert sum(weight.numel() for weight in build_text_encoder().parameters()) == pytest.approx(0.53e6, rel=0.02)
    assert ENTRIES > 10_000
