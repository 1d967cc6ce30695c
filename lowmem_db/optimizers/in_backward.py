"""The optimizer inside the backward pass: a gradient is used, or sent to the host, and freed as soon as it is complete.

This saves the memory of all gradients except the largest one and those of small parameters, which wait for the end of
the pass. There is no synchronization until the step is done. Anything that needs all gradients at once, such as
accumulation and clipping by their joint norm, is refused by the rules of the configuration.
"""

import math
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lowmem_db.errors import NonFiniteError
from lowmem_db.finite import first_not_finite
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.optimizers.on_host import HostStep
from lowmem_db.optimizers.units import LargeParameter, StepUnit

_NOT_YET = torch.tensor(torch.nan)  # until the host has it


class InBackwardHandle(OptimizerHandle):
    """An optimizer that steps in the backward pass.

    Args:
        *args: As for :class:`OptimizerHandle`.
        on_host: Steps large parameters on the host. Default: they are stepped on the device.
        **kwargs: As for :class:`OptimizerHandle`.
    """

    def __init__(self, *args: Any, on_host: HostStep | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_host = on_host
        self._squared_norms: dict[str, Tensor] = {}
        self._shares: list[str] = []  # those of which each process has squared its rows alone
        self._usable: Tensor | None = None  # 1, or NaN if the loss is not finite
        self._hooks: dict[str, RemovableHandle] = {}
        self.apply()

    def apply(self) -> None:
        """From now on, step large parameters when their gradient is complete."""
        for unit in self.units:
            if isinstance(unit, LargeParameter) and unit.name not in self._hooks:
                (parameter,) = unit.parameters.values()
                hook = partial(_step, weakref.ref(self), weakref.ref(unit))
                self._hooks[unit.name] = parameter.register_post_accumulate_grad_hook(hook)

    @property
    def withstands_non_finite_loss(self) -> bool:
        """Whether the rule leaves a parameter unchanged whose gradient is scaled by NaN."""
        return self.rule.reports_norm and (self._on_host is None or self._on_host.rule.reports_norm)

    def backward(self, loss: Tensor, *, finite: Tensor | None = None) -> None:
        """Run the backward pass and step large parameters in it; see :meth:`OptimizerHandle.backward`."""
        self._begin_step()
        finite = None if finite is None else self.reduction.world.least(finite)
        self._usable = None if finite is None else torch.where(finite > 0, 1.0, torch.nan)
        self._squared_norms, self._shares = {}, []
        if self._on_host is None:
            self._scaled(loss).backward()
            return
        self._on_host.begin_step(self._scalars)
        with self._on_host.running():
            self._scaled(loss).backward()
        found = self._on_host.squared_norms()
        self._squared_norms |= {name: found[name] for name, known in self._squared_norms.items() if known is _NOT_YET}

    def step_and_read(self, report: Tensor) -> tuple[float, list[float]]:
        """Step the small parameters; see :meth:`OptimizerHandle.step_and_read`.

        With loss scaling, a parameter with an infinite or NaN gradient is left unchanged and the scale is halved.

        Raises:
            NonFiniteError: The norm is infinite or NaN, without loss scaling; some weights may have been changed.
        """
        for unit in self.units:
            if not isinstance(unit, LargeParameter):
                self._on_gradient(unit)
        self._add_up_shares()
        norm = torch.stack(list(self._squared_norms.values())).sum().sqrt()
        self.clipping.update(norm)
        if self.loss_scale is not None:
            self.loss_scale.update(found_nonfinite=(~norm.isfinite()).float())
        self.zero_grad()
        value, *values = self.read(torch.cat([norm.reshape(1), report]))
        if not math.isfinite(value) and self.loss_scale is None:
            name = first_not_finite(self._squared_norms)
            what = "norm" if name is None else f"of {name}"
            raise NonFiniteError(f"the gradient {what} is {value}; some weights have already been changed")
        return value, values

    def remove_group(self, name: str) -> None:
        """Remove a group and its states for good: its parameters no longer change."""
        for unit in self.units:
            if unit.group == name and unit.name in self._hooks:
                self._hooks.pop(unit.name).remove()
        super().remove_group(name)

    def undo(self) -> None:
        """Undo :meth:`apply`."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _on_gradient(self, unit: StepUnit) -> None:
        """Step a unit whose gradient is complete, and free the gradient."""
        self.reduction.at_once(unit.name, [each.grad for each in unit.parameters.values() if each.grad is not None])
        gradient = unit.gradient()
        if gradient is None:
            return
        norm = None if self._rule_reports_norm(unit) else self._norm(gradient)
        scale = self._unscaled(self.clipping.scale(norm))
        if self.loss_scale is not None and norm is not None and scale is not None:
            scale = torch.where(norm.isfinite(), scale, torch.nan)  # the fused step leaves such a parameter unchanged
        if self.withstands_non_finite_loss and self._usable is not None:
            scale = self._usable if scale is None else scale * self._usable
        by_product = self._step_or_send(unit, gradient, scale)
        squared_norm = by_product if norm is None else norm.square()
        if norm is None and unit.sums is not None:
            self._shares.append(unit.name)
        assert squared_norm is not None, f"{type(self.rule).__name__} did not report the norm of {unit.name}"
        self._squared_norms[unit.name] = squared_norm
        for parameter in unit.parameters.values():
            parameter.grad = None

    def _add_up_shares(self) -> None:
        """Complete the squared norms of gradients that are shared out."""
        if self._shares:
            squares = torch.stack([self._squared_norms[name] for name in self._shares])
            self._squared_norms |= dict(zip(self._shares, self.reduction.total(squares), strict=True))

    def _step_or_send(self, unit: StepUnit, gradient: Tensor, scale: Tensor | None) -> Tensor | None:
        """Step a unit, here or on the host; return the square of its norm if the rule computes it, or NaN before."""
        if self._on_host is None or not isinstance(unit, LargeParameter):
            return self._step_unit(unit, scale)
        self._on_host.send(unit, gradient, scale)
        return _NOT_YET

    def _rule_reports_norm(self, unit: StepUnit) -> bool:
        """Return whether the step itself computes the norm, which clipping does not need beforehand."""
        host = self._on_host if isinstance(unit, LargeParameter) else None
        rule = self.rule if host is None else host.rule
        return rule.reports_norm and self.loss_scale is None and self.clipping.mode != "per_tensor"


def _step(handle: weakref.ref[InBackwardHandle], unit: weakref.ref[LargeParameter], _: Tensor) -> None:
    """Step in a hook, which must not keep its parameter alive: the garbage collector does not look into hooks."""
    if (stepping := handle()) is not None and (stepped := unit()) is not None:
        stepping._on_gradient(stepped)
