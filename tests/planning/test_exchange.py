"""What crosses between processes in a step."""

import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.planning.cards import find_card
from lowmem_db.planning.exchange import Exchange, exchange_of, exchange_of_shards, in_words
from tests.distributed.ranks import Fields


@pytest.mark.parametrize(
    ("fields", "sent", "received"),
    [
        ({"distributed.num_processes": 1}, 0, 0),
        ({"distributed.num_processes": 2}, 1200, 1200),  # half of it twice, around the ring
        ({"distributed.num_processes": 4}, 1800, 1800),
        ({"distributed.num_processes": 2, "training.gradient_accumulation_steps": 3}, 1200, 3600),
        (
            {
                "distributed.num_processes": 2,
                "training.gradient_accumulation_steps": 3,
                "distributed.reduce": "sum",
            },
            1200,
            1200,
        ),
        ({"distributed.num_processes": 4, "distributed.reduce": "ordered"}, 1200, 3600),
    ],
)
def test_gradients_go_round_or_through_the_first(fields: Fields, sent: int, received: int, tiny_fields: Fields) -> None:
    card = find_card("rtx 3060")
    config = load_config(None, list({**tiny_fields, **fields}.items()))
    found = exchange_of(config, 1200, card)
    assert (found.sent_bytes, found.received_bytes) == (sent, received)
    assert (found.seconds > 0) == (sent > 0)


@pytest.mark.parametrize(
    ("fields", "crosses"),
    [
        ({"training.clipping": "none"}, (2 * 1000 + 600) // 2),
        ({"training.clipping": "global"}, (2 * 1000 + 600 + 600) // 2),  # and once more for its norm
        ({"training.clipping": "global", "distributed.reduce": "sum"}, (2 * 1000 + 600) // 2),
        ({"training.clipping": "none", "training.gradient_accumulation_steps": 3}, 3 * (2 * 1000 + 600) // 2),
        ({"training.clipping": "none", "distributed.num_processes": 4}, 3 * (2 * 1000 + 600) // 4),
    ],
)
def test_weights_that_are_shared_out_cross_twice_for_each_batch(
    fields: Fields, crosses: int, tiny_fields: Fields
) -> None:
    shared_out = {"distributed.num_processes": 2, "distributed.sharding": "full"}
    config = load_config(None, list({**tiny_fields, **shared_out, **fields}.items()))
    found = exchange_of_shards(config, 1000, 600, find_card("rtx 3060"))
    assert (found.sent_bytes, found.received_bytes) == (crosses, crosses)


def test_words_say_whose_figures_they_are(tiny_fields: Fields) -> None:
    config = load_config(None, [*tiny_fields.items(), ("distributed.num_processes", 2)])
    said = in_words(config, Exchange(sent_bytes=1 << 30, received_bytes=1 << 30, seconds=0.5))
    assert said.startswith("2 processes: all figures are those of one; 1.00 GiB each way cross between the cards")
    ordered = in_words(config, Exchange(sent_bytes=1 << 20, received_bytes=3 << 20, seconds=0.5))
    assert "3.0 MiB to the first and 1.0 MiB back cross" in ordered
