"""The pages and forms: each reads files, or starts a command. What takes long never runs in this process."""

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lowmem_db import __version__, api
from lowmem_db.errors import LowmemDbError
from lowmem_db.fingerprint import of_values
from lowmem_db.reporting.pictures import thumbnail_bytes
from lowmem_db.reporting.records import PICTURE_SUFFIXES, read_run
from lowmem_db.reporting.view import duration, view_of
from lowmem_db.sampling.prompts import suite_names
from lowmem_db.storage.run_folder import RunFolder, read_json
from lowmem_db.ui import jobs, workplace
from lowmem_db.ui.drafts import Draft, Drafts, recipes
from lowmem_db.ui.workplace import Workplace, config_of, status_of

_HERE = Path(__file__).parent
_REPORTING = _HERE.parent / "reporting"
_GIB = 1 << 30
_MAX_PICTURES = 64
_SIZES = (256, 512)
Work = Callable[["Page", Request, FormData], Response]


@dataclass(frozen=True)
class Part:
    """A part of a page, and a key of its content."""

    key: str
    html: Markup

    def answer(self, request: Request) -> Response:
        """Return it, or nothing if the browser shows it already."""
        if request.query_params.get("known") == self.key:
            return Response(status_code=204)
        return HTMLResponse(self.html)


class Page:
    """The page of a workplace.

    Args:
        place: The workplace.
    """

    def __init__(self, place: Workplace) -> None:
        self.place = place
        self.drafts = Drafts(place)
        folders = [FileSystemLoader(_HERE / "templates"), FileSystemLoader(_REPORTING)]
        self._templates = Environment(loader=ChoiceLoader(folders), autoescape=True, undefined=StrictUndefined)
        self._templates.globals |= {"version": __version__}
        self._templates.filters |= {"duration": duration, "gib": _gib, "segment": _segment}

    def render(self, template: str, **values: Any) -> HTMLResponse:
        """Return a page or a part of one."""
        return HTMLResponse(self._templates.get_template(template).render(**values))

    def part(self, part_id: str, address: str, seconds: int, template: str, **values: Any) -> Part:
        """Return a part of a page that asks for itself again from time to time.

        Args:
            part_id: Its id.
            address: Where it asks.
            seconds: How often.
            template: Its template.
            **values: What that shows.
        """
        inner = Markup(self._templates.get_template(template).render(**values))
        key = of_values(inner)[:16]
        outer = self._templates.get_template("part.html")
        return Part(key, Markup(outer.render(name=part_id, address=address, key=key, seconds=seconds, inner=inner)))

    def run(self, request: Request) -> RunFolder:
        """Return the run that an address names.

        Raises:
            HTTPException: There is none.
        """
        return _found(self.place.all(), request.path_params["name"])

    def draft(self, request: Request) -> Draft:
        """Return the draft that an address names.

        Raises:
            HTTPException: There is none.
        """
        return _found(self.drafts.all(), request.path_params["name"])


def build_app(place: Workplace) -> Starlette:
    """Return the page of a workplace."""
    page = Page(place)
    get = functools.partial(_route, page, "GET")
    post = functools.partial(_route, page, "POST")
    return Starlette(
        routes=[
            get("/", home),
            post("/new", new_draft),
            post("/open", open_run),
            get("/new/{name}", show_draft),
            post("/new/{name}/photos", add_photos),
            post("/new/{name}/remove", remove_photo),
            post("/new/{name}/caption", write_caption),
            post("/new/{name}/settings", change_draft),
            get("/new/{name}/plan", show_plan),
            get("/new/{name}/photo/{file}", show_photo),
            post("/new/{name}/train", train_draft),
            post("/new/{name}/delete", delete_draft),
            get("/run/{name}", show_run),
            get("/run/{name}/status", show_status),
            get("/run/{name}/report", show_report),
            get("/run/{name}/drawn", show_drawn),
            post("/run/{name}/ask", ask_run),
            post("/run/{name}/resume", resume_run),
            post("/run/{name}/draw", draw),
            post("/run/{name}/export", export),
            get("/run/{name}/picture/{path:path}", show_picture),
            get("/run/{name}/exported/{file}", download),
            Route("/static/page.css", _style),
            Mount("/static", StaticFiles(directory=_HERE / "static")),
        ],
        exception_handlers={HTTPException: functools.partial(_show_problem, page)},
    )


