"""The card in ``final/``: what somebody who gets the model needs, and nothing that tells who made it."""

import getpass
import json
import platform
import shutil
from pathlib import Path

import pytest
import yaml

from lowmem_db.cli.train import train
from lowmem_db.config.loading import load_config
from lowmem_db.models.finding import find_model
from lowmem_db.run.model_card import license_of, model_card


def card(fields: dict[str, object], tiny_model: Path, **changed: object) -> str:
    return model_card(load_config(None, list((fields | changed).items())), find_model(str(tiny_model)), "model", 4)


def front_matter(text: str) -> dict[str, object]:
    return yaml.safe_load(text.split("---\n")[1])


def test_final_model_has_a_card(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_fields | {"prior.enabled": False, "training.max_train_steps": 1}
    train([f"{field}={json.dumps(value)}" for field, value in fields.items()])
    text = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "* Trigger words: `a zx dog`" in text
    assert "| steps | 1 |" in text
    assert str(tmp_path) not in text


def test_card_says_how_the_model_was_made_and_is_drawn_with(tiny_fields: dict[str, object], tiny_model: Path) -> None:
    text = card(
        tiny_fields,
        tiny_model,
        **{
            "model.clip_skip": 2,
            "model.prompt_chunks": 3,
            "objective.prediction_type": "v_prediction",
            "objective.zero_terminal_snr": True,
            "sampling.prompts": ["a zx dog on the moon"],
        },
    )
    for line in (
        "* Clip skip: 2",
        "* Prompts are read in 3 chunks of 75 tokens",
        "* What it predicts: `v_prediction`, with zero terminal SNR",
        "* `a zx dog on the moon`",
        "| seed | 0 |",
        "* Licence: that of the base model, which is not known here",
    ):
        assert line in text
    assert "torch " in text.splitlines()[-1]
    assert front_matter(text)["instance_prompt"] == "a zx dog"


def test_card_names_no_folder_user_or_machine(tiny_fields: dict[str, object], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    text = card(tiny_fields, tiny_model, **{"model.vae": str(tmp_path / "vae")})
    assert "* Autoencoder: vae" in text
    for secret in (str(tmp_path), str(tiny_model.parent), str(Path.home()), platform.node()):
        assert secret not in text
    assert getpass.getuser() not in text.replace("root", "") or getpass.getuser() == "root"


@pytest.mark.parametrize(("dora", "line"), [(False, "read `run-lora-kohya.safetensors`"), (True, "bakes this DoRA")])
def test_card_of_a_lora_says_which_file_is_for_whom(
    dora: bool, line: str, tiny_fields: dict[str, object], tiny_model: Path
) -> None:
    text = card(tiny_fields, tiny_model, **{"lora.enabled": True, "lora.dora": dora})
    assert line in text
    assert "load_lora_weights" in text
    assert "lora" in str(front_matter(text)["tags"])


def test_licence_is_that_of_a_known_base_or_of_its_card(
    tiny_fields: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    model_copy = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    model = find_model(str(model_copy))
    known = load_config(None, list((tiny_fields | {"model.base": "CompVis/stable-diffusion-v1-4"}).items()))
    assert license_of(known, model) == "creativeml-openrail-m"
    assert front_matter(model_card(known, model, "model", 1))["base_model"] == "CompVis/stable-diffusion-v1-4"
    local = load_config(None, list(tiny_fields.items()))
    assert license_of(local, model) is None
    (model_copy / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert license_of(local, model) == "mit"
    (model_copy / "README.md").write_text("---\n{[\n---\n")
    assert license_of(local, model) is None
