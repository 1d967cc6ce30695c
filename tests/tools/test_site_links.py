"""Links of the documentation to other files of the repository become addresses; those to nothing are told."""

import logging
from types import SimpleNamespace

import pytest

from tools.site_links import on_page_markdown

CONFIG = SimpleNamespace(repo_url="https://example.org/repository")


def page(place: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=place))


@pytest.mark.parametrize(
    ("place", "link", "address"),
    [
        ("runs.md", "../README.md", "https://example.org/repository/blob/main/README.md"),
        (
            "memory/weights.md",
            "../../kernels/README.md#x",
            "https://example.org/repository/blob/main/kernels/README.md#x",
        ),
        ("runs.md", "../configs", "https://example.org/repository/tree/main/configs"),
        ("memory/weights.md", "../runs.md", "../runs.md"),
        ("runs.md", "#before", "#before"),
        ("runs.md", "https://arxiv.org/abs/2208.12242", "https://arxiv.org/abs/2208.12242"),
    ],
)
def test_links(place: str, link: str, address: str) -> None:
    assert on_page_markdown(f"a [b]({link}) c", page=page(place), config=CONFIG) == f"a [b]({address}) c"


def test_link_to_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        on_page_markdown("[b](../nothing.md)", page=page("runs.md"), config=CONFIG)
    assert "runs.md links to ../nothing.md, which does not exist" in caplog.text
