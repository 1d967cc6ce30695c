"""One interface for every optimizer: ``backward``, ``step``, ``zero_grad``, ``state_dict``, ``bytes_per_parameter``.

Groups are named after their component (``unet``, ``text_encoder``), and each has its own learning rate. The handle here
steps after the backward pass; the one in :mod:`lowmem_db.optimizers.in_backward` steps during it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db.distributed.reduction import NO_REDUCTION, Reduction
from lowmem_db.distributed.shards import is_shared, own
from lowmem_db.errors import NonFiniteError
from lowmem_db.finite import first_not_finite
from lowmem_db.optimizers.clipping import GradientClipping, LossScale
from lowmem_db.optimizers.rules import StepScalars, UpdateRule
from lowmem_db.optimizers.states import load_into
from lowmem_db.optimizers.units import StepUnit
from lowmem_db.optimizers.weights import EXTRA_BITS


class OptimizerHandle:
    """An optimizer that steps after the backward pass.

    Args:
        units: Parameters that are stepped together, with their states.
        rule: The optimizer's arithmetic.
        clipping: Gradient clipping.
        loss_scale: Loss scaling for fp16, or None.
        device: Device of the parameters.
        reduction: Adds up the gradients of all processes. Default: there is one.
    """

    def __init__(
        self,
        units: Sequence[StepUnit],
        rule: UpdateRule,
        *,
        clipping: GradientClipping,
        loss_scale: LossScale | None,
        device: torch.device,
        reduction: Reduction = NO_REDUCTION,
    ) -> None:
        self.units = list(units)
        self.rule = rule
        self.clipping = clipping
        self.loss_scale = loss_scale
        self.device = device
        self.reduction = reduction
        self.num_steps = 0
        self._rates = dict.fromkeys(self.group_names(), 0.0)
        self._scalars: dict[str, StepScalars] = {}
        self._extra_bits_of_frozen: dict[str, Tensor] = {}

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all groups."""
        return [parameter for unit in self.units for parameter in unit.parameters.values()]

    def group_names(self) -> list[str]:
        """Return the names of the groups."""
        return list(dict.fromkeys(unit.group for unit in self.units))

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate of each group, by name."""
        self._rates = {group: rates[group] for group in self.group_names()}

    def zero_grad(self) -> None:
        """Free all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    @property
    def withstands_non_finite_loss(self) -> bool:
        """Whether a loss that is not finite leaves the weights unchanged, so that nobody has to look at it before."""
        return True

    def backward(self, loss: Tensor, *, finite: Tensor | None = None) -> None:
        """Run the backward pass, accumulating gradients.

        Args:
            loss: Scalar.
            finite: Scalar on the device, 0 if the loss or its gradient is not finite. Default: they are.
        """
        del finite  # the norm of the gradients is looked at before they are used
        self._scaled(loss).backward()
        self.reduction.after_backward(self.parameters())

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.value

    def step(self) -> float:
        """Step as :meth:`step_and_read` does; return the joint norm of the gradients before clipping.

        Raises:
            NonFiniteError: As for :meth:`step_and_read`.
        """
        return self.step_and_read(torch.empty(0, device=self.device))[0]

    def step_and_read(self, report: Tensor) -> tuple[float, list[float]]:
        """Step after the last backward pass and free the gradients.

        Args:
            report: fp32, one-dimensional, on the device; read together with the norm, in one synchronization.

        Returns:
            The joint norm of the gradients before clipping, and the values of the report.

        With loss scaling, a step with an infinite or NaN norm is skipped and the scale is halved.

        Raises:
            NonFiniteError: The norm is infinite or NaN, without loss scaling; the weights were not changed.
        """
        self.reduction.complete(self.parameters())
        norm = self._joint_norm()
        value, *values = self.read(torch.cat([norm.reshape(1), report]))
        finite = math.isfinite(value)
        if not finite and self.loss_scale is None:
            raise NonFiniteError(f"the gradient {self._where_not_finite()} is {value}; the weights were not changed")
        if finite:
            self._begin_step()
            for unit in self.units:
                self._step_unit(unit, self._scale_of(unit, norm))
            self.clipping.update(norm)
        if self.loss_scale is not None:
            self.loss_scale.update(found_nonfinite=torch.full((), float(not finite), device=self.device))
        self.zero_grad()
        return value, values

    def read(self, values: Tensor) -> list[float]:
        """Read values from the device; in a trace all are 1."""
        return [1.0] * len(values) if values.is_meta else values.tolist()

    def remove_group(self, name: str) -> None:
        """Remove a group and its states for good: its parameters and their extra bits no longer change."""
        own = {parameter: bits for parameter, bits in self.extra_bits().items() if parameter.startswith(f"{name}.")}
        self._extra_bits_of_frozen |= {parameter: bits.clone() for parameter, bits in own.items()}
        for unit in self.units:
            if unit.group == name:
                unit.states.remove([unit.name])
        self.units = [unit for unit in self.units if unit.group != name]
        self._rates.pop(name, None)

    def keep_extra_bits(self, extra_bits: Mapping[str, Tensor]) -> None:
        """Keep the extra bits of 24-bit weights that do not train."""
        self._extra_bits_of_frozen |= extra_bits

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next step depends on, except weights and learning rates."""
        return {
            "num_steps": self.num_steps,
            "parameters": self._states_by_parameter(),
            "clipping": self.clipping.state_dict(),
            "loss_scale": self.loss_scale.state_dict() if self.loss_scale is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of :meth:`state_dict`, with the loss scale if both have one.

        Settings such as the weight decay are not part of it: a resumed run may have changed them.

        Raises:
            KeyError: A tensor is missing.
            ValueError: One has another shape or type.
        """
        self.num_steps = int(state["num_steps"])
        for name, tensors in self._states_by_parameter().items():
            for key, tensor in tensors.items():
                load_into(tensor, state["parameters"][name], key, of=name)
        self.clipping.load_state_dict(state["clipping"])
        if self.loss_scale is not None and state["loss_scale"]:
            self.loss_scale.load_state_dict(state["loss_scale"])

    def extra_bits(self) -> dict[str, Tensor]:
        """Return the extra bits of 24-bit weights by parameter name, to be read or written in place."""
        states = self._states_by_parameter().items()
        return {name: tensors[EXTRA_BITS] for name, tensors in states if EXTRA_BITS in tensors}

    def bytes_per_parameter(self) -> float:
        """Return the bytes of optimizer state per trained parameter, including extra bits."""
        states = self._states_by_parameter().values()
        used = sum(tensor.nbytes for tensors in states for tensor in tensors.values())
        return used / sum(own(parameter).numel() for parameter in self.parameters())

    def _states_by_parameter(self) -> dict[str, Mapping[str, Tensor]]:
        frozen = {name: {EXTRA_BITS: bits} for name, bits in self._extra_bits_of_frozen.items()}
        return frozen | {name: tensors for unit in self.units for name, tensors in unit.states_by_parameter().items()}

    def _begin_step(self) -> None:
        """Count the step, and copy the scalars it depends on to the device."""
        self.num_steps += 1
        step = torch.full((), self.num_steps, dtype=torch.int64, device=self.device)
        self._scalars = {
            group: StepScalars(
                learning_rate=torch.full((), rate, device=self.device),
                step=step,
                host_learning_rate=rate,
                host_step=self.num_steps,
                gradient_scale=None,
                clip_update=self.clipping.mode == "update_rms",
            )
            for group, rate in self._rates.items()
        }
        for states in {id(unit.states): unit.states for unit in self.units}.values():
            states.begin_step()

    @torch.no_grad()
    def _step_unit(self, unit: StepUnit, scale: Tensor | None) -> Tensor | None:
        """Step one unit if it has a gradient; return the square of its norm if the rule computes it."""
        gradient = unit.gradient()
        if gradient is None:
            return None
        scalars = replace(self._scalars[unit.group], gradient_scale=scale, sums=unit.sums)
        with unit.states.on_device(unit.name) as state, unit.weight() as weight:
            return self.rule.step(weight, own(gradient), state, scalars, rounding_seed=unit.rounding_seed)

    def _scale_of(self, unit: StepUnit, joint_norm: Tensor) -> Tensor | None:
        """Return the factor for a unit's gradient, from clipping and loss scaling."""
        norm = joint_norm
        if self.clipping.mode == "per_tensor" and (gradient := unit.gradient()) is not None:
            norm = self._norm(gradient)
        return self._unscaled(self.clipping.scale(norm))

    def _joint_norm(self) -> Tensor:
        """Return the joint norm of all gradients, without the loss scale."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        return self._without_loss_scale(torch.linalg.vector_norm(self.reduction.norms(gradients)))

    def _where_not_finite(self) -> str:
        """Return the parameter whose gradient is infinite or NaN, in words; or that their norm is."""
        gradients = {
            name: own(parameter.grad)
            for unit in self.units
            for name, parameter in unit.parameters.items()
            if parameter.grad is not None
        }
        name = first_not_finite(gradients)
        return "norm" if name is None else f"of {name}"

    def _norm(self, gradient: Tensor) -> Tensor:
        """Return the norm of a gradient, without the loss scale."""
        if is_shared(gradient):
            return self._without_loss_scale(self.reduction.norms([gradient])[0])
        return self._without_loss_scale(torch.linalg.vector_norm(gradient, dtype=torch.float32))

    def _without_loss_scale(self, norm: Tensor) -> Tensor:
        return norm if self.loss_scale is None else norm / self.loss_scale.value

    def _unscaled(self, scale: Tensor | None) -> Tensor | None:
        """Return a gradient scale that also removes the loss scale."""
        if self.loss_scale is None:
            return scale
        inverse = 1.0 / self.loss_scale.value
        return inverse if scale is None else scale * inverse