def home(page: Page, request: Request, form: FormData) -> Response:
    """Show all runs and drafts."""
    runs = [
        {"name": name, "status": status_of(run), "picture": _newest_picture(name, run)}
        for name, run in page.place.all().items()
    ]
    return page.render("home.html", runs=runs, drafts=list(page.drafts.all().values()), folder=page.place.runs)


def new_draft(page: Page, request: Request, form: FormData) -> Response:
    """Begin a draft."""
    return _to(f"/new/{_segment(page.drafts.new(_text(form, 'noun'), _text(form, 'folder').strip()).name)}")


def open_run(page: Page, request: Request, form: FormData) -> Response:
    """Show a run that lies elsewhere."""
    return _to(f"/run/{_segment(page.place.open(Path(_text(form, 'folder')).expanduser()))}")


def show_draft(page: Page, request: Request, form: FormData) -> Response:
    """Show a draft: photos, questions, plan."""
    draft = page.draft(request)
    return page.render(
        "draft.html",
        draft=draft,
        photos=page.drafts.photos_of(draft),
        is_uploaded=page.drafts.is_uploaded(draft),
        recipes=recipes(),
        plan=_plan_part(page, draft).html,
    )


def add_photos(page: Page, request: Request, form: FormData) -> Response:
    """Keep uploaded photos."""
    draft = page.draft(request)
    for upload in form.getlist("photos"):
        if isinstance(upload, UploadFile) and upload.filename:
            page.drafts.add(draft, upload.filename, upload.file)
    return _to(f"/new/{_segment(draft.name)}")


def remove_photo(page: Page, request: Request, form: FormData) -> Response:
    """Delete an uploaded photo."""
    draft = page.draft(request)
    page.drafts.remove(draft, _text(form, "photo"))
    return _to(f"/new/{_segment(draft.name)}")


def write_caption(page: Page, request: Request, form: FormData) -> Response:
    """Write the caption of a photo."""
    page.drafts.caption(page.draft(request), _text(form, "photo"), _text(form, "caption"))
    return HTMLResponse("saved")


def change_draft(page: Page, request: Request, form: FormData) -> Response:
    """Change what was asked, and plan anew."""
    values = {name: _text(form, name) for name in ("noun", "identifier", "recipe", "base", "steps")}
    draft = page.drafts.change(page.draft(request), **values)
    if "HX-Request" not in request.headers:
        return _to(f"/new/{_segment(draft.name)}")
    return _plan_fragment(page, request, draft)


def show_plan(page: Page, request: Request, form: FormData) -> Response:
    """Show how far the plan is, or what it says."""
    return _plan_fragment(page, request, page.draft(request))


def show_photo(page: Page, request: Request, form: FormData) -> Response:
    """Send a small copy of a photo."""
    path = page.drafts.photo(page.draft(request), request.path_params["file"])
    return _picture(path, 256)


def train_draft(page: Page, request: Request, form: FormData) -> Response:
    """Start the run of a draft."""
    run = page.drafts.train(page.draft(request))
    return _to(f"/run/{_segment(run.root.name)}")


def delete_draft(page: Page, request: Request, form: FormData) -> Response:
    """Forget a draft."""
    page.drafts.delete(page.draft(request))
    return _to("/")


def show_run(page: Page, request: Request, form: FormData) -> Response:
    """Show a run: what it does, its report, drawing, export."""
    run, name = page.run(request), request.path_params["name"]
    config = config_of(run)
    subject, lora = config.get("subject", {}), config.get("lora", {})
    return page.render(
        "run_page.html",
        name=name,
        status=_status_part(page, name, run).html,
        report=_report_part(page, name, run).html,
        drawn=_drawn_part(page, name, run).html,
        prompt=subject.get("instance_prompt", "") if isinstance(subject, dict) else "",
        steps=run.complete_steps(),
        is_finished=run.final_dir.is_dir(),
        is_lora=bool(lora.get("enabled")) if isinstance(lora, dict) else False,
        suites=suite_names(),
        folder=run.root,
    )


def show_status(page: Page, request: Request, form: FormData) -> Response:
    """Show what a run does."""
    return _status_part(page, request.path_params["name"], page.run(request)).answer(request)


def show_report(page: Page, request: Request, form: FormData) -> Response:
    """Show the report as it is now."""
    return _report_part(page, request.path_params["name"], page.run(request)).answer(request)


