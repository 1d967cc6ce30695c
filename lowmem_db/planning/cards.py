"""Public figures of consumer and Colab cards, and how long a trace would take on them.

Tensor TFLOPS are dense and accumulate in fp32, as in training. The times are predictions for ranking strategies, not
measurements: they assume that the fractions of the public figures below are reached. A card computes what the host has
told it to, so that a step takes as long as the slower of the two: on a fast card that is the host.
"""

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from lowmem_db_kernels.dispatch import choose

from lowmem_db import nvidia
from lowmem_db.config.schema import Config
from lowmem_db.environment import GIB
from lowmem_db.errors import ConfigError
from lowmem_db.planning import calibration
from lowmem_db.planning.costs import COMPUTE_TYPES, Costs

_SHARE_OF_FLOPS = 0.5
_SHARE_FOR_PROGRAMS = 0.97  # the card's firmware keeps the rest
_SECONDS_OF_SMALLEST = 2.5e-6  # an operator on a card, however small
_SECONDS_OF_SMALLEST_ON_CPU = 5e-6
_HOST_SECONDS = 8e-6  # Python, autograd and torch's dispatcher, for each operator
_WORTH_A_TECHNIQUE = 0.98  # of a step's seconds; closer to 1 is what two measurements of the same thing differ by
_FEW_LANES = 8e9  # bytes per second: fewer than eight lanes of PCIe 4.0
_HOST_BANDWIDTH = 50e9  # bytes per second, the public figure of two channels of DDR4
_HOST_RATE_OF_THREAD = 2.5e9  # bytes per second of the compiled step of 8-bit AdamW, measured: 14 bytes in 5.5 ns
_HOST_SECONDS_OF_KERNEL = 25e-6  # the same for a kernel of ours, which Triton launches
_NO_PART_OF_NAME = re.compile(r"nvidia|geforce|tesla|\bgpu\b|[\s_-](sxm\d?|pcie|hbm\d\w?)\b")
_MEMORY = re.compile(r"[\s_-]\d+\s?gb\b", re.IGNORECASE)
_PCIE_3_LANE = 0.985e9  # bytes per second in each direction; every generation doubles it


@dataclass(frozen=True)
class Card:
    """A device that a run is planned for.

    Attributes:
        name: Its commercial name.
        memory_gib: Its memory.
        bandwidth: Memory bandwidth in GB/s.
        tflops: Dense half-precision TFLOPS of the tensor cores, accumulated in fp32.
        fp32_tflops: TFLOPS in fp32.
        pcie_generation: 1 to 6; 0 for the host itself.
        pcie_lanes: 1 to 16.
        capability: CUDA compute capability, or None for the CPU.
        multiprocessors: How many it has.
        host_threads: Threads of its host that compute beside it.
        eager_step: Whether plain PyTorch computes the optimizer's step there, as without Triton.
    """

    name: str
    memory_gib: float
    bandwidth: float
    tflops: float
    fp32_tflops: float
    pcie_generation: int
    pcie_lanes: int
    capability: tuple[int, int] | None
    multiprocessors: int
    host_threads: int = 8
    eager_step: bool = False

    @property
    def has_bf16(self) -> bool:
        """Whether it supports bf16: compute capability 8.0 or higher."""
        return self.capability is not None and self.capability >= (8, 0)

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU."""
        return self.capability is None

    @property
    def has_few_lanes(self) -> bool:
        """Whether so little crosses PCIe that an optimizer's step on the host may be faster."""
        return not self.is_cpu and pcie_rate(self) < _FEW_LANES

    @property
    def faster_with(self) -> frozenset[str]:
        """Fields of techniques that were measured to make its steps faster."""
        ratios = calibration.RATIOS.get(known_name(self.name), {})
        return frozenset(field for field, ratio in ratios.items() if ratio < _WORTH_A_TECHNIQUE)

    @property
    def usable_bytes(self) -> int:
        """Bytes of its memory that programs can use."""
        return int(self.memory_gib * GIB * _SHARE_FOR_PROGRAMS)


