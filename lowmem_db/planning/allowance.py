"""What a device needs beside the tensors of a trace. These are defaults: nothing here was measured on a card yet."""

from lowmem_db.planning.cards import Card

_CUDA_CONTEXT = 450 << 20  # the context, and the kernels that are loaded into it
_CUDA_WORKSPACES = 150 << 20  # of cuBLAS and cuDNN
_CUDA_FRAGMENTATION = 0.05  # of the peak: blocks of the caching allocator that no tensor fills
_PROCESS = 640 << 20  # Python, torch, diffusers and transformers on the CPU
_CPU_FRAGMENTATION = 0.05


def allowance_bytes(peak_bytes: int, card: Card) -> int:
    """Return the bytes to be set aside beside a peak of so many bytes.

    Args:
        peak_bytes: Bytes of tensors at the peak.
        card: Where they are.
    """
    if card.is_cpu:
        return _PROCESS + int(peak_bytes * _CPU_FRAGMENTATION)
    return _CUDA_CONTEXT + _CUDA_WORKSPACES + int(peak_bytes * _CUDA_FRAGMENTATION)
