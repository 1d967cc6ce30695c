"""The two layouts of a feature map that kernels support: contiguous and channels_last."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Return whether a feature map `(N, C, H, W)` is in channels_last and not also contiguous.

    Args:
        x: Any tensor.

    Returns:
        False if both layouts are the same.
    """
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy if it is in neither of the two layouts.

    Args:
        x: Any tensor.

    Returns:
        A dense tensor.
    """
    return x if is_channels_last(x) else x.contiguous()


def like(result: Tensor, x: Tensor) -> Tensor:
    """Return a result in the layout of x.

    Args:
        result: A tensor with the shape of x.
        x: A tensor in one of the two layouts.

    Returns:
        The result, copied if its layout differs.
    """
    return result.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
