"""Latent moments of pictures and embeddings of prompts, by content key.

A key holds the picture's bytes, the autoencoder's files, the resolution, the crop and the format's version: a changed
photo is encoded anew, and that photo alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lowmem_db import fingerprint
from lowmem_db.config.schema import Config
from lowmem_db.console import say, track
from lowmem_db.data.batches import EncodedImage, PromptTable
from lowmem_db.data.crops import load_pixels, num_distinct_crops
from lowmem_db.models.conditioning import encode_prompt, tokenize
from lowmem_db.models.latents import encode_moments
from lowmem_db.models.loading import load_autoencoder, load_text_encoder, load_tokenizer
from lowmem_db.models.source import ModelFolder
from lowmem_db.records import ImageRecord
from lowmem_db.storage.run_folder import read_json, write_json
from lowmem_db.storage.tensors import TensorStore

_FORMAT_VERSION = 1
_Loaded = TypeVar("_Loaded")


def encode_images(
    config: Config, model: ModelFolder, device: torch.device, records: Sequence[ImageRecord]
) -> list[EncodedImage]:
    """Return the latent moments of pictures, from the cache where they are there.

    The autoencoder is loaded when the first picture needs it, and computes in fp32.
    """
    store = TensorStore(config.cache_dir / "latents")
    autoencoder_key = model.content_key("vae")
    keys = [_moments_key(config, autoencoder_key, record) for record in records]
    missing = [record for record, key in zip(records, keys, strict=True) if _read_moments(store, key) is None]
    _say_reused(config, records, keys, missing)
    if missing:
        autoencoder = load_autoencoder(model, device=device)
        for record in track(missing, "encoding pictures", len(missing)):
            pixels = torch.stack(
                [
                    load_pixels(record, resolution=config.data.resolution, crop=config.data.crop, index=index)
                    for index in range(_num_crops(config, record))
                ]
            )
            moments = [encode_moments(autoencoder, picture[None]) for picture in pixels]
            mean, std = (torch.cat(parts).cpu() for parts in zip(*moments, strict=True))
            store.write(_moments_key(config, autoencoder_key, record), {"mean": mean, "std": std})
    return [_encoded(store, record, key) for record, key in zip(records, keys, strict=True)]


def encode_prompts(config: Config, model: ModelFolder, device: torch.device, prompts: Iterable[str]) -> PromptTable:
    """Return token ids of prompts, and their embeddings while the text encoder is frozen.

    The text encoder is loaded when the first prompt needs it, and computes in fp32.
    """
    unique = sorted({"", *prompts})
    input_ids = dict(zip(unique, tokenize(load_tokenizer(model), unique), strict=True))
    if config.training.train_text_encoder:
        return PromptTable(input_ids=input_ids)
    store = TensorStore(config.cache_dir / "prompts")
    encoder_key = model.content_key("text_encoder", "tokenizer")
    keys = {prompt: fingerprint.of_values("prompt", _FORMAT_VERSION, encoder_key, prompt) for prompt in unique}
    text_encoder = _lazily(lambda: load_text_encoder(model, device=device))
    embeds: dict[str, Tensor] = {}
    for prompt, key in keys.items():
        stored = store.read(key)
        if stored is None:
            with torch.no_grad():
                stored = {"embeds": encode_prompt(text_encoder(), input_ids[prompt][None])[0].cpu()}
            store.write(key, stored)
        embeds[prompt] = stored["embeds"]
    return PromptTable(input_ids=input_ids, prompt_embeds=embeds)


def _num_crops(config: Config, record: ImageRecord) -> int:
    return num_distinct_crops(
        record, resolution=config.data.resolution, crop=config.data.crop, num_crops=config.data.num_crops
    )


def _moments_key(config: Config, autoencoder_key: str, record: ImageRecord) -> str:
    crops = _num_crops(config, record)
    return fingerprint.of_values(
        "moments", _FORMAT_VERSION, record.content_key, autoencoder_key, config.data.resolution,
        config.data.crop if record.width != record.height else "whole", crops,
    )  # fmt: skip


def _read_moments(store: TensorStore, key: str) -> dict[str, Tensor] | None:
    moments = store.read(key)
    return moments if moments is not None and {"mean", "std"} <= moments.keys() else None


def _encoded(store: TensorStore, record: ImageRecord, key: str) -> EncodedImage:
    moments = _read_moments(store, key)
    assert moments is not None, f"{store.path(key)} was written and is not there"
    return EncodedImage(record=record, mean=moments["mean"], std=moments["std"])


def _say_reused(
    config: Config, records: Sequence[ImageRecord], keys: Sequence[str], missing: Sequence[ImageRecord]
) -> None:
    """Say what is reused, and for each picture that is not, why; remember the keys for the next run."""
    folder = records[0].path.parent.absolute()
    index_file = config.cache_dir / "latents" / f"index-{fingerprint.of_values(str(folder))}.json"
    index = read_json(index_file) or {}
    missing_paths = {record.path for record in missing}
    say(f"latents: {len(records) - len(missing)} of {len(records)} pictures of {folder} are in the cache")
    for record, key in zip(records, keys, strict=True):
        known = index.get(record.path.name)
        if record.path in missing_paths and known is not None:
            say(f"latents: {record.path.name} is encoded anew: {_reason(known, record, key)}")
        index[record.path.name] = {"content_key": record.content_key, "moments_key": key}
    write_json(index_file, index)


def _reason(known: dict[str, str], record: ImageRecord, key: str) -> str:
    if known["content_key"] != record.content_key:
        return "the file has changed"
    if known["moments_key"] != key:
        return "the autoencoder, the resolution or the crop has changed"
    return "its cache file is missing or damaged"


def _lazily(load: Callable[[], _Loaded]) -> Callable[[], _Loaded]:
    loaded: list[_Loaded] = []

    def get() -> _Loaded:
        if not loaded:
            loaded.append(load())
        return loaded[0]

    return get
