"""The reference of all fields as Markdown: ``python -m tools.reference docs/configuration.md``."""

import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lowmem_db.config.flag_tables import (
    ALWAYS_SO,
    CHANGES_NOTHING,
    CHOICE_FLAGS,
    COUNTS,
    REFUSED_FLAGS,
    SWITCH_FLAGS,
    VALUE_FLAGS,
)
from lowmem_db.config.loading import is_section
from lowmem_db.config.schema import Config
from lowmem_db.config.scripts import (
    DIFFERENT_HERE,
    LORA,
    SCRIPTS,
    TEXTUAL_INVERSION,
    VALIDATION_STEPS,
    WARMUP_STEPS,
    Script,
)


def render() -> str:
    """Return the text of ``docs/configuration.md``."""
    sections = [
        (name, field.annotation, field.annotation.__doc__)
        for name, field in Config.model_fields.items()
        if is_section(field.annotation)
    ]
    lines = [
        "# Configuration",
        "",
        "Generated from the code by `python -m tools.reference docs/configuration.md`.",
        "",
        "A YAML file holds these fields; `section.key=value` on the command line overrides it. Unknown fields are",
        "refused, with the nearest correct name, and all problems are reported at once.",
        "",
        *_table("Top level", "", "", Config),
    ]
    for name, section, text in sections:
        lines += _table(f"`{name}`", str(text).strip(), f"{name}.", section)
    return "\n".join([*lines, *_flags()])


def _table(title: str, text: str, prefix: str, section: type[BaseModel]) -> list[str]:
    rows = [
        f"| `{prefix}{name}` | {_default(field)} | {_one_line(field.description)} |"
        for name, field in section.model_fields.items()
        if not is_section(field.annotation)
    ]
    head = [f"## {title}", ""] + ([text, ""] if text else [])
    return [*head, "| field | default | meaning |", "|---|---|---|", *rows, ""]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined or value is None or value == ():
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split())


def _flags() -> list[str]:
    mapped = {flag: f"`{field}`" for flag, field in VALUE_FLAGS.items()}
    mapped |= {flag: f"`{field}={value}`" for flag, (field, value) in SWITCH_FLAGS.items()}
    for flag, values in CHOICE_FLAGS.items():
        mapped[flag] = ", ".join(
            f"`{path}`" for path in dict.fromkeys(path for set_ in values.values() for path in set_)
        )
    mapped |= {"validation_prompt": "`sampling.prompts`", "save_sample_prompt": "`sampling.prompts`"}
    mapped |= {"save_steps": "`checkpointing.every`", "placeholder_token": "`textual_inversion.token` and the prompt"}
    mapped |= {"concepts_list": "`subject` and `subject.concepts`, from a JSON file ([runs.md](runs.md))"}
    mapped |= {"resume_from_checkpoint": "`--resume`: `latest`, `checkpoint-500` or the path of a checkpoint"}
    mapped |= COUNTS
    mapped |= {flag: f"accepted: {note}" for flag, note in ALWAYS_SO.items()}
    for flag, harmless in CHANGES_NOTHING.items():
        values = "".join(f" ({value})" for value in harmless.values[:1])
        mapped[flag] = f"accepted{values}: {harmless.note}"
    mapped |= {flag: f"refused: {note}" for flag, note in REFUSED_FLAGS.items()}
    different = {**DIFFERENT_HERE, **TEXTUAL_INVERSION.different}
    return [
        "## Flags of diffusers' scripts",
        "",
        "Accepted unchanged, with underscores or hyphens. A whole command can be pasted after `lowmem-db train`, with",
        "`accelerate launch` and the name of the script. A flag without an effect is accepted with a remark.",
        "",
        "| flag | field |",
        "|---|---|",
        *(f"| `--{flag}` | {field} |" for flag, field in sorted(mapped.items())),
        "",
        "### Their defaults",
        "",
        "With flags and without a configuration file the defaults are those of the script: the one that is named, or",
        "the one that the flags belong to (`--rank`, `--validation_epochs` and others belong to those for a LoRA,",
        "`--placeholder_token` and others to Textual Inversion). A command that may be one for a LoRA but does not say",
        "so is refused, and asked about.",
        "",
        *_defaults_of_scripts(),
        "",
        "In those for DreamBooth one epoch, if neither steps nor epochs are given. Unless the learning rate is",
        f"constant, {WARMUP_STEPS} steps of warm-up.",
        f"With a prompt, samples every {VALIDATION_STEPS} steps, or {LORA.validation_epochs} epochs for a LoRA.",
        f"Different on purpose: {', '.join(different.values())}.",
        "",
    ]


def _defaults_of_scripts() -> list[str]:
    names = [f"`{name}`" for name in SCRIPTS]
    paths = dict.fromkeys(path for script in SCRIPTS.values() for path in script.defaults)
    rows = [f"| `{path}` | {' | '.join(_shown(script, path) for script in SCRIPTS.values())} |" for path in paths]
    return [f"| field | {' | '.join(names)} |", f"|---|{'---|' * len(names)}", *rows]


def _shown(script: Script, path: str) -> str:
    if path not in script.defaults:
        return ""
    value = script.defaults[path]
    if value is None:
        return "all" if path == "checkpointing.keep" else "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
