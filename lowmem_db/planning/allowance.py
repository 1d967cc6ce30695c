"""Memory that a device needs in addition to the tensors of a trace. These are defaults, not yet measured on a card."""

from lowmem_db.planning.cards import Card

_CUDA_CONTEXT = 450 << 20  # the context and the kernels loaded into it
_CUDA_WORKSPACES = 150 << 20  # of cuBLAS and cuDNN
_CUDA_FRAGMENTATION = 0.05  # of the peak: gaps in the blocks of the caching allocator
_PROCESS = 640 << 20  # Python, torch, diffusers and transformers on the CPU
_CPU_FRAGMENTATION = 0.05


def allowance_bytes(peak_bytes: int, card: Card) -> int:
    """Return the bytes to set aside in addition to a peak.

    Args:
        peak_bytes: Bytes of tensors at the peak.
        card: The card that holds them.
    """
    if card.is_cpu:
        return _PROCESS + int(peak_bytes * _CPU_FRAGMENTATION)
    return _CUDA_CONTEXT + _CUDA_WORKSPACES + int(peak_bytes * _CUDA_FRAGMENTATION)
