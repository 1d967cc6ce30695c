"""Curves, samples and scores of a run at Weights & Biases."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_db import environment
from lowmem_db.sampling.images import GRID_FILE
from lowmem_db.storage.run_folder import RunFolder, read_json, write_json
from lowmem_db.training.observers import Metrics, Observer, Training


class WeightsAndBiases(Observer):
    """Sends rows, samples and scores; a resumed run goes on where it was."""

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, trainer: Training) -> None:
        """Open the run.

        Raises:
            DependencyError: Weights & Biases refuses it.
        """
        self._run = environment.start_wandb(
            project=trainer.config.logging.wandb_project,
            name=trainer.run.root.absolute().name,
            dir=str(trainer.run.root),
            id=_identity(trainer.run, is_resumed=trainer.step > 0),
            resume="allow",
            config=trainer.config.model_dump(mode="json"),
        )
        self._run.define_metric("*", step_metric="step")

    def step(self, row: Mapping[str, Any]) -> None:
        """Send a row; what is unknown is left out."""
        self._run.log({name: value for name, value in row.items() if value is not None})

    def samples(self, step: int, folder: Path) -> None:
        """Send the images of a step."""
        image = environment.require("wandb").Image
        files = sorted(file for file in folder.glob("*.png") if file.name != GRID_FILE)
        self._run.log({"step": step, "samples": [image(str(file), caption=file.stem) for file in files]})

    def score(self, step: int, metrics: Metrics) -> None:
        """Send the scores of a step."""
        self._run.log({"step": step, **metrics})

    def end(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()


def _identity(run: RunFolder, *, is_resumed: bool) -> str:
    """Return the identity of a run there: a new one, or that of the run that is resumed."""
    file = run.root / "wandb.json"
    known = read_json(file) if is_resumed else None
    if isinstance(known, dict) and isinstance(known.get("id"), str):
        return known["id"]
    identity = uuid.uuid4().hex[:12]
    write_json(file, {"id": identity})
    return identity
