"""Commands for diffusers' scripts, and ``section.key=value`` arguments, read into fields.

Underscores and hyphens are equivalent. A flag without a counterpart is an error that says what to use instead; one that
changes nothing is accepted with a remark.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_db.config.concepts import REPLACED_FLAGS, fields_of, read_concepts
from lowmem_db.config.flag_tables import (
    ALWAYS_SO,
    CHANGES_NOTHING,
    CHOICE_FLAGS,
    COUNTS,
    LORA_FLAGS,
    REFUSED_FLAGS,
    SWITCH_FLAGS,
    TEXTUAL_INVERSION_FLAGS,
    VALUE_FLAGS,
)
from lowmem_db.config.loading import parse_override
from lowmem_db.config.scripts import (
    FULL,
    OF_A_WORD,
    REPEATS,
    Launch,
    Script,
    check_flags,
    defaults_of,
    describe,
    is_command_of_diffusers,
    read_launch,
    recognise,
)
from lowmem_db.config.spelling import nearest_name
from lowmem_db.errors import ConfigError

KNOWN_FLAGS = frozenset(
    (
        *VALUE_FLAGS, *SWITCH_FLAGS, *CHOICE_FLAGS, *ALWAYS_SO, *CHANGES_NOTHING, *COUNTS, *REFUSED_FLAGS,
        "validation_prompt", "validation_images", "save_sample_prompt", "save_steps", "concepts_list",
        "resume_from_checkpoint", "resume",
    )
)  # fmt: skip
_CHECKPOINT = re.compile(r"(?:checkpoint|step)-0*(\d+)")
_PRINTED_DASHES = "\u2013\u2014\u2212"
_MAY_BE_EMPTY = {"instance_prompt", "class_prompt", "validation_prompt"}


@dataclass
class Arguments:
    """The parsed command line.

    Attributes:
        overrides: Fields and their values, in order.
        defaults: Defaults of the script that the command is for, by field; overrides win.
        resume: Continue from a checkpoint.
        checkpoint: The checkpoint to continue from: a name, or a path. None for the newest complete one.
        notes: Remarks about the given flags.
        flags: Names of the flags given.
        counts: Passes through the photos, by flag.
        concepts_list: File with the subjects, or None.
        positional: Arguments that are neither flags nor overrides.
    """

    overrides: list[tuple[str, Any]] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)
    concepts_list: Path | None = None
    positional: list[str] = field(default_factory=list)


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Read flags, ``section.key=value`` overrides and positional arguments, in any order.

    With flags and without a configuration file, the defaults are those of diffusers' script: the one that is named, or
    the one that the flags belong to.

    Raises:
        ConfigError: With every argument that cannot be understood, one per line.
    """
    launch = read_launch(arguments)
    parsed, problems, rest = Arguments(), [], list(launch.arguments)
    while rest:
        argument = rest.pop(0)
        try:
            _refuse_left_over(argument)
            if argument.lstrip().startswith("--"):  # of a line break in one line, "\\ --flag", the shell leaves a space
                _read_flag(argument.lstrip(), rest, parsed)
            elif "=" in argument:
                parsed.overrides.append(parse_override(argument))
            else:
                parsed.positional.append(argument)
        except ConfigError as problem:
            problems.append(str(problem))
    if problems:
        raise ConfigError("\n".join(problems))
    is_of_diffusers = not parsed.positional and is_command_of_diffusers(parsed.flags, launch)
    if parsed.concepts_list is not None:
        has_prior = bool(dict(parsed.overrides).get("prior.enabled")) if is_of_diffusers else None
        _read_subjects(parsed, parsed.concepts_list, has_prior)
    if parsed.flags & TEXTUAL_INVERSION_FLAGS or launch.script in OF_A_WORD:
        _read_new_word(parsed)
    if is_of_diffusers:
        _read_as_script(parsed, launch)
    elif parsed.flags & LORA_FLAGS:
        parsed.overrides.insert(0, ("lora.enabled", True))
    if launch.left_out:
        parsed.notes.append(f"accelerate launch {', '.join(launch.left_out)}: have no effect here")
    return parsed


