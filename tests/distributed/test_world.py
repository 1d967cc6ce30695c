"""What processes tell each other, with two and three of them on the CPU."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from lowmem_db.distributed import world as world_module
from lowmem_db.distributed.reduction import OrderedReduction, Reduction, bits_of
from lowmem_db.distributed.scattering import OrderedSum, PartOfSum
from lowmem_db.distributed.shards import can_be_shared, joined_parts, rows_of
from lowmem_db.distributed.world import ALONE, World, joined, share_state
from lowmem_db.errors import ConfigError, DataError, RunInterrupted
from tests.distributed.ranks import kill_myself, run_ranks


def test_one_process_gets_back_what_it_gives() -> None:
    value = torch.ones(2)
    assert ALONE.gathered("a") == ["a"]
    assert ALONE.gathered_in_turn([1, 2]) == [1, 2]
    assert ALONE.from_first(lambda: 3) == 3
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.least(value) is value
    with joined() as world:
        assert world is ALONE


def test_exchanges_of_three_processes() -> None:
    assert run_ranks(3, _exchange) == [0, 0, 0]


def _exchange() -> None:
    with joined() as world:
        own = world.rank
        for length in (1, 5_000, 100_000):  # more than fits into one block, too
            assert world.gathered(str(own) * length) == [str(each) * length for each in range(3)]
        assert world.from_first(lambda: [own]) == [0]
        items = list(range(7))
        assert world.gathered_in_turn(world.share(items)) == items
        assert world.least(torch.tensor([3.0 - own, own])).tolist() == [1.0, 0.0]
        _add(world)
        _add_in_order(world)
        _add_parts(world)
        _share_rows(world)
        state = {"a": torch.full((2, 2), own), "deep": {"b": torch.tensor(own), "number": own}, "none": {}}
        shared = share_state(world, state)
        assert shared["a"].tolist() == [[0, 0], [0, 0]]
        assert (shared["deep"]["b"].item(), shared["deep"]["number"], shared["none"]) == (0, 0, {})
        world.check_same("numbers", 4)
        with pytest.raises(DataError, match="rank 2 has other numbers than rank 0"):
            world.check_same("numbers", own // 2)


def _add(world: World) -> None:
    """Tensors of every layout and type are summed in place."""
    shapes = [(3,), (2_000_000,), (2, 3, 4, 5), (1,), (4, 4)]
    tensors = [torch.full(shape, 1.0 + world.rank) for shape in shapes]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    tensors.append(torch.full((5,), 1.0 + world.rank, dtype=torch.bfloat16))
    pointers = [tensor.data_ptr() for tensor in tensors]
    world.add(tensors)
    assert all(bool((tensor == 6).all()) for tensor in tensors)
    assert pointers == [tensor.data_ptr() for tensor in tensors]
    pixels = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    expected = 3 * pixels
    world.add([pixels])
    assert torch.equal(pixels, expected)


def _add_in_order(world: World) -> None:
    """Gradients are added batch by batch, and in each round by rank, as one process does it."""
    values = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).exp()
    parameter, frozen = torch.nn.Parameter(torch.zeros(50)), torch.nn.Parameter(torch.zeros(2))
    reduction = OrderedReduction(world)
    for number in range(world.rank, 6, 3):
        (parameter * values[number]).sum().backward()
        reduction.after_backward([parameter, frozen])
    reduction.complete([parameter, frozen])
    expected = values[0].clone()
    for value in values[1:]:
        expected += value
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, expected)
    assert frozen.grad is None


def _add_parts(world: World) -> None:
    """The sums of what is shared out are those of one process, batch by batch."""
    values = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).exp()
    own = slice(2 * world.rank, 2 * world.rank + 2)
    part = torch.empty(2)
    PartOfSum(world)(part, values[0, world.rank].clone(), None, None)
    assert part.tolist() == pytest.approx(values[0].sum(0)[own].tolist())
    summing = OrderedSum(world, accumulates=True)
    expected = torch.zeros(6)
    for batch in values:
        part = torch.empty(2)
        summing(part, batch[world.rank].clone(), None, None)
        for value in batch:
            expected += value
    assert torch.equal(part, expected[own])
    summing.forget()
    summing(part, torch.ones(6), None, None)
    assert part.tolist() == [3, 3]


def _share_rows(world: World) -> None:
    whole = torch.arange(14.0).view(7, 2)
    rows = rows_of(len(whole), world.size)
    assert [(each.start, each.stop) for each in rows] == [(0, 3), (3, 6), (6, 7)]
    lengths = [each.stop - each.start for each in rows]
    assert torch.equal(joined_parts(whole[rows[world.rank]], whole.shape, lengths, world), whole)


@pytest.mark.parametrize(
    ("shape", "size", "block", "can_be"),
    [
        ((320, 320), 2, 256, True),
        ((320, 4, 3, 3), 2, 256, False),  # 22.5 blocks in each half
        ((320, 4, 3, 3), 2, 1, True),
        ((77, 768), 2, 256, True),  # 39 and 38 rows
        ((5, 100), 4, 1, False),  # 2, 2, 1 and none
        ((), 2, 1, False),
    ],
)
def test_rows_are_shared_out_where_every_process_has_some_and_no_block_is_cut(
    shape: tuple[int, ...], size: int, block: int, can_be: bool
) -> None:
    assert can_be_shared(torch.Size(shape), size, block) == can_be


def test_what_differs_in_one_bit_has_another_checksum() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    before = bits_of([parameter])
    assert bits_of([parameter]) == before
    parameter.data.view(torch.int32)[0, 0, 0, 0] ^= 1
    assert bits_of([parameter]) != before


def test_order_of_gradients_is_remembered() -> None:
    class _Two(World):
        def add(self, tensors: object) -> None:
            """Add nothing."""

    reductions = [Reduction(_Two(size=2)) for _ in range(2)]
    for reduction, names in zip(reductions, [("a", "b"), ("b", "a")], strict=True):
        for name in names:
            reduction.at_once(name, [])
    assert reductions[0].order != reductions[1].order


def test_error_of_one_process_ends_all_with_its_words(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(3, _fail, ConfigError("seed: is bad")) == [2, 2, 2]
    lines = capfd.readouterr().err.splitlines()
    for other in (0, 2):
        assert any(line.startswith(f"rank {other}: ended, because rank 1 did: seed: is bad") for line in lines)
    assert "rank 1: seed: is bad" in lines


def test_interruption_of_one_process_interrupts_all() -> None:
    assert run_ranks(2, _fail, RunInterrupted("SIGTERM: stopped")) == [130, 130]


def _fail(error: BaseException) -> None:
    with joined() as world:
        world.wait_for_all()
        if world.rank == 1:
            raise error
        world.wait_for_all()


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_process_ends_the_others_with_a_line(killed: int, capfd: pytest.CaptureFixture[str]) -> None:
    codes = run_ranks(3, _die, killed)
    assert codes == [-9 if each == killed else 2 for each in range(3)]
    said = capfd.readouterr().err
    assert said.count(f"ended, because rank {killed} did: it died without a word") == 2


def _die(killed: int) -> None:
    with joined() as world:
        world.wait_for_all()
        if world.rank == killed:
            kill_myself()
        world.add([torch.ones(10)])


def test_nobody_ends_before_the_last_one_is_done(tmp_path: Path) -> None:
    assert run_ranks(2, _finish_late, tmp_path / "done") == [0, 0]


def _finish_late(file: Path) -> None:
    with joined() as world:
        world.wait_for_all()
        if world.is_first:
            time.sleep(0.5)
            file.touch()
    assert file.exists()


def test_process_that_dies_after_the_others_were_done_is_reported() -> None:
    assert run_ranks(2, _die_at_the_end) == [-9, 2]


def _die_at_the_end() -> None:
    with joined() as world:
        world.wait_for_all()
        if world.is_first:
            kill_myself()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: is 2, but WORLD_SIZE is 2; allowed: 0 to 1"),
        ({"RANK": "1"}, "RANK: is 1 without WORLD_SIZE; allowed: 0 to 0"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK: is not set; allowed: whole numbers from 0"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK: is 'one'; allowed: whole numbers from 0"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: is '0'; allowed: whole numbers from 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: is not set, but WORLD_SIZE is 2"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "LOCAL_RANK: is not set; allowed: whole numbers from 0; start with torchrun or accelerate launch",
        ),
    ],
)
def test_variables_that_do_not_fit_together_are_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised, joined():
        pass
    assert message in str(raised.value)


def test_same_rank_twice_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, _join_soon, environment={"RANK": "0"}) == [2, 2]
    assert capfd.readouterr().err.count("MASTER_ADDR, MASTER_PORT: rank 0 of 2 does not find the others") == 2


def _join_soon() -> None:
    world_module._TO_MEET = timedelta(seconds=3)
    with joined():
        pass
