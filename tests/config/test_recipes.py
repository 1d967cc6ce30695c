from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config, parse_override
from lowmem_db.config.recipes import MAX_LINES, RECIPES, Wish, check_recipe, check_words, fields_for, name_for, text_of
from lowmem_db.errors import ConfigError


def _wish(**changes):
    values = {"photos": Path("photos/kettle"), "noun": "red kettle", "identifier": "zx", "output_dir": Path("runs/k")}
    return Wish(**{**values, **changes})


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_configuration_for_the_new_subject(recipe, tmp_path):
    file = tmp_path / "kettle.yaml"
    file.write_text(text_of(fields_for(_wish(recipe=recipe)), ["one", "two", "three", "four", "five"]))
    config = load_config(file)
    assert len(file.read_text().splitlines()) <= MAX_LINES
    assert max(map(len, file.read_text().splitlines())) <= 120
    assert (config.output_dir, config.subject.instance_dir) == (Path("runs/k"), Path("photos/kettle"))
    assert "kettle" in config.subject.class_prompt
    assert "sks" not in file.read_text()
    assert not {"dog", "zx"} & {*config.subject.class_prompt.split()}
    assert not any("dog" in prompt for prompt in config.prior.class_prompts)
    assert config.subject.instance_prompt in config.sampling.prompts


def test_a_recipe_differs_from_its_configuration_only_in_the_subject():
    own = load_config(Path("configs/sdxl_lora.yaml")).model_dump(exclude={"subject", "output_dir", "sampling"})
    made = load_config(None, _flat(fields_for(_wish(recipe="sdxl_lora"))))
    assert made.model_dump(exclude={"subject", "output_dir", "sampling"}) == own


def test_class_images_of_the_demo_are_of_the_new_class_and_of_nouns_that_have_nothing_of_it():
    theirs = load_config(Path("configs/demo.yaml")).prior.class_prompts
    kettles = fields_for(_wish(recipe="demo"))["prior"]["class_prompts"]
    assert kettles == [prompt.replace("dog", "red kettle") for prompt in theirs if prompt != "a red car"]
    assert fields_for(_wish(recipe="demo", noun="dog"))["prior"]["class_prompts"] == list(theirs)
    assert "a cat" not in fields_for(_wish(recipe="demo", noun="Cat"))["prior"]["class_prompts"]
    broken = fields_for(_wish(recipe="demo", noun="kettle with a hole in the lid"))["prior"]["class_prompts"]
    assert len(broken) == len(theirs), "small words name nothing"


def _flat(tree):
    return [
        (f"{name}.{inner}", each)
        for name, value in tree.items() if isinstance(value, dict)
        for inner, each in value.items()
    ] + [(name, value) for name, value in tree.items() if not isinstance(value, dict)]  # fmt: skip


def test_what_the_user_writes_is_no_yaml(tmp_path):
    file = tmp_path / "odd.yaml"
    noun = "yes: [#1] {'\"}"
    file.write_text(text_of(fields_for(_wish(noun=noun, base="models/a: b", recipe="sd15")), []))
    config = load_config(file)
    assert config.subject.class_prompt == f"a photo of {noun}"
    assert config.model.base == "models/a: b"


@pytest.mark.parametrize(
    ("noun", "name"), [("Red Kettle", "red-kettle"), ("猫", "猫"), ("../..", "subject"), ("a/b", "a-b")]
)
def test_the_name_of_the_file_comes_from_the_noun(noun, name):
    assert name_for(noun) == name


@pytest.mark.parametrize(("noun", "identifier"), [(" ", "sks"), ("a\nb", "sks"), ("dog", "two words"), ("dog", "")])
def test_words_that_name_nothing_are_refused(noun, identifier):
    with pytest.raises(ConfigError, match=r"--what|--identifier"):
        check_words(noun, identifier)


def test_a_typo_in_a_recipe_is_told():
    with pytest.raises(ConfigError, match="did you mean sdxl_lora"):
        check_recipe("sdxl_lor")


def test_overrides_of_a_recipe_are_those_of_train():
    assert parse_override("training.max_train_steps=3") == ("training.max_train_steps", 3)
