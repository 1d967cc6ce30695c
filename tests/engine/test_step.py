"""A step on numbers that are not finite touches no weight and says where it happened."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.config.strategy import resolve
from lowmem_db.engine.step import train_step
from lowmem_db.errors import NonFiniteError
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.families.stable_diffusion import SD_OF_ANY_WIDTH
from lowmem_db.objective.objective import Objective
from lowmem_db.objective.process import Diffusion
from lowmem_db.optimizers.build import build_optimizer
from lowmem_db.optimizers.handle import OptimizerHandle
from lowmem_db.records import Batch
from tests.config.test_rules import NEEDED
from tests.objective.test_objective import ALPHAS_CUMPROD, make_batch
from tests.tiny_models import tiny_text_encoder, tiny_unet

CPU = torch.device("cpu")


IN_BACKWARD = {"optimizer.name": "adamw8bit", "memory.optimizer_in_backward": True, "training.clipping": "update_rms"}
WAYS = [{}, IN_BACKWARD, IN_BACKWARD | {"optimizer.name": "adamw"}]
IDS = ["after backward", "fused in backward", "in backward"]


@pytest.fixture(params=WAYS, ids=IDS)
def parts(request: pytest.FixtureRequest) -> tuple[Denoiser, Objective, OptimizerHandle]:
    torch.manual_seed(0)
    denoiser = Denoiser(SD_OF_ANY_WIDTH, {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()})
    objective = Objective(
        ObjectiveConfig(),
        process=Diffusion(ALPHAS_CUMPROD, "epsilon"),
        prior_loss_weight=1.0,
        seed=0,
        device=CPU,
    )
    config = load_config(None, list((NEEDED | request.param).items()))
    optimizer = build_optimizer(resolve(config), denoiser.modules(), CPU)
    optimizer.set_learning_rates({"unet": 1e-3, "text_encoder": 1e-3})
    return denoiser, objective, optimizer


def weights(optimizer: OptimizerHandle) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in optimizer.parameters()]


def broken(batch: Batch, sample: int) -> Batch:
    batch.latent_mean[sample, 0, 0, 0] = float("nan")
    return batch


def test_non_finite_loss_names_the_sample_and_leaves_the_weights(parts) -> None:
    denoiser, objective, optimizer = parts
    before = weights(optimizer)
    with pytest.raises(NonFiniteError, match=r"the loss of 3\.png is not finite; the weights were not changed"):
        train_step(denoiser, objective, optimizer, [broken(make_batch(), 3)], 5)
    assert all(torch.equal(one, other) for one, other in zip(before, weights(optimizer), strict=True))


@pytest.mark.parametrize("parts", WAYS[:1], indirect=True)
def test_non_finite_gradient_leaves_the_weights(parts, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, objective, optimizer = parts
    before = weights(optimizer)
    denoiser.module.conv_out.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"the gradient of .*conv_out\.bias is"):
        train_step(denoiser, objective, optimizer, [make_batch()], 0)
    assert all(torch.equal(one, other) for one, other in zip(before, weights(optimizer), strict=True))


def test_step_reports_its_parts_and_frees_the_gradients(parts) -> None:
    denoiser, objective, optimizer = parts
    output = train_step(denoiser, objective, optimizer, [make_batch()], 0)
    assert output.loss == pytest.approx(output.loss_instance + output.loss_prior, rel=1e-6)
    assert output.grad_norm is not None
    assert output.grad_norm > 0
    assert all(parameter.grad is None for parameter in optimizer.parameters())


def test_without_prior_samples_the_prior_loss_is_none(parts) -> None:
    output = train_step(*parts, [make_batch(num_prior=0)], 0)
    assert output.loss_prior is None
    assert output.loss == output.loss_instance


def test_a_step_reads_from_the_device_once(parts, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, objective, optimizer = parts
    train_step(denoiser, objective, optimizer, [make_batch()], 0)
    read, reads = optimizer.read, []
    monkeypatch.setattr(optimizer, "read", lambda values: reads.append(len(values)) or read(values))
    with ScalarReads() as scalars:
        train_step(denoiser, objective, optimizer, [make_batch()], 1)
    assert scalars.number == 0
    assert len(reads) == (1 if optimizer.withstands_non_finite_loss else 2)


class ScalarReads(TorchDispatchMode):
    """Counts values that are read one by one."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
