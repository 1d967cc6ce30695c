"""What saves memory changes no number, and can be undone."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmem_db import environment
from lowmem_db.errors import DependencyError
from lowmem_db.memory import attention, checkpointing
from lowmem_db.models.denoiser import Denoiser
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.records import Conditioning

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_model: Path) -> ModelFolder:
    return find_model(str(tiny_model))


@pytest.fixture
def denoiser(model: ModelFolder) -> Denoiser:
    denoiser = Denoiser(model.family, {name: model.load(name) for name in ("unet", "text_encoder")})
    for module in denoiser.modules().values():
        module.train().requires_grad_(True)
    return denoiser


def loss_and_gradients(model: ModelFolder, denoiser: Denoiser) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    conditioning = Conditioning(tokens=model.family.tokenize(model, ["a dog", "a cat"]))
    loss = denoiser.predict(torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), conditioning).square().mean()
    loss.backward()
    gradients = {}
    for component, module in denoiser.modules().items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                gradients[f"{component}.{name}"], parameter.grad = parameter.grad, None
    return loss.detach(), gradients


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_recomputed_activations_give_the_same_bits(
    model: ModelFolder, denoiser: Denoiser, autocast_dtype: torch.dtype | None
) -> None:
    denoiser.autocast_dtype = autocast_dtype
    calls = []
    denoiser.module.mid_block.resnets[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    loss, gradients = loss_and_gradients(model, denoiser)
    assert len(calls) == 1
    undo = checkpointing.apply(denoiser.blocks(), "layers")
    recomputed_loss, recomputed_gradients = loss_and_gradients(model, denoiser)
    assert len(calls) == 3
    assert torch.equal(recomputed_loss, loss)
    for name, gradient in gradients.items():
        assert torch.equal(recomputed_gradients[name], gradient), name
    undo()
    loss_and_gradients(model, denoiser)
    assert len(calls) == 4


def test_recomputing_goes_with_a_text_encoder_that_stopped_training(model: ModelFolder, denoiser: Denoiser) -> None:
    denoiser.text_encoders()["text_encoder"].requires_grad_(False)
    loss, gradients = loss_and_gradients(model, denoiser)
    checkpointing.apply(denoiser.blocks(), "layers")
    recomputed_loss, recomputed_gradients = loss_and_gradients(model, denoiser)
    assert torch.equal(recomputed_loss, loss)
    for name, gradient in gradients.items():
        assert torch.equal(recomputed_gradients[name], gradient), name


def test_sdpa_is_what_the_model_has_already(model: ModelFolder) -> None:
    unet = model.load("unet")
    before = dict(unet.attn_processors)
    undo = attention.apply(unet, "sdpa", CPU)
    undo()
    assert unet.attn_processors == before


def test_xformers_on_the_cpu_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, model: ModelFolder) -> None:
    monkeypatch.setattr(environment, "require", lambda name: None)  # as if it were installed
    unet = model.load("unet")
    before = dict(unet.attn_processors)
    for refused in (lambda: attention.check("xformers", CPU), lambda: attention.apply(unet, "xformers", CPU)):
        with pytest.raises(DependencyError, match=r"'xformers' has no operator .* 'cpu'; use memory\.attention=sdpa"):
            refused()
    assert unet.attn_processors == before


def test_missing_xformers_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(DependencyError, match=r'xformers, .*; pip install "lowmem-db\[cuda\]"'):
        attention.check("xformers", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_attends_as_sdpa_does_with_the_same_bits_each_time(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("xformers")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    unet = model.load("unet").to("cuda").requires_grad_(True)
    noisy, text = torch.randn(2, 4, 16, 16, device="cuda"), torch.randn(2, 7, 16, device="cuda")

    def predicted(name: str) -> list[Tensor]:
        undo = attention.apply(unet, name, torch.device("cuda"))
        unet.zero_grad()
        made = unet(noisy, torch.tensor([10, 900], device="cuda"), text).sample
        made.square().mean().backward()
        undo()
        return [made.detach(), *(each.grad for each in unet.parameters() if each.grad is not None)]

    first, again, of_sdpa = predicted("xformers"), predicted("xformers"), predicted("sdpa")
    assert all(map(torch.equal, first, again))
    torch.testing.assert_close(first, of_sdpa, rtol=1e-3, atol=1e-4)