def _refuse_left_over(argument: str) -> None:
    """Refuse what pasted text leaves: a line break that the shell does not take for one, or a printed dash.

    Raises:
        ConfigError: The argument is one of these, or empty.
    """
    if not argument:
        raise ConfigError("'': is an empty argument; leave it out (a shell variable that is not set is empty too)")
    if argument.strip() in {"", "\\", "`", "^"}:
        raise ConfigError(
            f"{argument!r}: is left over from a line break, and what follows may be missing; in bash a backslash is "
            "the last character of its line, without a space after it; PowerShell takes ` and cmd.exe ^ in its place"
        )
    if argument[0] in _PRINTED_DASHES:
        name = argument.lstrip(f"-{_PRINTED_DASHES}")
        raise ConfigError(f"{argument}: begins with a dash for printing, as text processors make it; use --{name}")


def checkpoint_step(checkpoint: Path) -> int | None:
    """Return the step in the name of a checkpoint, diffusers' or this package's, or None."""
    found = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(found[1]) if found else None


def _read_subjects(parsed: Arguments, file: Path, has_prior: bool | None) -> None:
    """Set the subjects from a file.

    Raises:
        ConfigError: A flag gives a single subject, or the file cannot be used.
    """
    if given := [flag for flag in REPLACED_FLAGS if flag in parsed.flags]:
        raise ConfigError(
            "\n".join(f"--{flag}: --concepts_list has one for each subject; leave --{flag} out" for flag in given)
        )
    concepts, notes = read_concepts(file, has_prior=has_prior)
    parsed.overrides[:0] = fields_of(concepts)
    parsed.notes += notes


def _read_as_script(parsed: Arguments, launch: Launch) -> None:
    """Apply the defaults of the script, and drop what has no effect there either."""
    if "validation_images" in parsed.flags:
        parsed.overrides = [pair for pair in parsed.overrides if pair[0] != "sampling.prompts"]
    if launch.mixed_precision is not None:
        parsed.overrides.insert(0, ("training.mixed_precision", launch.mixed_precision))
    values = dict(parsed.overrides)
    script = launch.script or recognise(parsed.flags, values)
    if values.get("lora.enabled") is False and script not in OF_A_WORD:
        script = FULL
    check_flags(script, parsed.flags, values, VALUE_FLAGS)
    parsed.defaults = defaults_of(script, values)
    _drop_what_has_no_effect(parsed, script)
    if script in OF_A_WORD:
        _count_for_a_word(parsed, script)
    elif "max_train_steps" not in parsed.flags and "training.max_train_steps" not in values:
        parsed.counts.setdefault("num_train_epochs", 1)
    if script.validation_epochs is not None and "sampling.every" not in values and values.get("sampling.prompts"):
        parsed.counts.setdefault("validation_epochs", script.validation_epochs)
    parsed.notes.insert(0, describe(script, values))


def _read_new_word(parsed: Arguments) -> None:
    """Give fields of Textual Inversion what flags with other meanings elsewhere say."""
    given = dict(parsed.overrides)
    if "save_steps" in parsed.flags and "checkpointing_steps" in parsed.flags:
        parsed.notes.append(
            "--save_steps: no effect with --checkpointing_steps; every checkpoint holds the embedding: "
            "lowmem-db export RUN --step N"
        )
    rate = {"training.learning_rate": "textual_inversion.learning_rate"} if "learning_rate" in parsed.flags else {}
    parsed.overrides = [(rate.get(path, path), value) for path, value in parsed.overrides]
    prompt = "a painting in the style of" if given.get("textual_inversion.templates") == "style" else "a"
    if "placeholder_token" in parsed.flags:
        parsed.overrides.insert(0, ("subject.instance_prompt", f"{prompt} {given['textual_inversion.token']}"))
    parsed.overrides.insert(0, ("textual_inversion.enabled", True))