CPU = Card("CPU", 0.0, 20.0, 0.1, 0.1, 0, 0, None, 0)
CARDS = (
    Card("GTX 1660 Ti", 6.0, 288.0, 10.9, 5.4, 3, 16, (7, 5), 24),
    Card("RTX 2060", 6.0, 336.0, 25.8, 6.5, 3, 16, (7, 5), 30),
    Card("RTX 2070", 8.0, 448.0, 29.9, 7.5, 3, 16, (7, 5), 36),
    Card("RTX 2080", 8.0, 448.0, 40.3, 10.1, 3, 16, (7, 5), 46),
    Card("RTX 2080 Ti", 11.0, 616.0, 53.8, 13.4, 3, 16, (7, 5), 68),
    Card("RTX 3050", 8.0, 224.0, 18.2, 9.1, 4, 8, (8, 6), 20),
    Card("RTX 3060", 12.0, 360.0, 25.6, 12.7, 4, 16, (8, 6), 28),
    Card("RTX 3060 Ti", 8.0, 448.0, 32.4, 16.2, 4, 16, (8, 6), 38),
    Card("RTX 3070", 8.0, 448.0, 40.6, 20.3, 4, 16, (8, 6), 46),
    Card("RTX 3080", 10.0, 760.0, 59.5, 29.8, 4, 16, (8, 6), 68),
    Card("RTX 3080 Ti", 12.0, 912.0, 68.2, 34.1, 4, 16, (8, 6), 80),
    Card("RTX 3090", 24.0, 936.0, 71.2, 35.6, 4, 16, (8, 6), 82),
    Card("RTX 4060", 8.0, 272.0, 30.2, 15.1, 4, 8, (8, 9), 24),
    Card("RTX 4060 Ti", 8.0, 288.0, 44.1, 22.1, 4, 8, (8, 9), 34),
    Card("RTX 4060 Ti 16GB", 16.0, 288.0, 44.1, 22.1, 4, 8, (8, 9), 34),
    Card("RTX 4070", 12.0, 504.0, 58.3, 29.1, 4, 16, (8, 9), 46),
    Card("RTX 4070 Ti", 12.0, 504.0, 80.2, 40.1, 4, 16, (8, 9), 60),
    Card("RTX 4070 Ti Super", 16.0, 672.0, 88.2, 44.1, 4, 16, (8, 9), 66),
    Card("RTX 4080", 16.0, 717.0, 97.5, 48.7, 4, 16, (8, 9), 76),
    Card("RTX 4090", 24.0, 1008.0, 165.2, 82.6, 4, 16, (8, 9), 128),
    Card("RTX 5060 Ti 16GB", 16.0, 448.0, 47.4, 23.7, 5, 8, (12, 0), 36),
    Card("RTX 5070", 12.0, 672.0, 61.7, 30.9, 5, 16, (12, 0), 48),
    Card("RTX 5070 Ti", 16.0, 896.0, 87.9, 43.9, 5, 16, (12, 0), 70),
    Card("RTX 5080", 16.0, 960.0, 112.6, 56.3, 5, 16, (12, 0), 84),
    Card("RTX 5090", 32.0, 1792.0, 209.5, 104.8, 5, 16, (12, 0), 170),
    Card("T4", 15.0, 320.0, 65.0, 8.1, 3, 16, (7, 5), 40),
    Card("L4", 24.0, 300.0, 121.0, 30.3, 4, 16, (8, 9), 58),
    Card("V100", 16.0, 900.0, 112.0, 14.0, 3, 16, (7, 0), 80),
    Card("A100", 40.0, 1555.0, 312.0, 19.5, 4, 16, (8, 0), 108),
    Card("H100", 80.0, 3350.0, 989.0, 67.0, 5, 16, (9, 0), 132),
)
ASSUMED = next(card for card in CARDS if card.name == "RTX 3060")


