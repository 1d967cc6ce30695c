"""What all pages share: templates, parts that ask for themselves again, and short answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from lowmem_db import __version__
from lowmem_db.fingerprint import of_values
from lowmem_db.reporting.pictures import thumbnail_bytes
from lowmem_db.reporting.view import duration
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.ui.drafts import Draft, Drafts
from lowmem_db.ui.workplace import Workplace

_HERE = Path(__file__).parent
REPORTING = _HERE.parent / "reporting"
_GIB = 1 << 30


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
        folders = [FileSystemLoader(_HERE / "templates"), FileSystemLoader(REPORTING)]
        self._templates = Environment(loader=ChoiceLoader(folders), autoescape=True, undefined=StrictUndefined)
        self._templates.globals |= {"version": __version__}
        self._templates.filters |= {"duration": duration, "gib": _gib, "segment": segment}

    def render(self, template: str, **values: Any) -> HTMLResponse:
        """Return a page or a part of one."""
        return HTMLResponse(self._templates.get_template(template).render(**values))

    def part(self, part_id: str, address: str, seconds: int, template: str, **values: Any) -> Part:
        """Return a part of a page that asks for itself again from time to time.

        Args:
            part_id: Its id.
            address: Where it asks.
            seconds: How often; 0 for never again.
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
        return found(self.place.all(), request.path_params["name"])

    def draft(self, request: Request) -> Draft:
        """Return the draft that an address names.

        Raises:
            HTTPException: There is none.
        """
        return found(self.drafts.all(), request.path_params["name"])


def segment(name: str) -> str:
    """Return a name as a segment of an address."""
    return quote(name, safe="")


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"


def found(values: dict[str, Any], name: str) -> Any:
    """Return what has a name.

    Raises:
        HTTPException: Nothing has it.
    """
    if name not in values:
        raise HTTPException(404)
    return values[name]


def text_of(form: FormData, name: str) -> str:
    """Return a field of a form; nothing if it is not there or a file."""
    value = form.get(name, "")
    return value if isinstance(value, str) else ""


def to(address: str) -> Response:
    """Send the browser on to an address."""
    return RedirectResponse(address, 303)


def picture(path: Path | None, pixels: int | None) -> Response:
    """Send a picture, or a small copy of it with at most so many pixels a side.

    Raises:
        HTTPException: There is no such picture.
    """
    if path is None or not path.is_file():
        raise HTTPException(404)
    if pixels is None:
        return FileResponse(path)
    content = thumbnail_bytes(path, pixels)
    if content is None:
        raise HTTPException(404)
    return Response(content, media_type="image/jpeg")
