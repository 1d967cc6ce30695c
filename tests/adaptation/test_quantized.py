"""Frozen weights in 8 and 4 bits; bitsandbytes computes on the CPU here, as its own tests do."""

import pytest
import torch
from torch import nn

from lowmem_db import environment
from lowmem_db.adaptation.low_rank import attach
from lowmem_db.adaptation.quantized import check_device, quantize
from lowmem_db.config.schema import LoraConfig
from lowmem_db.errors import ConfigError
from tests.tiny_models import tiny_unet

bitsandbytes = pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    environment.quiet_libraries()


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.15), ("int8", 0.02)])
def test_adapters_train_beside_quantized_weights(kind, error) -> None:
    torch.manual_seed(0)
    unet, whole = tiny_unet(), tiny_unet()
    whole.load_state_dict(unet.state_dict())
    quantize([unet], kind, torch.float32)
    attach({"unet": unet}, LoraConfig(enabled=True, rank=2), seed=0)
    unet.to(CPU)
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([5, 7]), torch.randn(2, 6, 16))
    found, expected = unet(*inputs).sample, whole(*inputs).sample
    difference = ((found - expected).norm() / expected.norm()).item()
    assert 0 < difference < error
    found.square().mean().backward()
    assert all((parameter.grad is not None) == (".lora_" in name) for name, parameter in unet.named_parameters())
    assert any((p.grad != 0).any() for name, p in unet.named_parameters() if ".lora_B." in name)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_stand_in_on_meta_has_the_bytes_of_the_real_layer(kind) -> None:
    real = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 64, bias=False)).to(torch.bfloat16)
    meta = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 64, bias=False)).to("meta", torch.bfloat16)
    for module in (real, meta):
        quantize([module], kind, torch.bfloat16)
    real.to(CPU)
    real(torch.zeros(1, 96, dtype=torch.bfloat16))
    assert _num_bytes(meta) == sum(_real_bytes(layer, kind) for layer in real)
    output = meta(torch.zeros(3, 5, 96, device="meta", dtype=torch.bfloat16, requires_grad=True))
    assert (output.shape, output.dtype) == ((3, 5, 64), torch.bfloat16)
    output.sum().backward()


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _real_bytes(layer, kind) -> int:
    bias = 0 if layer.bias is None else layer.bias.nbytes
    if kind == "nf4":
        return layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes + bias
    return layer.weight.nbytes + (layer.weight.SCB if layer.state.SCB is None else layer.state.SCB).nbytes + bias


def test_other_devices_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"lora\.base_weights: 'int8' needs a CUDA device.*'cpu'"):
        check_device("int8", CPU)
    check_device("bf16", CPU)
    check_device("nf4", torch.device("cuda"))
