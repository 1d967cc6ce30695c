"""The two layouts of a feature map that kernels read: contiguous, and channels_last."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Say whether a feature map `(N, C, H, W)` is stored position by position, and not channel by channel too.

    Args:
        x: Any tensor.

    Returns:
        False where both layouts are the same.
    """
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy where it is in neither of the two layouts.

    Args:
        x: Any tensor.

    Returns:
        A dense tensor.
    """
    return x if is_channels_last(x) else x.contiguous()


def like(result: Tensor, x: Tensor) -> Tensor:
    """Lay a result out like x.

    Args:
        result: Of the shape of x.
        x: In one of the two layouts.

    Returns:
        The result, copied where it lies otherwise.
    """
    return result.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
