"""The metrics of each encoder, and their pairs for the pictures of one subject.

Pictures are passed in memory, so that images drawn during training can be scored as well as folders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lowmem_db.evaluation.captions import caption_pairs, read_caption
from lowmem_db.evaluation.duplicates import THRESHOLD
from lowmem_db.evaluation.encoders import Encoder, Images
from lowmem_db.evaluation.metrics import (
    Pairs,
    fidelity_pairs,
    preservation_pairs,
    prompt_pairs,
    real_pairs,
)

Role = Literal["fidelity", "prompt", "preservation", "diversity", "noun", "colour", "background"]
METRICS: dict[str, dict[Role, str]] = {
    "en0": {"fidelity": "EN0-I", "preservation": "EN0-PRES", "diversity": "EN0-DIV"},
    "captions": {"noun": "caption_noun", "colour": "caption_colour", "background": "caption_background"},
    "dino": {"fidelity": "DINO", "preservation": "PRES"},
    "clip": {"fidelity": "CLIP-I", "prompt": "CLIP-T"},
    "lpips": {"diversity": "DIV"},
}
"""Names of the metrics, by encoder and role. Only the paper's encoders have the paper's names."""
LOWER_IS_BETTER = ("EN0-PRES", "PRES")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures of one subject.

    Attributes:
        photos: Real photos of the subject.
        prompts: Each prompt, or None if it is not known, with its images.
        class_images: Images of the class prompt.
    """

    photos: Images
    prompts: Sequence[tuple[str | None, Images]]
    class_images: Images = field(default=())


@dataclass(frozen=True, kw_only=True)
class SubjectPairs:
    """The pairs of one subject for each metric, by its name.

    Attributes:
        metrics: Pairs with drawn images.
        real: Pairs of photos, for fidelity metrics: what a perfect model would reach.
        of_prompts: Means over the images of each known prompt, by prompt and metric; with EfficientNet-Lite0 also
            ``copies``, the share of images that are as near to a photo as near-duplicates are.
    """

    metrics: dict[str, Pairs]
    real: dict[str, Pairs]
    of_prompts: dict[str, dict[str, float]] = field(default_factory=dict)


def score_pictures(encoder: Encoder, pictures: Pictures) -> SubjectPairs:
    """Return the pairs for each metric of an encoder.

    A metric has no pairs if what it needs (known prompts, class images, two images of a prompt) is missing.
    """
    names = METRICS[encoder.files.kind]
    metrics: dict[str, Pairs] = {}
    real: dict[str, Pairs] = {}
    if "fidelity" in names:
        photos = encoder.embed_images(pictures.photos)
        drawn = [encoder.embed_images(images) for _, images in pictures.prompts]
        metrics[names["fidelity"]] = fidelity_pairs(drawn, photos)
        real[names["fidelity"]] = real_pairs(photos)
        if "preservation" in names:
            metrics[names["preservation"]] = (
                preservation_pairs(encoder.embed_images(pictures.class_images), photos) if pictures.class_images else []
            )
        if "prompt" in names:
            known = [
                (prompt, of_prompt) for (prompt, _), of_prompt in zip(pictures.prompts, drawn, strict=True) if prompt
            ]
            texts = [prompt for prompt, _ in known]
            metrics[names["prompt"]] = (
                prompt_pairs([images for _, images in known], encoder.embed_texts(texts)) if known else []
            )
    if "diversity" in names:
        metrics[names["diversity"]] = [encoder.distances(images) for _, images in pictures.prompts if len(images) > 1]
    if "noun" in names:
        metrics |= _caption_metrics(encoder, pictures)
    return SubjectPairs(metrics=metrics, real=real, of_prompts=_of_prompts(encoder, pictures, metrics))


def _of_prompts(encoder: Encoder, pictures: Pictures, metrics: dict[str, Pairs]) -> dict[str, dict[str, float]]:
    """Return what each known prompt reaches, to find the failures of figure 9: a lost context, copies of photos."""
    found: dict[str, dict[str, float]] = {prompt: {} for prompt, images in pictures.prompts if prompt and images}
    asked: dict[Role, list[str | None]] = {
        "fidelity": [prompt for prompt, _ in pictures.prompts],
        "prompt": [prompt for prompt, _ in pictures.prompts if prompt],
        "diversity": [prompt for prompt, images in pictures.prompts if len(images) > 1],
    }
    for role, prompts in asked.items():
        if (name := METRICS[encoder.files.kind].get(role)) is None:
            continue
        for prompt, values in zip(prompts, metrics[name], strict=False):
            if prompt and len(values):
                found[prompt] |= {name: float(values.double().mean())}
                if role == "fidelity" and encoder.files.kind == "en0":
                    found[prompt]["copies"] = _share_of_copies(values, len(pictures.photos))
    return found


def _share_of_copies(cosines: Tensor, num_photos: int) -> float:
    return float((cosines.view(-1, num_photos).amax(dim=1) >= THRESHOLD).double().mean())


def _caption_metrics(encoder: Encoder, pictures: Pictures) -> dict[str, Pairs]:
    """Score only the images of prompts that can be parsed."""
    read = [(read_caption(prompt), images) for prompt, images in pictures.prompts if prompt and images]
    readable = [(caption, images) for caption, images in read if caption is not None]
    shown = [encoder.name_images(images) for _, images in readable]
    found = caption_pairs([caption for caption, _ in readable], shown)
    return {name: found[role] for role, name in METRICS[encoder.files.kind].items()}
