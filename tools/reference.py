"""The reference of all fields as Markdown: ``python -m tools.reference docs/configuration.md``."""

import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lowmem_db.config.flags import ALWAYS_SO, CHOICE_FLAGS, REFUSED_FLAGS, SWITCH_FLAGS, VALUE_FLAGS
from lowmem_db.config.schema import Config


def render() -> str:
    """Return the text of ``docs/configuration.md``."""
    sections = [
        (name, field.annotation, field.annotation.__doc__)
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
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
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
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
    mapped |= {flag: f"`{field}`" for flag, (field, _) in CHOICE_FLAGS.items()}
    mapped |= {"validation_prompt": "`sampling.prompts`", "resume_from_checkpoint": "`--resume` (`latest`)"}
    mapped |= {flag: f"accepted: {note}" for flag, note in ALWAYS_SO.items()}
    mapped |= {flag: f"refused: {note}" for flag, note in REFUSED_FLAGS.items()}
    return [
        "## Flags of diffusers' `train_dreambooth.py`",
        "",
        "Accepted unchanged, with underscores or hyphens. Without a configuration file, prior preservation is off",
        "unless `--with_prior_preservation` is given, as in that script.",
        "",
        "| flag | field |",
        "|---|---|",
        *(f"| `--{flag}` | {field} |" for flag, field in sorted(mapped.items())),
        "",
    ]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
