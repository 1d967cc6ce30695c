"""Pages have a policy that names their own scripts, and no text in them can become code."""

import base64
import hashlib
import json
import re

import pytest

from lowmem_db.storage.pages import embedded, with_policy

PAGE = (
    '<!doctype html>\n<meta charset="utf-8">\n<style>p { color: red }</style>\n<script type="x">1</script>'
    "<script>\nrun();\n</script>"
)


def policy_of(page: str) -> dict[str, str]:
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    return dict(part.strip().split(" ", 1) for part in policy.split(";"))


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_policy_names_the_page_s_own_parts_and_nothing_else() -> None:
    policy = policy_of(with_policy(PAGE))
    assert policy["default-src"] == "'none'"
    assert policy["style-src"] == digest("p { color: red }")
    assert policy["script-src"] == digest("\nrun();\n")
    assert policy["img-src"] == "data:"
    assert with_policy(PAGE).index("Content-Security-Policy") < with_policy(PAGE).index("<style>")


def test_page_without_scripts_may_run_none() -> None:
    assert policy_of(with_policy('<meta charset="utf-8">hello'))["script-src"] == "'none'"


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--", "]]>", "&lt;", "\u2028", "a'b\"c\\"])
def test_text_stays_text(text: str) -> None:
    written = embedded({"prompt": text})
    assert not set("<>&") & set(written)
    assert written.isascii()
    assert json.loads(written) == {"prompt": text}
