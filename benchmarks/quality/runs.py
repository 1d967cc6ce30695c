"""One run of an ablation: photos and class images to a trained model, its samples, and their scores."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from benchmarks.demo_base.captions import article
from benchmarks.quality.subjects import Subject
from benchmarks.quality.variants import NUM_IMAGES, RECIPE, Variant
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import resolve
from lowmem_db.data.photos import read_photo, scan_photos
from lowmem_db.engine.build import build_ema, build_step
from lowmem_db.engine.draw import Artist, Job, kept
from lowmem_db.engine.draw import draw as engine_draw
from lowmem_db.engine.step import train_step
from lowmem_db.evaluation.captions import SCENES, Caption
from lowmem_db.evaluation.encoders import Encoder, find_encoders, load_encoder
from lowmem_db.evaluation.metrics import (
    cosine_distances,
    cosine_similarities,
    fidelity_pairs,
    preservation_pairs,
    real_pairs,
)
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.finding import find_model, model_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.text_encoders import embed_prompts, load_text_encoders
from lowmem_db.optimizers import weights
from lowmem_db.optimizers.schedules import learning_rates
from lowmem_db.preparation.class_images import class_prompt_of, prepare_class_images
from lowmem_db.preparation.prepare import prepare
from lowmem_db.randomness import derive_seed, generator
from lowmem_db.records import ImageRecord
from lowmem_db.sampling.latents import SamplingSettings

CPU = torch.device("cpu")
SAMPLING = SamplingSettings(sampler="ddim", num_inference_steps=14, guidance_scale=1.0)
LAST_STEPS = 25
"""Steps at the end whose mean is called the final loss."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was drawn after training.

    Attributes:
        plain: Images of the subject.
        contexts: Images of the subject in each context.
        of_class: Images of its class.
    """

    plain: list[Image.Image]
    contexts: Mapping[str, list[Image.Image]]
    of_class: list[Image.Image]


def base_key(model: ModelFolder) -> str:
    """Return what tells one base from another."""
    return model.whole_key[:12]


def recipe_of(variant: Variant) -> dict[str, Any]:
    """Return everything that a row depends on beside base, subject and seed."""
    mixture = {"class_prompts": ["a noun", *variant.further("noun")]} if variant.further else {}
    return {
        **RECIPE,
        **variant.fields,
        **mixture,
        "identifier": variant.identifier,
        "noun": variant.noun,
        "num_images": variant.num_images,
        "trained": variant.trained,
        "last_steps": LAST_STEPS,
        "samples": {
            **asdict(sampling_of(variant)),
            "num_images": NUM_IMAGES,
            "context": _one_or_all(variant.contexts),
        },
    }


def _one_or_all(contexts: Sequence[str]) -> str | list[str]:
    """Return contexts as rows hold them: the first rows had one."""
    return contexts[0] if len(contexts) == 1 else list(contexts)


def sampling_of(variant: Variant) -> SamplingSettings:
    """Return how the images of a variant are drawn."""
    return replace(SAMPLING, guidance_scale=variant.guidance_scale)


def config_of(variant: Variant, subject: Subject, seed: int, pictures: Path, work: Path) -> Config:
    """Return the configuration of a run.

    Args:
        variant: The variant.
        subject: The subject.
        seed: Seed of everything.
        pictures: Folder of the pictures that are trained on.
        work: Folder for caches.
    """
    fields: dict[str, Any] = {
        **RECIPE,
        **variant.fields,
        "seed": seed,
        "output_dir": str(work / "run"),
        "cache_dir": str(work / "cache"),
        "subject.instance_dir": str(pictures),
        "subject.instance_prompt": variant.instance_prompt(subject),
        "subject.class_prompt": article(variant.class_noun(subject)),
    }
    if variant.further and variant.fields.get("prior.enabled", True):
        fields["prior.class_prompts"] = variant.further(variant.class_noun(subject))
    return load_config(None, list(fields.items()))


def run(variant: Variant, subject: Subject, seed: int, work: Path) -> tuple[dict[str, Any], Drawn]:
    """Train, draw and score; return what the row holds of it, and the images."""
    started = time.perf_counter()
    with _pictures(subject, variant.num_images) as pictures:
        config = config_of(variant, subject, seed, pictures, work)
        model = model_of(config)
        denoiser, losses = _train(config, model) if variant.trained else (_untrained(config, model), {})
    drawn = draw(denoiser, model, config, variant, subject, seed)
    measured = {**scores_of(drawn, subject, variant, work), **{name: round(loss, 5) for name, loss in losses.items()}}
    return {**measured, "seconds": round(time.perf_counter() - started, 1)}, drawn


def scores_of(drawn: Drawn, subject: Subject, variant: Variant, work: Path) -> dict[str, float]:
    """Return what a row holds of the images of a run."""
    of_class = _embed_class(subject, work, variant.further, _of_class_images(variant))
    scores = score(_encoder(), drawn, _embed_photos(subject), of_class)
    scores |= identify(_identity(), drawn, _identify_photos(subject))
    scores |= read_captions(_classifier(), drawn, subject)
    return {name: round(value, 5) for name, value in scores.items()}


def score(
    encoder: Encoder, drawn: Drawn, photos: Float[Tensor, "m d"], class_images: Float[Tensor, "n d"]
) -> dict[str, float]:
    """Return every metric of one run as a number.

    Args:
        encoder: Embeds.
        drawn: What was drawn after training.
        photos: Embeddings of all pictures of the subject.
        class_images: Embeddings of images of the class that the untrained base drew.
    """
    plain, of_class = encoder.embed_images(drawn.plain), encoder.embed_images(drawn.of_class)
    contexts = {context: encoder.embed_images(images) for context, images in drawn.contexts.items()}
    of_plain = _mean(fidelity_pairs([plain], photos))
    by_context = {f"EN0-I {context}": _mean(fidelity_pairs([images], photos)) for context, images in contexts.items()}
    of_context = _mean_of(by_context)
    return {
        **(by_context if len(by_context) > 1 else {}),
        "EN0-I": (of_plain + of_context) / 2,
        "EN0-I plain": of_plain,
        "EN0-I context": of_context,
        "EN0-I real": _mean(real_pairs(photos)),
        "EN0-PRES": _mean(preservation_pairs(of_class, photos)),
        "EN0-DIV": _mean([cosine_distances(images) for images in (plain, *contexts.values())]),
        "EN0-DIV class": _mean([cosine_distances(of_class)]),
        "EN0-CLASS": float(cosine_similarities(of_class, class_images).mean()),
    }


def identify(encoder: Encoder, drawn: Drawn, photos: Float[Tensor, "m d"]) -> dict[str, float]:
    """Return subject fidelity and preservation by features that tell subjects of one class apart."""
    found = {
        group: _mean(fidelity_pairs([encoder.embed_images(images)], photos))
        for group, images in {"plain": drawn.plain, **drawn.contexts, "class": drawn.of_class}.items()
    }
    in_contexts = _mean_of({context: found[context] for context in drawn.contexts})
    return {
        **({f"ID-I {context}": found[context] for context in drawn.contexts} if len(drawn.contexts) > 1 else {}),
        "ID-I": (found["plain"] + in_contexts) / 2,
        "ID-I plain": found["plain"],
        "ID-I context": in_contexts,
        "ID-I real": _mean(real_pairs(photos)),
        "ID-PRES": found["class"],
    }


def read_captions(classifier: Encoder, drawn: Drawn, subject: Subject) -> dict[str, float]:
    """Return how often the classifier names the place, the noun of the subject, and that of its class, rightly."""
    named = {context: classifier.name_images(images) for context, images in drawn.contexts.items()}
    places = {context: _share(found, "background", background_of(context)) for context, found in named.items()}
    in_contexts = [caption for found in named.values() for caption in found]
    return {
        **({f"CAP-BG {context}": share for context, share in places.items()} if len(places) > 1 else {}),
        "CAP-BG": _mean_of(places),
        "CAP-NOUN": _share(in_contexts, "noun", subject.noun),
        "CAP-NOUN class": _share(classifier.name_images(drawn.of_class), "noun", subject.noun),
    }


def background_of(context: str) -> str:
    """Return what the classifier calls a context such as "in the snow"."""
    return next(place for place, phrases in SCENES.items() if context in phrases)


def _share(named: Sequence[Caption], attribute: str, wanted: str) -> float:
    return sum(getattr(caption, attribute) == wanted for caption in named) / len(named)


@torch.no_grad()
def draw(
    denoiser: Denoiser, model: ModelFolder, config: Config, variant: Variant, subject: Subject, seed: int
) -> Drawn:
    """Draw all images of a run in one batch; image ``i`` of every prompt starts from the same noise."""
    instance = variant.instance_prompt(subject)
    prompts = [instance, *(f"{instance} {context}" for context in variant.contexts), subject.class_prompt]
    for module in denoiser.modules().values():
        module.eval()
    text_encoders = denoiser.text_encoders() or load_text_encoders(model, CPU)
    frozen = Denoiser(denoiser.family, {denoiser.name: denoiser.module})
    table = embed_prompts(model, text_encoders, [*prompts, ""])
    job = Job(
        prompts=[prompt for prompt in prompts for _ in range(NUM_IMAGES)],
        size=(config.data.resolution, config.data.resolution),
        generators=[generator(seed, "samples", index) for _ in prompts for index in range(NUM_IMAGES)],
    )
    artist = Artist(model=model, settings=sampling_of(variant))
    (images,) = engine_draw(artist, table, [job], kept(frozen), kept(model.space.load(CPU)))
    plain, *contexts, of_class = (images[first : first + NUM_IMAGES] for first in range(0, len(images), NUM_IMAGES))
    return Drawn(plain=plain, contexts=dict(zip(variant.contexts, contexts, strict=True)), of_class=of_class)


def _train(config: Config, model: ModelFolder) -> tuple[Denoiser, dict[str, float]]:
    """Train to the last step; return the model in fp32, as ``final/`` has it, and its final losses."""
    batches = prepare(config, model, CPU, _scan(config))
    denoiser, objective, optimizer = build_step(resolve(config), model, CPU)
    ema = build_ema(config, denoiser, optimizer)
    outputs = []
    for step in range(config.training.max_train_steps):
        optimizer.set_learning_rates(learning_rates(config, denoiser.modules(), step))
        torch.manual_seed(derive_seed(config.seed, "dropout", step))
        outputs.append(train_step(denoiser, objective, optimizer, batches.batches_at(step), step))
        if ema is not None:
            ema.update(step + 1)
    weights.undo(denoiser.modules(), optimizer.extra_bits())
    if ema is not None:
        for name, parameter in ema.parameters.items():
            parameter.data = ema.average[name]
    last = outputs[-LAST_STEPS:]
    losses = {"loss_instance": sum(output.loss_instance for output in last) / len(last)}
    prior = [output.loss_prior for output in last if output.loss_prior is not None]
    return denoiser, losses | ({"loss_prior": sum(prior) / len(prior)} if prior else {})


def _scan(config: Config) -> list[ImageRecord]:
    subject = config.subject
    return scan_photos(
        subject.instance_dir,
        prompt=subject.instance_prompt,
        resolution=config.data.resolution,
        field="subject.instance_dir",
    )


def _untrained(config: Config, model: ModelFolder) -> Denoiser:
    return build_step(resolve(config), model, CPU)[0]


@cache
def _encoder() -> Encoder:
    return load_encoder(find_encoders(["en0"])[0], CPU)


@cache
def _identity() -> Encoder:
    return load_encoder(find_encoders(["identity"])[0], CPU)


@cache
def _identify_photos(subject: Subject) -> Float[Tensor, "m d"]:
    return _identity().embed_images([read_photo(path) for path in subject.pictures])


@cache
def _classifier() -> Encoder:
    return load_encoder(find_encoders(["captions"])[0], CPU)


@cache
def _embed_photos(subject: Subject) -> Float[Tensor, "m d"]:
    return _encoder().embed_images([read_photo(path) for path in subject.pictures])


def _of_class_images(variant: Variant) -> tuple[tuple[str, Any], ...]:
    """Return the fields of a variant that its class images depend on; none where all are of the class."""
    names = [name for name in variant.fields if name.startswith("prior.") and name != "prior.enabled"]
    return tuple((name, variant.fields[name]) for name in names) if variant.further else ()


@cache
def _embed_class(
    subject: Subject, work: Path, further: Callable[[str], list[str]] | None, fields: tuple[tuple[str, Any], ...]
) -> Float[Tensor, "n d"]:
    """Embed the images of the class that the untrained base draws."""
    config = config_of(Variant(fields=dict(fields), further=further), subject, 0, subject.folder, work)
    size = (config.data.resolution, config.data.resolution)
    drawn = prepare_class_images(config, find_model("demo"), CPU, {size: config.prior.num_class_images})[0]
    files = [
        path for index, path in enumerate(drawn.files or ()) if class_prompt_of(config, index) == subject.class_prompt
    ]
    return _encoder().embed_images([read_photo(path) for path in files])


@contextmanager
def _pictures(subject: Subject, count: int) -> Iterator[Path]:
    """Return a folder with the first pictures of a subject."""
    with tempfile.TemporaryDirectory() as folder:
        for path in subject.pictures[:count]:
            shutil.copy(path, folder)
        yield Path(folder)


def _mean_of(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def _mean(pairs: list[Tensor]) -> float:
    return float(torch.stack([values.double().mean() for values in pairs]).mean())
