"""From YAML and overrides to one checked configuration."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lowmem_db.config.loading import (
    field_paths,
    is_section,
    load_config,
    parse_override,
    read_yaml,
    to_yaml,
    write_yaml,
)
from lowmem_db.config.schema import Config, SubjectConfig
from lowmem_db.errors import ConfigError

NEEDED = (
    ("model.base", "demo"),
    ("subject.instance_dir", "photos"),
    ("subject.instance_prompt", "a sks dog"),
    ("subject.class_prompt", "a dog"),
    ("output_dir", "runs/dog"),
)
REPOSITORY = Path(__file__).parents[2]


def load(*arguments: str) -> Config:
    return load_config(None, [*NEEDED, *map(parse_override, arguments)])


def problems_of(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load(*arguments)
    return str(refused.value).splitlines()


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("training.learning_rat=1e-5", "training.learning_rate"),
        ("learning_rate=1e-5", "training.learning_rate"),
        ("memory.checkpoint=layers", "memory.checkpointing"),
    ],
)
def test_unknown_field_names_the_nearest(argument: str, nearest: str) -> None:
    (problem,) = problems_of(argument)
    assert problem == f"{argument.partition('=')[0]}: unknown field; did you mean {nearest}?"


def test_unknown_section_names_the_nearest() -> None:
    assert problems_of("trainings.max_train_steps=5") == ["trainings: unknown field; did you mean training?"]


def test_unknown_field_without_a_neighbour_lists_the_sections() -> None:
    (problem,) = problems_of("xyzzy=1")
    assert problem.startswith("xyzzy: unknown field; allowed sections: model, subject, output_dir")


def test_every_problem_is_shown_at_once() -> None:
    problems = problems_of(
        "trainin.learning_rate=1", "seed=x", "training.max_train_steps=0", "data.crop=left", "device=gpu"
    )
    named = {problem.partition(":")[0] for problem in problems}
    assert named == {"trainin", "seed", "training.max_train_steps", "data.crop", "device"}


def test_every_missing_field_is_named() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [])
    missing = {line.partition(":")[0] for line in str(refused.value).splitlines()}
    assert missing == {"model.base", "subject.instance_dir", "subject.instance_prompt", "output_dir"}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("training.learning_rate=1e-5", 1e-5),
        ("training.learning_rate=2", 2.0),
        ("training.max_train_steps=7", 7),
        ("training.train_text_encoder=yes", True),
        ("training.max_grad_norm=null", None),
        ("training.max_grad_norm=", None),
        ("training.mixed_precision=no", "no"),
        ("training.mixed_precision=bf16", "bf16"),
        ("sampling.prompts=[a sks dog, 'b, c']", ("a sks dog", "b, c")),
        ("sampling.prompts=[]", ()),
        ("seed=-3", -3),
        ("model.revision=123", "123"),
        ("model.revision=null", None),
        ("prior.class_dir=null", None),
        ("device=cuda:0", "cuda:0"),
    ],
)
def test_override_is_read_as_its_field_s_type(argument: str, value: object) -> None:
    found: object = load(argument)
    for name in argument.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "a=b", "a dog #1", "# dog", "yes", "no", "12:30:00", "2024-11-23", "2024-13-45", "1e-5", "1", "{dog}", "[dog]",
        "photo: a sks dog", "a 'sks' dog", 'the "sks" dog', '"sks" dog', "*dog", "&dog", "собака 犬 🐕", "a\tdog",
        " dog", "x" * 5000,
    ],
)  # fmt: skip
def test_text_is_taken_as_it_is(text: str) -> None:
    assert load(f"subject.instance_prompt={text}").subject.instance_prompt == text
    assert load(f"model.base={text}").model.base == text


@pytest.mark.parametrize("text", ["2024-11-23", "007", "a=b", "run #1", "null.d"])
def test_path_is_taken_as_it_is(text: str) -> None:
    assert load(f"output_dir={text}").output_dir == Path(text)


@pytest.mark.parametrize("text", ['"a dog"', "'a dog'"])
def test_text_may_be_quoted(text: str) -> None:
    assert load(f"subject.class_prompt={text}").subject.class_prompt == "a dog"


def test_the_later_override_wins() -> None:
    assert load("seed=1", "seed=2").seed == 2


def test_home_is_expanded_where_no_shell_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load("subject.instance_dir=~/photos", "model.base=~/models/sd15", "prior.class_dir=~/dogs")
    assert config.subject.instance_dir == Path("/home/somebody/photos")
    assert config.model.base == "/home/somebody/models/sd15"
    assert config.prior.class_dir == Path("/home/somebody/dogs")
    assert load("model.base=~nobody-at-all/sd15").model.base == "~nobody-at-all/sd15"


@pytest.mark.parametrize(
    ("argument", "field"),
    [
        ("training.learning_rate=nan", "training.learning_rate"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("training.learning_rate=inf", "training.learning_rate"),
        ("training.learning_rate=.inf", "training.learning_rate"),
        ("training.learning_rate=0", "training.learning_rate"),
        ("training.learning_rate=-1e-5", "training.learning_rate"),
        ("training.learning_rate=[1e-5]", "training.learning_rate"),
        ("training.learning_rate={a: 1}", "training.learning_rate"),
        ("training.learning_rate=fast", "training.learning_rate"),
        ("training.max_train_steps=1.5", "training.max_train_steps"),
        ("training.max_train_steps=[3]", "training.max_train_steps"),
        ("prior.loss_weight=-1", "prior.loss_weight"),
        ("objective.conditioning_dropout=1.1", "objective.conditioning_dropout"),
        ("optimizer.beta2=1", "optimizer.beta2"),
        ("ema.decay=1", "ema.decay"),
        ("sampling.prompts=a dog", "sampling.prompts"),
        ("memory.attention=flash", "memory.attention"),
        ("training=5", "training"),
        ("training=[1]", "training"),
        ("device=cuda:x", "device"),
        ("output_dir=null", "output_dir"),
    ],
)
def test_wrong_value_is_refused_by_the_name_of_its_field(argument: str, field: str) -> None:
    (problem,) = problems_of(argument)
    assert problem.startswith(f"{field}: ")
    assert " is not allowed: " in problem


@pytest.mark.parametrize("argument", ["=5", "training.learning_rate"])
def test_argument_that_is_no_override_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"is not an override; allowed: section\.key=value"):
        parse_override(argument)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {base: a}\nsubject: {instance_dir: b, instance_prompt: c}\noutput_dir: d\nseed: 5\n")
    config = load_config(path, [("seed", 6), ("prior.enabled", False)])
    assert (config.model.base, config.seed) == ("a", 6)


def test_section_whose_fields_are_commented_out_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  # max_train_steps: 5\nsampling:\n")
    config = load_config(path, [*NEEDED, ("training.learning_rate", 1e-6)])
    assert config.training.learning_rate == 1e-6
    assert config.sampling.prompts == ()


def test_unquoted_no_is_a_precision(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  mixed_precision: no\n")
    assert load_config(path, NEEDED).training.mixed_precision == "no"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty; allowed: a mapping"),
        (b"- a\n- b\n", "holds list; allowed: a mapping"),
        (b"training: [", "cannot be read as YAML"),
        (b"training: {a: b: c}", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"when: 2024-13-45", "cannot be read as YAML"),
        (b"a: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
    ],
)
def test_file_that_holds_no_configuration_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_yaml(path)
    assert str(refused.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(refused.value)


def test_the_configuration_of_another_program_is_refused_by_its_format(tmp_path: Path) -> None:
    path = tmp_path / "sd_scripts.toml"
    path.write_text("[general]\nenable_bucket = true\n")
    with pytest.raises(ConfigError, match=r"sd_scripts\.toml: is TOML, .*; allowed: YAML\. `lowmem-db configs`"):
        read_yaml(path)


def test_a_list_is_no_section() -> None:
    assert is_section(SubjectConfig)
    assert not any(is_section(kind) for kind in (list[str], dict[str, SubjectConfig], SubjectConfig | None, str))


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").touch()
    with pytest.raises(
        ConfigError, match=r"dmo\.yaml: the configuration file does not exist; did you mean .*demo\.yaml"
    ):
        read_yaml(tmp_path / "dmo.yaml")
    with pytest.raises(ConfigError, match=r"the folder .*nowhere does not exist either"):
        read_yaml(tmp_path / "nowhere" / "run.yaml")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_yaml(tmp_path)


def test_number_as_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("1: 2\ntraining: {3: 4}\n")
    with pytest.raises(ConfigError, match=r"(?s)training\.3: .*1: |1: .*training\.3: "):
        load_config(path, NEEDED)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(
    instance_prompt=TEXT,
    class_prompt=TEXT.filter(bool),
    prompts=st.lists(TEXT, max_size=3),
    learning_rate=st.floats(min_value=1e-30, max_value=1e30),
    seed=st.integers(),
)
def test_what_is_written_is_read_again(
    instance_prompt: str, class_prompt: str, prompts: list[str], learning_rate: float, seed: int
) -> None:
    overrides = [
        *NEEDED,
        ("subject.instance_prompt", instance_prompt),
        ("subject.class_prompt", class_prompt),
        ("sampling.prompts", prompts),
        ("training.learning_rate", learning_rate),
        ("seed", seed),
    ]
    config = load_config(None, overrides)
    assert Config.model_validate(yaml.safe_load(to_yaml(config))) == config


def test_written_file_is_read_again(tmp_path: Path) -> None:
    config = load("subject.instance_prompt=ein süßer\u2028 'sks' \"dog\": #1")
    write_yaml(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_every_field_has_a_path_and_a_description() -> None:
    paths = set(field_paths())
    promised = {
        "seed", "output_dir", "model.base", "subject.instance_dir", "subject.instance_prompt", "subject.class_prompt",
        "prior.enabled", "prior.num_class_images", "prior.loss_weight", "training.max_train_steps",
        "training.learning_rate", "training.train_batch_size", "training.train_text_encoder", "checkpointing.every",
    }  # fmt: skip
    assert promised <= paths
    for path in paths:
        *sections, name = path.split(".")
        section = Config.model_fields[sections[0]].annotation if sections else Config
        assert section.model_fields[name].description, path


def test_configuration_is_frozen() -> None:
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.training.learning_rate = 1.0


def test_every_configuration_file_builds() -> None:
    files = sorted((REPOSITORY / "configs").rglob("*.y*ml"))
    assert files
    for file in files:
        config = load_config(file)
        assert config.subject.instance_prompt != config.subject.class_prompt, file


@pytest.mark.parametrize("text", ["\x85", "a\x85b", "\u2028", "Hündchen", "犬"])
def test_every_text_survives_being_written(text: str) -> None:
    config = load_config(None, [*NEEDED, ("subject.class_prompt", text)])
    assert Config.model_validate(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("text", ["seed: 1\nmodel:\n  base: demo\nseed: 2\n", "training:\n  seed: 1\n\n\n  seed: 2\n"])
def test_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    lines = [number for number, line in enumerate(text.splitlines(), 1) if "seed" in line]
    with pytest.raises(ConfigError, match=f"seed appears twice, in line {lines[0]} and in line {lines[1]}"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("sampling.prompts=a dog", "sampling.prompts: 'a dog' is not allowed: it must be a list, such as "),
        ("output_dir=", "output_dir: null is not allowed: it must have a value; set output_dir=VALUE"),
        (
            "subject.instance_prompt=null",
            "subject.instance_prompt: null is not allowed: it must have a value; set subject.instance_prompt=VALUE",
        ),
    ],
)
def test_value_of_another_kind_says_how_it_is_written(argument: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(None, [parse_override(argument)])
