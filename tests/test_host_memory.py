import pytest
import torch

from lowmem_db import host_memory
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_is_pinned_for_a_cuda_device():
    assert empty_on_host((4,), torch.uint8, device=torch.device("cuda")).is_pinned()
