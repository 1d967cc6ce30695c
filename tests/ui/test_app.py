"""The pages and forms without a browser: what they show, what they refuse, and that foreign text is never markup."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.ui import jobs
from lowmem_db.ui.workplace import Workplace, status_of
from tests.ui.conftest import PHOTOS

MARKUP = "my <b>dog"


@pytest.fixture
def shown(place: Workplace, run_folder: Path) -> RunFolder:
    """A finished run in the workplace, whose name holds markup."""
    place.runs.mkdir()
    shutil.move(run_folder, place.runs / MARKUP)
    return RunFolder(place.runs / MARKUP)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were started, which do not run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(jobs, "start", lambda folder, given: commands.extend(given))
    return commands


def test_runs_are_listed_and_their_names_are_no_markup(client: TestClient, shown: RunFolder) -> None:
    page = client.get("/").text
    assert "my &lt;b&gt;dog" in page
    assert "/run/my%20%3Cb%3Edog" in page
    assert MARKUP not in page


def test_page_of_a_run_shows_its_report_with_addresses_of_pictures(client: TestClient, shown: RunFolder) -> None:
    page = client.get("/run/my%20%3Cb%3Edog").text
    for said in ("finished</strong> after 30 steps", "per step", 'data-step="20"', "step 10", "the final model"):
        assert said in page
    assert MARKUP not in page
    assert "<script>alert" not in page
    assert "data:image" not in page
    pictures = set(re.findall(r'<img src="([^"]+)"', page))
    assert len(pictures) == 1 + 2 * 3
    for address in pictures:
        answer = client.get(address)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
        assert b"secret artist" not in answer.content
    assert not re.search(r"style=|\son\w+=", page)


@pytest.mark.parametrize(
    "path",
    [
        "config.yaml", "samples/../config.yaml", "samples/%2e%2e/config.yaml", "..%2f..%2fsecret.png",
        "photos/..%2f..%2fsecret.png", "/etc/passwd", "samples/none.png", "checkpoints/step-000010/COMPLETE",
    ],
)  # fmt: skip
def test_only_pictures_of_the_run_are_sent(client: TestClient, shown: RunFolder, tmp_path: Path, path: str) -> None:
    shutil.copyfile(PHOTOS[0], tmp_path / "secret.png")
    assert client.get(f"/run/my%20%3Cb%3Edog/picture/{path}").status_code == 404


def test_link_out_of_the_run_is_not_followed(client: TestClient, shown: RunFolder, tmp_path: Path) -> None:
    shutil.copyfile(PHOTOS[0], tmp_path / "secret.png")
    (shown.root / "samples" / "link.png").symlink_to(tmp_path / "secret.png")
    assert client.get("/run/my%20%3Cb%3Edog/picture/samples/link.png").status_code == 404


def test_part_of_a_page_is_sent_again_only_if_it_has_changed(client: TestClient, shown: RunFolder) -> None:
    address = "/run/my%20%3Cb%3Edog/report"
    known = re.findall(r"known=(\w+)", client.get(address).text)[0]
    assert client.get(f"{address}?known={known}").status_code == 204
    with shown.metrics_file.open("a") as file:
        file.write('\n{"step": 31, "loss": 1.0}\n')
    assert client.get(f"{address}?known={known}").status_code == 200


def test_drawing_and_export_are_commands(client: TestClient, shown: RunFolder, started: list[list[str]]) -> None:
    address = "/run/my%20%3Cb%3Edog"
    prompts = {"prompts": "a zx dog\n\n--output=/etc\n", "step": "20", "num-images": "2", "guidance-scale": ""}
    assert client.post(f"{address}/draw", data=prompts, follow_redirects=False).status_code == 303
    assert client.post(f"{address}/export", data={"layout": "single-file", "precision": "fp16", "step": "20"})
    drawn, exported = started
    assert drawn == [
        "generate", str(shown.root), "--output", str(shown.root / "drawn" / "001"), "--prompt", "a zx dog",
        "--prompt", "--output=/etc", "--step=20", "--num-images=2",
    ]  # fmt: skip
    file = shown.root / "exported" / "my <b>dog-step-20-single-file-fp16.safetensors"
    assert exported == [
        "export", str(shown.root), "--out", str(file), "--format=single-file", "--precision=fp16", "--step=20",
    ]  # fmt: skip


def test_nothing_that_trains_cannot_be_asked_and_says_so(client: TestClient, shown: RunFolder) -> None:
    answer = client.post("/run/my%20%3Cb%3Edog/ask", data={"what": "save"})
    assert answer.status_code == 400
    assert "nothing trains in" in answer.text
    assert client.post("/run/my%20%3Cb%3Edog/ask", data={"what": "<i>x"}).text.count("<i>x") == 0


@pytest.mark.parametrize("address", ["/run/nothing", "/new/nothing", "/run/..%2f..", "/nothing", "/static/../app.py"])
def test_what_does_not_exist_is_a_page_too(client: TestClient, place: Workplace, address: str) -> None:
    assert client.get(address).status_code == 404


def test_run_elsewhere_is_opened_once(client: TestClient, place: Workplace, run_folder: Path, tmp_path: Path) -> None:
    elsewhere = run_folder.rename(tmp_path / MARKUP)
    for _ in range(2):
        answer = client.post("/open", data={"folder": str(elsewhere)}, follow_redirects=False)
        assert answer.headers["location"] == "/run/my%20%3Cb%3Edog"
    assert len(place.all()) == 1
    refused = client.post("/open", data={"folder": str(tmp_path)})
    assert (refused.status_code, "is not a run" in refused.text) == (400, True)


def test_draft_from_upload_to_command(client: TestClient, place: Workplace, started: list[list[str]]) -> None:
    page = client.post("/new", data={"noun": "<i>dog</i>", "folder": ""})
    assert page.url.path == "/new/i-dog-i"
    assert "<i>dog" not in page.text
    files = [("photos", ("one.jpg", io.BytesIO(PHOTOS[0].read_bytes()), "image/jpeg"))]
    page = client.post("/new/i-dog-i/photos", files=files)
    assert 'alt="photo one.jpg"' in page.text
    assert client.get("/new/i-dog-i/photo/one.jpg").headers["content-type"] == "image/jpeg"
    assert client.get("/new/i-dog-i/photo/..%2f..%2fone.jpg").status_code == 404
    assert client.post("/new/i-dog-i/train", follow_redirects=False).headers["location"] == "/run/i-dog-i"
    assert [command[0] for command in started] == ["photos", "plan", "train"]


def test_run_that_is_locked_by_another_process_is_shown_as_running(shown: RunFolder) -> None:
    shutil.rmtree(shown.final_dir)
    assert status_of(shown).state == "stopped"
    code = (
        "import sys; from pathlib import Path; from lowmem_db.storage.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(shown.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        status = status_of(shown)
        other.communicate("")
    assert (status.state, status.step) == ("training", 30)
    assert status_of(shown).state == "stopped"


def test_page_needs_no_torch() -> None:
    code = "import sys; import lowmem_db.ui.server; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers')))"
    subprocess.run([sys.executable, "-c", code], check=True)
