"""Web pages that this program writes: whole in themselves, with a policy that lets nothing else in."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

_PARTS = {
    "style": re.compile(r"<style>(.*?)</style>", re.DOTALL),
    "script": re.compile(r"<script>(.*?)</script>", re.DOTALL),
}
_CHARSET = '<meta charset="utf-8">'


def with_policy(page: str) -> str:
    """Return a page with a content-security policy: its own styles and scripts, pictures in the page, nothing else.

    Whatever text gets into the page, a browser then neither runs it nor fetches what it names.

    Args:
        page: A page with ``<meta charset="utf-8">``; styles and scripts stand in elements without attributes.
    """
    found = {name: pattern.findall(page) for name, pattern in _PARTS.items()}
    rules = policy(styles=found["style"], scripts=found["script"])
    head, charset, rest = page.partition(_CHARSET)
    assert charset, f"a page needs {_CHARSET}"
    return f'{head}{charset}\n<meta http-equiv="Content-Security-Policy" content="{rules}">{rest}'


def policy(*, styles: Sequence[str], scripts: Sequence[str]) -> str:
    """Return a content-security policy that allows these styles and scripts, pictures in the page, and nothing else."""
    style, script = (" ".join(f"'sha256-{_digest(text)}'" for text in own) or "'none'" for own in (styles, scripts))
    return (
        f"default-src 'none'; img-src data:; style-src {style}; script-src {script}; base-uri 'none'; "
        "form-action 'none'"
    )


def embedded(value: Any) -> str:
    """Return JSON that can stand in a ``script`` element: no text in it can end the element."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
