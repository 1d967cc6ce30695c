"""Who reaches the page, and what other pages can do with it."""

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from lowmem_db.ui.security import Guard

TOKEN = "a-token"


async def app(scope, receive, send) -> None:
    await PlainTextResponse("reached")(scope, receive, send)


def browser(host: str = "127.0.0.1:8642", *, behind_proxy: bool = False) -> TestClient:
    scheme = "https" if behind_proxy else "http"
    return TestClient(Guard(app, TOKEN, 8642, behind_proxy=behind_proxy), base_url=f"{scheme}://{host}")


def test_address_with_the_token_becomes_a_cookie_and_an_address_without_it() -> None:
    client = browser()
    answer = client.get(f"/run/dog?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/run/dog")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert client.get("/").text == "reached"


@pytest.mark.parametrize("query", ["", "?token=", "?token=another", "?token=%00"])
def test_without_the_token_nothing_is_shown(query: str) -> None:
    answer = browser().get(f"/{query}")
    assert answer.status_code == 403
    assert "reached" not in answer.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8642", "127.0.0.1.evil.example", "[::2]:8642"])
def test_another_name_for_this_machine_is_refused(host: str) -> None:
    client = browser()
    client.cookies.set("lowmem-db-8642", TOKEN)
    assert client.get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://127.0.0.1:8642"}, 200),
        ({}, 200),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_forms_come_from_this_server_alone(headers: dict[str, str], status: int) -> None:
    client = browser()
    client.cookies.set("lowmem-db-8642", TOKEN)
    assert client.post("/run/dog/ask", headers=headers).status_code == status


def test_every_answer_forbids_frames_scripts_of_others_and_caching() -> None:
    for answer in (browser().get("/"), browser().get(f"/?token={TOKEN}")):
        policy = answer.headers["content-security-policy"]
        for said in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
            assert said in policy
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_behind_a_proxy_its_name_is_accepted_and_the_token_still_needed() -> None:
    client = browser("something-colab.googleusercontent.com", behind_proxy=True)
    assert client.get("/").status_code == 403
    answer = client.get(f"/?token={TOKEN}", follow_redirects=False)
    assert "samesite=none" in answer.headers["set-cookie"].lower()
    assert "secure" in answer.headers["set-cookie"].lower()
    assert client.get("/").text == "reached"
    assert client.post("/", headers={"origin": "https://evil.example"}).status_code == 403
