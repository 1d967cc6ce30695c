"""Pictures of the page for the documentation, from a finished run, in four versions of each.

    python -m tools.screenshots runs/demo docs/images

Needs the packages of ``dev`` and Chromium.
"""

import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from lowmem_db.ui.app import build_app
from lowmem_db.ui.server import listen
from lowmem_db.ui.workplace import Workplace

ROOT = Path(__file__).parents[1]
PHOTOS = sorted((ROOT / "examples" / "drawn_dog").glob("*.png"))
WIDTHS = (1280, 390)
_PATIENCE = 600_000
_WITHOUT_FOLDERS = """folder => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replaceAll(folder + "/", "");
}"""
_QUALITY = 82


def main(run: Path, folder: Path) -> None:
    """Take all pictures."""
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        runs = Path(temporary) / "runs"
        shutil.copytree(run, runs / "dog", ignore=shutil.ignore_patterns("drawn", "exported", "jobs", ".lock"))
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        with _served(runs) as address:
            pages = {"home": "/", "draft": _draft(browser, address), "run": _drawn(browser, address)}
            for name, path in pages.items():
                for file in _taken(browser, address + path, folder / f"ui_{name}", runs.parent):
                    print(file)
        browser.close()


def chromium() -> str:
    """Return the path of Chromium."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        sys.exit("Chromium is not installed; on Debian: apt-get install chromium")
    return found


@contextmanager
def _served(runs: Path) -> Iterator[str]:
    """Serve the page in a thread, without a token."""
    with listen(None) as listener:
        config = uvicorn.Config(build_app(Workplace(runs)), log_level="error", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def _draft(browser: Browser, address: str) -> str:
    """Begin a draft; return its path."""
    page = browser.new_page()
    page.goto(address)
    page.get_by_label("What do the photos show?").fill("dog")
    page.get_by_role("button", name="Begin").click()
    page.set_input_files("#files", PHOTOS)
    page.get_by_label(f"Caption of {PHOTOS[1].name}").fill("a sks dog, sitting")
    page.get_by_label(f"Caption of {PHOTOS[1].name}").blur()
    page.wait_for_selector("#train:enabled", timeout=_PATIENCE)
    return page.url.removeprefix(address)


def _drawn(browser: Browser, address: str) -> str:
    """Draw from the run; return its path."""
    page = browser.new_page()
    page.goto(f"{address}/run/dog")
    page.get_by_label("Prompts, one per line").fill("a sks dog\na dog")
    page.get_by_role("button", name="Draw").click()
    page.wait_for_selector("#drawn .pictures img", timeout=_PATIENCE)
    return "/run/dog"


def _taken(browser: Browser, address: str, stem: Path, hidden: Path) -> Iterator[Path]:
    """Take the versions of a picture, without the name of a folder of this machine."""
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto(address)
            page.wait_for_load_state("load")
            page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
            page.wait_for_timeout(1500)
            page.evaluate(_WITHOUT_FOLDERS, str(hidden))
            file = stem.with_name(f"{stem.name}_{width}_{scheme}.jpg")
            page.screenshot(path=file, full_page=True, type="jpeg", quality=_QUALITY)
            page.close()
            yield file


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
