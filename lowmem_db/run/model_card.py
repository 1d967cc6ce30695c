"""The model card in ``final/``: what the model is, how it was made and how to draw with it.

It holds no photo, no path and no name of a user or machine.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.models.copying import SAMPLES_FILE
from lowmem_db.models.embedding_file import files_of_words
from lowmem_db.models.folder import ModelFolder
from lowmem_db.storage.places import EMBEDDED, EMBEDDING_FILE, EMBEDDINGS_DIR

CARD_FILE = "README.md"
LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "DeepFloyd/IF-I-XL-v1.0": "deepfloyd-if-license",
    "DeepFloyd/IF-II-M-v1.0": "deepfloyd-if-license",
}
"""Licences of well-known bases, by the identifiers of the Hugging Face hub."""
_PACKAGES = ("lowmem-db", "torch", "diffusers", "transformers", "peft")


def model_card(config: Config, model: ModelFolder, noun: str, step: int, *, has_samples: bool = False) -> str:
    """Return the card of a finished run.

    Args:
        config: The resolved configuration.
        model: The base model.
        noun: What ``final/`` holds, in a word.
        step: The step that it was taken from.
        has_samples: Whether there is a picture of samples beside it.
    """
    name = config.output_dir.absolute().name
    base = _base_name(config)
    license_name = license_of(config, model)
    origin = f"[{base}](https://huggingface.co/{base})" if _is_hub_id(config) else f"{base} ({model.family.name})"
    prompt = config.subject.instance_prompt
    lines = [
        _front_matter(config, base, license_name),
        f"# {name}",
        "",
        f"{noun[:1].upper()}{noun[1:]}, made from {origin}.",
        "",
        f"* Trigger words: `{prompt}`",
        f"* Licence: {license_name or 'that of the base model, which is not known here'}",
        f"* What it predicts: {_prediction(config, model)}",
        f"* Size: {config.data.resolution} px",
        *_remarks(config, model),
        "",
        "## How to draw",
        "",
        "```python",
        *_usage(config, model, base),
        "```",
        *_for_other_programs(config, model, name),
        "",
        *_prompts(config, has_samples=has_samples),
        "## How it was made",
        "",
        *_settings(config, step),
        "",
        ", ".join(f"{package} {version}" for package, version in _versions().items()),
        "",
    ]
    return "\n".join(lines)


def license_of(config: Config, model: ModelFolder) -> str | None:
    """Return the licence of the base: that of a well-known model, or what its own card says; None if neither does."""
    if config.model.base in LICENSES:
        return LICENSES[config.model.base]
    card = model.path / CARD_FILE
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    parts = text.split("---\n", 2)
    if text.startswith("---\n") and len(parts) == 3:
        try:
            said = yaml.safe_load(parts[1])
        except yaml.YAMLError:  # somebody else's card: nothing depends on it
            return None
        found = said.get("license") if isinstance(said, dict) else None
        return found if isinstance(found, str) else None
    return None


def _is_hub_id(config: Config) -> bool:
    base = config.model.base
    return base not in EMBEDDED and base.count("/") == 1 and not Path(base).exists() and not base.startswith((".", "~"))


def _base_name(config: Config) -> str:
    """Return the name of the base without folders of this machine."""
    base = config.model.base
    return base if _is_hub_id(config) or base in EMBEDDED else Path(base).name


def _front_matter(config: Config, base: str, license_name: str | None) -> str:
    found: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if license_name is not None:
        found["license"] = license_name
    if _is_hub_id(config):
        found["base_model"] = base
    found["instance_prompt"] = config.subject.instance_prompt
    found["tags"] = ["text-to-image", "diffusers", _method(config), "lowmem-db"]
    return f"---\n{yaml.safe_dump(found, sort_keys=False, allow_unicode=True)}---\n"


def _method(config: Config) -> str:
    if config.textual_inversion.enabled:
        return "textual_inversion"
    return "lora" if config.lora.enabled else "dreambooth"


def _prediction(config: Config, model: ModelFolder) -> str:
    scheduler = model.config_of("scheduler") if "scheduler" in model.family.names_of("scheduler") else {}
    kind = config.objective.prediction_type or scheduler.get("prediction_type", "epsilon")
    changed = config.objective.zero_terminal_snr
    is_zero = scheduler.get("rescale_betas_zero_snr", False) if changed is None else changed
    return f"`{kind}`" + (", with zero terminal SNR" if is_zero else "")


def _remarks(config: Config, model: ModelFolder) -> list[str]:
    found = []
    if (low_resolution := model.family.low_resolution(model, config)) is not None:
        found.append(
            f"* Enlarges pictures of {low_resolution.resolution} px; trained with noise of variance "
            f"{low_resolution.variance:g} on them, whose nearest level in diffusers is {low_resolution.level}; the "
            "default of its pipeline, 250, is a level that the model was not trained with"
        )
    if config.model.clip_skip is not None:
        found.append(f"* Clip skip: {config.model.clip_skip}")
    if config.model.prompt_chunks > 1:
        found.append(f"* Prompts are read in {config.model.prompt_chunks} chunks of 75 tokens")
    if config.model.vae is not None:
        vae = config.model.vae
        found.append(f"* Autoencoder: {Path(vae).name if Path(vae).exists() else vae}")
    return found


def _usage(config: Config, model: ModelFolder, base: str) -> list[str]:
    prompt = json.dumps(config.subject.instance_prompt, ensure_ascii=False)
    if config.textual_inversion.enabled:
        return _usage_of_embedding(config, base, prompt)
    call = f"image = pipeline({prompt}{_given(config, model)}).images[0]"
    if not config.lora.enabled:
        return [
            "from diffusers import DiffusionPipeline",
            "",
            'pipeline = DiffusionPipeline.from_pretrained("FOLDER_OR_HUB_ID")',
            *_learned_words(model),
            call,
        ]
    return [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(base)})",
        'pipeline.load_lora_weights("FOLDER_OR_HUB_ID", weight_name="pytorch_lora_weights.safetensors")',
        *_learned_words(model),
        *_changed_scheduler(config, model),
        call,
    ]


def _learned_words(model: ModelFolder) -> list[str]:
    """Return how diffusers is told the words that the model was trained with."""
    found = []
    for file, word in files_of_words(model.words):
        token = json.dumps(word.token, ensure_ascii=False)
        place = f'"FOLDER/{EMBEDDINGS_DIR}/{file}"'
        if len(word.vectors) == 1:
            found.append(f"pipeline.load_textual_inversion({place}, token={token})")
        else:
            found += [
                f"rows = safetensors.torch.load_file({place})",
                f'pipeline.load_textual_inversion(rows["clip_l"], token={token})',
                f'pipeline.load_textual_inversion(rows["clip_g"], token={token}, text_encoder=pipeline.text_encoder_2, '
                "tokenizer=pipeline.tokenizer_2)",
            ]
    return found


def _given(config: Config, model: ModelFolder) -> str:
    """Return the further arguments of a super-resolution pipeline, whose defaults are not those of the training."""
    low_resolution = model.family.low_resolution(model, config)
    return "" if low_resolution is None else f", image=small_picture, noise_level={low_resolution.level}"


def _changed_scheduler(config: Config, model: ModelFolder) -> list[str]:
    """Return what a LoRA's user has to change, which in a complete model is changed already."""
    changes = ", ".join(
        f"{name}={value!r}" for name, value in model.family.scheduler_changes(model, config.objective).items()
    )
    line = f"pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, {changes})"
    return [line] if changes else []


