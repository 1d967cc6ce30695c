from typing import Any

import pytest
import torch

from lowmem_db import host_memory, out_of_memory
from lowmem_db.host_memory import empty_on_host, observed, pieces_on_host


@pytest.mark.parametrize(("device", "where"), [("cpu", "cpu"), ("meta", "meta")])
def test_allocates_for_the_device(device, where):
    tensor = empty_on_host((2, 3), torch.uint8, device=torch.device(device))
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((2, 3), torch.uint8, where)


def test_observers_are_told_inside_the_block_alone():
    seen = []
    with observed(seen.append):
        inside = empty_on_host((1,), torch.float32, device=torch.device("meta"))
    empty_on_host((1,), torch.float32, device=torch.device("meta"))
    assert len(seen) == 1
    assert seen[0] is inside


def test_pieces_share_allocations_that_round_up_little(monkeypatch):
    monkeypatch.setattr(host_memory, "_CHUNK_BYTES", 1024)
    allocated = []
    with observed(allocated.append):
        pieces = pieces_on_host([512, 256, 512, 0, 2000, 1024], device=torch.device("cpu"))
    assert [chunk.nbytes for chunk in allocated] == [768, 512, 2000, 1024]
    assert [piece.nbytes for piece in pieces] == [512, 256, 512, 0, 2000, 1024]
    assert not any(piece.any() for piece in pieces)
    assert pieces_on_host([], device=torch.device("cpu")) == []


def refuses_to_pin(message: str) -> Any:
    original = torch.empty

    def empty(size: tuple[int, ...], *, dtype: torch.dtype, device: str = "cpu", pin_memory: bool = False) -> Any:
        if pin_memory:
            raise RuntimeError(message)
        return original(size, dtype=dtype, device=device)

    return empty


def test_pinned_memory_that_cannot_be_had_is_the_host_s(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    monkeypatch.setattr(torch, "empty", refuses_to_pin(said))
    with pytest.raises(MemoryError) as raised:
        pieces_on_host([3 << 20, 1 << 20], device=torch.device("cuda", 1))
    assert out_of_memory.place_of(raised.value) == "host"
    assert out_of_memory.reason_of(raised.value) == "the host has no 4.0 MiB of pinned memory left"


def test_other_faults_of_the_card_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", refuses_to_pin("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        empty_on_host((4,), torch.uint8, device=torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_is_pinned_for_a_cuda_device():
    assert empty_on_host((4,), torch.uint8, device=torch.device("cuda")).is_pinned()
