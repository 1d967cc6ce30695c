"""The page of one run: what it does, its report, drawing, export."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from lowmem_db import api
from lowmem_db.reporting.records import PICTURE_SUFFIXES, read_run
from lowmem_db.reporting.view import view_of
from lowmem_db.sampling.prompts import suite_names
from lowmem_db.storage.run_folder import RunFolder, read_json
from lowmem_db.ui import jobs, workplace
from lowmem_db.ui.page import Page, Part, found, picture, segment, text_of, to
from lowmem_db.ui.workplace import config_of, status_of

_MAX_PICTURES = 64
_SIZES = (256, 512)


def show_run(page: Page, request: Request, form: FormData) -> Response:
    """Show a run: what it does, its report, drawing, export."""
    run, name = page.run(request), request.path_params["name"]
    return page.render(
        "run_page.html",
        name=name,
        status=_status_part(page, name, run).html,
        report=_report_part(page, name, run).html,
        forms=_forms_part(page, name, run).html,
        drawn=_drawn_part(page, name, run).html,
        prompt=_prompt(run),
        folder=run.root,
    )


def show_status(page: Page, request: Request, form: FormData) -> Response:
    """Show what a run does."""
    return _status_part(page, request.path_params["name"], page.run(request)).answer(request)


def show_report(page: Page, request: Request, form: FormData) -> Response:
    """Show the report as it is now."""
    return _report_part(page, request.path_params["name"], page.run(request)).answer(request)


def show_forms(page: Page, request: Request, form: FormData) -> Response:
    """Show the forms of drawing and export, once there is a checkpoint."""
    return _forms_part(page, request.path_params["name"], page.run(request)).answer(request)


def show_drawn(page: Page, request: Request, form: FormData) -> Response:
    """Show what was drawn and exported."""
    return _drawn_part(page, request.path_params["name"], page.run(request)).answer(request)


def ask_run(page: Page, request: Request, form: FormData) -> Response:
    """Ask a run to stop, to save or to draw samples."""
    run, what = page.run(request), text_of(form, "what")
    if what == "stop":
        workplace.stop(run)
    else:
        api.ask(run.root, what)  # type: ignore[arg-type]  # it says what is allowed
    return to(f"/run/{segment(request.path_params['name'])}")


def resume_run(page: Page, request: Request, form: FormData) -> Response:
    """Continue a run."""
    run = page.run(request)
    commands = read_json(workplace.train_folder(run) / jobs.COMMANDS)
    started_with = Path(commands[0][1]) if isinstance(commands, list) else run.config_file
    workplace.train(run, run.config_file if run.config_file.is_file() else started_with)
    return to(f"/run/{segment(request.path_params['name'])}")


def draw(page: Page, request: Request, form: FormData) -> Response:
    """Draw from a checkpoint."""
    run = page.run(request)
    out = _new_folder(run.root / "drawn")
    arguments = ["generate", str(run.root), "--output", str(out)]
    for prompt in text_of(form, "prompts").splitlines():
        if prompt.strip():
            arguments += ["--prompt", prompt.strip()]
    options = ("suite", "step", "num-images", "seed", "guidance-scale", "negative-prompt")
    for option in options:
        if value := text_of(form, option).strip():
            arguments += [f"--{option}={value}"]
    jobs.start(out / "job", [arguments])
    return to(f"/run/{segment(request.path_params['name'])}#drawn")


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
    layout, precision, step = text_of(form, "layout"), text_of(form, "precision"), text_of(form, "step")
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
    return to(f"/run/{segment(request.path_params['name'])}#drawn")


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
    return picture(path, pixels)


def download(page: Page, request: Request, form: FormData) -> Response:
    """Send an exported file."""
    files = {file.name: file for file in (page.run(request).root / "exported").glob("*.safetensors")}
    path = found(files, request.path_params["file"])
    return FileResponse(path, filename=path.name)


def _status_part(page: Page, name: str, run: RunFolder) -> Part:
    address = f"/run/{segment(name)}/status"
    return page.part("status", address, 1, "status.html", name=name, status=status_of(run))


def _report_part(page: Page, name: str, run: RunFolder) -> Part:
    address = f"/run/{segment(name)}/report"
    return page.part("report", address, 3, "report.html", run=_report(name, run), compared=False)


def _forms_part(page: Page, name: str, run: RunFolder) -> Part:
    steps, is_finished = run.complete_steps(), run.final_dir.is_dir()
    lora = config_of(run).get("lora", {})
    values = {
        "name": name,
        "prompt": _prompt(run),
        "steps": steps,
        "is_finished": is_finished,
        "is_lora": bool(lora.get("enabled")) if isinstance(lora, dict) else False,
        "suites": suite_names(),
    }
    # They ask for themselves until they can be used: what is typed into them stays.
    seconds = 0 if steps or is_finished else 3
    return page.part("forms", f"/run/{segment(name)}/forms", seconds, "forms.html", **values)


def _prompt(run: RunFolder) -> str:
    subject = config_of(run).get("subject", {})
    return str(subject.get("instance_prompt", "")) if isinstance(subject, dict) else ""


def _drawn_part(page: Page, name: str, run: RunFolder) -> Part:
    values = {"drawn": _drawn(name, run), "exported": _exported(run)}
    return page.part("drawn", f"/run/{segment(name)}/drawn", 2, "drawn.html", name=name, **values)


def _report(name: str, run: RunFolder) -> dict[str, Any] | None:
    """Return what the template of the report shows; None if there is no configuration yet."""
    if not run.config_file.is_file():
        return None

    def show(path: Path, pixels: int) -> str:
        inside = path.is_relative_to(run.root)
        place = path.relative_to(run.root).as_posix() if inside else f"photos/{path.name}"
        return f"/run/{segment(name)}/picture/{quote(place)}?size=256"

    return view_of(read_run(run.root), name, share=False, show=show)


def _drawn(name: str, run: RunFolder) -> list[dict[str, Any]]:
    """Return what was drawn, the newest first."""
    drawings = []
    for folder in sorted((each for each in (run.root / "drawn").glob("*") if each.name.isdecimal()), reverse=True):
        files = sorted(file for file in folder.glob("*.png") if file.stem != "grid")[:_MAX_PICTURES]
        addresses = [f"/run/{segment(name)}/picture/drawn/{folder.name}/{quote(file.name)}" for file in files]
        commands = read_json(folder / "job" / jobs.COMMANDS)
        command = commands[0] if isinstance(commands, list) and commands else []
        prompts = [command[i + 1] for i, part in enumerate(command[:-1]) if part == "--prompt"]
        options = [part for part in command if part.startswith("--") and "=" in part]
        job = jobs.job_in(folder / "job")
        drawings.append({
            "number": int(folder.name), "job": job, "pictures": addresses,
            "what": ", ".join(prompts) or "the prompt of the run", "options": " ".join(options),
        })  # fmt: skip
    return drawings


def _exported(run: RunFolder) -> dict[str, Any]:
    """Return what was exported, and how far the last export is."""
    folder = run.root / "exported"
    files = [
        {"name": file.name, "size": file.stat().st_size if file.is_file() else None, "path": file}
        for file in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if not file.name.startswith(".")
    ]
    return {"job": jobs.job_in(folder / ".job"), "files": files}
