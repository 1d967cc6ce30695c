"""Where an optimizer on the host's CPU beats one on the card, with streamed weights: by the planner's time model.

``python benchmarks/speed/host_step.py [--only sd15_full_2gb] [--output FILE.json]``

On the card, 24-bit weights and 8-bit moments cross both ways in the backward pass: 5.03 bytes a parameter. With the
step on the host (``memory.optimizer_step=host``), gradients leave (2 bytes) and weights arrive (2 bytes), and the host
steps beside the backward pass, at the measured rate of the compiled step of one thread times the threads.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem_db.cli.arguments import read_arguments
from lowmem_db.config.strategy import changed, resolve
from lowmem_db.models.finding import model_of
from lowmem_db.planning.cards import Card, find_card
from lowmem_db.planning.phases import TracedRun
from lowmem_db.planning.predictor import Predictor, Traces

CONFIGURATIONS = ("sd15_full_2gb", "sdxl_full_4gb")
PLACES = (  # card, PCIe generation, lanes
    ("RTX 3050", 4, 8), ("RTX 3050", 3, 8), ("RTX 3050", 3, 4), ("RTX 3050", 3, 1), ("RTX 4060", 4, 8),
    ("RTX 4060", 3, 8), ("RTX 4060", 3, 4), ("RTX 3060", 4, 16), ("RTX 3060", 3, 4), ("T4", 3, 16),
    ("RTX 4090", 4, 16), ("RTX 4090", 3, 4), ("A100", 4, 16),
)  # fmt: skip
THREADS = (4, 8, 16)


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    """Yield the seconds of a step at each place."""
    on_card = resolve(read_arguments([name], needs_photos=False).config)
    on_host = changed(on_card, {"memory.optimizer_step": "host"})
    resident = changed(on_card, {"memory.stream_weights": False, "memory.stream_optimizer_state": False})
    run = TracedRun(config=on_card, model=model_of(on_card, weights=False), card=find_card("RTX 3060"))
    traces = Traces()
    for card_name, generation, lanes in PLACES:
        card: Card = replace(find_card(card_name), pcie_generation=generation, pcie_lanes=lanes)
        by_threads = {
            count: Predictor(replace(run, card=replace(card, host_threads=count)), [on_card, on_host, resident], traces)
            for count in THREADS
        }
        predictor = by_threads[THREADS[0]]
        yield {
            "configuration": name,
            "card": card_name,
            "pcie": f"{generation}.0 x{lanes}",
            "resident": predictor.seconds(resident),
            "step_on_card": predictor.seconds(on_card),
            "step_on_host": {str(count): each.seconds(on_host) for count, each in by_threads.items()},
        }


def main() -> None:
    """Print a Markdown table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CONFIGURATIONS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    names = CONFIGURATIONS if arguments.only is None else (arguments.only,)
    rows = [row for name in names for row in rows_of(name)]
    heads = [f"on the host, {count} threads" for count in THREADS]
    print(f"| configuration | card, PCIe | weights that stay | step on the card | {' | '.join(heads)} |")
    print("|---|---|---|---|" + "---|" * len(THREADS))
    for row in rows:
        seconds = [row["resident"], row["step_on_card"], *row["step_on_host"].values()]
        cells = [row["configuration"], f"{row['card']}, {row['pcie']}", *(f"{each:.2f}" for each in seconds)]
        print(f"| {' | '.join(cells)} |")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
