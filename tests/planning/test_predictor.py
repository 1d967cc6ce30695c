"""What strategies share: a trace that serves two of them has to be the trace of both."""

from itertools import combinations

import pytest

from lowmem_db.config.strategy import FIELDS, changed, key_of, resolve
from lowmem_db.planning.phases import trace_class_images, trace_residents, trace_sample, trace_train
from tests.config.test_strategy import CHOICES
from tests.planning.conftest import make_config, make_run

OTHERS = {
    "memory.offload_checkpoints": {"memory.checkpointing": "segments"},
    "memory.stream_weights": {"memory.checkpointing": "segments", "memory.optimizer_in_backward": True},
}


def measure(trace, config):
    run = make_run(config)
    if trace in {"weights", "resident"}:
        found = trace_residents(run, [config])[0]
        return found.resident.weights if trace == "weights" else (found.resident, found.host_bytes, found.trained_bytes)
    traces = {"train": trace_train, "sample": trace_sample, "class_images": trace_class_images}
    found = traces[trace](run)
    return found.peak, found.host_bytes


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.path)
def test_what_is_shared_is_the_same(field, tiny_model):
    config = make_config(
        model__base=str(tiny_model), data__resolution=32, optimizer__name="adamw8bit",
        lora__enabled=field.path == "lora.base_weights", sampling__prompts=["a dog"], sampling__num_images=2,
        prior__num_class_images=1,
    )  # fmt: skip
    plain = resolve(changed(config, OTHERS.get(field.path, {})))
    strategies = [changed(plain, {field.path: value}) for value in CHOICES.get(field.path, (False, True))]
    found = {}
    for trace in ("weights", "resident", "train", "sample", "class_images"):
        for one, other in combinations(range(len(strategies)), 2):
            if key_of(strategies[one], trace) == key_of(strategies[other], trace):
                for index in (one, other):
                    if (trace, index) not in found:
                        found[trace, index] = measure(trace, strategies[index])
                assert found[trace, one] == found[trace, other], f"{field.path} changes {trace}"
    depends_on_it = {"weights", "resident", "train", "sample", "class_images"} <= field.traced.keys()
    assert found or depends_on_it, "nothing is shared"
