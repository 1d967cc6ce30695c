"""Scores of images drawn during training, to find the best step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lowmem_db.config.schema import Config
from lowmem_db.data.photos import read_photo
from lowmem_db.errors import ConfigError, LowmemDbError
from lowmem_db.evaluation.encoders import Encoder, Images, find_encoders, load_encoder
from lowmem_db.evaluation.metrics import summarise
from lowmem_db.evaluation.scoring import METRICS, Pictures, score_pictures

_KINDS = tuple(kind for kind, names in METRICS.items() if "fidelity" in names)


class Scorer:
    """Compares images with the photos. The encoder runs on the CPU, so that the device's memory stays as planned.

    Args:
        config: The configuration of the run.
        photos: The photos of the subject.

    Raises:
        ConfigError: ``evaluation.encoder`` is unknown, or does not compare images with photos.
        DependencyError: The package of the encoder is not installed.
        ModelError: The encoder's files are missing or damaged, or cannot be downloaded from the hub.
    """

    def __init__(self, config: Config, photos: Sequence[Path]) -> None:
        self._prompts, self._class_prompt = config.evaluation_prompts, config.subject.class_prompt
        self._photos = photos
        self._encoder = _load(config.evaluation.encoder)

    def __call__(self, drawn: Mapping[str, Images]) -> dict[str, float]:
        """Return ``score``, where higher is better, and the metrics behind it.

        Args:
            drawn: Images of every prompt to score, and of the class prompt if there is one.
        """
        pictures = Pictures(
            photos=[read_photo(photo) for photo in self._photos],
            prompts=[(prompt, drawn[prompt]) for prompt in self._prompts],
            class_images=drawn[self._class_prompt] if self._class_prompt else (),
        )
        pairs = score_pictures(self._encoder, pictures).metrics
        metrics = {name: summarise({"run": of_metric}).value for name, of_metric in pairs.items()}
        names = METRICS[self._encoder.files.kind]
        fidelity = metrics[names["fidelity"]]
        preservation = metrics.get(names.get("preservation", ""))
        assert fidelity is not None, "images and photos were given"
        found = {name: value for name, value in metrics.items() if value is not None}
        return {"score": fidelity - (preservation or 0.0)} | found


def _load(request: str) -> Encoder:
    kind = request.partition("=")[0].strip()
    if kind not in _KINDS:
        raise ConfigError(
            f"evaluation.encoder: {request!r} does not compare images with photos; allowed: {', '.join(_KINDS)}, each "
            "also as NAME=FOLDER_OR_HUB_ID"
        )
    try:
        return load_encoder(find_encoders([request])[0], torch.device("cpu"))
    except LowmemDbError as error:  # which names the option of evaluate
        message = str(error).replace("--encoder: ", "evaluation.encoder: ").replace("--encoder ", "evaluation.encoder=")
        raise type(error)(message) from error
