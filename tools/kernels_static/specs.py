"""What the static check compiles: each kernel as the package launches it at the sizes of SD 1.5, with its bars.

The number of 128-bit accesses is that of the tensors of two bytes and more that a tile reads or writes. Narrow accesses
are those of scalars and of values per channel or per block; their number is bounded so that a tile cannot hide there.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

DTYPES = ("bf16", "fp16", "fp32")
NUM_WARPS = 4
_THREADS = NUM_WARPS * 32
_FLOATS = {
    "input_perturbation", "noise_offset", "elements_per_sample", "instance_share", "prior_share", "overflow",
    "prior_loss_weight", "num_instance_or_1", "num_prior_or_1", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2",
    "eps", "weight_decay", "group_size",
}  # fmt: skip
_UNSPECIALIZED = {"seed_low", "seed_high", "step"}
_DIVISIBLE = {"num_elements", "sample_size", "spatial_size", "num_channels", "num_columns", "num_rows", "num_groups"}
_POINTERS = {
    "sample_ids_ptr": "i64", "step_ptr": "i64", "extra_ptr": "i8", "state1_ptr": "u8",
    "state2_ptr": "u8",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A kernel, how it is launched, and its bars.

    Attributes:
        name: Name in the table.
        kernel: The Triton function.
        constants: Its constexpr arguments.
        tensors: Pointers in the dtype under test; other pointers are fp32 or of a fixed type.
        fixed: Types of pointers where they differ from the usual.
        elements: Elements of a tile.
        dtypes: The dtypes to compile, all where empty.
        wide_loads: Fewest 128-bit loads.
        wide_stores: Fewest 128-bit stores.
        narrow_loads: Most loads below 64 bits.
        narrow_stores: Most stores below 64 bits.
        max_registers: Per thread.
        max_per_element: Instructions for each element.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    tensors: tuple[str, ...] = ()
    fixed: dict[str, str] | None = None
    elements: int = 1024
    dtypes: tuple[str, ...] = ()
    wide_loads: int = 0
    wide_stores: int = 0
    narrow_loads: int = 0
    narrow_stores: int = 0
    max_registers: int = 64
    max_per_element: float = 100.0

    @property
    def elements_per_thread(self) -> float:
        """Elements of a tile that one thread holds."""
        return self.elements / _THREADS

    def signature(
        self, dtype: str, *, ones: bool = False
    ) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
        """Return types, constants and the divisibility that an aligned launch has; `ones` are integers that are 1."""
        names = self.kernel.arg_names
        types = {name: self._type(name, dtype) for name in names}
        aligned = [name for name in names if name.endswith("_ptr") or name in _DIVISIBLE]
        constants = self.constants
        if ones:
            specialized = [name for name in names if types[name] == "i32" and name not in _UNSPECIALIZED]
            types |= dict.fromkeys(specialized, "constexpr")
            constants = constants | dict.fromkeys(specialized, 1)
            aligned = [name for name in aligned if name not in specialized]
        return types, constants, {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}

    def _type(self, name: str, dtype: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name.endswith("_ptr"):
            element = dtype if name in self.tensors else {**_POINTERS, **(self.fixed or {})}.get(name, "fp32")
            return f"*{element}"
        return "fp32" if name in _FLOATS else "i32"


def _module(name: str) -> Any:
    # The package's functions hide the modules of the same name.
    return import_module(f"lowmem_db_kernels.{name}")


def _noise_specs() -> list[Spec]:
    kernel = _module("noise")._noise_kernel
    plain = {"HAS_STD": False, "HAS_OFFSET": False, "HAS_PERTURBATION": False, "REVERSE": False, "BLOCK": 1024}
    tensors = ("latents_ptr", "std_ptr")
    bars: dict[str, Any] = {"tensors": tensors, "wide_loads": 1, "wide_stores": 2, "narrow_loads": 4}
    posterior = plain | {"HAS_STD": True}
    return [
        Spec(name="noise", kernel=kernel, constants=plain, max_per_element=75, **bars),
        Spec(name="noise, posterior", kernel=kernel, constants=posterior, max_per_element=130, **bars),
        # Sixteen channels at a time: most threads idle, each of the others draws one number.
        Spec(
            name="noise, offset",
            kernel=_module("noise")._offset_kernel,
            constants={"BLOCK": 16},
            elements=128,
            dtypes=("fp32",),
            narrow_stores=1,
            max_per_element=300,
        ),
    ]


def _loss_specs() -> list[Spec]:
    module = _module("diffusion_loss")
    mse = {"KIND": 0, "LEARNED_VARIANCE": False, "REVERSE": False, "BLOCK": 1024}
    bars: dict[str, Any] = {"tensors": ("prediction_ptr", "gradient_ptr"), "wide_stores": 1, "narrow_stores": 2}
    bars_with_variance: dict[str, Any] = bars | {"wide_stores": 2}
    return [
        Spec(
            name="loss, mse",
            kernel=module._loss_kernel,
            constants=mse,
            wide_loads=2,
            narrow_loads=1,
            max_per_element=55,
            **bars,
        ),
        Spec(
            name="loss, huber",
            kernel=module._loss_kernel,
            constants=mse | {"KIND": 1},
            wide_loads=2,
            narrow_loads=2,
            max_per_element=85,
            **bars,
        ),
        Spec(
            name="loss, learned variance",
            kernel=module._loss_kernel,
            constants=mse | {"LEARNED_VARIANCE": True},
            dtypes=("bf16",),
            wide_loads=2,
            narrow_loads=1,
            max_per_element=60,
            **bars_with_variance,
        ),
        Spec(
            name="loss, finish",
            kernel=module._finish_kernel,
            constants={"BLOCK": 16},
            dtypes=("fp32",),
            narrow_loads=16,
            narrow_stores=5,
        ),
    ]


def _adamw_specs() -> list[Spec]:
    kernel = _module("adamw8bit_triton")._step_kernel
    constants = {"WEIGHTS": 0, "QUANTIZED": True, "HAS_GRAD_SCALE": True, "HAS_UPDATE_SCALE": True, "DRY_RUN": False}
    constants |= {"HAS_UPDATE_SQUARES": False, "REVERSE": False, "BLOCK": 1024}
    bf16 = {"param_ptr": "bf16"}
    bars: dict[str, Any] = {"tensors": ("grad_ptr",), "narrow_loads": 8, "narrow_stores": 4, "max_registers": 96}
    return [
        Spec(
            name="adamw, fp32",
            kernel=kernel,
            max_per_element=195,
            constants=constants,
            wide_loads=3,
            wide_stores=2,
            **bars,
        ),
        Spec(
            name="adamw, limited update",
            kernel=kernel,
            max_per_element=205,  # ten of them before the loop: a root and two divisions that round as torch
            constants=constants | {"WEIGHTS": 2, "HAS_UPDATE_SCALE": False, "HAS_UPDATE_SQUARES": True},
            wide_loads=2,
            wide_stores=1,
            **bars,
            fixed=bf16,
            dtypes=("bf16",),
        ),
        Spec(
            name="adamw, extra bits",
            kernel=kernel,
            max_per_element=200,
            constants=constants | {"WEIGHTS": 2},
            wide_loads=2,
            wide_stores=1,
            **bars,
            fixed=bf16,
            dtypes=("bf16", "fp32"),
        ),
        Spec(
            name="adamw, stochastic",
            kernel=kernel,
            max_per_element=210,
            constants=constants | {"WEIGHTS": 1},
            wide_loads=2,
            wide_stores=1,
            **bars,
            fixed=bf16,
            dtypes=("bf16", "fp32"),
        ),
        Spec(
            name="adamw, fp32 states",
            kernel=kernel,
            max_per_element=80,
            constants=constants | {"QUANTIZED": False},
            wide_loads=8,
            wide_stores=6,
            **bars,
            fixed={"state1_ptr": "fp32", "state2_ptr": "fp32"},
            dtypes=("fp32",),
        ),
    ]


def _group_norm_specs() -> list[Spec]:
    module = _module("group_norm_silu_kernels")
    tensors: dict[str, Any] = {
        "tensors": ("x_ptr", "output_ptr", "grad_output_ptr", "grad_x_ptr", "weight_ptr", "bias_ptr")
    }
    specs = []
    for layout, channels, positions, tiles in (("NCHW", 4, 256, 1), ("channels_last", 128, 8, 8)):
        constants = {"CHANNELS_LAST": layout != "NCHW", "REVERSE": False, "CHANNELS": channels, "POSITIONS": positions}
        chunked = constants | {"TILES": tiles}
        specs += [
            Spec(
                name=f"norm, statistics, {layout}",
                kernel=module._statistics_kernel,
                constants=chunked,
                wide_loads=1,
                narrow_stores=2,
                # The compiler unrolls the loop over tiles on sm_90, and then it counts eight times.
                max_per_element=30 if layout == "NCHW" else 130,
                **tensors,
            ),
            Spec(
                name=f"norm, apply, {layout}",
                kernel=module._apply_kernel,
                constants=constants,
                wide_loads=1,
                wide_stores=1,
                narrow_loads=8,
                max_per_element=65,
                **tensors,
            ),
            Spec(
                name=f"norm, sums, {layout}",
                kernel=module._sums_kernel,
                # In channels_last half a tile, of which the compiler unrolls two: 16-bit tensors are read by 64 bits.
                constants=chunked if layout == "NCHW" else chunked | {"CHANNELS": channels // 2},
                wide_loads=2 if layout == "NCHW" else 0,
                narrow_loads=8,
                narrow_stores=2,
                max_per_element=65,
                **tensors,
            ),
            Spec(
                name=f"norm, grad input, {layout}",
                kernel=module._grad_input_kernel,
                constants=constants,
                wide_loads=2,
                wide_stores=1,
                narrow_loads=12,
                max_per_element=90,
                **tensors,
            ),
        ]
    return [
        *specs,
        Spec(
            name="norm, merge statistics",
            kernel=module._merge_statistics_kernel,
            constants={"CHUNK": 256, "BLOCK": 256},
            narrow_loads=24,
            narrow_stores=2,
            max_per_element=290,
            elements=256,
            dtypes=("fp32",),
        ),
        Spec(
            name="norm, merge sums",
            kernel=module._merge_sums_kernel,
            constants={"CHANNELS": 16, "CHUNKS": 16},
            narrow_loads=8,
            narrow_stores=4,
            max_per_element=130,
            elements=256,
            dtypes=("fp32",),
        ),
    ]


def _geglu_specs() -> list[Spec]:
    module = _module("geglu")
    constants = {"REVERSE": False, "ROWS": 4, "COLUMNS": 256}
    tensors = ("packed_ptr", "output_ptr", "grad_output_ptr", "grad_packed_ptr")
    return [
        Spec(
            name="geglu",
            kernel=module._geglu_kernel,
            constants=constants,
            tensors=tensors,
            wide_loads=2,
            wide_stores=1,
            max_per_element=57,
        ),
        Spec(
            name="geglu, backward",
            kernel=module._geglu_backward_kernel,
            constants=constants,
            tensors=tensors,
            wide_loads=3,
            wide_stores=2,
            max_per_element=80,
        ),
    ]


SPECS = {
    spec.name: spec
    for spec in (*_noise_specs(), *_loss_specs(), *_adamw_specs(), *_group_norm_specs(), *_geglu_specs())
}
