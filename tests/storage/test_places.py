"""What a model's name means on this machine, by the names of files alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_db.errors import ModelError
from lowmem_db.storage.places import DEMO_DIR, EMBEDDING_FILE, LORA_FILE, absolute_base, place_of


def make(root: Path, *files: str) -> Path:
    for name in files:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def test_nothing_heavy_is_imported() -> None:
    program = "import sys, lowmem_db.run.inputs; print({'torch', 'numpy', 'safetensors'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "set()"


def test_places_of_models(tmp_path: Path) -> None:
    folder = make(tmp_path / "tiny", "model_index.json")
    run = make(tmp_path / "run", "config.yaml", "final/model_index.json")
    file = make(tmp_path, "one.safetensors") / "one.safetensors"
    assert place_of("demo") == DEMO_DIR
    assert place_of("demo_if") == DEMO_DIR.parent / "if"
    assert place_of("demo_if_ii") == DEMO_DIR.parent / "if_ii"
    assert place_of(str(folder)) == folder
    assert place_of(str(run)) == run / "final"
    assert place_of(str(file)) == file
    assert place_of("owner/name") is None
    assert place_of("owner/name/file.safetensors") is None


def test_folder_of_the_hub_s_cache_stands_for_its_snapshot(tmp_path: Path) -> None:
    cached = make(tmp_path / "models--owner--tiny", "snapshots/abc/model_index.json", "blobs/x")
    for name in (cached, cached / "snapshots", cached / "snapshots" / "abc"):
        assert place_of(str(name)) == cached / "snapshots" / "abc"
    make(cached, "snapshots/def/model_index.json")
    with pytest.raises(ModelError, match=r"has 2 snapshots \(abc, def\); allowed: one"):
        place_of(str(cached))
    make(cached, "refs/main")
    (cached / "refs" / "main").write_text("def\n")
    assert place_of(str(cached)) == cached / "snapshots" / "def"
    with pytest.raises(ModelError, match=r"is a cache of models from the hub; .* Name owner/tiny"):
        place_of(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "named", "said"),
    [
        (
            ["dog/config.yaml"],
            "dog",
            "is a run without a final model; .*lowmem-db train {root}/dog/config.yaml --resume",
        ),
        (["dog/config.yaml", f"dog/final/{LORA_FILE}"], "dog", "holds a LoRA .*lowmem-db export {root}/dog --merge"),
        (
            ["dog/config.yaml", f"dog/final/{EMBEDDING_FILE}"],
            "dog",
            "has learned a word .*Name the base of that run, and the word beside it: model.embeddings={root}/dog",
        ),
        (
            ["dog/config.yaml", *(f"dog/checkpoints/step-000003/{name}" for name in ("COMPLETE", "ema.safetensors"))],
            "dog/checkpoints/step-000003",
            "is a checkpoint of a run; .*lowmem-db generate {root}/dog --step N",
        ),
        ([f"dog/{LORA_FILE}"], "dog", "holds a LoRA"),
        ([f"dog/{LORA_FILE}"], f"dog/{LORA_FILE}", "holds a LoRA"),
        (
            ["tiny/model_index.json", "tiny/unet/config.json"],
            "tiny/unet",
            "only the unet of a model; .* Name {root}/tiny",
        ),
        (["tiny/model_index.json"], "tiny/model_index.json", "is the index of a model; .* Name {root}/tiny"),
        (["runs/a/config.yaml"], "runs", "is a folder of runs; .* Name {root}/runs/a"),
        (["all/tiny/model_index.json"], "all", "its folder tiny does; .* Name {root}/all/tiny"),
        (["all/one.safetensors"], "all", r"the file itself\. Name {root}/all/one.safetensors"),
        (["dog.yaml"], "dog.yaml", "is a configuration: lowmem-db train"),
        (["dog.png"], "dog.png", "is a picture"),
        (["tiny/model_index.json"], "tinny", "did you mean {root}/tiny"),
        ([], "a/b/c", "the folder {root}/a/b does not exist either"),
    ],
)
def test_what_is_no_model_is_named_with_a_way_out(tmp_path: Path, files: list[str], named: str, said: str) -> None:
    make(tmp_path, *files)
    with pytest.raises(ModelError, match=said.replace("{root}", re.escape(str(tmp_path)))):
        place_of(str(tmp_path / named))


def test_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"is a link to .*gone, which does not exist"):
        place_of(str(tmp_path / "link"))


def test_misspelt_run_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "runs/dog/config.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"did you mean runs/dog\?"):
        place_of("runs/dgo")


def test_base_means_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make(tmp_path, "tiny/model_index.json"))
    assert absolute_base("tiny") == absolute_base("./tiny") == str(tmp_path / "tiny")
    assert [absolute_base(name) for name in ("demo", "demo_if")] == ["demo", "demo_if"]
    assert absolute_base("owner/name") == "owner/name"
