"""How processes hear that another one has ended, even while they wait for it.

Every process waits for the farewell of every other one, in threads. A process that dies sends none, but its connections
close, which is as good as a word.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_db.errors import LowmemDbError, RunInterrupted

_BYTES = 4096
_SECONDS_TO_NOTICE = 20.0  # torchrun kills after 30
_SECONDS_FOR_NEWS = 10.0


class RankError(LowmemDbError):
    """Another process of the run has ended; the message says which, and why."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Farewell:
    """How a process ended.

    Attributes:
        rank: Which process.
        exit_code: Its exit code; 0 if its work is done.
        reason: Its last words.
    """

    rank: int
    exit_code: int = 0
    reason: str = ""

    def error(self) -> BaseException:
        """Return the error that ends this process too."""
        message = f"ended, because rank {self.rank} did: {self.reason}"
        is_interruption = self.exit_code == RunInterrupted.exit_code
        return RunInterrupted(message) if is_interruption else RankError(message, self.exit_code)


class Watch:
    """Listens to the other processes.

    Args:
        rank: This process.
        size: Number of processes.
        group: A group of the backend gloo, used for nothing else.
    """

    def __init__(self, rank: int, size: int, group: Any) -> None:
        self._rank, self._group = rank, group
        self._peers = [peer for peer in range(size) if peer != rank]
        self._changed = threading.Condition()
        self._left: dict[int, Farewell] = {}
        self._noticed = threading.Event()
        self._is_held_off = False
        self._sent: list[Any] = []
        self._where = _name_of_machine()

    def start(self) -> None:
        """Start to listen."""
        for peer in self._peers:
            threading.Thread(target=self._listen, args=(peer,), daemon=True, name=f"rank {peer}").start()

    def wait_for(self, is_done: Callable[[], bool]) -> None:
        """Wait until something is done, which is told by :meth:`look`.

        Raises:
            RankError: Another process has ended before its work was done.
            RunInterrupted: It was asked to stop.
        """
        with self._changed:
            self._changed.wait_for(lambda: is_done() or self._bad_news() is not None)
        if not is_done():
            raise self._take_notice()

    def look(self, _: object = None) -> None:
        """Let :meth:`wait_for` look again."""
        with self._changed:
            self._changed.notify_all()

    def reason_for(self, error: RuntimeError) -> BaseException:
        """Return why a connection broke: the end of a process if there is news of one, else the error itself."""
        with self._changed:
            self._changed.wait_for(lambda: self._bad_news() is not None, timeout=_SECONDS_FOR_NEWS)
        return error if self._bad_news() is None else self._take_notice()

    def leave(self, exit_code: int = 0, reason: str = "") -> None:
        """Say farewell, and wait until all others have left or died.

        Args:
            exit_code: Exit code of this process.
            reason: Last words; those of the process that was the first to end are passed on.
        """
        self._noticed.set()
        origin = self._bad_news()
        told = origin or Farewell(rank=self._rank, exit_code=exit_code, reason=f"{reason}{self._where}")
        message = _to_tensor(told)
        for peer in self._peers:
            with suppress(RuntimeError):  # it is gone
                self._sent.append((message, dist.isend(message, peer, group=self._group)))
        with self._changed:
            self._changed.wait_for(lambda: len(self._left) == len(self._peers))

    @contextmanager
    def held_off(self) -> Iterator[None]:
        """Return a context in which this process is not ended, however long it takes no notice of the others."""
        self._is_held_off = True
        try:
            yield
        finally:
            self._is_held_off = False

    def bad_news(self) -> BaseException | None:
        """Return the end of another process that was not done, as an error."""
        return None if self._bad_news() is None else self._take_notice()

    def _listen(self, peer: int) -> None:
        farewell = self._farewell_of(peer)
        with self._changed:
            self._left[peer] = farewell
            self._changed.notify_all()
        while farewell.exit_code and not self._noticed.wait(_SECONDS_TO_NOTICE):
            if not self._is_held_off:
                _leave_at_once(self._rank, farewell)  # the process waits for a card, or computes something else

    def _farewell_of(self, peer: int) -> Farewell:
        buffer = torch.zeros(_BYTES, dtype=torch.uint8)
        try:
            received = dist.irecv(buffer, peer, group=self._group)
            assert received is not None, "a process does not listen to itself"
            received.wait()
        except RuntimeError:  # the connection is closed
            return Farewell(rank=peer, exit_code=2, reason="it died without a word: it was killed, or has crashed")
        return _from_tensor(buffer)

    def _bad_news(self) -> Farewell | None:
        """Return the first process that ended before its work was done; not this one, whose end others pass on."""
        with self._changed:
            ended = self._left.values()
            return next((each for each in ended if each.exit_code and each.rank != self._rank), None)

    def _take_notice(self) -> BaseException:
        self._noticed.set()
        news = self._bad_news()
        assert news is not None, "nobody has ended"
        return news.error()


def _to_tensor(farewell: Farewell) -> Tensor:
    reason = " ".join(farewell.reason.split())
    data = json.dumps(asdict(farewell) | {"reason": reason[: _BYTES // 8]}).encode()
    return torch.tensor(list(data.ljust(_BYTES)), dtype=torch.uint8)


def _from_tensor(message: Tensor) -> Farewell:
    return Farewell(**json.loads(bytes(message.tolist())))


def _name_of_machine() -> str:
    """Return where a process is, in words, if there may be more than one machine."""
    on_one = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return "" if on_one else f" (on {socket.gethostname()})"


def _leave_at_once(rank: int, farewell: Farewell) -> None:
    with suppress(OSError, ValueError):  # the terminal may be gone
        sys.stderr.write(f"rank {rank}: {farewell.error()}\n")
        sys.stderr.flush()
    os._exit(farewell.exit_code)
