"""Who may use the page: whoever knows its token, over the loopback address, from a page of this server."""

import secrets
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HOSTS = {"127.0.0.1", "localhost", "[::1]"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_REFUSED = (
    "<!doctype html><html lang=en><meta charset=utf-8><title>lowmem-db</title><h1>This page needs its token</h1>"
    "<p>Open the address that <code>lowmem-db ui</code> shows in its terminal."
)


class Guard:
    """Lets a request through if it brings the token, and adds the headers that keep other pages out.

    Args:
        app: The page.
        token: What the address has to hold.
        port: The port, which the name of the cookie holds: cookies are shared by all ports of a machine.
        behind_proxy: Whether requests come through a proxy under its own name, as on Colab, and in a frame.
    """

    def __init__(self, app: ASGIApp, token: str, port: int, *, behind_proxy: bool = False) -> None:
        self._app, self._token, self._behind_proxy = app, token, behind_proxy
        self._cookie = f"lowmem-db-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._answer(HTTPConnection(scope), scope["method"])
        answer = self._app if refusal is None else refusal
        await answer(scope, receive, self._with_headers(send))

    def _answer(self, request: HTTPConnection, method: str) -> Response | None:
        """Return the answer to a request that does not reach the page, or None."""
        if not self._behind_proxy and _host(request.headers) not in _HOSTS:
            return HTMLResponse("This page is served under 127.0.0.1 only.", 421)
        given = request.query_params.get("token")
        if given is not None and method == "GET":
            return self._entrance(request) if self._is_token(given) else HTMLResponse(_REFUSED, 403)
        if not self._is_token(request.cookies.get(self._cookie, "")):
            return HTMLResponse(_REFUSED, 403)
        if method not in {"GET", "HEAD"} and not _is_same_origin(request.headers):
            return HTMLResponse("Only pages of this server may send forms to it.", 403)
        return None

    def _entrance(self, request: HTTPConnection) -> Response:
        """Keep the token as a cookie, and drop it from the address."""
        answer = RedirectResponse(request.url.path, 303)
        same_site = "none" if self._behind_proxy else "strict"
        answer.set_cookie(
            self._cookie, self._token, httponly=True, samesite=same_site, secure=self._behind_proxy, path="/"
        )
        return answer

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())

    def _with_headers(self, send: Send) -> Send:
        policy = POLICY.replace("; frame-ancestors 'none'", "") if self._behind_proxy else POLICY

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in (*_HEADERS.items(), ("Content-Security-Policy", policy)):
                    headers[name] = value
            await send(message)

        return send_with_headers


def _host(headers: Headers) -> str:
    return headers.get("host", "").rpartition(":")[0] or headers.get("host", "")


def _is_same_origin(headers: Mapping[str, str]) -> bool:
    """Return whether a form comes from a page of this server; browsers say so, other programs say nothing."""
    origin = headers.get("origin")
    if origin is not None:
        return urlsplit(origin).netloc == headers.get("host")
    return headers.get("sec-fetch-site", "same-origin") == "same-origin"
