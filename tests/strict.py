"""What torch refuses on a CUDA device once a run has made it deterministic, refused on the CPU too."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

_REFUSED = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "_ctc_loss_backward",
    "_upsample_bicubic2d_aa_backward", "_upsample_bilinear2d_aa_backward", "adaptive_max_pool2d_backward",
    "avg_pool3d_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "histc", "kthvalue", "max_unpool2d",
    "max_unpool3d", "nll_loss2d_forward", "put", "put_", "reflection_pad1d_backward", "reflection_pad2d_backward",
    "reflection_pad3d_backward", "upsample_bicubic2d_backward", "upsample_bilinear2d_backward",
    "upsample_linear1d_backward", "upsample_trilinear3d_backward",
}  # fmt: skip


class StrictAsOnCuda(TorchDispatchMode):
    """Raises for each operator in the list of ``torch.use_deterministic_algorithms`` that throws.

    It looks into the operators of ``lowmem_db_kernels`` too.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, overload = func._schema.name.partition("::")[2], func._overloadname
        if (
            name in _REFUSED
            or (name in {"median", "nanmedian"} and overload.startswith("dim"))
            or (name in {"cumsum", "cumsum_"} and _is_fractional(args[0], kwargs))
            or (name == "bincount" and (len(args) > 1 or kwargs.get("weights") is not None))
            or (name.startswith("scatter_reduce") and "prod" in args)
        ):
            raise RuntimeError(f"{name} does not have a deterministic implementation on CUDA")
        if func.namespace == "lowmem_db_kernels":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        return func(*args, **kwargs)


def _is_fractional(tensor: Tensor, kwargs: Mapping[str, Any]) -> bool:
    dtype = kwargs.get("dtype") or tensor.dtype
    return dtype.is_floating_point or dtype.is_complex
