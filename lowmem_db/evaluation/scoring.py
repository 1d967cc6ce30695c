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
from lowmem_db.evaluation.failures import CONTEXT, DROP, UNTUNED, Nearest, find_nearest, sees_context
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
    "identity": {"fidelity": "ID-I", "preservation": "ID-PRES"},
    "captions": {"noun": "caption_noun", "colour": "caption_colour", "background": "caption_background"},
    "dino": {"fidelity": "DINO", "preservation": "PRES"},
    "clip": {"fidelity": "CLIP-I", "prompt": "CLIP-T"},
    "lpips": {"diversity": "DIV"},
}
"""Names of the metrics, by encoder and role. Only the paper's encoders have the paper's names."""
LOWER_IS_BETTER = ("EN0-PRES", "ID-PRES", "PRES")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures of one subject.

    Attributes:
        photos: Real photos of the subject.
        prompts: Each prompt, or None if it is not known, with its images.
        class_images: Images of the class prompt.
        plain: Drawn images of the subject without a context.
        untuned: Prompts with the images that the model drew for them before training.
        class_caption: What the prompts say without their context: ``a dog``.
    """

    photos: Images
    prompts: Sequence[tuple[str | None, Images]]
    class_images: Images = field(default=())
    plain: Images = field(default=())
    untuned: Sequence[tuple[str, Images]] = field(default=())
    class_caption: str | None = None


@dataclass(frozen=True, kw_only=True)
class SubjectPairs:
    """The pairs of one subject for each metric, by its name.

    Attributes:
        metrics: Pairs with drawn images.
        real: Pairs of photos, for fidelity metrics: what a perfect model would reach.
        of_prompts: Means over the images of each known prompt, by prompt and metric; with EfficientNet-Lite0 also
            ``copies``, the share of images that are as near to a photo as near-duplicates are. More of them, for the
            failures of figure 9, are named in :mod:`lowmem_db.evaluation.failures`.
        nearest: How near images are to photos, with EfficientNet-Lite0.
    """

    metrics: dict[str, Pairs]
    real: dict[str, Pairs]
    of_prompts: dict[str, dict[str, float]] = field(default_factory=dict)
    nearest: Nearest | None = None


def score_pictures(encoder: Encoder, pictures: Pictures) -> SubjectPairs:
    """Return the pairs for each metric of an encoder.

    A metric has no pairs if what it needs (known prompts, class images, two images of a prompt) is missing.
    """
    names = METRICS[encoder.files.kind]
    metrics: dict[str, Pairs] = {}
    real: dict[str, Pairs] = {}
    extra: dict[str, dict[str, float]] = {}
    nearest = None
    if "fidelity" in names:
        photos = encoder.embed_images(pictures.photos)
        drawn = [encoder.embed_images(images) for _, images in pictures.prompts]
        metrics[names["fidelity"]] = fidelity_pairs(drawn, photos)
        real[names["fidelity"]] = real_pairs(photos)
        nearest = find_nearest(drawn, photos) if encoder.files.kind == "en0" else None
        extra = _drops(encoder, pictures, photos, metrics[names["fidelity"]])
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
            extra = _joined(extra, _contexts(encoder, pictures, known))
    if "diversity" in names:
        metrics[names["diversity"]] = [encoder.distances(images) for _, images in pictures.prompts if len(images) > 1]
    if "noun" in names:
        metrics |= _caption_metrics(encoder, pictures)
        extra = _backgrounds(encoder, pictures)
    of_prompts = _joined(_of_prompts(encoder, pictures, metrics), extra)
    return SubjectPairs(metrics=metrics, real=real, of_prompts=of_prompts, nearest=nearest)


def _joined(first: dict[str, dict[str, float]], second: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {prompt: first.get(prompt, {}) | second.get(prompt, {}) for prompt in {**first, **second}}


def _drops(encoder: Encoder, pictures: Pictures, photos: Tensor, pairs: Pairs) -> dict[str, dict[str, float]]:
    """Return how much lower the fidelity of each prompt is than that of the subject without a context."""
    if not pictures.plain:
        return {}
    name = METRICS[encoder.files.kind]["fidelity"]
    (plain,) = fidelity_pairs([encoder.embed_images(pictures.plain)], photos)
    return {
        prompt: {name + DROP: float(plain.mean() - values.double().mean())}
        for (prompt, _), values in zip(pictures.prompts, pairs, strict=True)
        if prompt and len(values)
    }


def _contexts(encoder: Encoder, pictures: Pictures, drawn: Sequence[tuple[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Return the share of images of each prompt that fit it better than the class alone, by CLIP."""
    caption = pictures.class_caption
    if caption is None:
        return {}
    untuned = [(prompt, encoder.embed_images(images)) for prompt, images in pictures.untuned if images]
    (without,) = encoder.embed_texts([caption])
    found: dict[str, dict[str, float]] = {}
    for name, rows in ((CONTEXT, drawn), (CONTEXT + UNTUNED, untuned)):
        asked = [(prompt, images) for prompt, images in rows if prompt != caption and len(images)]
        texts = encoder.embed_texts([prompt for prompt, _ in asked]) if asked else []
        for (prompt, images), text in zip(asked, texts, strict=True):
            share = float(sees_context(images, text, without).double().mean())
            found.setdefault(prompt, {})[name] = share
    return found


def _backgrounds(encoder: Encoder, pictures: Pictures) -> dict[str, dict[str, float]]:
    """Return the share of images of each prompt in which the caption classifier sees what it names."""
    names = METRICS[encoder.files.kind]
    found: dict[str, dict[str, float]] = {}
    for end, rows in (("", pictures.prompts), (UNTUNED, pictures.untuned)):
        for prompt, images in rows:
            if not prompt or not images or (caption := read_caption(prompt)) is None:
                continue
            pairs = caption_pairs([caption], [encoder.name_images(images)])
            found.setdefault(prompt, {}).update(
                {names[role] + end: float(pairs[role][0].mean()) for role in names if pairs[role]}
            )
    return found


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
