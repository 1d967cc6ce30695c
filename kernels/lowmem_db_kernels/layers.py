"""Layers without constructor or state, for `kernels.kernelize`: their forward replaces a model's own."""

from torch import Tensor, nn

from .geglu import geglu
from .group_norm_silu import group_norm_silu


class GroupNormSiLU(nn.Module):
    """GroupNorm followed by SiLU, on the parameters of `torch.nn.GroupNorm`."""

    num_groups: int
    eps: float
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalize and activate `(N, C, ...)`."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class GEGLU(nn.Module):
    """The gated layer of diffusers' feed-forward block."""

    proj: nn.Linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project and gate `(..., C)`."""
        return geglu(self.proj(hidden_states))
