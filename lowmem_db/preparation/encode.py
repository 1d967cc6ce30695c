"""Latent moments of images and embeddings of prompts, by content key.

The key covers the image's bytes, the autoencoder's files, the resolution, the crop and the format version, so that only
a changed photo is encoded again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowmem_db import fingerprint
from lowmem_db.config.schema import Config, DataConfig
from lowmem_db.console import say, track
from lowmem_db.data.batches import EncodedImage, PromptTable
from lowmem_db.data.crops import crop_facts, load_pixels, num_distinct_crops
from lowmem_db.errors import NonFiniteError, StorageError
from lowmem_db.launch import own_first
from lowmem_db.memory.drawing import load_all
from lowmem_db.models.families.spaces import Codec
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.text_encoders import check_embeds, read_otherwise, tokenize_prompts
from lowmem_db.records import ImageRecord, Size
from lowmem_db.storage.locks import locked
from lowmem_db.storage.run_folder import read_json, write_json
from lowmem_db.storage.tensors import TensorStore

_FORMAT_VERSION = 2
_PROMPT_FORMAT_VERSION = 1
_EMBEDS_IN_MEMORY = 64
_PROMPTS_AT_ONCE = 64
_Loaded = TypeVar("_Loaded")


def encode_images(
    config: Config, model: ModelFolder, device: torch.device, records: Sequence[ImageRecord], sizes: Sequence[Size]
) -> list[EncodedImage]:
    """Return the moments of images in the denoiser's space, from the cache if they are in it.

    The encoder is loaded when the first image needs it, and computes in fp32.

    Args:
        config: The configuration.
        model: The model, with its autoencoder if it has one.
        device: The device to encode on.
        records: The images.
        sizes: Height and width in pixels to which each image is cropped.
    """
    store = TensorStore(config.cache_dir / "latents", needed={"mean", "std", "time_ids"})
    space_key = model.space.content_key()
    if config.memory.tiled_preparation:
        space_key = fingerprint.of_values(space_key, "tiles")
    sides = (False, True) if config.data.random_flip else (False,)
    crops = [
        _Crops(record, size, config.data, mirrored)
        for record, size in zip(records, sizes, strict=True)
        for mirrored in sides
    ]
    keys = [picture.key(space_key) for picture in crops]
    missing = [picture for picture, key in zip(crops, keys, strict=True) if store.read(key) is None]
    index = _say_reused(config, crops, keys, missing)
    codec = _lazily(lambda: load_encoder(config, model, device))
    for picture in track(own_first(missing), "encoding pictures", len(missing)):
        store.read_or_make(picture.key(space_key), partial(_encode, codec, picture))
    write_json(_index_file(config, crops), index)
    found = [keys[first : first + len(sides)] for first in range(0, len(keys), len(sides))]
    return [_encoded(model, store, record, own) for record, own in zip(records, found, strict=True)]


def load_encoder(config: Config, model: ModelFolder, device: torch.device) -> Codec:
    """Load what encodes pictures, in fp32; where weights stream, without the decoder."""
    codec = model.space.load(device)
    if config.memory.stream_weights:
        codec.drop_decoder()
    if config.memory.tiled_preparation:
        codec.encode_in_tiles(config.data.resolution)
    return codec


def load_encoders_of_text(config: Config, model: ModelFolder, device: torch.device) -> Mapping[str, nn.Module]:
    """Load the text encoders, in fp32."""
    family, streamed = model.family, bool(config.memory.stream_weights)
    return load_all(family, family.text_encoders, model.load, device, streamed=streamed)


def encode_prompts(config: Config, model: ModelFolder, device: torch.device, prompts: Iterable[str]) -> PromptTable:
    """Return the token ids of prompts, and their embeddings if the text encoders are frozen.

    The text encoders are loaded when the first prompt needs them, and compute in fp32.
    """
    unique = sorted({"", *prompts})
    tokens = tokenize_prompts(model, unique)
    if config.runs_text_encoders:
        return tokens
    store = TensorStore(config.cache_dir / "prompts")
    encoder_key = model.content_key(*model.family.names_of("text_encoder", "tokenizer"))
    text_encoders = _lazily(lambda: load_encoders_of_text(config, model, device))
    keys = {
        prompt: fingerprint.of_values("prompt", _PROMPT_FORMAT_VERSION, encoder_key, prompt, *read_otherwise(model))
        for prompt in unique
    }

    def missing() -> list[str]:
        return [prompt for prompt in unique if store.read(keys[prompt]) is None]

    def encode_missing() -> None:
        found = missing()  # another process may have encoded some in the meantime
        for first in range(0, len(found), _PROMPTS_AT_ONCE):
            together = found[first : first + _PROMPTS_AT_ONCE]
            told = [tokens.conditioning([prompt]).tokens for prompt in together]
            with torch.no_grad():
                encoded = model.family.encode_each(text_encoders(), told)
            for prompt, made in zip(together, encoded, strict=True):
                check_embeds(model, made, [prompt])
                store.write(keys[prompt], {name: rows[0].cpu() for name, rows in made.items()})

    if missing():
        with locked(config.cache_dir / ".locks" / f"prompts-{encoder_key[:16]}.lock"):
            encode_missing()
    return replace(tokens, embeds=StoredEmbeds(store, keys))


class StoredEmbeds(Mapping[str, Mapping[str, Tensor]]):
    """Embeddings by prompt, read when they are needed: variants of captions in several chunks would fill gigabytes.

    Args:
        store: Where they are.
        keys: The key of each prompt.
    """

    def __init__(self, store: TensorStore, keys: Mapping[str, str]) -> None:
        self._store, self._keys = store, keys
        self._read = lru_cache(_EMBEDS_IN_MEMORY)(self._read_now)

    def __getitem__(self, prompt: str) -> Mapping[str, Tensor]:
        return self._read(self._keys[prompt])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _read_now(self, key: str) -> Mapping[str, Tensor]:
        found = self._store.read(key)
        if found is None:
            raise StorageError(
                f"{self._store.path(key)}: has been deleted or damaged since the run started; start it again with "
                "--resume"
            )
        return found


def _encode(codec: Callable[[], Codec], picture: "_Crops") -> dict[str, Tensor]:
    try:
        moments = [codec().encode(picture.pixels(index)[None]) for index in range(picture.count)]
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{picture.record.path}: {error}; its moments are not kept. Download the model again, or use another"
        ) from error
    mean, std = (torch.cat(parts).cpu() for parts in zip(*moments, strict=True))
    return {"mean": mean, "std": std, "time_ids": picture.facts()}


@dataclass(frozen=True)
class _Crops:
    """The crops of an image to encode."""

    record: ImageRecord
    size: Size
    config: DataConfig
    mirrored: bool

    @property
    def count(self) -> int:
        return num_distinct_crops(self.record, size=self.size, crop=self.config.crop, num_crops=self.config.num_crops)

    @property
    def index_name(self) -> str:
        """Name in the index: the file name, the size unless it is the usual square, and the side."""
        is_square = self.size == (self.config.resolution, self.config.resolution)
        name = self.record.path.name if is_square else f"{self.record.path.name} {self.size[1]}x{self.size[0]}"
        return f"{name} mirrored" if self.mirrored else name

    def pixels(self, index: int) -> Tensor:
        return load_pixels(self.record, size=self.size, crop=self.config.crop, index=index, mirrored=self.mirrored)

    def facts(self) -> Tensor:
        return torch.stack([self._facts(index) for index in range(self.count)])

    def _facts(self, index: int) -> Tensor:
        return crop_facts(self.record, size=self.size, crop=self.config.crop, index=index, mirrored=self.mirrored)

    def key(self, space_key: str) -> str:
        has_crop_s_shape = self.record.width * self.size[0] == self.record.height * self.size[1]
        return fingerprint.of_values(
            "moments", _FORMAT_VERSION, self.record.content_key, space_key, list(self.size),
            "whole" if has_crop_s_shape else self.config.crop, self.count, *(["mirrored"] if self.mirrored else []),
        )  # fmt: skip


def _encoded(model: ModelFolder, store: TensorStore, record: ImageRecord, keys: Sequence[str]) -> EncodedImage:
    """Return the moments of an image, those of its mirrored crops after the others."""
    found: list[dict[str, Tensor]] = []
    for key in keys:
        moments = store.read(key)
        assert moments is not None, f"{store.path(key)} was written but does not exist"
        found.append(moments)
    mean, std, time_ids = (torch.cat([moments[name] for moments in found]) for name in ("mean", "std", "time_ids"))
    picture = model.family.describe_pictures(time_ids)
    return EncodedImage(record=record, mean=mean, std=std, picture=picture, has_mirrored=len(keys) > 1)


def _index_file(config: Config, crops: Sequence[_Crops]) -> Path:
    folder = crops[0].record.path.parent.absolute()
    return config.cache_dir / "latents" / f"index-{fingerprint.of_values(str(folder))}.json"


def _say_reused(
    config: Config, crops: Sequence[_Crops], keys: Sequence[str], missing: Sequence[_Crops]
) -> dict[str, dict[str, str]]:
    """Say how many images are reused and why others are not; return the keys, for the next run."""
    folder = crops[0].record.path.parent.absolute()
    index = read_json(_index_file(config, crops))
    index = index if isinstance(index, dict) else {}
    say(f"latents: {len(crops) - len(missing)} of {len(crops)} pictures of {folder} are in the cache")
    for picture, key in zip(crops, keys, strict=True):
        known = index.get(picture.index_name)
        if picture in missing and isinstance(known, dict):
            say(f"latents: encoding {picture.record.path.name} again: {_reason(known, picture.record, key)}")
        index[picture.index_name] = {"content_key": picture.record.content_key, "moments_key": key}
    return index


def _reason(known: dict[str, str], record: ImageRecord, key: str) -> str:
    if known.get("content_key") != record.content_key:
        return "the file has changed"
    if known.get("moments_key") != key:
        return "the autoencoder, the resolution or the crop has changed"
    return "its cache file is missing or damaged"


def _lazily(load: Callable[[], _Loaded]) -> Callable[[], _Loaded]:
    loaded: list[_Loaded] = []

    def get() -> _Loaded:
        if not loaded:
            loaded.append(load())
        return loaded[0]

    return get
