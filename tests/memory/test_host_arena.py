import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem_db.host_memory import observed
from lowmem_db.memory import host_arena
from lowmem_db.memory.host_arena import HostArena

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(host_arena, "CHUNK_BYTES", 4096)


def test_memory_that_was_given_back_is_used_again():
    allocated = []
    with observed(allocated.append):
        arena = HostArena(CPU)
        for _ in range(3):
            regions = [arena.take(size) for size in (1000, 2000, 100)]
            for region in regions:
                arena.give_back(region)
    assert [tensor.numel() for tensor in allocated] == [4096]
    assert arena.num_bytes == arena.num_bytes_free == 4096


def test_gaps_grow_together_again():
    arena = HostArena(CPU)
    regions = [arena.take(1024) for _ in range(4)]
    for index in (1, 3, 0, 2):
        arena.give_back(regions[index])
    assert arena.take(4096).tensor.numel() == 4096
    assert arena.num_bytes == 4096


def test_more_than_a_chunk_gets_a_chunk_of_its_own():
    arena = HostArena(CPU)
    arena.take(512)
    assert arena.take(5000).tensor.numel() == 5000
    assert arena.num_bytes == 4096 + 5120


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_lies_where_the_device_needs_it(device):
    assert HostArena(torch.device(device)).take(8).tensor.device.type == device


@given(st.lists(st.tuples(st.integers(1, 3000), st.booleans()), max_size=40))
def test_regions_never_overlap(requests):
    arena, taken = HostArena(CPU), []
    for number, (size, gives_back) in enumerate(requests):
        region = arena.take(size)
        region.tensor.fill_(number)
        taken.append((number, region))
        if gives_back:
            number, region = taken.pop(len(taken) // 2)
            assert (region.tensor == number).all()
            arena.give_back(region)
    for number, region in taken:
        assert (region.tensor == number).all()
        arena.give_back(region)
    assert arena.num_bytes == arena.num_bytes_free
