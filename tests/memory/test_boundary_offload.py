"""What segments keep waits on the host: once each, in memory that is used again, and it comes back in time."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from lowmem_db.host_memory import observed
from lowmem_db.memory import boundary_offload, checkpointing
from lowmem_db.memory.boundary_offload import BoundaryOffload
from lowmem_db.memory.segments import Segment
from lowmem_db.models.families.unet_blocks import find_blocks
from tests.memory.models import assert_same_bits, build, clones, loss_and_gradients, loss_of

LIMIT = 4096
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _tiny_tensors_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary_offload, "MIN_BYTES", LIMIT)


@pytest.fixture
def offload() -> BoundaryOffload:
    return BoundaryOffload()


def segment(offload: BoundaryOffload, function=torch.sin) -> Segment:
    return Segment(function, nn.Identity(), offload.keeping)


def large(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 2048), requires_grad=True) * 1


def test_a_tensor_that_two_segments_keep_is_stored_once(offload: BoundaryOffload) -> None:
    x = large()
    first, second = segment(offload)(x), segment(offload)(x)
    assert offload.num_bytes_kept() == x.nbytes
    other = segment(offload)(large())
    assert offload.num_bytes_kept() == 2 * x.nbytes
    (first + second + other).sum().backward()
    del first, second, other
    assert offload.num_bytes_kept() == 0


def test_a_tensor_that_was_changed_while_it_was_copied_is_refused(offload: BoundaryOffload) -> None:
    x = torch.randn(2, 2048)
    weight = torch.ones((), requires_grad=True)
    output = segment(offload, lambda x: (x * weight).sin())(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="was changed in place"):
        output.sum().backward()


def test_a_tensor_that_was_changed_later_is_another(offload: BoundaryOffload) -> None:
    x = torch.randn(2, 2048)
    before = x.clone()
    weight = torch.ones((), requires_grad=True)
    multiply = segment(offload, lambda x: (x * weight).sin())
    first = multiply(x)
    others = [multiply(torch.zeros(2, 2048)) for _ in range(2)]  # by now x was copied
    x.add_(1)
    (first + multiply(x) + sum(others)).sum().backward()
    again = weight.detach().requires_grad_()
    ((before * again).sin() + (x * again).sin()).sum().backward()
    assert torch.allclose(weight.grad, again.grad)


@pytest.mark.parametrize(
    ("tensor", "num_bytes"),
    [
        (torch.randn(LIMIT // 4), 0),
        (torch.randn(LIMIT // 4 + 1), LIMIT + 512),
        (torch.randn(64, 64)[:, :32], 0),
        (torch.randn(1, 64).expand(64, 64), 0),
        (torch.randn(64, 64).t(), 64 * 64 * 4),
        (torch.randn(64, 64)[16:48], 32 * 64 * 4),
        (torch.randn(2, 8, 16, 16).to(memory_format=torch.channels_last), 2 * 8 * 16 * 16 * 4),
    ],
    ids=["at the limit", "above", "not dense", "expanded", "transposed", "part", "channels last"],
)
def test_what_goes_and_how_it_comes_back(offload: BoundaryOffload, tensor: Tensor, num_bytes: int) -> None:
    seen = []
    output = segment(offload, lambda x: (seen.append(x), x.sin())[1])(tensor.detach().requires_grad_())
    assert offload.num_bytes_kept() == num_bytes
    output.sum().backward()
    forward, recomputed = seen
    assert recomputed.stride() == forward.stride()
    assert torch.equal(recomputed, forward)


def test_the_device_lets_go_of_what_was_copied(offload: BoundaryOffload) -> None:
    """But for the last two tensors, whose copies may still be under way."""
    storages = []
    x = large()
    for _ in range(6):
        storages.append(torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage()))
        x = segment(offload)(x)
    assert [storage.expired() for storage in storages] == [True] * 4 + [False] * 2


def test_tensors_come_back_one_segment_early(offload: BoundaryOffload, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    copy = boundary_offload._Host.copy

    def recording_copy(host, target: Tensor, source: Tensor):
        if torch._C._current_graph_task_id() != -1:  # in a backward pass
            events.append(f"copy {int(source.flatten()[0])}")
        return copy(host, target, source)

    monkeypatch.setattr(boundary_offload._Host, "copy", recording_copy)

    def step(x: Tensor) -> Tensor:
        events.append(f"compute {int(x.flatten()[0])}")
        return x * (x.detach() + 1) / x.detach()

    x = torch.ones(2, 2048, requires_grad=True) * 1
    for _ in range(5):
        x = segment(offload, step)(x)
    del events[:]
    x.sum().backward()
    assert events == [
        *("compute 5",),  # it and 4 never left
        *("copy 3", "compute 4"),
        *("copy 2", "compute 3"),
        *("copy 1", "compute 2"),
        "compute 1",
    ]


class LateHost(boundary_offload._Host):
    """A stream whose copies run as late as waiting allows, on memory that must still be there by then."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queue: list[tuple] = []
        self.num_waits = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        leaves = source.untyped_storage().nbytes() < target.untyped_storage().nbytes()  # the arena's chunks are larger
        on_device, on_host = (source, target) if leaves else (target, source)
        layout = (on_device.storage_offset(), on_device.shape, on_device.stride())
        storage = weakref.ref(on_device.untyped_storage())
        self.queue.append((leaves, on_host, on_device.dtype, layout, storage))
        if not leaves:
            on_device.fill_(float("nan"))

    def wait(self, copied: None) -> None:
        self.num_waits += 1
        for leaves, on_host, dtype, layout, storage in self.queue:
            alive = storage()
            assert alive is not None, "device memory was let go before its copy"
            on_device = torch.empty(0, dtype=dtype).set_(alive, *layout)
            (on_host if leaves else on_device).copy_(on_device if leaves else on_host)
        self.queue.clear()


