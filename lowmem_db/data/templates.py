"""Prompts that Textual Inversion trains with (arXiv:2208.01618, section 4.1, and its supplement): neutral contexts.

They are a part of CLIP's templates for ImageNet (MIT License, Copyright 2021 OpenAI), as Gal et al. chose them.
"""

from lowmem_db.config.schema import Config

_OBJECT = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
    "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}",
    "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}", "a photo of the {}",
    "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}", "a rendition of the {}",
    "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
    "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}",
    "a photo of a cool {}", "a photo of a small {}",
)  # fmt: skip
_STYLE = tuple(
    f"{article} in the style of {{}}"
    for article in (
        "a painting", "a rendering", "a cropped painting", "the painting", "a clean painting", "a dirty painting",
        "a dark painting", "a picture", "a cool painting", "a close-up painting", "a bright painting",
        "a good painting", "a rendition", "a nice painting", "a small painting", "a weird painting", "a large painting",
    )
)  # fmt: skip


def templates_of(config: Config) -> tuple[str, ...]:
    """Return the prompts of which one is drawn for each sample; empty if the instance prompt is always used."""
    own = config.textual_inversion
    if not own.enabled or own.templates == "prompt":
        return ()
    return tuple(template.replace("{}", own.token) for template in (_OBJECT if own.templates == "object" else _STYLE))
