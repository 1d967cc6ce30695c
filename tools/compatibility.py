"""What can be combined, as Markdown: ``python -m tools.compatibility docs/memory/compatibility.md``.

Each cell is what the table of refused combinations in ``config/rules.py`` answers.
"""

import sys
from pathlib import Path
from typing import Any

from lowmem_db.config.rules import refusals
from lowmem_db.config.schema import Config

Fields = dict[str, Any]
TECHNIQUES: tuple[Fields, ...] = (
    {"memory.optimizer_in_backward": True},
    {"memory.optimizer_in_backward": True, "memory.stream_optimizer_state": True},
    {"memory.weights": "bf16_extra_bits"},
    {"memory.weights": "bf16_extra_bits", "memory.stream_optimizer_state": True},
    {"memory.weights": "bf16_stochastic"},
    {"training.mixed_precision": "fp16"},
    {"training.mixed_precision": "fp16", "memory.optimizer_in_backward": True},
    {"memory.checkpointing": "segments", "memory.offload_checkpoints": True},
    {"memory.checkpointing": "segments", "memory.optimizer_in_backward": True, "memory.stream_weights": True},
    {
        "memory.checkpointing": "segments",
        "memory.optimizer_in_backward": True,
        "memory.stream_weights": True,
        "memory.stream_optimizer_state": True,
        "memory.optimizer_step": "host",
    },
    {"memory.fused_layers": True},
    {"memory.channels_last": True},
    {"lora.enabled": True, "lora.base_weights": "bf16"},
    {"lora.enabled": True, "lora.base_weights": "nf4"},
    {"lora.enabled": True, "memory.checkpointing": "segments", "memory.stream_weights": True},
)
FEATURES: tuple[Fields, ...] = (
    {"optimizer.name": "adamw"},
    {"optimizer.name": "adamw8bit"},
    {"optimizer.name": "adafactor"},
    {"training.gradient_accumulation_steps": 2},
    {"training.clipping": "global"},
    {"training.clipping": "lagged"},
    {"training.clipping": "update_rms"},
    {"training.clipping": "per_tensor"},
    {"ema.enabled": True},
    {"training.train_text_encoder": True, "training.stop_text_encoder_training": 400},
    {"training.layers": ["unet.mid_block.*"]},
    {"lora.enabled": True, "lora.dora": True},
)
_NEEDED: Fields = {
    "model.base": "demo", "subject.instance_dir": "photos", "subject.instance_prompt": "a sks dog",
    "subject.class_prompt": "a dog", "output_dir": "run", "optimizer.name": "adamw8bit",
}  # fmt: skip


def render() -> str:
    """Return the text of ``docs/memory/compatibility.md``."""
    notes: list[str] = []
    head = ["", *(_label(feature) for feature in FEATURES)]
    rows = [
        [_label(technique), *(_cell(technique | feature, notes) for feature in FEATURES)] for technique in TECHNIQUES
    ]
    lines = [
        "# What can be combined",
        "",
        "Generated from the code by `python -m tools.compatibility docs/memory/compatibility.md`.",
        "A refused combination stops the command before anything is loaded, with the message below the table. The",
        "optimizer is 8-bit AdamW unless the column says otherwise.",
        "",
        _row(head),
        _row(["---"] * len(head)),
        *(_row(row) for row in rows),
        "",
        *(f"{number}. {note}" for number, note in enumerate(notes, start=1)),
        "",
    ]
    return "\n".join(lines)


def _cell(fields: Fields, notes: list[str]) -> str:
    """Return ``yes``, or ``no`` with the numbers of the messages."""
    found = refusals(_config(fields))
    notes += [message for message in found if message not in notes]
    return ", ".join(f"no ({notes.index(message) + 1})" for message in found) or "yes"


def _config(fields: Fields) -> Config:
    tree: dict[str, Any] = {}
    for path, value in (_NEEDED | fields).items():
        section, _, name = path.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return Config.model_validate(tree)


def _label(fields: Fields) -> str:
    return "<br>".join(f"`{_name(path)}: {str(value).lower()}`" for path, value in fields.items())


def _name(path: str) -> str:
    """Return the name of a field, with its section where several sections have a field of that name."""
    name = path.rpartition(".")[2]
    return path if name == "enabled" else name


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
