"""The optimizer inside the backward pass: a gradient is consumed and freed as soon as it is complete.

The memory of all gradients is saved but for the largest; gradients of small parameters wait for the end of the pass.
Nothing waits for the device until the step is done. What needs all gradients at once, accumulation and clipping by
their joint norm, is refused by the configuration.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lowmem_db.errors import NonFiniteError
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.optimizers.units import LargeParameter, StepUnit


class InBackwardHandle(OptimizerHandle):
    """An optimizer that steps in the backward pass; arguments as for :class:`OptimizerHandle`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._squared_norms: list[Tensor] = []
        self._hooks: dict[str, RemovableHandle] = {}
        self.apply()

    def apply(self) -> None:
        """Step large parameters from now on when their gradient is complete."""
        for unit in self.units:
            if isinstance(unit, LargeParameter) and unit.name not in self._hooks:
                (parameter,) = unit.parameters.values()
                hook = partial(self._on_gradient, unit)
                self._hooks[unit.name] = parameter.register_post_accumulate_grad_hook(hook)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass and step large parameters in it."""
        self._begin_step()
        self._squared_norms = []
        super().backward(loss)

    def step(self) -> float:
        """Step the small parameters; return the joint norm of all gradients before clipping.

        Under loss scaling, a parameter whose gradient is not finite was left as it is, and the scale is halved.

        Raises:
            NonFiniteError: The norm is not finite, without loss scaling; other weights may have been stepped.
        """
        for unit in self.units:
            if not isinstance(unit, LargeParameter):
                self._on_gradient(unit)
        norm = torch.stack(self._squared_norms).sum().sqrt()
        self.clipping.update(norm)
        if self.loss_scale is not None:
            self.loss_scale.update(found_nonfinite=(~norm.isfinite()).float())
        self.zero_grad()
        value = norm.item()
        if not math.isfinite(value) and self.loss_scale is None:
            raise NonFiniteError(f"the gradient's norm is {value}, and part of the weights has been stepped with it")
        return value

    def remove_group(self, name: str) -> None:
        """Take a group out for good, with its states: its parameters stay as they are."""
        for unit in self.units:
            if unit.group == name and unit.name in self._hooks:
                self._hooks.pop(unit.name).remove()
        super().remove_group(name)

    def undo(self) -> None:
        """Leave gradients as they are again; what :meth:`apply` takes back."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _on_gradient(self, unit: StepUnit, _: object = None) -> None:
        """Step a unit whose gradient is complete, and free that."""
        gradient = unit.gradient()
        if gradient is None:
            return
        norm = None if self._rule_reports_norm() else self._norm(gradient)
        scale = self._unscaled(self.clipping.scale(norm))
        if self.loss_scale is not None and norm is not None and scale is not None:
            scale = torch.where(norm.isfinite(), scale, torch.nan)  # the fused step leaves such a parameter alone
        by_product = self._step_unit(unit, scale)
        squared_norm = by_product if norm is None else norm.square()
        assert squared_norm is not None, f"{type(self.rule).__name__} did not report the norm of {unit.name}"
        self._squared_norms.append(squared_norm)
        for parameter in unit.parameters.values():
            parameter.grad = None

    def _rule_reports_norm(self) -> bool:
        """Say whether the norm need not be known before the step and comes out of it."""
        return self.rule.reports_norm and self.loss_scale is None and self.clipping.mode != "per_tensor"