def _count_for_a_word(parsed: Arguments, script: Script) -> None:
    """Drop epochs that the script does not count either, because its number of steps has a default."""
    if parsed.counts.pop("num_train_epochs", None):
        steps = script.defaults["training.max_train_steps"]
        parsed.notes.append(f"--num_train_epochs: no effect; {script.name} takes --max_train_steps (default {steps})")
    if "validation_epochs" in parsed.counts:
        parsed.counts.setdefault("repeats", REPEATS)


def _drop_what_has_no_effect(parsed: Arguments, script: Script) -> None:
    values = {**script.defaults, **dict(parsed.overrides)}
    for paths, has_effect, needed in _HAVE_NO_EFFECT:
        given = {flag: path for flag, path in _PATHS.items() if flag in parsed.flags and path in paths}
        if given and not has_effect(values):
            parsed.overrides = [pair for pair in parsed.overrides if pair[0] not in given.values()]
            named = ", ".join(f"--{flag}" for flag in given)
            parsed.notes.append(f"{named}: no effect without {needed}")
    if "validation_epochs" in parsed.counts and not values.get("sampling.prompts"):
        del parsed.counts["validation_epochs"]
        parsed.notes.append("--validation_epochs: no effect without --validation_prompt")


_PATHS = {
    **VALUE_FLAGS,
    **{flag: path for flag, (path, _) in SWITCH_FLAGS.items()},
    "prior_generation_precision": "prior.precision",
    "validation_scheduler": "sampling.sampler",
}
_HAVE_NO_EFFECT: tuple[tuple[set[str], Callable[[Mapping[str, Any]], bool], str], ...] = (
    (
        {"training.lr_num_cycles"},
        lambda values: values.get("training.lr_scheduler") == "cosine_with_restarts",
        "--lr_scheduler=cosine_with_restarts",
    ),
    (
        {"training.lr_power"},
        lambda values: values.get("training.lr_scheduler") == "polynomial",
        "--lr_scheduler=polynomial",
    ),
    (
        {"training.lr_warmup_steps"},
        lambda values: (
            values.get("training.lr_scheduler", "constant") != "constant"
            or str(values.get("training.lr_warmup_steps")) == "0"
        ),
        "--lr_scheduler=constant_with_warmup",
    ),
    ({"final.hub_model_id"}, lambda values: bool(values.get("final.push_to_hub")), "--push_to_hub"),
    (
        {"sampling.every", "sampling.num_images", "sampling.sampler"},
        lambda values: bool(values.get("sampling.prompts")),
        "--validation_prompt",
    ),
    (
        {"sampling.negative_prompt", "sampling.guidance_scale", "sampling.num_inference_steps"},
        lambda values: bool(values.get("sampling.prompts")) or values.get("evaluation.every") is not None,
        "--save_sample_prompt",
    ),
    (
        {
            "prior.class_dir", "prior.loss_weight", "prior.num_class_images", "prior.sample_batch_size",
            "prior.precision",
        },
        lambda values: bool(values.get("prior.enabled")),
        "--with_prior_preservation",
    ),
    (
        {"subject.class_prompt"},
        lambda values: bool(values.get("prior.enabled")) or values.get("evaluation.every") is not None,
        "--with_prior_preservation",
    ),
    (
        {
            "training.learning_rate_text_encoder", "training.learning_rate_text_encoder_2",
            "training.stop_text_encoder_training",
        },
        lambda values: bool(values.get("training.train_text_encoder")),
        "--train_text_encoder",
    ),
)  # fmt: skip
"""Fields of flags, when they have an effect, and what is missing if they have none."""


