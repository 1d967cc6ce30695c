"""Memory that a device needs in addition to the tensors of a trace.

The shares for fragmentation hold what a model of the caching allocator reserves beyond the tensors of real strategies
(:mod:`lowmem_db.planning.caching_allocator`, with a test). What cards measured is in
:mod:`lowmem_db.planning.calibration`.
"""

from collections.abc import Iterable

import torch

from lowmem_db import environment, nvidia
from lowmem_db.planning import calibration
from lowmem_db.planning.cards import Card
from lowmem_db.planning.costs import Attention

_CUDA_CONTEXT = calibration.CUDA_CONTEXT
_KERNELS_LOADED_LATER = _CUDA_CONTEXT // 3  # of the context: what the driver takes when a kernel first runs
_CUDA_WORKSPACES = calibration.CUDA_WORKSPACES
_BESIDE_ATTENTION = 32 << 20  # cuBLAS; cuDNN's workspaces are let go before the next attention
_COMMUNICATOR = 400 << 20  # buffers and kernels of NCCL
_FIRST_WITH_FLASH = (8, 0)
_FRAGMENTATION = calibration.FRAGMENTATION
_FRAGMENTATION_OF_FIXED_SEGMENTS = 0.10
_NOTEWORTHY = 256 << 20  # a desktop holds less; contexts differ by as much
_PROCESS = 640 << 20  # Python, torch, diffusers and transformers on the CPU


def allowance_bytes(peak_bytes: int, card: Card, attentions: Iterable[Attention] = ()) -> int:
    """Return the bytes to set aside in addition to a peak.

    Args:
        peak_bytes: Bytes of tensors at the peak.
        card: The card that holds them.
        attentions: What attention computes the backward pass of. Default: nothing large.
    """
    if card.is_cpu:
        return _PROCESS + int(peak_bytes * _FRAGMENTATION)
    return _CUDA_CONTEXT + workspace_bytes(card, attentions) + fragmentation_bytes(peak_bytes)


def workspace_bytes(card: Card, attentions: Iterable[Attention] = ()) -> int:
    """Return what the libraries of a card take for themselves, the backward pass of attention above all.

    For the same bits each time, flash attention sums the gradients of the queries in as many copies as keep all
    multiprocessors busy (``mha_bwd`` in torch's ``flash_api.cpp``); before Ampere, another kernel has one copy.

    Args:
        card: The card.
        attentions: What attention computes the backward pass of.
    """
    of_attention = max((_gradient_copies(card, each) for each in attentions), default=0)
    return max(_CUDA_WORKSPACES, _BESIDE_ATTENTION + of_attention)


def _gradient_copies(card: Card, attention: Attention) -> int:
    """Return the bytes of the copies, in fp32; attention in fp32 sums in the gradient itself."""
    if attention.dtype == torch.float32:
        return 0
    is_flash = card.capability is not None and card.capability >= _FIRST_WITH_FLASH
    copies = -(-card.multiprocessors // attention.num_heads) if is_flash else 1
    num_queries, width = -(-attention.num_queries // 128) * 128, -(-attention.width // 32) * 32
    return 4 * copies * attention.num_heads * num_queries * width


def communicator_bytes(card: Card, num_processes: int) -> int:
    """Return what NCCL takes of a card to connect it with others, from the first step on; estimated, not measured."""
    return _COMMUNICATOR if num_processes > 1 and not card.is_cpu else 0


def context_in_use() -> int:
    """Return what the context of this process already takes of a card, so that it is missing from what is free."""
    return _CUDA_CONTEXT - _KERNELS_LOADED_LATER


def held_by_others(device: torch.device) -> int:
    """Return what other programs hold of a CUDA device, if it is worth a word; else 0."""
    held = environment.bytes_beside_allocator(device) - _CUDA_CONTEXT
    return held if held >= _NOTEWORTHY else 0


def allocator_bytes(budget_bytes: int) -> int:
    """Return what the caching allocator of a card may take of a budget.

    Args:
        budget_bytes: Bytes of the card that the process may use.
    """
    return budget_bytes - _CUDA_CONTEXT


def reserved_bytes(peak_bytes: int, card: Card, attentions: Iterable[Attention] = ()) -> int | None:
    """Return what the caching allocator takes for a peak of so many bytes; None on the CPU, which has none.

    Args:
        peak_bytes: Bytes of tensors at the peak.
        card: Where they are.
        attentions: What attention computes the backward pass of. Default: nothing large.
    """
    return None if card.is_cpu else peak_bytes + workspace_bytes(card, attentions) + fragmentation_bytes(peak_bytes)


def fragmentation_bytes(peak_bytes: int) -> int:
    """Return what the caching allocator of a card reserves beyond its tensors.

    Args:
        peak_bytes: Bytes of tensors at the peak.
    """
    share = _FRAGMENTATION if nvidia.has_expandable_segments() else _FRAGMENTATION_OF_FIXED_SEGMENTS
    return int(peak_bytes * share)
