"""What a run says before it trains."""

import pytest
import torch

from lowmem_db import environment
from lowmem_db.run import attempts
from tests.planning.conftest import make_config


@pytest.mark.parametrize(("place", "said"), [("device", ["cuda:0"]), ("host", ["cuda:0", "cpu"])])
def test_kernels_are_missed_where_the_optimizer_steps(
    place: str, said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "slow_kernels", lambda device: f"slow on {device}")
    streamed = {"memory__optimizer_in_backward": True, "memory__stream_optimizer_state": True}
    config = make_config(memory__optimizer_step=place, memory__stream_weights=True, **streamed)
    attempts._say_what_is_slow(config, torch.device("cuda:0"))
    printed = "".join(capsys.readouterr())
    assert [device for device in ("cuda:0", "cpu") if f"slow on {device}" in printed] == said