def show_drawn(page: Page, request: Request, form: FormData) -> Response:
    """Show what was drawn and exported."""
    return _drawn_part(page, request.path_params["name"], page.run(request)).answer(request)


def ask_run(page: Page, request: Request, form: FormData) -> Response:
    """Ask a run to stop, to save or to draw samples."""
    run, what = page.run(request), _text(form, "what")
    if what == "stop":
        workplace.stop(run)
    else:
        api.ask(run.root, what)  # type: ignore[arg-type]  # it says what is allowed
    return _to(f"/run/{_segment(request.path_params['name'])}")


def resume_run(page: Page, request: Request, form: FormData) -> Response:
    """Continue a run."""
    run = page.run(request)
    commands = read_json(workplace.train_folder(run) / jobs.COMMANDS)
    started_with = Path(commands[0][1]) if isinstance(commands, list) else run.config_file
    workplace.train(run, run.config_file if run.config_file.is_file() else started_with)
    return _to(f"/run/{_segment(request.path_params['name'])}")


def draw(page: Page, request: Request, form: FormData) -> Response:
    """Draw from a checkpoint."""
    run = page.run(request)
    out = _new_folder(run.root / "drawn")
    arguments = ["generate", str(run.root), "--output", str(out)]
    for prompt in _text(form, "prompts").splitlines():
        if prompt.strip():
            arguments += ["--prompt", prompt.strip()]
    options = ("suite", "step", "num-images", "seed", "guidance-scale", "negative-prompt")
    for option in options:
        if value := _text(form, option).strip():
            arguments += [f"--{option}={value}"]
    jobs.start(out / "job", [arguments])
    return _to(f"/run/{_segment(request.path_params['name'])}#drawn")


