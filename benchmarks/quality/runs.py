"""One run of an ablation: photos and class images to a trained model, its samples, and their scores."""

import shutil
import tempfile
import time
from collections.abc import Iterator
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
from benchmarks.quality.variants import RECIPE, Variant
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import resolve
from lowmem_db.data.photos import read_photo, scan_photos
from lowmem_db.engine.build import build_step
from lowmem_db.engine.draw import Artist, Job, kept
from lowmem_db.engine.draw import draw as engine_draw
from lowmem_db.engine.step import train_step
from lowmem_db.evaluation.encoders import Encoder, find_encoders, load_encoder
from lowmem_db.evaluation.metrics import (
    cosine_distances,
    cosine_similarities,
    fidelity_pairs,
    preservation_pairs,
    real_pairs,
)
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.text_encoders import embed_prompts, load_text_encoders
from lowmem_db.optimizers import weights
from lowmem_db.optimizers.schedules import learning_rates
from lowmem_db.preparation.class_images import prepare_class_images
from lowmem_db.preparation.prepare import prepare
from lowmem_db.randomness import derive_seed, generator
from lowmem_db.records import ImageRecord
from lowmem_db.sampling.latents import SamplingSettings

CPU = torch.device("cpu")
SAMPLING = SamplingSettings(sampler="ddim", num_inference_steps=14, guidance_scale=1.0)
NUM_IMAGES = 4
CONTEXT, BACKGROUND = "in the snow", "snow"
LAST_STEPS = 25
"""Steps at the end whose mean is called the final loss."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was drawn after training: images of the subject, of the subject in a context, and of its class."""

    plain: list[Image.Image]
    context: list[Image.Image]
    of_class: list[Image.Image]


def base_key(model: ModelFolder) -> str:
    """Return what tells one base from another."""
    return model.whole_key[:12]


def recipe_of(variant: Variant) -> dict[str, Any]:
    """Return everything that a row depends on beside base, subject and seed."""
    return {
        **RECIPE,
        **variant.fields,
        "identifier": variant.identifier,
        "noun": variant.noun,
        "num_images": variant.num_images,
        "trained": variant.trained,
        "last_steps": LAST_STEPS,
        "samples": {**asdict(sampling_of(variant)), "num_images": NUM_IMAGES, "context": CONTEXT},
    }


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
        "subject.class_prompt": article(variant.noun_of(subject) or subject.noun),
    }
    return load_config(None, list(fields.items()))


def run(variant: Variant, subject: Subject, seed: int, work: Path) -> tuple[dict[str, Any], Drawn]:
    """Train, draw and score; return what the row holds of it, and the images."""
    started = time.perf_counter()
    model = find_model("demo")
    with _pictures(subject, variant.num_images) as pictures:
        config = config_of(variant, subject, seed, pictures, work)
        denoiser, losses = _train(config, model) if variant.trained else (_untrained(config, model), {})
    drawn = draw(denoiser, model, config, variant, subject, seed)
    scores = score(_encoder(), drawn, _embed_photos(subject), _embed_class(subject, work))
    named = _classifier().name_images(drawn.context)
    scores["CAP-BG"] = sum(one.background == BACKGROUND for one in named) / len(named)
    seconds = round(time.perf_counter() - started, 1)
    return {**{name: round(value, 5) for name, value in {**scores, **losses}.items()}, "seconds": seconds}, drawn


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
    plain, context, of_class = (encoder.embed_images(images) for images in (drawn.plain, drawn.context, drawn.of_class))
    of_plain, of_context = (_mean(fidelity_pairs([images], photos)) for images in (plain, context))
    return {
        "EN0-I": (of_plain + of_context) / 2,
        "EN0-I plain": of_plain,
        "EN0-I context": of_context,
        "EN0-I real": _mean(real_pairs(photos)),
        "EN0-PRES": _mean(preservation_pairs(of_class, photos)),
        "EN0-DIV": _mean([cosine_distances(images) for images in (plain, context)]),
        "EN0-DIV class": _mean([cosine_distances(of_class)]),
        "EN0-CLASS": float(cosine_similarities(of_class, class_images).mean()),
    }


@torch.no_grad()
def draw(
    denoiser: Denoiser, model: ModelFolder, config: Config, variant: Variant, subject: Subject, seed: int
) -> Drawn:
    """Draw all images of a run in one batch; image ``i`` of every prompt starts from the same noise."""
    instance = variant.instance_prompt(subject)
    prompts = [instance, f"{instance} {CONTEXT}", subject.class_prompt]
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
    plain, context, of_class = (images[first : first + NUM_IMAGES] for first in range(0, len(images), NUM_IMAGES))
    return Drawn(plain=plain, context=context, of_class=of_class)


def _train(config: Config, model: ModelFolder) -> tuple[Denoiser, dict[str, float]]:
    """Train to the last step; return the model in fp32, as ``final/`` has it, and its final losses."""
    batches = prepare(config, model, CPU, _scan(config))
    denoiser, objective, optimizer = build_step(resolve(config), model, CPU)
    outputs = []
    for step in range(config.training.max_train_steps):
        optimizer.set_learning_rates(learning_rates(config, denoiser.modules(), step))
        torch.manual_seed(derive_seed(config.seed, "dropout", step))
        outputs.append(train_step(denoiser, objective, optimizer, batches.batches_at(step), step))
    weights.undo(denoiser.modules(), optimizer.extra_bits())
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
def _classifier() -> Encoder:
    return load_encoder(find_encoders(["captions"])[0], CPU)


@cache
def _embed_photos(subject: Subject) -> Float[Tensor, "m d"]:
    return _encoder().embed_images([read_photo(path) for path in subject.pictures])


@cache
def _embed_class(subject: Subject, work: Path) -> Float[Tensor, "n d"]:
    """Embed the images of the class that the untrained base draws."""
    config = config_of(Variant(), subject, 0, subject.folder, work)
    size = (config.data.resolution, config.data.resolution)
    drawn = prepare_class_images(config, find_model("demo"), CPU, {size: config.prior.num_class_images})[0]
    return _encoder().embed_images([read_photo(path) for path in drawn.files or ()])


@contextmanager
def _pictures(subject: Subject, count: int) -> Iterator[Path]:
    """Return a folder with the first pictures of a subject."""
    with tempfile.TemporaryDirectory() as folder:
        for path in subject.pictures[:count]:
            shutil.copy(path, folder)
        yield Path(folder)


def _mean(pairs: list[Tensor]) -> float:
    return float(torch.stack([values.double().mean() for values in pairs]).mean())
