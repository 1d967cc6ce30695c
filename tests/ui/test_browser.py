"""The whole way in a real browser, from photos to a picture, while pages are reloaded and the server is killed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

from tests.cli.conftest import REPOSITORY, environment_of_commands  # noqa: F401
from tests.ui.browser import Server
from tests.ui.conftest import CHROMIUM, PHOTOS, quick_recipes

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
PATIENCE = 240_000  # ms; a machine that does other things too is slow
expect.set_options(timeout=30_000)
NOUN = "<b>dog</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Start servers, and end them after the test."""
    servers: list[Server] = []

    def start_server(*arguments: Any) -> Server:
        servers.append(Server(*arguments))
        return servers[-1]

    yield start_server
    for server in servers:
        server.kill()


def of_axe(said: ConsoleMessage) -> bool:
    """Return whether axe-core was refused a style of its own, as the pages' policy refuses all; they have none."""
    return said.text.startswith("Applying inline style")


def accessible(page: Page) -> None:
    """Check contrast, names, labels and landmarks."""
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_from_photos_to_a_picture(  # noqa: PLR0915
    browser: Browser,
    start: Callable[..., Server],
    tmp_path: Path,
    environment_of_commands: dict[str, str],  # noqa: F811
) -> None:
    configs = quick_recipes(tmp_path / "configs")
    environment = environment_of_commands | {"LOWMEM_DB_CACHE": str(tmp_path / "cache")}
    server = start(tmp_path / "runs", configs, environment)
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append("a dialog"))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" and not of_axe(said) else None)
    page.goto(server.address)
    assert "token" not in page.url
    accessible(page)

    page.get_by_label("What do the photos show?").fill(NOUN)
    page.get_by_role("button", name="Begin").click()
    page.set_input_files("#files", PHOTOS)
    expect(page.locator(".photos-edit li")).to_have_count(len(PHOTOS))
    page.get_by_label("Caption of 00.jpg").fill("a sks dog on <i>grass</i>")
    page.get_by_label("Caption of 00.jpg").blur()
    expect(page.locator(".photos-edit output").first).to_have_text("saved")
    page.reload()
    expect(page.get_by_label("Caption of 00.jpg")).to_have_value("a sks dog on <i>grass</i>")
    page.wait_for_selector("#train:enabled, #plan .warning", timeout=PATIENCE)
    train = page.get_by_role("button", name="Train")
    expect(train).to_be_enabled()
    expect(page.locator("#plan")).to_contain_text("GiB")
    accessible(page)
    train.click()

    other = context.new_page()  # a second tab on the same run
    other.goto(page.url)
    expect(other.get_by_label("Prompts, one per line")).to_have_count(0)
    expect(page.locator("#status .state")).to_contain_text("training", timeout=PATIENCE)
    page.reload()
    server.kill()  # the run goes on
    expect(page.locator("#gone")).to_be_visible(timeout=20_000)
    server = start(tmp_path / "runs", configs, environment, server.port)
    for tab in (page, other):
        tab.goto(server.address)
        tab.get_by_role("link", name="b-dog-b").click()
        problems.clear()  # a server that is gone is told on the console
        expect(tab.locator("#status .state")).to_contain_text("finished", timeout=PATIENCE)
    expect(page.locator("#report [data-step]").last).to_be_visible(timeout=20_000)
    accessible(page)
    page.get_by_label("Prompts, one per line").fill("a sks <u>dog</u>")
    page.get_by_label("Images of each").fill("1")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#drawn .pictures img")).to_have_count(1, timeout=PATIENCE)
    expect(other.locator("#drawn .pictures img")).to_have_count(1, timeout=20_000)
    assert page.locator("#drawn .pictures img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    page.get_by_role("button", name="Export").click()  # one file: the demo base has another autoencoder
    expect(page.locator("#drawn").get_by_role("alert")).to_contain_text("export --format diffusers", timeout=PATIENCE)
    page.get_by_label("for", exact=True).select_option("diffusers")
    page.get_by_role("button", name="Export").click()
    expect(page.locator("#drawn")).to_contain_text("b-dog-b-diffusers-fp16", timeout=PATIENCE)
    accessible(page)
    assert page.locator("main b, main i, main u").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert problems == []


@pytest.fixture
def page(
    browser: Browser,
    start: Callable[..., Server],
    tmp_path: Path,
    environment_of_commands: dict[str, str],  # noqa: F811
) -> Page:
    """Return the first page of a server."""
    server = start(tmp_path / "runs", quick_recipes(tmp_path / "configs"), environment_of_commands)
    page = browser.new_context().new_page()
    page.goto(server.address)
    return page


def test_what_is_entered_before_the_scripts_have_loaded_is_kept(page: Page) -> None:
    held: list[Route] = []
    holding = True

    def asked_for(script: Route) -> None:
        if holding:
            held.append(script)
        else:
            script.continue_()

    def let_go() -> None:
        nonlocal holding
        holding = False
        while held:
            held.pop().continue_()

    page.get_by_label("What do the photos show?").fill("dog")
    page.route("**/*.js", asked_for)
    page.get_by_role("button", name="Begin").click(no_wait_after=True)
    page.set_input_files("#files", PHOTOS[:1])
    let_go()
    expect(page.locator(".photos-edit li")).to_have_count(1)
    holding = True
    page.goto(page.url, wait_until="commit")
    page.get_by_label("Caption of 00.jpg").fill("a dog on grass")
    page.get_by_label("Rare word for it").fill("zwx")
    let_go()
    expect(page.locator(".photos-edit output")).to_have_text("saved")
    expect(page.locator("#plan code").first).to_have_text("a zwx dog")


def test_photos_are_dropped_and_everything_is_reached_by_keyboard(page: Page) -> None:
    page.get_by_label("What do the photos show?").focus()
    page.keyboard.type("dog")
    page.keyboard.press("Enter")
    page.wait_for_selector("#files")
    content = [list(Path(photo).read_bytes()) for photo in PHOTOS[:2]]
    dropped = page.evaluate_handle(
        """photos => {
            const dropped = new DataTransfer();
            photos.forEach((photo, index) => dropped.items.add(new File([new Uint8Array(photo)], `${index}.jpg`)));
            return dropped;
        }""",
        content,
    )
    page.wait_for_load_state("load")
    page.locator(".drop").dispatch_event("drop", {"dataTransfer": dropped})
    expect(page.locator(".photos-edit li")).to_have_count(2)

    page.wait_for_load_state("load")
    usable = "a[href], button:enabled, input:not([type=hidden]):enabled, select, textarea, summary"
    wanted = page.locator(usable).evaluate_all("all => all.map(one => one.outerHTML)")
    reached: list[str] = []
    for _ in wanted:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.outerHTML"))
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style != "none", f"{reached[-1]} does not show that it has the focus"
    assert reached == wanted
    page.get_by_role("button", name="Remove 1.jpg").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".photos-edit li")).to_have_count(1)
