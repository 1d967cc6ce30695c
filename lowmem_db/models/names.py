"""Names of layers and tensors in published files, whatever the libraries call them in memory."""

import re

from torch import nn

_OF_CLIP = re.compile(r"(embeddings|encoder\.layers|final_layer_norm)\b")
_PREFIX = "text_model."
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"(mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.")


def published_name(component: str, path: str) -> str:
    """Return the name of a layer or tensor of a component in published files.

    transformers 5 dropped the prefix ``text_model.`` of CLIP's text encoder in memory; files and other tools still
    use it.
    """
    is_of_clip = component.startswith("text_encoder") and _OF_CLIP.match(path) is not None
    return _PREFIX + path if is_of_clip else path


def current_name(path: str) -> str:
    """Return the name that diffusers now has for a tensor of an autoencoder's attention; others keep theirs."""
    return _OLD_NAME.sub(lambda match: f"{match[1]}.{_OLD_ATTENTION[match[2]]}.", path)


def second_names(module: nn.Module) -> dict[str, str]:
    """Return the further names of parameters that a module has in two places, each with its first name."""
    first: dict[nn.Parameter, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in named if first.setdefault(parameter, name) != name}
