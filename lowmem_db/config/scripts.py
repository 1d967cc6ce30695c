"""The scripts of diffusers for DreamBooth and Textual Inversion.

How they are started, how they are told apart, and their defaults.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from lowmem_db.config.flag_tables import LORA_FLAGS, TEXTUAL_INVERSION_FLAGS
from lowmem_db.errors import ConfigError


@dataclass(frozen=True)
class Script:
    """A script of diffusers.

    Attributes:
        name: Its file name.
        trains: What trains, in words.
        defaults: Its defaults where they are not those of the configuration, by field.
        validation_epochs: Epochs between validations, or None if it counts steps.
        different: Defaults of its own that are better here, as in ``DIFFERENT_HERE``.
        needed: Flags without which it does not start.
    """

    name: str
    trains: str
    defaults: Mapping[str, Any]
    validation_epochs: int | None = None
    different: Mapping[str, str] = field(default_factory=dict)
    needed: tuple[str, ...] = ()


@dataclass
class Launch:
    """A command, without what starts the script.

    Attributes:
        arguments: The arguments of the script.
        script: The script that is named, or None.
        mixed_precision: The default that ``accelerate launch`` sets, or None.
        left_out: Options of ``accelerate launch`` that have no meaning here.
    """

    arguments: list[str]
    script: Script | None = None
    mixed_precision: str | None = None
    left_out: list[str] = field(default_factory=list)


_OF_ALL = {
    "prior.enabled": False,
    "prior.num_class_images": 100,
    "training.train_batch_size": 4,
    "training.lr_warmup_from_zero": True,
    "checkpointing.keep": None,
    "sampling.sampler": "dpm_solver",
    "final.layout": "flat",
}
_OF_LORA = {
    **_OF_ALL,
    "output_dir": "lora-dreambooth-model",
    "lora.enabled": True,
    "lora.rank": 4,
    "sampling.num_inference_steps": 50,
}
FULL = Script(
    "train_dreambooth.py",
    "all weights train; for a LoRA add --rank=4",
    {**_OF_ALL, "output_dir": "dreambooth-model"},
)
LORA = Script(
    "train_dreambooth_lora.py",
    "a LoRA trains; for all weights add lora.enabled=false",
    {**_OF_LORA, "training.learning_rate": 5e-4},
    validation_epochs=50,
)
LORA_SDXL = Script(
    "train_dreambooth_lora_sdxl.py",
    LORA.trains,
    {
        **_OF_LORA,
        "data.resolution": 1024,
        "training.learning_rate": 1e-4,
        "training.learning_rate_text_encoder": 5e-6,
        "optimizer.weight_decay": 1e-4,
        "prior.guidance_scale": 5.0,
        "sampling.guidance_scale": 5.0,
    },
    validation_epochs=50,
)
TEXTUAL_INVERSION = Script(
    "textual_inversion.py",
    "the embedding of a new word trains",
    {
        "output_dir": "text-inversion-model",
        "textual_inversion.enabled": True,
        "textual_inversion.learning_rate": 1e-4,
        "data.random_flip": True,
        "training.max_train_steps": 5000,
        "training.train_batch_size": 16,
        "training.max_grad_norm": None,
        **{path: _OF_ALL[path] for path in ("training.lr_warmup_from_zero", "checkpointing.keep")},
        **{path: _OF_ALL[path] for path in ("sampling.sampler", "final.layout")},
    },
    different={"data.crop": "photos are cropped to squares, not squeezed"},
    needed=("train_data_dir", "placeholder_token", "initializer_token"),
)
TEXTUAL_INVERSION_SDXL = replace(
    TEXTUAL_INVERSION,
    name="textual_inversion_sdxl.py",
    defaults={**TEXTUAL_INVERSION.defaults, "sampling.guidance_scale": 5.0},
)
OF_A_WORD = (TEXTUAL_INVERSION, TEXTUAL_INVERSION_SDXL)
"""Scripts that learn the embedding of a new word."""
SCRIPTS = {script.name: script for script in (FULL, LORA, LORA_SDXL, *OF_A_WORD)}

REPEATS = 100
"""Default of ``--repeats`` in the scripts that learn a word."""

WARMUP_STEPS = 500
"""Default of ``--lr_warmup_steps``; a constant learning rate ignores it."""
VALIDATION_STEPS = 100
"""Default of ``--validation_steps``."""

DIFFERENT_HERE = {
    "seed": "seed=0, so that a run can be repeated",
    "prior.sampler": "prior.sampler=ddpm, the paper's",
    "training.mixed_precision": "the plan chooses types and checkpointing that fit the card",
}
"""Defaults that are better here, and why; each is named unless it is set."""

_IDENTIFYING = {
    "pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "train_data_dir", "placeholder_token",
}  # fmt: skip
_ONLY_OF_A_WORD = TEXTUAL_INVERSION_FLAGS | {"train_data_dir"}
_ONLY_LORA = LORA_FLAGS | {
    "lora_layers", "output_kohya_format", "validation_epochs", "image_interpolation_mode", "do_edm_style_training",
    "adam_weight_decay_text_encoder", "prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction",
    "prodigy_safeguard_warmup",
}  # fmt: skip
_ONLY_SDXL = {
    "use_dora", "output_kohya_format", "do_edm_style_training", "text_encoder_lr", "snr_gamma", "random_flip",
    "repeats",
    "pretrained_vae_model_name_or_path", "optimizer", "adam_weight_decay_text_encoder", "prodigy_beta3",
    "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup",
}  # fmt: skip
_RATE_OF_A_LORA = 5e-5
_LAUNCHERS = {"accelerate", "python", "python3", "torchrun"}
_ONE_DEVICE = {"num_processes", "num_machines", "nproc_per_node", "nnodes"}


def read_launch(arguments: Sequence[str]) -> Launch:
    """Split ``accelerate launch OPTIONS SCRIPT.py`` or ``SCRIPT.py`` from the arguments of the script.

    Raises:
        ConfigError: The script is not known, or is to be started on several devices.
    """
    rest = list(arguments)
    if not rest or not (rest[0] in _LAUNCHERS or rest[0].endswith(".py")):
        return Launch(rest)
    where = next((index for index, word in enumerate(rest) if word.endswith(".py")), None)
    if where is None:
        raise ConfigError(f"{rest[0]}: is followed by no script; allowed: {', '.join(SCRIPTS)}, or flags alone")
    name = PurePath(rest[where].replace("\\", "/")).name
    if name not in SCRIPTS:
        raise ConfigError(
            f"{name}: is not a script whose commands are known; allowed: {', '.join(SCRIPTS)}, or flags alone"
        )
    launch = Launch(rest[where + 1 :], SCRIPTS[name])
    options = [word for word in rest[:where] if word not in {*_LAUNCHERS, "launch"}]
    for option, value in _pairs(options):
        _read_launch_option(launch, option, value)
    return launch


def is_command_of_diffusers(flags: Collection[str], launch: Launch) -> bool:
    """Return whether the model, the photos or the prompt are given by a flag, or the script is named."""
    return launch.script is not None or bool(_IDENTIFYING & set(flags))


def recognise(flags: Collection[str], values: Mapping[str, Any]) -> Script:
    """Return the script that a command without its name was written for.

    Args:
        flags: Names of the flags given.
        values: The fields that are set.

    Raises:
        ConfigError: The command may be one for a LoRA, but does not say so.
    """
    given = set(flags)
    is_sdxl = "xl" in str(values.get("model.base", "")).lower()
    if given & TEXTUAL_INVERSION_FLAGS:
        return TEXTUAL_INVERSION_SDXL if is_sdxl else TEXTUAL_INVERSION
    wants_lora = values.get("lora.enabled")
    if wants_lora is None and not given & _ONLY_LORA:
        _ask_about_lora(values)
    if wants_lora is False or (wants_lora is None and not given & _ONLY_LORA):
        return FULL
    return LORA_SDXL if is_sdxl or given & _ONLY_SDXL else LORA


def check_flags(script: Script, flags: Collection[str], values: Mapping[str, Any], paths: Mapping[str, str]) -> None:
    """Check that the flags are those of the script.

    Args:
        script: The script.
        flags: Names of the flags given.
        values: The fields that are set.
        paths: The fields of flags.

    Raises:
        ConfigError: A flag belongs to a script of another kind, or one that the script needs is missing.
    """
    foreign = sorted(_ONLY_OF_A_WORD & set(flags)) if script not in OF_A_WORD else []
    if "train_data_dir" in foreign:
        raise ConfigError(
            "--train_data_dir: is a flag of textual_inversion.py, which needs --placeholder_token too; for DreamBooth "
            "use --instance_data_dir"
        )
    if foreign:
        raise ConfigError(f"--{foreign[0]}: is a flag of textual_inversion.py, not of {script.name}; leave it out")
    missing = [flag for flag in script.needed if flag not in flags and paths[flag] not in values]
    if missing:
        raise ConfigError("\n".join(f"--{flag}: is missing, and {script.name} needs it; add it" for flag in missing))


def defaults_of(script: Script, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a script, by field, for the fields that are set."""
    defaults = {path: value for path, value in script.defaults.items() if path not in values}
    lora_enabled = values.get("lora.enabled", defaults.get("lora.enabled", False))
    if not lora_enabled:
        defaults = {path: value for path, value in defaults.items() if not path.startswith("lora.")}
    if not values.get("training.train_text_encoder"):
        defaults.pop("training.learning_rate_text_encoder", None)
    if values.get("training.lr_scheduler", "constant") != "constant":
        defaults.setdefault("training.lr_warmup_steps", WARMUP_STEPS)
    if script.validation_epochs is None and values.get("sampling.prompts"):
        defaults.setdefault("sampling.every", VALIDATION_STEPS)
    return {path: value for path, value in defaults.items() if path not in values}


