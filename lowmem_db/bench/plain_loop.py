"""The loop of diffusers' DreamBooth script, on tensors that are there already: what our steps are compared with."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowmem_db import environment
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.steps import LEARNING_RATE
from lowmem_db.bench.strategies import Strategy
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.planning.phases import training_batches

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class PlainLoop:
    """Steps in fp32 weights, with autocast on a card.

    Args:
        strategy: Whose model and batch it has; how it saves memory does not count.
        setting: What is measured.
        make_optimizer: Makes the optimizer of some parameters.
        checkpointing: Whether diffusers' gradient checkpointing is on.
        prepare: Changes the modules before the optimizer is made.
    """

    def __init__(
        self,
        strategy: Strategy,
        setting: Setting,
        make_optimizer: Optimizer,
        *,
        checkpointing: bool = False,
        prepare: Callable[[nn.Module], object] = lambda module: None,
    ) -> None:
        model, family = strategy.model, strategy.model.family
        names = (family.denoiser, *family.text_encoders)
        modules = {name: model.load(name, setting.device).train().requires_grad_(True) for name in names}
        self.denoiser = Denoiser(family, modules)
        if checkpointing:
            self.denoiser.module.enable_gradient_checkpointing()
        prepare(self.denoiser.module)
        self._parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        self._optimizer = make_optimizer(self._parameters)
        self._batch = training_batches(strategy.config, model, self.denoiser)[0]
        self._alphas = torch.linspace(0.9985, 0.0047, 1000, device=setting.device)
        self._setting = setting

    def __call__(self) -> None:
        """Do one step, with torch's own arithmetic: ours is strict, and stays so in the process."""
        with _as_torch_computes():
            self._step()

    def _step(self) -> None:
        device = self._setting.device
        latents = self._batch.latent_mean.to(device)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, len(self._alphas), (len(latents),), device=device)
        alphas = self._alphas[timesteps].view(-1, 1, 1, 1)
        loss = self._loss(alphas.sqrt() * latents + (1.0 - alphas).sqrt() * noise, timesteps, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss.item()

    def _loss(self, noisy: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        setting = self._setting
        dtype = torch.bfloat16 if setting.card.has_bf16 else torch.float16
        with torch.autocast(setting.device.type, dtype, enabled=setting.is_cuda):
            told = self.denoiser.told(self._batch.conditioning)
            prediction = self.denoiser.family.predict(self.denoiser.module, noisy, timesteps, told)
        return functional.mse_loss(prediction.float(), noise)


@contextmanager
def _as_torch_computes() -> Iterator[None]:
    """Return a context in which torch computes as it does by default, which is quicker than the same bits each time."""
    is_strict, before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_strict, warn_only=warn_only)
        torch.backends.cudnn.deterministic = before


def adamw(setting: Setting) -> Optimizer:
    """Return torch's AdamW, fused on a card."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=setting.is_cuda)


def bitsandbytes_adamw() -> Optimizer:
    """Return the 8-bit AdamW of bitsandbytes.

    Raises:
        DependencyError: It does not load.
    """
    library = environment.require("bitsandbytes")
    return lambda parameters: library.optim.AdamW8bit(parameters, lr=LEARNING_RATE)
