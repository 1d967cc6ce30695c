"""One handle for every optimizer: ``backward``, ``step``, ``zero_grad``, ``state_dict``, ``bytes_per_parameter``.

Parameter groups are named after the component they belong to (``unet``, ``text_encoder``), and each keeps its own
learning rate.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db import environment
from lowmem_db.config.schema import OptimizerConfig
from lowmem_db.errors import ConfigError


class OptimizerHandle:
    """An optimizer that steps after the backward pass.

    Args:
        optimizer: Its groups carry the key ``name``.
        max_grad_norm: Largest joint norm of the gradients of all groups; None: no clipping.
        scaler: Loss scaling for fp16 autocast (arXiv:1710.03740); None: no scaling.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler

    def parameters(self) -> list[nn.Parameter]:
        """Return what is stepped, all groups together."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def group_names(self) -> list[str]:
        """Return the names of the groups."""
        return [group["name"] for group in self.optimizer.param_groups]

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate of each group by its name."""
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]

    def zero_grad(self) -> None:
        """Free all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those that are there."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def gradient_norm(self) -> float:
        """Return the joint norm of the gradients; called once between the last backward pass and the step."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.get_total_norm(self._gradients()).item()

    def step(self, gradient_norm: float) -> None:
        """Clip by the joint norm and step; loss scaling leaves a step with a non-finite norm out and halves the scale.

        Args:
            gradient_norm: What :meth:`gradient_norm` returned.
        """
        if self.max_grad_norm is not None and gradient_norm > self.max_grad_norm:
            torch._foreach_mul_(self._gradients(), self.max_grad_norm / gradient_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def remove_group(self, name: str) -> None:
        """Take a group out for good, with its states: its parameters stay as they are."""
        kept = [group for group in self.optimizer.param_groups if group["name"] != name]
        for group in self.optimizer.param_groups:
            if group["name"] == name:
                for parameter in group["params"]:
                    self.optimizer.state.pop(parameter, None)
                    parameter.grad = None
        self.optimizer.param_groups[:] = kept

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the optimizer and of the loss scaling."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the states of :meth:`state_dict`; the scale of the loss where both scale it.

        Settings such as the weight decay stay those of this run: a resumed run may have changed them.
        """
        settings = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))

    def bytes_per_parameter(self) -> float:
        """Return the bytes of optimizer state per trained parameter, as they stand in memory now."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        used = {tensor.data_ptr(): tensor.nbytes for tensor in states if isinstance(tensor, Tensor)}
        return sum(used.values()) / sum(parameter.numel() for parameter in self.parameters())

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters() if parameter.grad is not None]


def build_optimizer(
    config: OptimizerConfig,
    modules: Mapping[str, nn.Module],
    *,
    max_grad_norm: float | None,
    scale_loss: bool,
    device: torch.device,
) -> OptimizerHandle:
    """Build the optimizer of the configuration, a group for each module.

    Args:
        config: The section ``optimizer``.
        modules: What trains, by the name of its component.
        max_grad_norm: See :class:`OptimizerHandle`.
        scale_loss: Scale the loss, as fp16 autocast needs it.
        device: Where the modules are.

    Raises:
        ConfigError: A module has nothing to train.
        DependencyError: 8-bit AdamW is asked for and bitsandbytes is missing.
    """
    groups = [_group(name, module.parameters()) for name, module in modules.items()]
    options = {
        "lr": 0.0,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw8bit":
        optimizer = environment.require("bitsandbytes").optim.AdamW8bit(groups, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    scaler = torch.amp.GradScaler(device.type) if scale_loss else None
    return OptimizerHandle(optimizer, max_grad_norm=max_grad_norm, scaler=scaler)


def _group(name: str, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ConfigError(f"{name}: has no parameter that trains")
    return {"name": name, "params": trained}