def describe(script: Script, values: Mapping[str, Any]) -> str:
    """Say in one line which defaults apply, what trains, and what is different here."""
    enabled = values.get("prior.enabled")
    named = [why for path, why in {**DIFFERENT_HERE, **script.different}.items() if path not in values]
    named = [why for why in named if enabled or not why.startswith("prior.")]
    different = f"; different here: {', '.join(named)}" if named else ""
    return f"defaults are those of diffusers' {script.name} ({script.trains}){different}"


def _ask_about_lora(values: Mapping[str, Any]) -> None:
    rate, output_dir = values.get("training.learning_rate"), PurePath(str(values.get("output_dir", ""))).name
    way_out = (
        "for a LoRA add --rank=4, or put train_dreambooth_lora.py before the flags; to train all weights add "
        "lora.enabled=false"
    )
    if "lora" in output_dir.lower():
        raise ConfigError(f"--output_dir: {output_dir!r} sounds like a LoRA, but no flag asks for one; {way_out}")
    if values.get("model.base") != "demo" and _number(rate) >= _RATE_OF_A_LORA:
        raise ConfigError(
            f"--learning_rate: {rate} is usual for a LoRA and too high for all weights (default 5e-6); {way_out}"
        )


def _number(value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        return 0.0


def _pairs(options: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return options with their values; a word without dashes is the value of the option before it."""
    pairs: list[tuple[str, str | None]] = []
    for word in options:
        if word.startswith("-"):
            name, separator, value = word.lstrip("-").partition("=")
            pairs.append((name.replace("-", "_"), value if separator else None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], word)
    return pairs


def _read_launch_option(launch: Launch, option: str, value: str | None) -> None:
    if option == "mixed_precision":
        launch.mixed_precision = value
    elif option == "multi_gpu" or (option in _ONE_DEVICE and value != "1"):
        raise ConfigError(
            f"--{option}: the launcher has to start lowmem-db itself; leave it out to train on one card, or for two: "
            "accelerate launch --multi_gpu --num_processes 2 -m lowmem_db train FLAGS, without the script's name"
        )
    else:
        launch.left_out.append(f"--{option}")