def _new_folder(folder: Path) -> Path:
    """Make the next of the folders ``001``, ``002``, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + len([each for each in folder.iterdir() if each.name.isdecimal()])
    while True:
        try:
            (made := folder / f"{number:03d}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return made


def export(page: Page, request: Request, form: FormData) -> Response:
    """Export a checkpoint."""
    run = page.run(request)
    layout, precision, step = _text(form, "layout"), _text(form, "precision"), _text(form, "step")
    folder = run.root / "exported"
    ending = "" if layout == "diffusers" else ".safetensors"
    parts = [run.root.absolute().name, f"step-{step}" if step not in ("", "final") else "", layout, precision]
    name = "-".join(part for part in parts if part) + ending
    arguments = ["export", str(run.root), "--out", str(folder / name)]
    for option, value in (("--format", layout), ("--precision", precision), ("--step", step)):
        if value:
            arguments += [f"{option}={value}"]
    folder.mkdir(exist_ok=True)
    jobs.start(folder / ".job", [arguments])
    return _to(f"/run/{_segment(request.path_params['name'])}#drawn")


def show_picture(page: Page, request: Request, form: FormData) -> Response:
    """Send a picture of a run: one it drew, or a photo it trained from."""
    run, given = page.run(request), request.path_params["path"]
    size = request.query_params.get("size", "")
    pixels = int(size) if size.isdecimal() and int(size) in _SIZES else None
    if given.startswith("photos/"):
        subject = config_of(run).get("subject", {})
        root = Path(str(subject.get("instance_dir", ""))) if isinstance(subject, dict) else Path()
        path, pixels = root / given.removeprefix("photos/"), 256
    else:
        root = run.root
        path = root / given
        if Path(given).parts[:1] not in {("samples",), ("drawn",)}:
            raise HTTPException(404)
    if path.suffix.lower() not in PICTURE_SUFFIXES or not path.resolve().is_relative_to(root.resolve()):
        raise HTTPException(404)
    return _picture(path, pixels)


def download(page: Page, request: Request, form: FormData) -> Response:
    """Send an exported file."""
    files = {file.name: file for file in (page.run(request).root / "exported").glob("*.safetensors")}
    path = _found(files, request.path_params["file"])
    return FileResponse(path, filename=path.name)


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


def _plan_fragment(page: Page, request: Request, draft: Draft) -> Response:
    return _plan_part(page, draft).answer(request)


def _plan_part(page: Page, draft: Draft) -> Part:
    subject = page.drafts.fields_of(draft)["subject"]
    plan = _plan_of(page, draft)
    return page.part(
        "plan", f"/new/{_segment(draft.name)}/plan", 2, "plan.html", draft=draft, plan=plan, prompts=subject
    )


def _plan_of(page: Page, draft: Draft) -> dict[str, Any]:
    """Return what the template shows of a plan."""
    try:
        job = page.drafts.plan(draft)
    except LowmemDbError as error:
        return {"state": "failed", "message": str(error), "photos": {}, "found": {}}
    folder = page.drafts.plan_folder(draft)
    photos, found = jobs.output_of(folder, 0), jobs.output_of(folder, 1)
    return {
        "state": job.state,
        "message": job.message,
        "photos": photos.get("photos", {}) if isinstance(photos, dict) else {},
        "found": found if isinstance(found, dict) and job.state == "done" else {},
    }


def _status_part(page: Page, name: str, run: RunFolder) -> Part:
    address = f"/run/{_segment(name)}/status"
    return page.part("status", address, 1, "status.html", name=name, status=status_of(run))


def _report_part(page: Page, name: str, run: RunFolder) -> Part:
    address = f"/run/{_segment(name)}/report"
    return page.part("report", address, 3, "report.html", run=_report(name, run), compared=False)


def _drawn_part(page: Page, name: str, run: RunFolder) -> Part:
    values = {"drawn": _drawn(name, run), "exported": _exported(run)}
    return page.part("drawn", f"/run/{_segment(name)}/drawn", 2, "drawn.html", name=name, **values)


def _report(name: str, run: RunFolder) -> dict[str, Any] | None:
    """Return what the template of the report shows; None if there is no configuration yet."""
    if not run.config_file.is_file():
        return None

    def show(path: Path, pixels: int) -> str:
        inside = path.is_relative_to(run.root)
        place = path.relative_to(run.root).as_posix() if inside else f"photos/{path.name}"
        return f"/run/{_segment(name)}/picture/{quote(place)}?size=256"

    return view_of(read_run(run.root), name, share=False, show=show)


def _drawn(name: str, run: RunFolder) -> list[dict[str, Any]]:
    """Return what was drawn, the newest first."""
    found = []
    for folder in sorted((each for each in (run.root / "drawn").glob("*") if each.name.isdecimal()), reverse=True):
        files = sorted(file for file in folder.glob("*.png") if file.stem != "grid")[:_MAX_PICTURES]
        addresses = [f"/run/{_segment(name)}/picture/drawn/{folder.name}/{quote(file.name)}" for file in files]
        commands = read_json(folder / "job" / jobs.COMMANDS)
        command = commands[0] if isinstance(commands, list) and commands else []
        prompts = [command[i + 1] for i, part in enumerate(command[:-1]) if part == "--prompt"]
        options = [part for part in command if part.startswith("--") and "=" in part]
        job = jobs.job_in(folder / "job")
        found.append({
            "number": int(folder.name), "job": job, "pictures": addresses,
            "what": ", ".join(prompts) or "the prompt of the run", "options": " ".join(options),
        })  # fmt: skip
    return found


def _exported(run: RunFolder) -> dict[str, Any]:
    """Return what was exported, and how far the last export is."""
    folder = run.root / "exported"
    files = [
        {"name": file.name, "size": file.stat().st_size if file.is_file() else None, "path": file}
        for file in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if not file.name.startswith(".")
    ]
    return {"job": jobs.job_in(folder / ".job"), "files": files}


def _newest_picture(name: str, run: RunFolder) -> str | None:
    sample = run.newest_sample()
    if sample is None:
        return None
    return f"/run/{_segment(name)}/picture/{quote(sample.relative_to(run.root).as_posix())}?size=256"


def _picture(path: Path | None, pixels: int | None) -> Response:
    if path is None or not path.is_file():
        raise HTTPException(404)
    if pixels is None:
        return FileResponse(path)
    content = thumbnail_bytes(path, pixels)
    if content is None:
        raise HTTPException(404)
    return Response(content, media_type="image/jpeg")


async def _style(request: Request) -> Response:
    return FileResponse(_REPORTING / "page.css")


def _segment(name: str) -> str:
    return quote(name, safe="")


def _to(address: str) -> Response:
    return RedirectResponse(address, 303)


def _text(form: FormData, name: str) -> str:
    value = form.get(name, "")
    return value if isinstance(value, str) else ""


def _found(values: dict[str, Any], name: str) -> Any:
    if name not in values:
        raise HTTPException(404)
    return values[name]


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"
