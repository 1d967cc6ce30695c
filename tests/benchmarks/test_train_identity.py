import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.quality.train_identity import discriminant_directions, find_drawings, judge, views_of
from lowmem_db.evaluation.encoders import find_encoders, load_encoder
from lowmem_db.evaluation.metrics import cosine_similarities
from lowmem_db.randomness import generator


def test_directions_are_those_in_which_drawings_differ_and_their_views_do_not() -> None:
    source = generator(0, "test")
    of_drawings = torch.randn(60, 1, 8, generator=source, dtype=torch.float64)
    of_views = torch.randn(60, 6, 8, generator=source, dtype=torch.float64)
    same, background = torch.tensor([1.0] * 3 + [0.0] * 5), torch.tensor([0.1] * 3 + [9.0] * 5)
    features = of_drawings * same + of_views * background
    found = discriminant_directions(features, 3, shrinkage=0.0)
    kept = found.norm(dim=1)
    assert kept[:3].min() > 20 * kept[3:].max()
    spread = (features - features.mean(dim=1, keepdim=True)) @ found
    torch.testing.assert_close(spread.square().sum((0, 1)) / (60 * 5), torch.ones(3, dtype=torch.float64))


def test_judged_nouns_are_not_learned(tmp_path: Path) -> None:
    for key in ("noto/dog", "noto-v1/blowfish", "emojione/cat", "noto/robot", "streamline-emojis/robot", "noto/anchor"):
        path = tmp_path / f"{key}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGBA", (8, 8)).save(path)
    learned, judged = find_drawings(tmp_path)
    assert [f"{path.parent.name}/{path.stem}" for path in learned] == ["noto/robot"]
    assert [path.stem for paths in judged.values() for path in paths] == ["dog"]


def test_views_show_one_drawing_in_many_ways() -> None:
    views = views_of(Image.new("RGBA", (128, 128), "red"), 4, random.Random(0))
    assert len({view.tobytes() for view in views}) == 4
    assert {view.size for view in views} == {(128, 128)}


def test_a_projection_is_judged_beside_the_features_as_they_are() -> None:
    features = torch.tensor([[1.0, 5.0], [1.0, -5.0], [-1.0, 5.0], [-1.0, -5.0]], dtype=torch.float64)
    sets = {"set": (features, torch.tensor([0, 0, 1, 1]).numpy())}
    found = judge(sets, torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    assert found["set"]["auc"] == pytest.approx(1)
    assert found["set"]["auc_pooled"] <= 0.5


def test_subjects_in_one_style_are_told_apart_on_other_backgrounds() -> None:
    subjects = Path(__file__).parents[2] / "benchmarks" / "quality" / "subjects"
    pictures = [
        Image.open(subjects / name / f"{number:02d}.png").convert("RGB")
        for name in ("drawn_cat", "drawn_dog")
        for number in (0, 2, 3)
    ]
    is_same = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool() & ~torch.eye(6, dtype=torch.bool)
    is_other = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)) == 0

    def gap(kind: str) -> float:
        embedded = load_encoder(find_encoders([kind])[0], torch.device("cpu")).embed_images(pictures)
        cosines = cosine_similarities(embedded, embedded)
        return float(cosines[is_same].mean() - cosines[is_other].mean())

    assert gap("identity") > 0.08
    assert gap("identity") > 3 * gap("en0")
