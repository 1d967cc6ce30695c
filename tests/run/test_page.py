import pytest

from lowmem_db.run import page
from lowmem_db.storage.run_folder import RunFolder


def test_a_disk_without_room_for_the_page_does_not_end_the_run(tmp_path, monkeypatch, caplog, capsys):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / page.REPORT_FILE).mkdir()  # a folder in the place of the file cannot be replaced
    page.write_page(RunFolder(tmp_path))
    assert "lowmem-db report" in capsys.readouterr().err


@pytest.mark.parametrize("event", ["checkpoint", "samples", "score", "end"])
def test_the_page_is_rewritten(tmp_path, event):
    (tmp_path / "config.yaml").write_text("{}")
    arguments = {"checkpoint": (1,), "samples": (1, tmp_path), "score": (1, {}), "end": ()}[event]
    getattr(page.ReportPage(RunFolder(tmp_path)), event)(*arguments)
    assert (tmp_path / page.REPORT_FILE).is_file()