@pytest.mark.parametrize("placement", ["layers", "segments", "nested"])
def test_copies_that_run_late_change_no_bits(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = []
    monkeypatch.setattr(boundary_offload, "_Host", lambda device: hosts.append(LateHost(device)) or hosts[-1])
    modules = build("sdxl_like")
    plain = clones(modules)
    checkpointing.apply(find_blocks(modules), placement, offload=True)
    for step in range(3):
        assert_same_bits(loss_and_gradients(modules, step), loss_and_gradients(plain, step))
    assert hosts[0].num_waits > 30


@pytest.mark.parametrize("placement", ["layers", "segments", "nested"])
def test_host_memory_is_allocated_in_the_first_step_alone(placement: str) -> None:
    modules = build("sdxl_like")
    plain = clones(modules)
    checkpointing.apply(find_blocks(modules), placement, offload=True)
    allocated: list[Tensor] = []
    with observed(allocated.append):
        loss_and_gradients(modules)
        in_first_step = len(allocated)
        for step in range(1, 4):
            assert_same_bits(loss_and_gradients(modules, step), loss_and_gradients(plain, step))
        loss_of(modules)  # a forward pass without a backward pass
        assert_same_bits(loss_and_gradients(modules, 5), loss_and_gradients(plain, 5))
    assert in_first_step == len(allocated) == 1


def test_segments_inside_a_segment_keep_nothing(monkeypatch: pytest.MonkeyPatch, offload: BoundaryOffload) -> None:
    modules = build("sdxl_like")
    monkeypatch.setattr(checkpointing, "BoundaryOffload", lambda: offload)
    kept = {}
    for placement in ("segments", "nested"):
        undo = checkpointing.apply(find_blocks(modules), placement, offload=True)
        loss = loss_of(modules)
        kept[placement] = offload.num_bytes_kept()
        loss.backward()
        undo()
    tokens = 2 * 8 * 8 * 16 * 4  # between the two blocks of each of the four transformers
    assert kept["segments"] - kept["nested"] == 4 * tokens


def test_two_forward_passes_before_backward() -> None:
    modules = build("tiny")
    plain = clones(modules)
    checkpointing.apply(find_blocks(modules), "segments", offload=True)
    for either in (modules, plain):
        (loss_of(either, 1) + loss_of(either, 2)).backward()
    for new, old in zip(modules["unet"].parameters(), plain["unet"].parameters(), strict=True):
        assert torch.equal(new.grad, old.grad)


def test_a_step_that_fails_leaves_nothing_behind(offload: BoundaryOffload) -> None:
    def fail(x: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        segment(offload, fail)(segment(offload)(large()))
    assert offload.num_bytes_kept() == 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("placement", ["layers", "segments", "nested"])
def test_the_same_bits_on_a_gpu(
    placement: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)  # as a run does: otherwise attention differs from one pass to the next
    modules = {name: module.cuda() for name, module in build("sdxl_like").items()}
    plain = clones(modules)
    checkpointing.apply(find_blocks(plain), placement)
    checkpointing.apply(find_blocks(modules), placement, offload=True)
    for step in range(4):
        loss = loss_of(modules, step)
        scratch = [torch.full((2048,), float("nan"), device="cuda") for _ in range(200)]  # where tensors lay before
        del scratch
        loss.backward()
        expected = loss_and_gradients(plain, step)
        assert torch.equal(loss, expected["loss"])
        for component, module in modules.items():
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    assert torch.equal(parameter.grad, expected[f"{component}.{name}"]), name
                    parameter.grad = None


@pytest.mark.gpu
@needs_gpu
def test_memory_of_a_gpu_is_freed(offload: BoundaryOffload) -> None:
    size = 16 * 2**20
    x = torch.randn(size // 4, device="cuda", requires_grad=True) * 1
    before = torch.cuda.memory_allocated()
    for _ in range(8):
        x = segment(offload)(x)
    assert torch.cuda.memory_allocated() - before <= 3 * size
    torch.cuda.reset_peak_memory_stats()
    x.sum().backward()
    assert torch.cuda.max_memory_allocated() - before <= 8 * size