def find_card(name: str) -> Card:
    """Find a card by name, in any spelling: ``rtx 3060``, ``RTX3060``, ``3060``, ``RTX 3060 8GB``.

    A card of laptops, or a part of one (MIG), is another card: it has less memory than the whole one of that name.

    Raises:
        ConfigError: The name is unknown, or its memory is none; the message suggests similar ones.
    """
    cards = _by_plain_name()
    plain = _plain(name)
    for key in (plain, "rtx" + plain):
        if key in cards:
            return cards[key]
    for digits in (2, 1):
        model, memory = plain[: -2 - digits], plain[-2 - digits : -2]
        key = next((key for key in (model, "rtx" + model) if key in cards), None)
        if plain.endswith("gb") and memory.isdecimal() and key is not None:
            if int(memory) == 0:
                raise ConfigError(f"--gpu: {name!r} has no memory; give at least 1GB behind the name, or leave it out")
            return replace(cards[key], name=f"{cards[key].name} {int(memory)}GB", memory_gib=float(memory))
    near = difflib.get_close_matches(plain, cards, n=6, cutoff=0.6)
    hint = f"did you mean {' or '.join(cards[key].name for key in near)}? " if near else ""
    raise ConfigError(
        f"--gpu: {name!r} is unknown; {hint}Allowed: {', '.join(card.name for card in CARDS)}; or leave --gpu out "
        "and give --budget"
    )


def card_of(name: str, *, total_bytes: int, capability: tuple[int, int], multiprocessors: int | None = None) -> Card:
    """Return the card for a device in this machine, with its real memory; an unknown one is as fast as ``ASSUMED``."""
    like = _known(name) or ASSUMED
    return replace(
        like,
        name=name,
        memory_gib=total_bytes / GIB / _SHARE_FOR_PROGRAMS,
        capability=capability,
        multiprocessors=multiprocessors or like.multiprocessors,
    )


def card_here(device: torch.device) -> Card:
    """Return the card of a CUDA device of this machine, with its own lanes, and what computes the optimizer's step."""
    found = torch.cuda.get_device_properties(device)
    card = card_of(
        found.name,
        total_bytes=found.total_memory,
        capability=(found.major, found.minor),
        multiprocessors=found.multi_processor_count,
    )
    eager_step = choose("adamw8bit_step", device).backend == "eager"
    card = replace(card, eager_step=eager_step, host_threads=torch.get_num_threads())
    link = _link_of(found)
    return card if link is None else replace(card, pcie_generation=link[0], pcie_lanes=link[1])


def _link_of(properties: Any) -> tuple[int, int] | None:
    """Return PCIe generation and lanes of a device, or None if torch or the driver does not tell."""
    if not hasattr(properties, "pci_bus_id"):  # an older version of torch
        return None
    return nvidia.pcie_link(properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)


def is_known(name: str) -> bool:
    """Return whether a card that a driver calls ``name`` is in :data:`CARDS`."""
    return _known(name) is not None


def known_name(name: str) -> str:
    """Return the name in :data:`CARDS` of a card that a driver calls ``name``, or ``name`` if it is not there."""
    known = _known(name)
    return name if known is None else known.name


class Crossing(NamedTuple):
    """Bytes that cross PCIe beside a step; the two directions do not slow each other down.

    Attributes:
        forward: To the card, in the forward pass.
        backward: To the card, in the backward pass.
        back: To the host, in the backward pass.
    """

    forward: int = 0
    backward: int = 0
    back: int = 0


