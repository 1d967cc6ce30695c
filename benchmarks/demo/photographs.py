"""What the small model makes of photographs: the demo's recipe on the four photographed subjects of the ablations.

    python -m benchmarks.demo.photographs --work runs/photographs --output runs/photographs/photographs.jpg

Subjects, prompts and seeds were fixed before they were drawn, and every image of the list is shown. The same command
goes on where it was stopped; a subject takes about four minutes of one CPU core.
"""

import argparse
from pathlib import Path

from benchmarks.demo.picture import Row, compose, draw, given, settings_of
from benchmarks.quality.subjects import BY_NAME, Subject
from lowmem_db import load_config, train
from lowmem_db.config.recipes import Wish, fields_for
from lowmem_db.config.schema import Config
from lowmem_db.engine.source import find_source

SUBJECTS = [subject for subject in BY_NAME.values() if subject.kind == "photo"]
CONTEXTS = ("on the beach", "in the snow", "at night", "in the city")

TINY = {
    "training.max_train_steps": 1,
    "training.lr_warmup_steps": 0,
    "prior.num_class_images": 15,
    "prior.num_inference_steps": 1,
    "sampling.prompts": [],
}


def config_of(subject: Subject, work: Path, *, tiny: bool = False) -> Config:
    """Return what ``lowmem-db new PHOTOS --what NOUN --config demo`` writes, with caches and runs in ``work``."""
    run = work / subject.name
    fields = fields_for(Wish(photos=subject.folder, noun=subject.noun, recipe="demo", output_dir=run))
    return load_config(overrides={**fields, "cache_dir": str(work / "cache"), **(TINY if tiny else {})})


def row_of(subject: Subject, work: Path, *, tiny: bool = False) -> Row:
    """Train on a subject, if that is not done yet, and return its row: two photos, new places, another of its class."""
    config = config_of(subject, work, tiny=tiny)
    train(config, resume=True)
    named, of_class = config.subject.instance_prompt, config.subject.class_prompt
    columns = [*([f"{named} {context}"] for context in CONTEXTS), [of_class]]
    source = find_source(str(work / subject.name))
    [images] = draw(source, columns, settings_of(config, tiny=tiny), resolution=config.data.resolution)
    photos = [("one of five photos", photo) for _, photo in given(config)[:2]]
    return f"“{named}” in new places, and “{of_class}”", [*photos, *zip((*CONTEXTS, of_class), images, strict=True)]


def main() -> None:
    """Train and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs and caches")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--tiny", action="store_true", help="one subject, one step, to try the script")
    options = parser.parse_args()
    subjects = SUBJECTS[:1] if options.tiny else SUBJECTS
    rows = [row_of(subject, options.work, tiny=options.tiny) for subject in subjects]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    compose(rows).save(options.output, quality=90)
    print(options.output)


if __name__ == "__main__":
    main()
