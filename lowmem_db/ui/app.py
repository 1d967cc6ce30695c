"""The routes. Each reads files, or starts a command; what takes long never runs in this process."""

import functools
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lowmem_db.errors import LowmemDbError
from lowmem_db.ui import draft_pages, run_pages
from lowmem_db.ui.page import REPORTING, Page
from lowmem_db.ui.workplace import Workplace

Work = Callable[[Page, Request, FormData], Response]


def build_app(place: Workplace) -> Starlette:
    """Return the page of a workplace."""
    page = Page(place)
    get = functools.partial(_route, page, "GET")
    post = functools.partial(_route, page, "POST")
    return Starlette(
        routes=[
            get("/", draft_pages.home),
            post("/new", draft_pages.new_draft),
            post("/open", draft_pages.open_run),
            get("/new/{name}", draft_pages.show_draft),
            post("/new/{name}/photos", draft_pages.add_photos),
            post("/new/{name}/remove", draft_pages.remove_photo),
            post("/new/{name}/caption", draft_pages.write_caption),
            post("/new/{name}/settings", draft_pages.change_draft),
            get("/new/{name}/plan", draft_pages.show_plan),
            get("/new/{name}/photo/{file}", draft_pages.show_photo),
            post("/new/{name}/train", draft_pages.train_draft),
            post("/new/{name}/delete", draft_pages.delete_draft),
            get("/run/{name}", run_pages.show_run),
            get("/run/{name}/status", run_pages.show_status),
            get("/run/{name}/report", run_pages.show_report),
            get("/run/{name}/forms", run_pages.show_forms),
            get("/run/{name}/drawn", run_pages.show_drawn),
            post("/run/{name}/ask", run_pages.ask_run),
            post("/run/{name}/resume", run_pages.resume_run),
            post("/run/{name}/draw", run_pages.draw),
            post("/run/{name}/export", run_pages.export),
            get("/run/{name}/picture/{path:path}", run_pages.show_picture),
            get("/run/{name}/exported/{file}", run_pages.download),
            Route("/static/page.css", _style),
            Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
        ],
        exception_handlers={HTTPException: functools.partial(_show_problem, page)},
    )


def _route(page: Page, method: str, path: str, work: Work) -> Route:
    """Return a route whose work runs in a thread; an error that the user can fix is shown where it belongs."""

    async def answer(request: Request) -> Response:
        form = await _form(request) if method == "POST" else FormData()
        try:
            return await run_in_threadpool(work, page, request, form)
        except LowmemDbError as error:
            return _problem(page, request, str(error))
        finally:
            await form.close()

    return Route(path, answer, methods=[method])


async def _form(request: Request) -> FormData:
    return await request.form(max_files=2000, max_fields=2000)


def _problem(page: Page, request: Request, message: str, status: int = 400) -> Response:
    if "HX-Request" in request.headers:
        answer = page.render("problem_part.html", message=message)
        answer.headers.update({"HX-Retarget": "#problem", "HX-Reswap": "innerHTML"})
        return answer
    answer = page.render("problem.html", message=message, back=request.headers.get("referer", "/"))
    answer.status_code = status
    return answer


def _show_problem(page: Page, request: Request, error: Exception) -> Response | Awaitable[Response]:
    assert isinstance(error, HTTPException)
    message = "There is no such page: the run or the draft is gone." if error.status_code == 404 else error.detail
    return _problem(page, request, message, error.status_code)


async def _style(request: Request) -> Response:
    return FileResponse(REPORTING / "page.css")
