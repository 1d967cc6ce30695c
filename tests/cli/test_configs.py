"""``lowmem-db configs``, and configurations by their names."""

from pathlib import Path

import pytest

from lowmem_db.config import shipped
from lowmem_db.config.loading import load_config
from lowmem_db.errors import ConfigError
from tests.cli.conftest import Run

FOLDER = Path(__file__).parents[2] / "configs"


def test_list_has_every_file_with_what_it_trains(run: Run) -> None:
    outcome = run("configs")
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(file.stem for file in FOLDER.glob("*.yaml"))
    assert all(len(line.split()) > 5 for line in lines)


def test_copy_of_the_demo_brings_its_photos_and_overwrites_nothing(run: Run, tmp_path: Path) -> None:
    outcome = run("configs", "demo", "--output", "mine")
    assert (outcome.code, outcome.out) == (0, f"{Path('mine/demo.yaml')}\n{Path('mine/examples/drawn_dog')}\n")
    assert (tmp_path / "mine/demo.yaml").read_bytes() == (FOLDER / "demo.yaml").read_bytes()
    assert (tmp_path / "mine/examples/drawn_dog/LICENSE.md").is_file()
    again = run("configs", "demo", "--output", "mine")
    assert (again.code, again.out) == (2, "")
    assert "exists already" in again.err


def test_unknown_name_is_refused_with_the_names_there_are(run: Run) -> None:
    outcome = run("configs", "sd16")
    assert outcome.code == 2
    assert "sd16: is not a configuration" in outcome.err
    assert "sd15_full_8gb" in outcome.err


@pytest.mark.parametrize("given", ["demo", "configs/demo.yaml"])
def test_name_is_found_from_an_empty_folder_with_its_photos(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(Path(given))
    assert config.model.base == "demo"
    assert sorted(file.name for file in config.subject.instance_dir.glob("*.png"))[0] == "00.png"


def test_files_of_the_user_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("seed: 7")
    assert shipped.find(Path("demo")) == Path("demo")
    (tmp_path / "configs").mkdir()
    with pytest.raises(ConfigError, match=r"does not exist; did you mean demo, a configuration of this package"):
        load_config(Path("configs/demo.yaml"))
    with pytest.raises(ConfigError, match=r"demo\.yaml: the configuration file does not exist"):
        load_config(Path("demo.yaml"))


def test_photos_of_other_files_stay_relative(tmp_path: Path) -> None:
    shipped.copy("demo", tmp_path)
    assert load_config(tmp_path / "demo.yaml").subject.instance_dir == Path("examples/drawn_dog")
