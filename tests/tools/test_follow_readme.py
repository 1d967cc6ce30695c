import pytest

from tools.follow_readme import INLINE, ROOT, SKIPPED, commands_of, inline_commands, made_small


def test_every_command_of_the_readme_is_run_or_skipped_for_a_reason():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any(words[:2] == ["lowmem-db", "train"] for words in commands_of(readme))
    assert ["lowmem-db", "doctor"] in list(inline_commands(readme))


def test_no_command_is_kept_for_a_sentence_that_is_gone():
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert [command for command in (*INLINE, *SKIPPED) if f"`{command}" not in words] == []


def test_an_unknown_command_is_refused_by_name():
    with pytest.raises(SystemExit, match="lowmem-db frobnicate"):
        list(inline_commands("Run `lowmem-db\nfrobnicate` now."))


def test_commands_in_blocks_are_whole_and_not_sentences():
    text = "```\nlowmem-db train sd15 \\\n  a=1  # a remark\n```\n"
    assert list(commands_of(text)) == [["lowmem-db", "train", "sd15", "a=1"]]
    assert list(inline_commands(text)) == []


def test_only_what_is_long_is_made_small():
    assert made_small(["lowmem-db", "configs"]) == ["lowmem-db", "configs"]
    assert "training.max_train_steps=2" in made_small(["lowmem-db", "train", "demo"])
