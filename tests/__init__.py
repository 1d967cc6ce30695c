"""Modules whose signatures state shapes are checked against them wherever a test calls them.

Checking every call of every module would double the processor time of the tests.
"""

from pathlib import Path

from jaxtyping import install_import_hook

_ROOT = Path(__file__).parents[1]
WITH_SHAPES = [
    ".".join(file.relative_to(_ROOT).with_suffix("").parts)
    for file in sorted((_ROOT / "lowmem_db").rglob("*.py"))
    if "from jaxtyping import" in file.read_text(encoding="utf-8")
]
install_import_hook(WITH_SHAPES, "beartype.beartype")
