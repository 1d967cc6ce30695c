"""From a template to a page: one file, escaped, whose content-security policy allows its own style and script alone."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lowmem_db.storage.pages import policy

_FOLDER = Path(__file__).parent


def fill(template: str, **values: Any) -> str:
    """Return the HTML of a page.

    Args:
        template: A template in this folder; it finds the style, the script and the policy beside the values.
        values: What it shows; text is escaped.
    """
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    return (
        _templates()
        .get_template(template)
        .render(style=Markup(style), script=Markup(script), policy=policy(styles=[style], scripts=[script]), **values)
    )


@cache
def _templates() -> Environment:
    return Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
