"""The pages of all runs and drafts, and of one draft: photos, captions, questions, plan."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from lowmem_db.errors import LowmemDbError
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.ui import jobs
from lowmem_db.ui.drafts import Draft, recipes
from lowmem_db.ui.page import Page, Part, picture, segment, text_of, to
from lowmem_db.ui.workplace import status_of


def home(page: Page, request: Request, form: FormData) -> Response:
    """Show all runs and drafts."""
    runs = [
        {"name": name, "status": status_of(run), "picture": _newest_picture(name, run)}
        for name, run in page.place.all().items()
    ]
    return page.render("home.html", runs=runs, drafts=list(page.drafts.all().values()), folder=page.place.runs)


def new_draft(page: Page, request: Request, form: FormData) -> Response:
    """Begin a draft."""
    return to(f"/new/{segment(page.drafts.new(text_of(form, 'noun'), text_of(form, 'folder').strip()).name)}")


def open_run(page: Page, request: Request, form: FormData) -> Response:
    """Show a run that lies elsewhere."""
    return to(f"/run/{segment(page.place.open(Path(text_of(form, 'folder')).expanduser()))}")


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
    uploads = [upload for upload in form.getlist("photos") if isinstance(upload, UploadFile)]
    page.drafts.add(draft, [(upload.filename, upload.file) for upload in uploads if upload.filename])
    return to(f"/new/{segment(draft.name)}")


def remove_photo(page: Page, request: Request, form: FormData) -> Response:
    """Delete an uploaded photo."""
    draft = page.draft(request)
    page.drafts.remove(draft, text_of(form, "photo"))
    return to(f"/new/{segment(draft.name)}")


def write_caption(page: Page, request: Request, form: FormData) -> Response:
    """Write the caption of a photo."""
    page.drafts.caption(page.draft(request), text_of(form, "photo"), text_of(form, "caption"))
    return HTMLResponse("saved")


def change_draft(page: Page, request: Request, form: FormData) -> Response:
    """Change what was asked, and plan anew."""
    values = {name: text_of(form, name) for name in ("noun", "identifier", "recipe", "base", "steps")}
    draft = page.drafts.change(page.draft(request), **values)
    if "HX-Request" not in request.headers:
        return to(f"/new/{segment(draft.name)}")
    return _plan_fragment(page, request, draft)


def show_plan(page: Page, request: Request, form: FormData) -> Response:
    """Show how far the plan is, or what it says."""
    return _plan_fragment(page, request, page.draft(request))


def show_photo(page: Page, request: Request, form: FormData) -> Response:
    """Send a small copy of a photo."""
    path = page.drafts.photo(page.draft(request), request.path_params["file"])
    return picture(path, 256)


def train_draft(page: Page, request: Request, form: FormData) -> Response:
    """Start the run of a draft."""
    run = page.drafts.train(page.draft(request))
    return to(f"/run/{segment(run.root.name)}")


def delete_draft(page: Page, request: Request, form: FormData) -> Response:
    """Forget a draft."""
    page.drafts.delete(page.draft(request))
    return to("/")


def _plan_fragment(page: Page, request: Request, draft: Draft) -> Response:
    return _plan_part(page, draft).answer(request)


def _plan_part(page: Page, draft: Draft) -> Part:
    subject = page.drafts.fields_of(draft)["subject"]
    plan = _plan_of(page, draft)
    return page.part(
        "plan", f"/new/{segment(draft.name)}/plan", 2, "plan.html", draft=draft, plan=plan, prompts=subject
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


def _newest_picture(name: str, run: RunFolder) -> str | None:
    sample = run.newest_sample()
    if sample is None:
        return None
    return f"/run/{segment(name)}/picture/{quote(sample.relative_to(run.root).as_posix())}?size=256"
