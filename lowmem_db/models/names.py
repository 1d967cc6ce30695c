"""Names of layers and tensors in published files, whatever the libraries call them in memory."""

import re

_OF_CLIP = re.compile(r"(embeddings|encoder\.layers|final_layer_norm)\b")
_PREFIX = "text_model."


def published_name(component: str, path: str) -> str:
    """Return the name of a layer or tensor of a component in published files.

    transformers 5 dropped the prefix ``text_model.`` of CLIP's text encoder in memory; files and other tools still
    use it.
    """
    is_of_clip = component.startswith("text_encoder") and _OF_CLIP.match(path) is not None
    return _PREFIX + path if is_of_clip else path
