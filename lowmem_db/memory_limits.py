"""How much of the host's memory this process may use: containers and batch systems allow less than the machine has.

Docker, Kubernetes, Slurm and systemd set limits of control groups (cgroups, version 1 or 2), and the kernel kills what
exceeds them; ``ulimit -v`` limits the address space. Where nothing is known of them, only the machine counts.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # cgroups of version 1 have a number near 2^63 where there is no limit


@dataclass(frozen=True)
class Limit:
    """A limit on the memory of this process and, maybe, of others.

    Attributes:
        total_bytes: The limit.
        used_bytes: What counts towards it and cannot be reclaimed.
        name: Who set it, in words.
    """

    total_bytes: int
    used_bytes: int
    name: str

    @property
    def free_bytes(self) -> int:
        """What is left."""
        return max(0, self.total_bytes - self.used_bytes)


def limits() -> list[Limit]:
    """Return the limits that hold for this process; none where the system has none or does not tell."""
    return [*_of_control_groups(), *_of_address_space()]


def _of_control_groups() -> Iterator[Limit]:
    """Yield the limits of the control groups of this process, and of those above them."""
    for version, path in _memberships():
        for mount, shown in _mounts(version):
            folder = mount / _below(path, shown)
            while True:
                yield from _of_group(folder, version)
                if folder == mount or mount not in folder.parents:
                    break
                folder = folder.parent


def _memberships() -> Iterator[tuple[int, str]]:
    """Yield the version and the path of each control group of this process that may limit memory."""
    for line in _lines("proc/self/cgroup"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            yield 2, path
        elif "memory" in controllers.split(","):
            yield 1, path


def _mounts(version: int) -> Iterator[tuple[Path, str]]:
    """Yield where a hierarchy of control groups is mounted, and which of its folders is shown there."""
    for line in _lines("proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, words = before.split(), after.split()
        kind, options = (words[0], words[-1].split(",")) if words else ("", [])
        is_wanted = kind == "cgroup2" if version == 2 else kind == "cgroup" and "memory" in options
        if is_wanted and len(fields) > 4:
            yield _ROOT / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3])


def _below(path: str, shown: str) -> str:
    """Return the path of a group inside a mount that shows only a part of the hierarchy, as in a container."""
    inside = path == shown or path.startswith(shown.rstrip("/") + "/")
    return path[len(shown) :].strip("/") if inside and ".." not in path else ""


def _of_group(folder: Path, version: int) -> Iterator[Limit]:
    is_new = version == 2
    names = ("memory.max", "memory.high") if is_new else ("memory.limit_in_bytes",)
    given = [value for name in names if (value := _number(folder / name)) is not None]
    used = _number(folder / ("memory.current" if is_new else "memory.usage_in_bytes"))
    if not given or used is None or min(given) >= _UNLIMITED:
        return
    statistics = dict(_pairs(folder / "memory.stat"))
    prefix = "" if is_new else "total_"
    reclaimable = ("inactive_file", "active_file", *(("slab_reclaimable",) if is_new else ()))
    cached = sum(statistics.get(prefix + name, 0) for name in reclaimable)
    yield Limit(min(given), max(0, used - cached), f"the control group {folder}")


def _of_address_space() -> Iterator[Limit]:
    if sys.platform == "win32":
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = next((line.split() for line in _lines("proc/self/statm")), None)
    if limit != resource.RLIM_INFINITY and pages:
        yield Limit(limit, int(pages[0]) * resource.getpagesize(), "ulimit -v")


def tightest() -> Limit | None:
    """Return the limit that leaves the least, or None if there is none."""
    return min(limits(), key=lambda limit: limit.free_bytes, default=None)


def _lines(path: str) -> list[str]:
    try:
        return (_ROOT / path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    """Return the number in a file; None if there is none, as for ``max``."""
    try:
        text = file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _pairs(file: Path) -> Iterator[tuple[str, int]]:
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        name, _, value = line.partition(" ")
        if value.strip().isdecimal():
            yield name, int(value)


def _unescaped(path: str) -> str:
    """Return a path of ``mountinfo``, in which spaces are written in octal."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path
