"""DreamBooth and Textual Inversion on one subject, side by side, as in Tables 1 and 2 of DreamBooth (arXiv:2208.12242).

    python -m benchmarks.two_methods photos/teapot --what teapot --out runs/teapot [--config sd15] [FIELD=VALUE ...]

Trains both on the same photos, draws the paper's prompts with both from the same noise, scores them, and writes a page
that shows them beside the photos and the pages that ask people (Table 2). Each command is printed before it runs; the
same command goes on where it was stopped.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lowmem_db.config.schema import TextualInversionConfig

METHODS = ("dreambooth", "textual_inversion")
WORD = TextualInversionConfig().token
A_WORD_ALONE = (
    "textual_inversion.enabled=true", f"subject.instance_prompt=a {WORD}", "prior.class_prompts=[]",
    "training.train_text_encoder=false", "lora.enabled=false", "training.learning_rate=5e-6",
    "training.learning_rate_text_encoder=null", "ema.enabled=false", "training.lr_scheduler=constant",
    "training.lr_warmup_steps=0",
)  # fmt: skip
"""Fields of Textual Inversion, which takes back what a configuration says of weights and of class images."""


def commands(
    photos: Path, what: str, out: Path, *, config: str, fields: Sequence[str], word_steps: int, evaluated: Sequence[str]
) -> list[list[str]]:
    """Return the commands, without the program's name.

    Args:
        photos: The photos of the subject.
        what: Its class, as in "a sks teapot".
        out: Where everything is written.
        config: The configuration of both methods.
        fields: Fields of both methods, such as ``training.train_batch_size=2``.
        word_steps: Steps of Textual Inversion.
        evaluated: Further arguments of ``evaluate``.
    """
    runs, images = out / "runs", out / "images"
    of_both = [f"subject.instance_dir={photos}", f"subject.class_prompt=a {what}", *fields]
    own = {
        METHODS[0]: [f"subject.instance_prompt=a sks {what}", *of_both],
        METHODS[1]: [*of_both, *A_WORD_ALONE, f"training.max_train_steps={word_steps}"],
    }
    drawn = [str(images / method) for method in METHODS]
    return [
        *(["train", config, "--resume", f"output_dir={runs / method}", *own[method]] for method in METHODS),
        ["evaluate", str(runs), "--output", str(images), *evaluated],
        ["gallery", *drawn, "--real", str(photos), "--output", str(out / "gallery.html")],
        ["evaluate", "--pairs", *drawn, "--real", str(photos), "--output", str(out / "questionnaires")],
    ]


def main() -> None:
    """Run all commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("fields", nargs="*", metavar="FIELD=VALUE", help="of both methods")
    parser.add_argument("--what", required=True, help="the class, such as teapot; one token of the model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default="sd15", help="name or file of the configuration")
    parser.add_argument("--word-steps", type=int, default=5000, help="steps of Textual Inversion")
    parser.add_argument("--evaluate", default="", metavar="ARGUMENTS", help='such as "--encoder paper --encoder en0"')
    options = parser.parse_intermixed_args()
    for arguments in commands(
        options.photos,
        options.what,
        options.out,
        config=options.config,
        fields=options.fields,
        word_steps=options.word_steps,
        evaluated=shlex.split(options.evaluate),
    ):
        print("lowmem-db", shlex.join(arguments), flush=True)
        if code := subprocess.run([sys.executable, "-m", "lowmem_db", *arguments], check=False).returncode:
            sys.exit(code)


if __name__ == "__main__":
    main()
