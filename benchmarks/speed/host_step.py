"""Where an optimizer on the host's CPU would beat one on the card, with streamed weights: by the planner's time model.

``python benchmarks/speed/host_step.py [--only sd15_full_2gb] [--output FILE.json]``

On the card, 24-bit weights and 8-bit moments cross both ways in the backward pass: 5.03 bytes a parameter. With the
step on the host, gradients leave (2 bytes) and weights arrive (2 bytes), and the host steps at the measured 3.62 ns a
parameter and thread (``benchmarks/results/adamw8bit_cpu.json``). The model favours the host: its threads do not slow
each other down, all of its work hides behind the card's, nothing waits for the step of the first layers,
``update_rms`` costs it no second pass, and the card's own step costs nothing any more.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem_db.cli.arguments import read_arguments
from lowmem_db.config.strategy import resolve
from lowmem_db.models.finding import model_of
from lowmem_db.planning.cards import Card, Crossing, find_card, seconds_per_step
from lowmem_db.planning.phases import TracedRun
from lowmem_db.planning.predictor import Predictor

CONFIGURATIONS = ("sd15_full_2gb", "sdxl_full_4gb")
PLACES = (  # card, PCIe generation, lanes
    ("RTX 3050", 4, 8), ("RTX 3050", 3, 8), ("RTX 3050", 3, 4), ("RTX 3050", 3, 1), ("RTX 4060", 4, 8),
    ("RTX 4060", 3, 8), ("RTX 4060", 3, 4), ("RTX 3060", 4, 16), ("RTX 3060", 3, 4), ("T4", 3, 16),
    ("RTX 4090", 4, 16), ("RTX 4090", 3, 4), ("A100", 4, 16),
)  # fmt: skip
THREADS = (6, 8, 16)
_TIMES = json.loads((Path(__file__).parents[1] / "results" / "adamw8bit_cpu.json").read_text())["times"]
SECONDS_PER_PARAMETER = next(each["ns_per_parameter"] for each in _TIMES if each["way"] == "native") * 1e-9


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    """Yield the seconds of a step at each place."""
    config = resolve(read_arguments([name], needs_photos=False).config)
    run = TracedRun(config=config, model=model_of(config, weights=False), card=find_card("RTX 3060"))
    predictor = Predictor(run, [config])
    kept = predictor.resident(config)
    costs, again = predictor._costs(config)
    num_trained = sum(kept.num_trained.values())
    steps = (costs.is_kernel == 1) & (costs.in_backward == 1)
    without = replace(costs, moved_bytes=costs.moved_bytes * ~steps)
    gradients = kept.streamed_trained_bytes
    crossing = Crossing(forward=kept.streamed_bytes, backward=kept.streamed_bytes, back=gradients)
    for card_name, generation, lanes in PLACES:
        card: Card = replace(find_card(card_name), pcie_generation=generation, pcie_lanes=lanes)
        on_card = seconds_per_step(costs, card, again=again, crossing=predictor.crossing(config))
        beside = seconds_per_step(without, card, again=again, crossing=crossing)
        host = {count: SECONDS_PER_PARAMETER * num_trained / count for count in THREADS}
        yield {
            "configuration": name,
            "card": card_name,
            "pcie": f"{generation}.0 x{lanes}",
            "resident": seconds_per_step(costs, card, again=again),
            "step_on_card": on_card,
            "step_on_host_for_nothing": beside,
            "step_on_host": {str(count): max(beside, seconds) for count, seconds in host.items()},
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
