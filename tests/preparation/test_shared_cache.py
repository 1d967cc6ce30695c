"""Several runs on one fresh cache at once: nothing is drawn or encoded twice, and nobody calls an entry damaged."""

import multiprocessing
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.models.finding import model_of
from lowmem_db.preparation import class_images, encode
from lowmem_db.run.run import prepare_data

RUNS = 3


def note(made: Any, kind: str, original: Callable[..., Any], name_of: Callable[..., list[str]]) -> Callable[..., Any]:
    """Return a function that also notes what it makes."""

    def noting(*arguments: Any, **options: Any) -> Any:
        for name in name_of(*arguments, **options):
            made.put((kind, name))
        return original(*arguments, **options)

    return noting


def prepare_and_note(config: Config, start: Any, made: Any, output: Path) -> None:
    class_images._IMAGES_PER_LOAD = 1
    class_images._save = note(made, "drawn", class_images._save, lambda file, _: [file.name])
    encode.load_pixels = note(made, "encoded", encode.load_pixels, lambda record, **_: [record.path.name])
    encode.check_embeds = note(made, "embedded", encode.check_embeds, lambda _, __, prompts: prompts)
    with output.open("w") as file, redirect_stderr(file):
        start.wait(120)
        prepare_data(config)


def test_runs_share_the_work(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    fields = tiny_fields | {"prior.num_class_images": 6, "prior.sample_batch_size": 1, "data.crop": "center"}
    config = load_config(None, list(fields.items()))
    model_of(config)
    context = multiprocessing.get_context("fork")
    start, made = context.Barrier(RUNS), context.Queue()
    outputs = [tmp_path / f"{number}.txt" for number in range(RUNS)]
    runs = [context.Process(target=prepare_and_note, args=(config, start, made, output)) for output in outputs]
    for run in runs:
        run.start()
    for run in runs:
        run.join(300)
    said = "".join(output.read_text() for output in outputs)
    assert [run.exitcode for run in runs] == [0] * RUNS, said
    names = [f"{number:05d}.png" for number in range(6)]
    expected = [("drawn", name) for name in names] + [("encoded", name) for name in names]
    expected += [("encoded", f"photo{number}.png") for number in range(3)]
    expected += [("embedded", prompt) for prompt in ("", "a dog", "a zx dog")]
    assert Counter(made.get(timeout=30) for _ in expected) == Counter(expected)
    assert made.empty()
    assert "damaged" not in said
