"""Bytes of a device that a computation on meta tensors would hold, and their peak."""

import weakref
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_db import host_memory


class DeviceTrace(TorchDispatchMode):
    """Follows each storage from the operation that makes it until it dies; the allocator rounds up to 512 bytes."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.host_bytes = 0
        self._sizes: dict[int, int] = {}
        self._ignored = {tensor.untyped_storage()._cdata for tensor in known}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._follow(leaf.untyped_storage())
        return output

    def on_host(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        self._forget(key)
        self._ignored.add(key)
        self.host_bytes += tensor.nbytes

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._ignored:
            return
        self._sizes[key] = -(-storage.nbytes() // 512) * 512
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._references.pop(key, None)


def efficient_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """SDPA as on CUDA; torch's own on meta tensors keeps the probabilities."""
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def traced(module: nn.Module, *inputs: Tensor):
    """Trace; weights and inputs are not counted, and gradients of weights are freed as they come."""
    trace = DeviceTrace([*module.parameters(), *inputs])
    original = nn.functional.scaled_dot_product_attention
    hooks = [parameter.register_post_accumulate_grad_hook(_free) for parameter in module.parameters()]
    nn.functional.scaled_dot_product_attention = efficient_attention
    try:
        with ExitStack() as stack:
            stack.enter_context(host_memory.observed(trace.on_host))
            stack.enter_context(trace)
            yield trace
    finally:
        nn.functional.scaled_dot_product_attention = original
        for hook in hooks:
            hook.remove()


def _free(parameter: Tensor) -> None:
    parameter.grad = None
