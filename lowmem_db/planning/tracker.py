"""Counts the bytes of all tensors that are alive while code runs, on the meta device or on a real one.

A dispatch mode sees each operator's outputs. A storage counts from the operator that made it until nothing refers to
it, as in CUDA's caching allocator. What is made from tensors on the host alone is there too. Allocations inside an
operator are not seen, except in the eager twins of ``lowmem_db_kernels``.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from lowmem_db_kernels import registry
from lowmem_db_kernels.adamw8bit_eager import launches_and_bytes, temporary_bytes
from lowmem_db_kernels.adamw8bit_state import StepOperands
from lowmem_db_kernels.dispatch import choose
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_db import host_memory
from lowmem_db.planning import meta_results
from lowmem_db.planning.caching_allocator import Event
from lowmem_db.planning.costs import KERNELS, CostRecorder, Row
from lowmem_db.records import PARTS, MemoryParts

CUDA_ROUNDING = 512
_COPY = torch.ops.aten.copy_.default
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
_STEP = torch.ops.lowmem_db_kernels.adamw8bit_step.default
_READ_SCALAR = torch.ops.aten._local_scalar_dense.default


@dataclass(slots=True)
class _Storage:
    num_bytes: int
    part: int
    on_host: bool
    reference: Any
    is_pinned: bool = False


class AllocationTracker(TorchDispatchMode):
    """Follows the storages that operators make on one type of device while :meth:`tracking`.

    Args:
        device_type: ``meta`` in a trace, ``cpu`` for real tensors; storages elsewhere do not count.
        rounding: Sizes of storages are rounded up to a multiple of this many bytes.
        cpu_kernels: Whether to look inside the operators of ``lowmem_db_kernels`` that run as eager twins on the CPU.
        costs: Is notified of every operator in a trace.
        eager_step: Whether the optimizer's step runs on a card as its eager twin, whose temporaries and time count.
    """

    def __init__(
        self,
        *,
        device_type: str = "meta",
        rounding: int = CUDA_ROUNDING,
        cpu_kernels: bool = False,
        costs: CostRecorder | None = None,
        eager_step: bool = False,
    ) -> None:
        super().__init__()
        self.device_type = device_type
        self._rounding = rounding
        self._cpu_kernels = cpu_kernels
        self._costs = costs or CostRecorder()
        self._eager_step = eager_step
        self._storages: dict[int, _Storage] = {}
        self._totals = [0] * len(PARTS)
        self._live_bytes = self._host_bytes = self._pinned_bytes = 0
        self._peak_before: tuple[int, tuple[int, ...], int] = (0, (), 0)
        self._interval_peak = 0
        self._part_of_new = PARTS.index("other")
        self._events: list[Event] | None = None
        self.reset_peak()

    @property
    def live(self) -> MemoryParts:
        """Bytes in use on the device."""
        return MemoryParts(*self._totals)

    @property
    def peak(self) -> MemoryParts:
        """Bytes in use on the device at the peak since the last :meth:`reset_peak`."""
        return MemoryParts(*self._peak_totals)

    @property
    def peak_host_bytes(self) -> int:
        """Peak bytes on the host since the last :meth:`reset_peak`."""
        return self._peak_host_bytes

    @property
    def peak_pinned_bytes(self) -> int:
        """Peak bytes of those that a device reads and writes, by :mod:`lowmem_db.host_memory`."""
        return self._peak_pinned_bytes

    def reset_peak(self) -> None:
        """Restart the peak from what is in use now."""
        self._peak_bytes, self._peak_totals = self._live_bytes, tuple(self._totals)
        self._peak_host_bytes, self._peak_pinned_bytes = self._host_bytes, self._pinned_bytes

    @property
    def live_bytes(self) -> int:
        """Bytes in use on the device, all parts together."""
        return self._live_bytes

    def end_interval(self) -> int:
        """Return the peak bytes since the last call."""
        peak, self._interval_peak = self._interval_peak, self._live_bytes
        return peak

    def record_events(self) -> list[Event]:
        """Return what is in use now as allocations; those from now on, and what is freed, are added to the list."""
        self._events = [
            (key, each.num_bytes) for key, each in self._storages.items() if each.num_bytes and not each.on_host
        ]
        return self._events

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Follow what is made inside the block."""
        with host_memory.observed(self._is_pinned), self:
            yield

    def register(self, tensors: Iterable[Tensor], part: str) -> None:
        """Assign tensors to a part, including tensors that were made outside."""
        for tensor in tensors:
            self._follow(tensor)
            self._retag(tensor, PARTS.index(part))

    @contextmanager
    def new_tensors_are(self, part: str) -> Iterator[None]:
        """Assign tensors that operators make inside the block to a part."""
        before, self._part_of_new = self._part_of_new, PARTS.index(part)
        try:
            yield
        finally:
            self._part_of_new = before

    @contextmanager
    def gradients_of(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Count what the backward pass assigns to parameters inside the block as gradients."""
        gradients = PARTS.index("gradients")

        def is_complete(gradient: Tensor) -> None:
            self._retag(gradient, gradients)

        handles = [parameter.register_hook(is_complete) for parameter in parameters if parameter.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while it is planned, so no operator need pass through the wrapper that says so."""
        return False

    @no_type_check
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if func is _READ_SCALAR and args[0].is_meta:
            return _likely_value(args[0].dtype)
        if self._cpu_kernels and func.namespace == KERNELS and not _is_native(func):
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if self._eager_step and func is _STEP and not host_memory.is_computing():
            self._follow(torch.empty(temporary_bytes(args[0].numel()), dtype=torch.uint8, device=self.device_type))
        if self.device_type != "meta":
            made = func(*args, **kwargs)
            self._follow_made(made, args)
            return made
        made, row = meta_results.run(func, args, kwargs)
        is_new = self._follow_made(made, args)
        if row is not None and (is_new or func._schema.is_mutable):
            self._record(func, args, row)
        return made

    @no_type_check
    def _record(self, func: Any, args: tuple[Any, ...], row: Row) -> None:
        """Record the costs of an operator; a copy between host and device crosses PCIe."""
        if self._are_on_host(args):
            self._costs.add_on_host(row)
        elif func is _ATTENTION_BACKWARD:
            self._costs.add_attention(args[1])
            self._costs.add(row)
        elif func is _COPY and (to_host := self.is_on_host(args[0])) != self.is_on_host(args[1]):
            self._costs.add_crossing(args[1].nbytes, to_host=to_host)
        elif self._eager_step and func is _STEP:
            self._costs.add_several(*launches_and_bytes(args[0].numel(), dry_run=StepOperands(*args).dry_run))
        else:
            self._costs.add(row)

    @no_type_check
    def _follow_all(self, made: Any) -> bool:
        """Follow the storages that an operator returned; return whether one of them is new."""
        if isinstance(made, Tensor):
            return self._follow(made)
        is_new = False
        if isinstance(made, list | tuple):
            for value in made:
                is_new |= self._follow_all(value)
        return is_new

    @no_type_check
    def _follow(self, tensor: Tensor) -> bool:
        """Follow a tensor's storage; return whether it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or storage.device.type != self.device_type:
            return False
        num_bytes = -(-storage.nbytes() // self._rounding) * self._rounding
        part = self._part_of_new
        self._storages[key] = _Storage(num_bytes, part, False, weakref.ref(storage, lambda _: self._forget(key)))
        self._totals[part] += num_bytes
        self._live_bytes += num_bytes
        self._peak_before = self._peak_bytes, self._peak_totals, self._interval_peak
        if self._live_bytes > self._peak_bytes:
            self._peak_bytes, self._peak_totals = self._live_bytes, tuple(self._totals)
        self._interval_peak = max(self._interval_peak, self._live_bytes)
        if self._events is not None and num_bytes:
            self._events.append((key, num_bytes))
        return True

    @no_type_check
    def _forget(self, key: int) -> None:
        storage = self._storages.pop(key)
        if storage.on_host:
            self._host_bytes -= storage.num_bytes
            self._pinned_bytes -= storage.num_bytes * storage.is_pinned
        else:
            self._totals[storage.part] -= storage.num_bytes
            self._live_bytes -= storage.num_bytes
            if self._events is not None and storage.num_bytes:
                self._events.append((key, 0))

    @no_type_check
    def _retag(self, tensor: Tensor, part: int) -> None:
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is not None and not storage.on_host:
            self._totals[storage.part] -= storage.num_bytes
            self._totals[part] += storage.num_bytes
            storage.part = part

    @no_type_check
    def _is_pinned(self, tensor: Tensor) -> None:
        """Move the tensor that was followed last to the host, to memory that a device reads and writes."""
        self._is_on_host(tensor)
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is not None:
            storage.is_pinned = True
            self._pinned_bytes += storage.num_bytes
            self._peak_pinned_bytes = max(self._peak_pinned_bytes, self._pinned_bytes)

    def _is_on_host(self, tensor: Tensor) -> None:
        """Move the tensor that was followed last from the device to the host."""
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is None:
            return
        self._totals[storage.part] -= storage.num_bytes
        self._live_bytes -= storage.num_bytes
        self._peak_bytes, self._peak_totals, self._interval_peak = self._peak_before
        if self._events is not None and storage.num_bytes:
            self._events.pop()
        storage.on_host = True
        self._host_bytes += storage.num_bytes
        self._peak_host_bytes = max(self._peak_host_bytes, self._host_bytes)

    @no_type_check
    def _follow_made(self, made: Any, args: tuple[Any, ...]) -> bool:
        """Follow what an operator made of its arguments; return whether it is new."""
        is_new = self._follow_all(made)
        if is_new and isinstance(made, Tensor) and self._are_on_host(args):
            self._is_on_host(made)
        return is_new

    @no_type_check
    def _are_on_host(self, args: tuple[Any, ...]) -> bool:
        """Return whether an operator computes on the host: it is told to, or its tensors are there."""
        if host_memory.is_computing():
            return True
        if not self._host_bytes:
            return False
        tensors = [value for value in args if isinstance(value, Tensor)]
        return bool(tensors) and all(map(self.is_on_host, tensors))

    @no_type_check
    def is_on_host(self, tensor: Tensor) -> bool:
        """Return whether :mod:`lowmem_db.host_memory` allocated a tensor's storage."""
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        return storage is not None and storage.on_host


def _is_native(func: Any) -> bool:
    """Return whether an operator runs as compiled code on the CPU, whose allocations cannot be seen."""
    name = func._schema.name.partition("::")[2]
    return name in registry and choose(name, torch.device("cpu")).backend == "native"


def _likely_value(dtype: torch.dtype) -> bool | float:
    """Return a likely scalar in a successful step: true, finite, nothing to clip."""
    return True if dtype == torch.bool else 1.0
