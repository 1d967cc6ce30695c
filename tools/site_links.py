"""Links of the documentation that lead to other files of the repository, for the site: they become addresses there.

A hook of mkdocs; a file that does not exist is an error, as every broken link is.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_log = logging.getLogger("mkdocs.hooks.site_links")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **rest: Any) -> str:
    """Return the text of a page with addresses for what lies outside of ``docs``."""

    def replaced(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), found[2]))
        if place.startswith("docs/"):
            return found[0]
        target = ROOT / place
        if not target.exists():
            _log.warning("%s links to %s, which does not exist", page.file.src_uri, found[2])
        kind = "tree" if target.is_dir() else "blob"
        return f"{found[1]}{config.repo_url}/{kind}/main/{place}{found[3]}"

    return _LINK.sub(replaced, markdown)