def _usage_of_embedding(config: Config, base: str, prompt: str) -> list[str]:
    token = json.dumps(config.textual_inversion.token, ensure_ascii=False)
    return [
        "from diffusers import DiffusionPipeline",
        "from safetensors.torch import load_file",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(base)})",
        f'rows = load_file("FOLDER/{EMBEDDING_FILE}")',
        f'pipeline.load_textual_inversion(rows.get("clip_l", rows.get({token})), token={token})',
        'if "clip_g" in rows:  # SDXL',
        "    second = {'text_encoder': pipeline.text_encoder_2, 'tokenizer': pipeline.tokenizer_2}",
        f'    pipeline.load_textual_inversion(rows["clip_g"], token={token}, **second)',
        f"image = pipeline({prompt}).images[0]",
    ]


def _for_other_programs(config: Config, model: ModelFolder, name: str) -> list[str]:
    if not model.family.lora_prefixes:
        return []  # no other program reads the family
    if config.textual_inversion.enabled:
        return [
            "",
            f"ComfyUI and AUTOMATIC1111: copy `{EMBEDDING_FILE}` to their folder of embeddings; there the name of the "
            "file is the word.",
        ]
    if not config.lora.enabled:
        return ["", f"For ComfyUI and other programs: `lowmem-db export {name}` makes a single file."]
    if config.lora.dora:
        return ["", f"For ComfyUI and other programs: `lowmem-db export {name}` bakes this DoRA into a plain LoRA."]
    return ["", f"ComfyUI, AUTOMATIC1111 and others read `{name}-lora-kohya.safetensors`, not the other file."]


def _prompts(config: Config, *, has_samples: bool) -> list[str]:
    if not config.sampling.prompts:
        return []
    picture = [f"![one row for each prompt below]({SAMPLES_FILE})", ""] if has_samples else []
    return ["## Samples", "", *picture, *(f"* `{prompt}`" for prompt in config.sampling.prompts), ""]


def _settings(config: Config, step: int) -> list[str]:
    training, prior = config.training, config.prior
    rows: dict[str, Any] = {
        "steps": step,
        "photos per step": config.samples_per_step,
        "learning rate": _rate(config),
        "text encoder trained": training.train_text_encoder,
        "optimizer": config.optimizer.name,
        "prior preservation": f"{prior.num_class_images} class images, weight {prior.loss_weight}"
        if prior.enabled
        else "none",
        "seed": config.seed,
    }
    if config.lora.enabled:
        rows["rank"] = config.lora.rank
    if config.textual_inversion.enabled:
        rows["vectors"] = config.textual_inversion.num_vectors
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _rate(config: Config) -> float:
    own = config.textual_inversion
    return own.learning_rate if own.enabled else config.training.learning_rate


def _versions() -> dict[str, str]:
    known = environment.versions()
    return {name: str(known[name]) for name in _PACKAGES if known.get(name)}