def seconds_per_step(
    costs: Costs, card: Card, *, again: np.ndarray | None = None, crossing: Crossing | None = None
) -> float:
    """Predict the seconds of a traced step on a card.

    Args:
        costs: The costs of its operators.
        card: The card.
        again: How many more times each operator runs in the backward pass. Default: 0 for all.
        crossing: Bytes that cross PCIe meanwhile. Default: none.
    """
    again = np.zeros(len(costs.flops)) if again is None else again
    on_card, is_backward = operator_seconds(costs, card), costs.in_backward == 1
    forward, backward = on_card[~is_backward].sum(), on_card[is_backward].sum() + (again * on_card).sum()
    copying = [pcie_seconds(num_bytes, card) for num_bytes in crossing or Crossing()]
    beside = seconds_on_host(costs.host_bytes_in_backward, card)
    if card.is_cpu:
        backward, beside = backward + beside, 0.0
    computing = max(forward, copying[0]) + max(backward, beside, *copying[1:])
    computing += seconds_on_host(costs.host_bytes, card)
    launching = ((1.0 + again) * host_seconds(costs)).sum() + costs.num_on_host * _HOST_SECONDS_OF_KERNEL
    on_host = 0.0 if card.is_cpu else launching
    return float(max(computing, on_host)) * calibration.SECONDS.get(known_name(card.name), 1.0)


def measured_ratio(card: Card, config: Config) -> float:
    """Return the measured seconds of a step with a strategy's fused layers over those without; 1 if nobody measured."""
    memory, ratios = config.memory, calibration.RATIOS.get(known_name(card.name), {})
    if not memory.fused_layers:
        return 1.0
    return ratios.get("memory.channels_last" if memory.channels_last else "memory.fused_layers", 1.0)


def operator_seconds(costs: Costs, card: Card) -> np.ndarray:
    """Predict how long a card takes for each operator: its computing or memory time, whichever is longer."""
    half, full = card.tflops * 1e12 * _SHARE_OF_FLOPS, card.fp32_tflops * 1e12 * _SHARE_OF_FLOPS
    rates = np.array([full if dtype == torch.float32 else half for dtype in COMPUTE_TYPES])
    computing = costs.flops / rates[costs.compute_type]
    moving = costs.moved_bytes / (card.bandwidth * 1e9 * calibration.SHARE_OF_BANDWIDTH)
    smallest = _SECONDS_OF_SMALLEST_ON_CPU if card.is_cpu else _SECONDS_OF_SMALLEST
    return np.maximum(np.maximum(computing, moving), smallest)


def host_seconds(costs: Costs) -> np.ndarray:
    """Predict how long the host takes to launch each operator on a card."""
    return np.where(costs.is_kernel == 1, _HOST_SECONDS_OF_KERNEL, _HOST_SECONDS)


def seconds_on_host(num_bytes: int, card: Card) -> float:
    """Predict the seconds in which the processor beside a card reads and writes so many bytes."""
    if card.is_cpu:
        return num_bytes / (card.bandwidth * 1e9 * calibration.SHARE_OF_BANDWIDTH)
    rate = min(_HOST_BANDWIDTH * calibration.SHARE_OF_BANDWIDTH, card.host_threads * _HOST_RATE_OF_THREAD)
    return num_bytes / rate


def pcie_seconds(num_bytes: int, card: Card) -> float:
    """Predict the seconds that a copy to or from the host takes."""
    if card.is_cpu:
        return num_bytes / (card.bandwidth * 1e9 * calibration.SHARE_OF_BANDWIDTH)
    return num_bytes / (pcie_rate(card) * calibration.SHARE_OF_PCIE)


def pcie_rate(card: Card) -> float:
    """Return the public figure of a card's PCIe, in bytes per second and direction."""
    return _PCIE_3_LANE * 2 ** (card.pcie_generation - 3) * card.pcie_lanes


def _known(name: str) -> Card | None:
    """Return the card that a driver calls ``name``; what only begins alike, such as a laptop's, is another one."""
    cards = _by_plain_name()
    return cards.get(_plain(name)) or cards.get(_plain(_MEMORY.sub("", name)))


def _by_plain_name() -> dict[str, Card]:
    return {_plain(card.name): card for card in CARDS}


def _plain(name: str) -> str:
    """Return a name without spaces, case, maker, product line and form."""
    return re.sub(r"[^a-z0-9]", "", _NO_PART_OF_NAME.sub("", name.lower()))
