import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.models.finding import model_of
from lowmem_db.planning.cards import ASSUMED, Card
from lowmem_db.planning.phases import TracedRun

FIELDS = {
    "model.base": "demo",
    "subject.instance_dir": "photos",
    "subject.instance_prompt": "a sks dog",
    "subject.class_prompt": "a dog",
    "output_dir": "run",
    "data.resolution": 128,
    "prior.sample_batch_size": 1,
}


def make_config(**fields: object) -> Config:
    """Return a configuration of the demo base; a dot in a field's name is written as two underscores."""
    changed = {name.replace("__", "."): value for name, value in fields.items()}
    return load_config(None, list((FIELDS | changed).items()))


def make_run(config: Config, card: Card = ASSUMED) -> TracedRun:
    return TracedRun(config=config, model=model_of(config, weights=False), card=card)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
