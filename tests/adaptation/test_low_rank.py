"""Adapters in memory and on disk, and in a fresh pipeline of diffusers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from lowmem_db.adaptation.layers import count_trained
from lowmem_db.adaptation.lora_file import LoraFile, lora_file, put_into, read_lora, write_lora
from lowmem_db.adaptation.low_rank import AdapterState, adapters_of, attach, peft_settings
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import LoraConfig
from lowmem_db.config.strategy import resolve
from lowmem_db.errors import ConfigError, DependencyError, ModelError, StorageError
from lowmem_db.models.suggested_base import SuggestedBase
from lowmem_db.run.checks import check_machine
from lowmem_db.storage.places import LORA_FILE
from tests.tiny_models import tiny_text_encoder, tiny_text_encoder_2, tiny_unet

KINDS = {
    "attention": {},
    "all layers": {"targets": ("attention", "feed_forward", "convolutions")},
    "scaled": {"alpha": 2.5, "targets": ("attention", "feed_forward")},
    "rank-stabilised": {"rank_stabilized": True, "alpha": 4.0},
    "DoRA": {"dora": True, "targets": ("attention", "feed_forward", "convolutions")},
}


def config_of(**fields: object) -> LoraConfig:
    return LoraConfig.model_validate({"enabled": True, "rank": 4, **fields})


def trained(modules: dict[str, nn.Module], config: LoraConfig) -> dict[str, nn.Module]:
    """Give models adapters that change what they compute."""
    attach(modules, config, seed=0)
    torch.manual_seed(1)
    for module in modules.values():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name or ".lora_magnitude_vector." in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return modules


def fresh_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionPipeline) -> Tensor:
    random = torch.Generator().manual_seed(3)
    images = pipeline("a zx dog", num_inference_steps=3, height=32, width=32, output_type="pt", generator=random).images
    return torch.as_tensor(images)


@pytest.mark.parametrize("kind", KINDS)
def test_file_in_a_fresh_pipeline_draws_bit_for_bit_what_the_trained_model_draws(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    config = config_of(**KINDS[kind])
    pipeline = fresh_pipeline(tiny_model)
    before = draw(pipeline)
    modules = trained({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}, config)
    expected = draw(pipeline)
    assert (expected - before).abs().max() > 1e-3
    lora = lora_file(modules, peft_settings(config), dtype=torch.float32, base=SuggestedBase(fields={"base": "x"}))
    write_lora(tmp_path / LORA_FILE, lora)
    fresh = fresh_pipeline(tiny_model)
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(draw(fresh), expected)
    ours = fresh_pipeline(tiny_model)
    read = read_lora(tmp_path / LORA_FILE)
    assert read.base == SuggestedBase(fields={"base": "x"})
    put_into("unet", ours.unet, read)
    put_into("text_encoder", ours.text_encoder, read)
    assert torch.equal(draw(ours), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_and_are_all_that_trains(kind: str) -> None:
    unet = tiny_unet()
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.randn(1, 6, 16))
    expected = unet(*inputs).sample
    count = sum(parameter.numel() for parameter in unet.parameters())
    attach({"unet": unet}, config_of(**KINDS[kind]), seed=0)
    torch.testing.assert_close(unet(*inputs).sample, expected)
    unet(*inputs).sample.square().mean().backward()
    graded = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert graded == {name for name, _ in unet.named_parameters() if ".lora_" in name}
    assert count_trained({"unet": unet})["unet"] == sum(p.numel() for p in unet.parameters()) - count


def test_adapters_are_drawn_from_the_seed_and_fp32_beside_low_precision() -> None:
    states = []
    for seed in (0, 0, 1):
        unet = tiny_unet().to(torch.bfloat16)
        torch.manual_seed(len(states))  # the state of the global generator has no influence
        attach({"unet": unet}, config_of(), seed=seed)
        states.append(adapters_of("unet", unet))
        assert {parameter.dtype for parameter in unet.parameters() if parameter.requires_grad} == {torch.float32}
        assert unet.dtype == torch.bfloat16
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_targets_may_be_patterns_and_kinds() -> None:
    modules: dict[str, nn.Module] = {"unet": tiny_unet(), "text_encoder_2": tiny_text_encoder_2()}
    attach(modules, config_of(targets=("unet.mid_block.*.to_q", "*.text_model.encoder.layers.1.*")), seed=0)
    adapters = {f"{name}.{key}" for name, module in modules.items() for key in adapters_of(name, module)}
    names = {key.partition(".lora_")[0] for key in adapters}
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q" in names
    assert "text_encoder_2.text_model.encoder.layers.1.mlp.fc1" in names
    assert all("mid_block" in name or "layers.1" in name for name in names)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("unet.mid_block.norm*",),
            r"lora\.targets: 'unet\.mid_block\.norm\*' selects no layer; allowed: attention, fe",
        ),
        (("attn",), r"lora\.targets: 'attn' selects no layer; .* such as .*attn"),
        (("convolutions",), r"lora\.targets: selects no layer of text_encoder, .*train_text_encoder=false"),
    ],
)
def test_target_that_selects_nothing_is_an_error(targets: tuple[str, ...], message: str) -> None:
    modules: dict[str, nn.Module] = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}
    with pytest.raises(ConfigError, match=message):
        attach(modules, config_of(targets=targets), seed=0)


def test_adapters_on_the_meta_device_have_the_shapes_of_real_ones() -> None:
    shapes = []
    for device in ("cpu", "meta"):
        unet = tiny_unet().to(device)
        attach({"unet": unet}, config_of(**KINDS["DoRA"]), seed=0)
        shapes.append({name: tuple(tensor.shape) for name, tensor in adapters_of("unet", unet).items()})
    assert shapes[0] == shapes[1]


def test_state_of_a_checkpoint_is_taken_over_whole_or_not_at_all() -> None:
    first, second = trained({"unet": tiny_unet()}, config_of())["unet"], tiny_unet()
    attach({"unet": second}, config_of(), seed=5)
    state = AdapterState("unet", first).state_dict()
    assert all("base_layer" not in name for name in state)
    AdapterState("unet", second).load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapters_of("unet", second).items())
    name = next(iter(state))
    with pytest.raises(KeyError):
        AdapterState("unet", second).load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match="has no adapter x"):
        AdapterState("unet", second).load_state_dict({**state, "x": torch.zeros(1)})


def test_names_and_metadata_are_those_of_diffusers(tmp_path: Path) -> None:
    config = config_of(dora=True, alpha=8.0, rank_stabilized=True)
    modules = trained({"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}, config)
    write_lora(tmp_path / "a", lora_file(modules, peft_settings(config), dtype=torch.float16, base=SuggestedBase()))
    read = read_lora(tmp_path / "a")
    query = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert {f"{query}.lora_A.weight", f"{query}.lora_B.weight", f"{query}.lora_magnitude_vector.weight"} <= set(
        read.state
    )
    assert {tensor.dtype for tensor in read.state.values()} == {torch.float16}
    fields = json.loads(read.metadata["lora_adapter_metadata"])
    assert (fields["unet.r"], fields["unet.lora_alpha"], fields["unet.use_dora"], fields["unet.use_rslora"]) == (
        4, 8.0, True, True,
    )  # fmt: skip
    assert any("encoder.layers.0.self_attn.q_proj" in path for path in fields["text_encoder.target_modules"])
    assert fields["unet.rank_pattern"] == {}  # diffusers 0.35 loads no file that lacks it


def test_damaged_file_and_another_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"no safetensors")
    with pytest.raises(StorageError, match="is damaged"):
        read_lora(tmp_path / "damaged")
    with pytest.raises(ModelError, match="does not fit this base model"):
        put_into("unet", tiny_unet(), _of_another_width())


def _of_another_width() -> LoraFile:
    unet = trained({"unet": tiny_unet()}, config_of())["unet"]
    state = {f"unet.{name}": torch.zeros(3, 3) for name in adapters_of("unet", unet)}
    return LoraFile(state=state, settings={"unet": peft_settings(config_of())}, base=SuggestedBase(), metadata={})


def test_adapters_take_the_mode_of_their_model_so_that_dropout_is_off_where_images_are_drawn() -> None:
    drawing, training = tiny_unet().eval(), tiny_unet().train()
    for unet in (drawing, training):
        attach({"unet": unet}, config_of(dropout=0.5), seed=0)
    assert not any(module.training for module in drawing.modules())
    assert all(module.training for module in training.modules())


def test_library_that_peft_refuses_is_named_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Colab, where torchao 0.10 is preinstalled: peft raises only when it adds an adapter."""

    def too_old() -> bool:
        raise ImportError("Found an incompatible version of torchao. Found version 0.10.0")

    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", too_old)
    config = load_config(None, [*REQUIRED, ("lora.enabled", True)])
    with pytest.raises(DependencyError, match=r"peft .* torchao\. Found version 0\.10\.0\); pip uninstall torchao"):
        check_machine(resolve(config), torch.device("cpu"))


REQUIRED = [
    ("model.base", "demo"),
    ("output_dir", "run"),
    ("subject.instance_dir", "photos"),
    ("subject.instance_prompt", "a sks dog"),
    ("subject.class_prompt", "a dog"),
]
