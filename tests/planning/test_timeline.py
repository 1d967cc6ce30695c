"""Peaks of mixed placements, put together from traces with one placement."""

import pytest

from lowmem_db.config.strategy import changed, resolve
from lowmem_db.planning.phases import Traced, trace_train
from lowmem_db.planning.timeline import END, BlockFigures, mixed_peak
from tests.planning.conftest import make_config, make_run


def test_blocks_before_one_are_still_there_and_those_behind_it_are_gone():
    figures = {"a": BlockFigures(left=3, peak=10), "b": BlockFigures(left=5, peak=8), END: BlockFigures(0, 1)}
    assert mixed_peak(figures) == 3 + 8
    assert mixed_peak({**figures, "b": BlockFigures(left=1, peak=2)}) == 10
    assert mixed_peak({**figures, END: BlockFigures(left=0, peak=7)}) == 3 + 5 + 7


def test_mixture_has_the_peak_of_its_own_trace(tiny_model):
    config = make_config(
        model__base=str(tiny_model), data__resolution=64, prior__enabled=False, training__train_batch_size=8,
        training__train_text_encoder=True, memory__optimizer_in_backward=True,
    )  # fmt: skip
    plain = resolve(config)

    def trace(placement) -> Traced:
        return trace_train(make_run(changed(plain, {"memory.checkpointing": placement})))

    none, segments = map(trace, ("none", "segments"))
    blocks = list(none.blocks)
    assert blocks[0] == "text_encoder"
    assert blocks[-1] == END
    resident = none.resident.total
    assert resident + mixed_peak(none.blocks) == pytest.approx(none.peak.total, rel=0.001)
    for chosen in (blocks[-2:-1], blocks[1:3]):
        exact = trace(dict.fromkeys(chosen, "segments")).peak.total
        mixed = {name: (segments if name in chosen else none).blocks[name] for name in blocks}
        assert resident + mixed_peak(mixed) == pytest.approx(exact, rel=0.01)
        assert segments.peak.total < exact < none.peak.total
