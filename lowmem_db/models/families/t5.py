"""T5's tokenizer and encoder (arXiv:1910.10683), as pixel cascades use them.

T5-XXL has 4.8 billion parameters. Here its encoder runs layer by layer from its files: one layer is in memory at a
time, and the embeddings are those of the whole encoder, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5TokenizerFast  # type: ignore[attr-defined]

from lowmem_db import environment
from lowmem_db.errors import ModelError
from lowmem_db.models.families.base import Tensors
from lowmem_db.models.files import ModelFiles, safetensors_of
from lowmem_db.models.loading import META, check_names, configuration_of, load_tokenizer
from lowmem_db.models.stored_tensor import StoredTensor, read_header

MAX_TOKENS = 77
"""Tokens of a prompt in DeepFloyd IF, which T5 itself does not limit."""
_FAST, _SENTENCEPIECE = "tokenizer.json", "spiece.model"
_WORDS, _NORM = "shared.weight", "encoder.final_layer_norm.weight"
_SECOND_NAMES = {_WORDS: "encoder.embed_tokens.weight"}
_RELATIVE = "layer.0.SelfAttention.relative_attention_bias.weight"


def load_t5_tokenizer(files: ModelFiles, component: str, *_: Any) -> T5TokenizerFast:
    """Load a T5 tokenizer that turns capitals into small letters, as diffusers' pipelines do before it.

    Raises:
        DependencyError: Only its SentencePiece file is there, and the library that reads it is missing.
        ModelError: Its files are missing or damaged.
    """
    path = files.folder_of(component)
    if not (path / _FAST).is_file() and (path / _SENTENCEPIECE).is_file():
        environment.require("sentencepiece")
    tokenizer = load_tokenizer(files, component, T5TokenizerFast, ((_FAST,), (_SENTENCEPIECE,)))
    tokenizer.model_max_length = MAX_TOKENS
    backend: Any = tokenizer.backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return tokenizer


def tokenize(tokenizer: T5TokenizerFast, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return token ids of prompts, padded or truncated to 77, and masks of the tokens that are not padding."""
    encoded = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}


def load_layerwise(files: ModelFiles, component: str, device: torch.device, dtype: torch.dtype) -> "LayerwiseT5":
    """Return an encoder that reads its layers when it needs them; on the meta device, without files.

    Whatever ``dtype`` says, it computes in fp32: T5 overflows in fp16.

    Raises:
        ModelError: There are no safetensors, or they lack tensors.
    """
    del dtype
    config = configuration_of(T5EncoderModel, files, component)
    if device.type == "meta":
        return LayerwiseT5(config, {}, device)
    path = files.folder_of(component)
    stored: dict[str, StoredTensor] = {}
    for file in _safetensors(path, files.variant_of(component)):
        stored |= read_header(file)[0]
    for name, second in _SECOND_NAMES.items():
        if second in stored:
            stored.setdefault(name, stored[second])
    encoder = LayerwiseT5(config, stored, device)
    check_names(path, missing=set(encoder.names()) - stored.keys(), unexpected=())
    return encoder


def _safetensors(path: Path, variant: str | None) -> list[Path]:
    if not (found := safetensors_of(path, variant)):
        raise ModelError(
            f"{path}: has no safetensors, from which T5 is read layer by layer; allowed: safetensors weights. Download "
            "the version of the model that has them"
        )
    return found


class LayerwiseT5(nn.Module):
    """T5's encoder with at most one layer in memory.

    Args:
        config: Its configuration.
        stored: Its tensors, under their names in the files.
        device: Where it computes; on the meta device its tensors have no values.
    """

    def __init__(self, config: T5Config, stored: Mapping[str, StoredTensor], device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._num_layers = config.num_layers
        self._stored = stored
        # A stack of a single layer, filled with one layer after the other. It stands in a tuple and holds no weights
        # between them, so this module has no parameters, and moving it moves nothing.
        stack, self._width = _stack_of_one(config), config.d_model
        norm, stack.final_layer_norm = stack.final_layer_norm, nn.Identity()
        self._parts: tuple[Any, Any] = (stack, norm)
        self._shapes = {name: _emptied(parent, key) for name, parent, key in _parameters(stack.block[0])}
        _emptied(norm, "weight")

    def names(self) -> Iterator[str]:
        """Yield the names of the tensors that it reads."""
        yield from (_WORDS, _NORM)
        for index in range(self._num_layers):
            yield from {self._stored_name(index, name) for name in self._shapes}

    @torch.no_grad()
    def forward(
        self, prompts: Sequence[tuple[Int[Tensor, "b tokens"], Int[Tensor, "b tokens"]]]
    ) -> list[Float[Tensor, "b tokens dim"]]:
        """Return the last hidden states of several batches of prompts, each of which is computed by itself.

        Args:
            prompts: Token ids and attention masks.
        """
        stack, norm = self._parts
        masks = [mask.to(self.device) for _, mask in prompts]
        states = [self._embedded(token_ids) for token_ids, _ in prompts]
        for index in range(self._num_layers):
            self._fill(index)
            for place, mask in enumerate(masks):
                states[place] = stack(inputs_embeds=states[place], attention_mask=mask).last_hidden_state
        self._empty()
        norm.weight = _frozen(self._read(_NORM, (self._width,)))
        return [norm(state) for state in states]

    def _embedded(self, token_ids: Int[Tensor, "b tokens"]) -> Float[Tensor, "b tokens dim"]:
        if self.device.type == "meta":
            return torch.empty(*token_ids.shape, self._width, device=self.device)
        return self._stored[_WORDS].read()[token_ids.cpu()].to(self.device, torch.float32)  # mapped: only these rows

    def _fill(self, index: int) -> None:
        """Read a layer into the place of the one before it."""
        self._empty()
        for name, parent, key in _parameters(self._parts[0].block[0]):
            setattr(parent, key, _frozen(self._read(self._stored_name(index, name), self._shapes[name])))

    def _empty(self) -> None:
        for _, parent, key in _parameters(self._parts[0].block[0]):
            _emptied(parent, key)

    def _stored_name(self, index: int, name: str) -> str:
        """Return the name of a layer's parameter in the files; all layers have the first one's position bias."""
        return f"encoder.block.{0 if name == _RELATIVE else index}.{name}"

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, device=self.device)
        return self._stored[name].read().to(self.device, torch.float32, copy=True)


def encode(encoder: LayerwiseT5, tokens: Sequence[Tensors]) -> list[Float[Tensor, "b tokens dim"]]:
    """Return the embeddings of several batches of tokens, as :func:`tokenize` returns them."""
    return encoder([(each["input_ids"], each["attention_mask"]) for each in tokens])


def _stack_of_one(config: T5Config) -> Any:
    """Return the stack of an encoder of one layer, without its words, on the meta device."""
    with torch.device(META):
        stack: Any = T5EncoderModel(type(config)(**{**config.to_dict(), "num_layers": 1})).encoder
    stack.embed_tokens = None
    return stack.eval().requires_grad_(False)


def _parameters(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return the parameters of a module: name, owner and its attribute."""
    return [
        (f"{path}.{key}" if path else key, parent, key)
        for path, parent in module.named_modules()
        for key in parent._parameters
        if parent._parameters[key] is not None
    ]


def _emptied(parent: nn.Module, key: str) -> tuple[int, ...]:
    """Take away the values of a parameter; return its shape."""
    shape = tuple(getattr(parent, key).shape)
    setattr(parent, key, _frozen(torch.empty(0)))
    return shape


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
