"""Most parameters of the tiny models are stepped alone, as those of large models are."""

import pytest

from lowmem_db.optimizers import build


@pytest.fixture(autouse=True)
def _few_small_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_LARGEST_SMALL", 255)