def _read_flag(argument: str, rest: list[str], parsed: Arguments) -> None:
    text, separator, inline = argument.removeprefix("--").partition("=")
    name = text.replace("-", "_")
    parsed.flags.add(name)
    if name in REFUSED_FLAGS:
        _skip_values(separator, rest)
        raise ConfigError(f"--{name}: is not supported; {REFUSED_FLAGS[name]}")
    if separator and name in {*ALWAYS_SO, *SWITCH_FLAGS, "resume"}:
        raise ConfigError(f"--{name}: takes no value, but {inline!r} was given; use --{name}, or leave it out")
    if name in ALWAYS_SO:
        parsed.notes.append(f"--{name}: {ALWAYS_SO[name]}")
    elif name in SWITCH_FLAGS:
        parsed.overrides.append(SWITCH_FLAGS[name])
    elif name == "resume":
        parsed.resume = True
    elif name == "validation_images":
        _skip_values(separator, rest)
        parsed.notes.append(
            "--validation_images: no effect, nor has --validation_prompt beside it; a super-resolution model draws "
            "nothing while it trains, and afterwards with lowmem-db generate FIRST_STAGE --upscale RUN"
        )
    elif name in KNOWN_FLAGS:
        _read_value_flag(name, inline if separator else _value(name, rest), parsed)
    else:
        _skip_values(separator, rest)
        nearest = nearest_name(name, KNOWN_FLAGS)
        hint = f"did you mean --{nearest}?" if nearest else "a field without a flag is set as section.key=value"
        raise ConfigError(f"--{text}: unknown flag; {hint}")


def _read_value_flag(name: str, value: str, parsed: Arguments) -> None:
    if not value and name not in _MAY_BE_EMPTY:
        raise ConfigError(f"--{name}: is empty; set a value (a shell variable that is not set is empty too)")
    if name in VALUE_FLAGS:
        parsed.overrides.append((VALUE_FLAGS[name], value))
    elif name in CHOICE_FLAGS:
        choices = CHOICE_FLAGS[name]
        if value not in choices:
            raise ConfigError(f"--{name}: {value!r} is not supported; allowed: {', '.join(choices)}")
        parsed.overrides += choices[value].items()
    elif name in CHANGES_NOTHING:
        harmless = CHANGES_NOTHING[name]
        if harmless.values and value not in harmless.values:
            raise ConfigError(f"--{name}: {value!r} is not supported; {harmless.otherwise}")
        parsed.notes.append(f"--{name}: no effect; {harmless.note}")
    elif name in COUNTS:
        parsed.counts[name] = _count(name, value)
    elif name == "validation_prompt":
        parsed.overrides.append(("sampling.prompts", [value]))
    elif name == "save_sample_prompt":
        parsed.overrides += [("sampling.prompts", [value]), ("sampling.every", None)]
    elif name == "save_steps":
        parsed.overrides.insert(0, ("checkpointing.every", value))  # --checkpointing_steps wins
    elif name == "concepts_list":
        parsed.concepts_list = Path(value).expanduser()
    else:
        _read_checkpoint(name, value, parsed)


def _read_checkpoint(name: str, value: str, parsed: Arguments) -> None:
    parsed.resume = True
    parsed.checkpoint = None if value == "latest" else Path(value)
    if parsed.checkpoint is not None and checkpoint_step(parsed.checkpoint) is None:
        raise ConfigError(
            f"--{name}: {value!r} is not a checkpoint; allowed: latest, checkpoint-500 (the one of step 500), or the "
            "path of a checkpoint in --output_dir"
        )


def _count(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"--{name}: {value!r} is not allowed: it must be a whole number from 1")
    return int(value)


def _value(name: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"--{name}: needs a value: --{name}=VALUE")
    return rest.pop(0)


def _skip_values(separator: str, rest: list[str]) -> None:
    """Drop the values of a flag that is refused anyway, so that they are not reported as further problems."""
    while not separator and rest and not rest[0].startswith("--") and "=" not in rest[0]:
        rest.pop(0)
