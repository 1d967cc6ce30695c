"""Bad configurations of every kind end in one line for each problem, within bounded time and memory, without torch."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem_db.config.flags import parse_arguments
from lowmem_db.config.loading import field_paths, load_config
from lowmem_db.config.yaml_text import MAX_BYTES, MAX_VALUES
from lowmem_db.errors import ConfigError

NEEDED = "model: {base: demo}\nsubject: {instance_dir: photos, instance_prompt: a sks dog}\noutput_dir: runs/dog\n"
NUMBERS = ("seed", "training.max_train_steps", "training.learning_rate", "prior.loss_weight", "data.resolution")
TEXTS = ("subject.instance_prompt", "subject.class_prompt", "model.base")
PATHS = ("subject.instance_dir", "output_dir", "cache_dir", "prior.class_dir")


ODD_NUMBERS = (
    "true", "False", "yes", "010", "0777", "-010", "1:30", "1:30:00", "1:30.5", "[1]", "{a: 1}", "2024-11-23", "dog",
    "''",    "!!binary aGk=", "!!set {1}", ".nan", ".inf", "0x" + "f" * 5000, "9" * 5000,
)  # fmt: skip
ODD_ARGUMENTS = (
    "true", "no", "010", "1:30", "[[1]]", "{}", "dog", ".nan", "9" * 5000, "0x" + "f" * 5000, "[" * 5000, "&a [*a]",
    "!!python/name:os.system", "1\0", "\udce9", "2024-11-23", "1e999",
)  # fmt: skip
ODD_NAMES = (
    "",
    "x",
    "x" * 100_000,
    "a." * 50_000 + "b",
    "\x1b[31m",
    "[bold]",
    "训练",
    "training",
    "training.x.y",
    "..",
)
MISTAKES = [b"", b"\0", b"\xff", b"[", b"{", b"}", b":", b"&a ", b"*a", b"- ", b"\n", b"\t", b"'", b'"', b"!", b"010"]


def bomb(levels: int, width: int, top: str) -> str:
    lines = ["a0: &a0 [dog]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"{top}: *a{levels - 1}"])


def merge_bomb(levels: int, width: int) -> str:
    lines = ["m0: &m0 {seed: 1}"]
    lines += [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * width)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


def files() -> Iterator[tuple[str, bytes]]:
    """Yield the kind and the content of bad configuration files."""
    yield from (("alias bomb", bomb(levels, 9, top).encode()) for levels in (6, 9, 20) for top in ("sampling", "x"))
    yield (
        "alias bomb in a known field",
        f"sampling: {{prompts: &p [{'dog, ' * 200}]}}\n{bomb(8, 9, 'training')}".encode(),
    )
    yield from (("merge bomb", merge_bomb(levels, 9).encode()) for levels in (7, 12))
    yield from (("alias of itself", text) for text in (b"a: &a [*a]", b"&a {b: *a}", b"a: &a {b: &b [*a, *b]}"))
    for depth in (21, 500, 20_000):
        yield from (("deep", (opening * depth).encode()) for opening in ("[", "{a: ", "- ", "? ", "[{a: "))
        yield "deep and whole", ("a: " + "[" * depth + "]" * depth).encode()
    yield "deep by indentation", "".join(f"{' ' * n}a:\n" for n in range(300)).encode()
    for key in ("[1, 2]", "{a: b}", "? [a]\n", "? {a: {b: c}}\n", "!!set {a}", "[[]]"):
        yield "odd key", f"{key}: 3\n".encode()
        yield "odd key in a section", f"training: {{{key.strip('? ')}: 3}}\n".encode()
    yield from (
        ("key that is no field", f"training: {{{key}: 3}}\n".encode()) for key in ("1", "null", "true", "1.5", "''")
    )
    yield from (("key that stands twice", text) for text in (b"seed: 1\nseed: 2", b"training: {a: 1, a: 2}"))
    for field in NUMBERS:
        section, _, name = field.rpartition(".")
        for value in ODD_NUMBERS:
            yield "no number", (f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n").encode()
    yield from (
        ("NUL", text) for text in (b"\0", b"seed: 1\0", b'subject: {class_prompt: "a\\0dog"}', b'cache_dir: "a\\0b"')
    )
    yield "not UTF-8", b"subject: {class_prompt: na\xe9}"
    yield "not UTF-8", b"\xff\xfe" + "seed: 1".encode("utf-16-le")
    yield "not UTF-8", "seed: 1".encode("utf-16")
    yield "not UTF-8", "seed: 1".encode("utf-16-be")
    yield "not UTF-8", b"\xfe\xffseed"
    yield "surrogate", b'subject: {class_prompt: "\\ud800"}'
    yield "Windows path", b'subject: {instance_dir: "C:\\Users\\me\\photos"}'
    yield "Windows path", b'cache_dir: "D:\\data\\photos"'
    yield "large", b"# " + b"x" * MAX_BYTES
    yield "many values", ("sampling: {prompts: [" + "a, " * (MAX_VALUES + 1) + "]}").encode()
    yield "long text", f"subject: {{class_prompt: {'dog ' * 20_000}}}".encode()
    for path in PATHS:
        section, _, name = path.rpartition(".")
        for value in ("x" * 300, "猫" * 100, "/".join(["x" * 100] * 60)):
            yield "long path", (f"{section}: {{{name}: {value}}}\n" if section else f"{name}: {value}\n").encode()
    yield from (
        ("no mapping", text) for text in (b"", b"- a", b"3", b"dog", b"null", b"--- a\n--- b\n", b"\xef\xbb\xbf")
    )
    yield from (("tag", text) for text in (b"a: !!python/object/apply:os.system ['true']", b"!x a", b"seed: !!int dog"))
    yield from (
        ("syntax", text) for text in (b"a: [", b"{a: b: c}", b"\ta: 1", b"a: 'b", b"%YAML 9.9\n---\na: 1", b"*a", b"@a")
    )


def mutated(count: int) -> Iterator[tuple[str, bytes]]:
    """Yield whole configurations with some bytes replaced, taken out or put in."""
    chance = random.Random(14)
    text = (Path(__file__).parents[2] / "configs" / "demo.yaml").read_bytes()
    for _ in range(count):
        content = bytearray(text)
        for _ in range(chance.randint(1, 12)):
            place = chance.randrange(len(content))
            content[place : place + chance.randint(0, 3)] = chance.choice(MISTAKES)
        yield "mutated", bytes(content)


FILES = list(files())
MUTATED = list(mutated(120))


@pytest.mark.parametrize(("kind", "content"), FILES, ids=[f"{n} {kind}" for n, (kind, _) in enumerate(FILES)])
def test_bad_file_is_refused(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_config(path, [("model.base", "demo")])
    assert_in_lines(str(refused.value))


@pytest.mark.parametrize("content", [content for _, content in MUTATED], ids=range(len(MUTATED)))
def test_mutated_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    try:
        load_config(path)
    except ConfigError as refused:
        assert_in_lines(str(refused))


def arguments() -> Iterator[tuple[str, str]]:
    """Yield the kind of a bad argument, and the argument."""
    for field in NUMBERS:
        for value in ODD_ARGUMENTS:
            yield "no number", f"{field}={value}"
    for field in (*TEXTS, *PATHS):
        for value in ("a\0b", "na\udce9", "x" * 70_000):
            yield "no text", f"{field}={value}"
    yield from (("long path", f"{field}={value}") for field in PATHS for value in ("x" * 256, "a/" * 3000))
    for name in ODD_NAMES:
        yield "no field", f"{name}=1"
    yield from (("no list", f"sampling.prompts={value}") for value in ("dog", "{a: b}", "[[a]]", "[{a: b}]", "3"))


ARGUMENTS = list(arguments())


@pytest.mark.parametrize(("kind", "argument"), ARGUMENTS, ids=[f"{n} {kind}" for n, (kind, _) in enumerate(ARGUMENTS)])
def test_bad_argument_is_refused(tmp_path: Path, kind: str, argument: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(NEEDED)
    with pytest.raises(ConfigError) as refused:
        load_config(path, parse_arguments([argument]).overrides)
    assert_in_lines(str(refused.value))


@pytest.mark.parametrize("field", sorted(field_paths()))
def test_every_field_refuses_what_it_cannot_hold(tmp_path: Path, field: str) -> None:
    """A mapping of a list fits no field, nor does an endless text."""
    path = tmp_path / "run.yaml"
    path.write_text(NEEDED)
    for value in ({"a": [{"b": []}]}, "x" * 100_000):
        with pytest.raises(ConfigError) as refused:
            load_config(path, [(field, value)])
        assert_in_lines(str(refused.value))
        assert str(refused.value).startswith(field)


def assert_in_lines(message: str) -> None:
    for line in message.splitlines():
        assert 10 < len(line) < 1500, line[:300]
        assert ": " in line


@pytest.mark.parametrize("path", ["/dev/zero", ".", "x" * 300, "a\0b", "/".join(["x" * 200] * 30)])
def test_what_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(Path(path))
    assert_in_lines(str(refused.value))


def test_hints(tmp_path: Path) -> None:
    """What the commonest mistakes are told."""
    for content, hint in {
        b'cache_dir: "C:\\Users\\me"': "use single quotes, or / in paths",
        "seed: 1".encode("utf-16"): "it is UTF-16; save it as UTF-8",
        b"seed: 010": "YAML reads 010 in line 1 as 8; write that number, or quote it if it is a text: '010'",
        b"seed: 1:30": "YAML reads 1:30 in line 1 as 90",
        b"{[1]: 2}": "line 1 has a sequence as a key; allowed: a word",
        b"\n\na: &a [*a]": "line 3 contains an alias of itself",
    }.items():
        (tmp_path / "run.yaml").write_bytes(content)
        with pytest.raises(ConfigError) as refused:
            load_config(tmp_path / "run.yaml")
        assert hint in str(refused.value)


def test_what_is_unambiguous_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "common: &common {max_train_steps: 7}\n".replace("common: ", "training: ")
        + NEEDED
        + "seed: 0x10\nsampling: {prompts: &p ['010', '1:30', yes it is], every: 1_000}\n",
        encoding="utf-8-sig",
    )
    config = load_config(path, [("subject.class_prompt", "1:30")])
    assert (config.seed, config.training.max_train_steps, config.sampling.every) == (16, 7, 1000)
    assert config.sampling.prompts == ("010", "1:30", "yes it is")
    assert parse_arguments(["subject.class_prompt=010"]).overrides == [("subject.class_prompt", "010")]


def test_nothing_of_this_imports_torch(tmp_path: Path) -> None:
    for number, (_, content) in enumerate(FILES[::10]):
        (tmp_path / f"{number}.yaml").write_bytes(content)
    program = (
        "import sys\nfrom pathlib import Path\nfrom lowmem_db.config.loading import load_config\n"
        "for path in Path(sys.argv[1]).glob('*.yaml'):\n    try:\n        load_config(path)\n"
        "    except Exception as error:\n        assert type(error).__name__ == 'ConfigError', error\n"
        "print([name for name in ('torch', 'numpy', 'PIL', 'diffusers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=120)
    assert (found.stdout, found.stderr) == (json.dumps([]) + "\n", "")
