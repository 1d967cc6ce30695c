"""Latent moments of pictures and embeddings of prompts, by content key.

A key holds the picture's bytes, the autoencoder's files, the resolution, the crop and the format's version: a changed
photo is encoded anew, and that photo alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lowmem_db import fingerprint
from lowmem_db.config.schema import Config, DataConfig
from lowmem_db.console import say, track
from lowmem_db.data.batches import EncodedImage, PromptTable
from lowmem_db.data.crops import crop_time_ids, load_pixels, num_distinct_crops
from lowmem_db.models.latents import encode_moments
from lowmem_db.models.loading import load_autoencoder
from lowmem_db.models.source import ModelFolder
from lowmem_db.models.text_encoders import load_text_encoders, tokenize_prompts
from lowmem_db.records import Conditioning, ImageRecord, Size
from lowmem_db.storage.run_folder import read_json, write_json
from lowmem_db.storage.tensors import TensorStore

_FORMAT_VERSION = 2
_PROMPT_FORMAT_VERSION = 1
_Loaded = TypeVar("_Loaded")


def encode_images(
    config: Config, model: ModelFolder, device: torch.device, records: Sequence[ImageRecord], sizes: Sequence[Size]
) -> list[EncodedImage]:
    """Return the latent moments of pictures, from the cache where they are there.

    The autoencoder is loaded when the first picture needs it, and computes in fp32.

    Args:
        config: The configuration.
        model: Where the autoencoder is.
        device: Where it computes.
        records: The pictures.
        sizes: Height and width in pixels that each is cropped to.
    """
    store = TensorStore(config.cache_dir / "latents")
    autoencoder_key = model.content_key("vae")
    crops = [_Crops(record, size, config.data) for record, size in zip(records, sizes, strict=True)]
    keys = [picture.key(autoencoder_key) for picture in crops]
    missing = [picture for picture, key in zip(crops, keys, strict=True) if _read_moments(store, key) is None]
    _say_reused(config, crops, keys, missing)
    if missing:
        autoencoder = load_autoencoder(model, device=device)
        for picture in track(missing, "encoding pictures", len(missing)):
            moments = [encode_moments(autoencoder, picture.pixels(index)[None]) for index in range(picture.count)]
            mean, std = (torch.cat(parts).cpu() for parts in zip(*moments, strict=True))
            tensors = {"mean": mean, "std": std, "time_ids": picture.time_ids()}
            store.write(picture.key(autoencoder_key), tensors)
    return [_encoded(store, record, key) for record, key in zip(records, keys, strict=True)]


def encode_prompts(config: Config, model: ModelFolder, device: torch.device, prompts: Iterable[str]) -> PromptTable:
    """Return token ids of prompts, and their embeddings while the text encoders are frozen.

    The text encoders are loaded when the first prompt needs them, and compute in fp32.
    """
    unique = sorted({"", *prompts})
    tokens = PromptTable.of(unique, tokenize_prompts(model, unique), zeroes_empty_prompt=model.zeroes_empty_prompt)
    if config.training.train_text_encoder:
        return tokens
    store = TensorStore(config.cache_dir / "prompts")
    second = ("text_encoder_2", "tokenizer_2") * model.family.has_text_encoder_2
    encoder_key = model.content_key("text_encoder", "tokenizer", *second)
    text_encoders = _lazily(lambda: load_text_encoders(model, device=device))
    embeds: dict[str, dict[str, Tensor]] = {}
    for prompt in unique:
        key = fingerprint.of_values("prompt", _PROMPT_FORMAT_VERSION, encoder_key, prompt)
        stored = store.read(key)
        if stored is None:
            stored = _embeddings(text_encoders().embed(tokens.conditioning([prompt])))
            store.write(key, stored)
        embeds[prompt] = stored
    has_pooled = model.family.has_text_encoder_2
    return replace(
        tokens,
        prompt_embeds={prompt: tensors["embeds"] for prompt, tensors in embeds.items()},
        pooled_embeds={prompt: tensors["pooled"] for prompt, tensors in embeds.items()} if has_pooled else None,
    )


def _embeddings(conditioning: Conditioning) -> dict[str, Tensor]:
    """Return the embeddings of one prompt, to be stored."""
    found = {"embeds": conditioning.prompt_embeds, "pooled": conditioning.pooled_embeds}
    return {name: rows[0].cpu() for name, rows in found.items() if rows is not None}


@dataclass(frozen=True)
class _Crops:
    """The crops of a picture that are encoded."""

    record: ImageRecord
    size: Size
    config: DataConfig

    @property
    def count(self) -> int:
        return num_distinct_crops(self.record, size=self.size, crop=self.config.crop, num_crops=self.config.num_crops)

    @property
    def index_name(self) -> str:
        """What it is called in the index: its name, and its size where that is not the usual square."""
        is_square = self.size == (self.config.resolution, self.config.resolution)
        return self.record.path.name if is_square else f"{self.record.path.name} {self.size[1]}x{self.size[0]}"

    def pixels(self, index: int) -> Tensor:
        return load_pixels(self.record, size=self.size, crop=self.config.crop, index=index)

    def time_ids(self) -> Tensor:
        return torch.stack(
            [
                crop_time_ids(self.record, size=self.size, crop=self.config.crop, index=index)
                for index in range(self.count)
            ]
        )

    def key(self, autoencoder_key: str) -> str:
        has_crop_s_shape = self.record.width * self.size[0] == self.record.height * self.size[1]
        return fingerprint.of_values(
            "moments", _FORMAT_VERSION, self.record.content_key, autoencoder_key, list(self.size),
            "whole" if has_crop_s_shape else self.config.crop, self.count,
        )  # fmt: skip


def _read_moments(store: TensorStore, key: str) -> dict[str, Tensor] | None:
    moments = store.read(key)
    return moments if moments is not None and {"mean", "std", "time_ids"} <= moments.keys() else None


def _encoded(store: TensorStore, record: ImageRecord, key: str) -> EncodedImage:
    moments = _read_moments(store, key)
    assert moments is not None, f"{store.path(key)} was written and is not there"
    return EncodedImage(record=record, mean=moments["mean"], std=moments["std"], time_ids=moments["time_ids"])


def _say_reused(config: Config, crops: Sequence[_Crops], keys: Sequence[str], missing: Sequence[_Crops]) -> None:
    """Say what is reused, and for each picture that is not, why; remember the keys for the next run."""
    folder = crops[0].record.path.parent.absolute()
    index_file = config.cache_dir / "latents" / f"index-{fingerprint.of_values(str(folder))}.json"
    index = read_json(index_file) or {}
    say(f"latents: {len(crops) - len(missing)} of {len(crops)} pictures of {folder} are in the cache")
    for picture, key in zip(crops, keys, strict=True):
        known = index.get(picture.index_name)
        if picture in missing and known is not None:
            say(f"latents: {picture.record.path.name} is encoded anew: {_reason(known, picture.record, key)}")
        index[picture.index_name] = {"content_key": picture.record.content_key, "moments_key": key}
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
