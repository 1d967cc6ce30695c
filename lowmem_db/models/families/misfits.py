"""Where the configurations of a Stable Diffusion model contradict each other; only JSON files are read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem_db.models.families.base import Family
from lowmem_db.models.files import ModelFiles, read_json

OTHER_CHANNELS = {5: "a depth model", 7: "an upscaler", 8: "an image-editing model", 9: "an inpainting model"}
"""What a UNet with so many input channels is for; a text-to-image model has as many as its autoencoder."""
_WHOLE = "use the model that these files come from as a whole"


def misfits(family: Family, files: ModelFiles) -> Iterator[str]:
    """Yield each contradiction, beginning with the component that shows it."""
    unet = files.config_of(family.denoiser)
    yield from _channels(unet, files)
    yield from _widths(family, files, unet)
    for encoder, tokenizer in zip(family.text_encoders, family.names_of("tokenizer"), strict=True):
        yield from _tokens(files, encoder, tokenizer)


def _channels(unet: dict[str, Any], files: ModelFiles) -> Iterator[str]:
    of_latents = files.config_of("vae").get("latent_channels", 4)
    taken, given = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if taken != of_latents and taken in OTHER_CHANNELS:
        yield (
            f"unet: has {taken} input channels instead of {of_latents}: it is {OTHER_CHANNELS[taken]}; allowed: "
            "text-to-image models. Use the model that it was made from"
        )
    elif taken != of_latents or given != of_latents:
        wrong = f"takes {taken}" if taken != of_latents else f"gives {given}"
        yield f"unet: {wrong} channels, but the vae has {of_latents} latent channels; {_WHOLE}"


def _widths(family: Family, files: ModelFiles, unet: dict[str, Any]) -> Iterator[str]:
    if unet.get("encoder_hid_dim") is not None or not isinstance(unet.get("cross_attention_dim"), int):
        return
    widths = [int(files.config_of(name).get("hidden_size", 0)) for name in family.text_encoders]
    if all(widths) and sum(widths) != unet["cross_attention_dim"]:
        yield (
            f"unet: takes text embeddings of width {unet['cross_attention_dim']}, but "
            f"{' and '.join(family.text_encoders)} give {' + '.join(map(str, widths))}; {_WHOLE}"
        )


def _tokens(files: ModelFiles, encoder: str, tokenizer: str) -> Iterator[str]:
    rows = files.config_of(encoder).get("vocab_size")
    largest = _largest_token(files.folder_of(tokenizer))
    if isinstance(rows, int) and largest is not None and largest[1] >= rows:
        token, number = largest
        yield (
            f"{tokenizer}: its token {token!r} has the number {number}, but {encoder} knows only {rows}; remove the "
            "token from the tokenizer's files, or use a text encoder that was trained with it"
        )


def _largest_token(folder: Path) -> tuple[str, int] | None:
    """Return the token with the largest number in a tokenizer's files, or None if they do not say."""
    numbers: dict[str, int] = {}
    for name, find in _TOKENS.items():
        if (folder / name).is_file():
            numbers |= {
                str(token): number for token, number in find(read_json(folder / name)) if isinstance(number, int)
            }
    return max(numbers.items(), key=lambda item: item[1]) if numbers else None


def _of_fast(content: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    vocabulary = (content.get("model") or {}).get("vocab")
    yield from vocabulary.items() if isinstance(vocabulary, dict) else ()
    yield from ((added.get("content"), added.get("id")) for added in content.get("added_tokens") or ())


_TOKENS = {
    "vocab.json": lambda content: content.items(),
    "added_tokens.json": lambda content: content.items(),
    "tokenizer.json": _of_fast,
}
