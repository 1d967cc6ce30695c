"""A configuration of a run means the same in every working folder."""

from pathlib import Path
from typing import Any

import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.run.absolute import with_absolute_paths

RELATIVE = {
    "output_dir": "run", "cache_dir": "cache", "subject.instance_dir": "photos", "subject.instance_prompt": "a zx dog",
    "subject.class_prompt": "a dog", "prior.class_dir": "class", "checkpointing.copy_to": "drive",
    "model.base": "./base", "model.vae": "./vae", "model.embeddings": ["word.safetensors"],
    "subject.concepts": [
        {"instance_dir": "cat", "instance_prompt": "a qz cat", "class_prompt": "a cat", "class_dir": "cats"}
    ],
}  # fmt: skip


def paths_in(value: Any) -> list[Path]:
    if isinstance(value, Path):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [path for item in values for path in paths_in(item)]


def test_no_path_depends_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    config = load_config(None, list(RELATIVE.items()))
    assert len(paths_in(config.model_dump())) == 7, "a new field that holds a path belongs into RELATIVE"
    absolute = with_absolute_paths(config)
    assert all(path.is_relative_to(tmp_path) for path in paths_in(absolute.model_dump()))
    assert absolute.model.embeddings == (str(tmp_path / "word.safetensors"),)
    assert (absolute.model.base, absolute.model.vae) == (str(tmp_path / "base"), str(tmp_path / "vae"))


def test_names_stay_names() -> None:
    names = {"model.base": "owner/name", "model.vae": "owner/vae"}
    config = with_absolute_paths(load_config(None, list((RELATIVE | names).items())))
    assert (config.model.base, config.model.vae) == ("owner/name", "owner/vae")
