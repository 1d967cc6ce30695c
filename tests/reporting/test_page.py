import base64
import hashlib
import re
import shutil
import subprocess
import sys

import pytest

import lowmem_db
from lowmem_db.errors import CheckpointError
from lowmem_db.reporting.page import render
from lowmem_db.reporting.records import read_run
from lowmem_db.reporting.view import find_warnings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_the_page_shows_samples_scores_memory_and_commands(run_folder):
    page = lowmem_db.report(run_folder).read_text()
    assert (run_folder / "report.html").is_file()
    for text in ("finished", 'data-step="10"', "0.500 at step 20", "1.75 GiB", "--step 20", "torch", "9.9", "a card"):
        assert text in page
    assert page.count("data:image/jpeg") == 1 + 2 * 3  # a photo, and the samples without their grids


def test_the_page_loads_nothing_and_its_policy_fits_its_style_and_script(run_folder):
    page = render([read_run(run_folder)])
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:)[a-z/]""", page)
    for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'".replace("'", "&#39;") in page
    assert "style=" not in page
    assert " on" not in "".join(re.findall(r"<[a-z]+ [^>]*", page)).replace(" once", "")


def test_every_row_of_the_metrics_is_a_point_of_a_curve(run_folder):
    page = render([read_run(run_folder)])
    curves = re.findall(r"""<polyline class="raw[^"]*" points="([^"]*)\"""", page)
    assert [len(points.split()) for points in curves] == [29, 30, 30]  # one instance loss is not a number


def test_foreign_text_is_escaped(run_folder):
    page = render([read_run(run_folder)])
    assert "alert(1)" in page
    for markup in ("<b>dog", "<i>dog", "<script>alert"):
        assert markup not in page


def test_a_shared_page_holds_no_photo_and_no_path(run_folder):
    page = lowmem_db.report(run_folder, share=True).read_text()
    assert not (run_folder / "report.html").exists()
    assert page.count("data:image/jpeg") == 2 * 3
    for secret in ("somebody", "private_photos", str(run_folder.parent), "dog&lt;/b&gt;"):
        assert secret not in page


def test_pictures_carry_no_metadata(run_folder):
    page = lowmem_db.report(run_folder).read_text()
    pictures = [base64.b64decode(text) for text in re.findall(r'data:image/jpeg;base64,([^"]+)', page)]
    assert pictures
    assert not any(b"secret artist" in picture or b"Exif" in picture for picture in pictures)


def test_runs_are_compared(run_folder, tmp_path):
    other = shutil.copytree(run_folder, tmp_path / "other")
    config = (other / "config.yaml").read_text().replace("0.001", "0.002")
    (other / "config.yaml").write_text(config)
    page = lowmem_db.report([run_folder, other], tmp_path / "both.html").read_text()
    differences = page.split("Where their settings differ")[1].split("Last samples")[0]
    assert "training.learning_rate" in differences
    assert "0.002" in differences
    assert "max_train_steps" not in differences


@pytest.mark.parametrize("name", ["metrics.jsonl", "scores.jsonl", "plan.json", "environment.json", "samples", "final"])
def test_what_is_missing_is_left_out(run_folder, name):
    path = run_folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "my &lt;b&gt;dog" in render([read_run(run_folder)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.json", '{"phases": [1, {"name": 3, "parts": []}], "peak_bytes": "x"}'),
        ("plan.json", '{"phases": {"name": 1}}'),
        ("environment.json", '{"versions": [], "devices": "x"}'),
        ("metrics.jsonl", '{"step": 1, "loss": "x", "seconds": true}\n{"step": 2}\n'),
        ("scores.jsonl", '{"step": 1, "score": null}\n'),
        ("config.yaml", "sampling: {prompts: 7}\ntraining: []\nsubject: {instance_dir: [1]}\n"),
    ],
)
def test_odd_files_give_a_page(run_folder, name, content):
    (run_folder / name).write_text(content)
    assert "</html>" in render([read_run(run_folder)])


@pytest.mark.parametrize("config", [None, "", "- a list", "[1", "x: " + "[" * 100])
def test_a_folder_that_is_no_run_is_named(run_folder, config):
    (run_folder / "config.yaml").unlink() if config is None else (run_folder / "config.yaml").write_text(config)
    with pytest.raises(CheckpointError, match="give the output_dir of a run"):
        lowmem_db.report(run_folder)
    with pytest.raises(CheckpointError, match="is not a folder"):
        lowmem_db.report(run_folder / "nothing")


def test_warnings_name_what_looks_wrong(run_folder):
    (run_folder / "plan.json").write_text(f'{{"budget_bytes": {2 << 30}}}')
    (run_folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": NaN, "peak_bytes": {3 << 30}}}\n')
    first, second = find_warnings(read_run(run_folder))
    assert "not finite in 1 step" in first
    assert "3.00 GiB, more than its budget of 2.00 GiB" in second


def test_torch_is_not_imported(run_folder):
    code = "import sys; from lowmem_db import report; report(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(run_folder)], check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_slider_works_in_a_browser(run_folder, tmp_path):
    page = lowmem_db.report(run_folder, tmp_path / "page.html")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r'data-step="10" hidden', run.stdout)
    assert re.search(r'data-step="20">', run.stdout)
    assert "Content Security Policy" not in run.stderr
