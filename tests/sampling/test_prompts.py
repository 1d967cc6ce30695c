"""Prompts: the paper's suites, files, and the names of the subject."""

import re
from pathlib import Path
from typing import Any

import pytest

from lowmem_db.config.schema import Config
from lowmem_db.errors import DataError
from lowmem_db.sampling.prompts import (
    collect_prompts,
    fill_in,
    read_prompt_file,
    read_suite,
    subject_names,
    suite_names,
)

SIZES = {
    "objects": 25, "live_subjects": 25, "art_renditions": 8, "view_synthesis": 5, "property_modification": 10,
    "accessories": 8, "expressions": 8, "material": 6, "recontextualization": 5, "comic": 6, "original_setting": 6,
}  # fmt: skip


def collect(*prompts: str, prompt_file: Path | None = None, suites: tuple = (), **names: object) -> list[str]:
    given = {"identifier": None, "class_noun": None, "run_config": None} | names
    return collect_prompts(prompts, prompt_file, suites, **given)


def test_every_suite_is_there() -> None:
    assert set(suite_names()) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_suite_has_its_prompts_with_every_placeholder_filled(name: str) -> None:
    prompts = read_suite(name, identifier="sks", class_noun="dog")
    assert len(prompts) == len(set(prompts)) == SIZES[name]
    for prompt in prompts:
        assert re.search(r"\bsks dog\b", prompt), prompt
        assert not set(prompt) & set("{}#"), prompt
        assert prompt == " ".join(prompt.split())


def test_names_with_braces_are_kept() -> None:
    prompts = read_suite("objects", identifier="{0}", class_noun="{class_noun}")
    assert prompts[0] == "a {0} {class_noun} in the jungle"


def test_misspelt_name_in_braces_is_refused() -> None:
    names: dict[str, Any] = {"identifier": "{x}", "class_noun": "dog", "run_config": None}
    assert fill_in("--comic", ["a {identifier} {class_noun}"], **names) == ["a {x} dog"]
    with pytest.raises(DataError, match=r"--comic: 'a \{token\} dog': \{token\} stands for nothing; allowed: "):
        fill_in("--comic", ["a {token} dog"], **names)


def test_unknown_suite_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match="'object' does not exist; allowed: accessories, art_renditions"):
        read_suite("object", identifier="sks", class_noun="dog")


@pytest.mark.parametrize(
    ("instance", "base", "names"),
    [
        ("a sks dog", "a dog", ("sks", "dog")),
        ("a photo of sks dog", "a photo of dog", ("sks", "dog")),
        ("sks dog", "dog", ("sks", "dog")),
        ("a sks corgi dog", "a dog", ("sks corgi", "dog")),
        ("a zx qv toy robot", "a toy robot", ("zx qv", "toy robot")),
        ("a sks dog on grass", "a dog on grass", ("sks", "dog on grass")),
        ("a sks sks dog", "a sks dog", ("sks", "dog")),
        ("  a   sks  dog ", "a dog", ("sks", "dog")),
        ("фото собака пёс", "фото пёс", ("собака", "пёс")),
    ],
)
def test_names_of_the_subject_are_read_from_its_prompts(instance: str, base: str, names: tuple[str, str]) -> None:
    assert subject_names(instance, base) == names


@pytest.mark.parametrize(
    ("instance", "base"),
    [
        ("a dog", "a dog"),
        ("a dog", "a cat"),
        ("a dog sks", "a dog"),
        ("sks", "dog"),
        ("", ""),
        ("a dog", ""),
        ("", "a dog"),
        ("a sks dog", "an animal"),
        ("a dog", "a sks dog"),
    ],
)
def test_prompts_that_do_not_say_the_names_are_refused(instance: str, base: str) -> None:
    with pytest.raises(DataError, match="set --identifier and --class-noun"):
        subject_names(instance, base)


def test_prompts_come_in_the_order_of_their_options(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# remark\n\n  from the file \n")
    prompts = collect("first", prompt_file=file, suites=("objects",), identifier="sks", class_noun="dog")
    assert prompts[:3] == ["first", "from the file", "a sks dog in the jungle"]
    assert len(prompts) == 27


def test_suites_take_their_names_from_the_run(tiny_config: Config) -> None:
    assert "a zx dog in the jungle" in collect(suites=("objects",), run_config=tiny_config)
    assert "a zx cat in the jungle" in collect(suites=("objects",), run_config=tiny_config, class_noun="cat")


def test_suite_without_names_is_refused() -> None:
    with pytest.raises(DataError, match="add --identifier sks --class-noun dog"):
        collect(suites=("objects",), identifier="sks")


@pytest.mark.parametrize("content", [b"", b"\n# only a remark\n", b"\xff\xfe\xff"])
def test_file_without_a_prompt_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"prompts\.txt: (has no prompt|cannot be read as text)"):
        read_prompt_file(file)


def test_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a sks dog\n", encoding="utf-8-sig")
    assert read_prompt_file(file) == ["a sks dog"]


@pytest.mark.parametrize("name", ["nothing.txt", "."])
def test_missing_file_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read as text"):
        read_prompt_file(tmp_path / name)
