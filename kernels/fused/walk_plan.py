"""How a walk is cut up: channels of a program, tokens fetched ahead, segments of time.

For one channel per head and up to 16 states the rule is what was fastest on an H100 (NOTES.md has the sweep); else it
comes from counting instructions of the compiled kernel for that card (132 processors with 4 schedulers each): a token
costs a warp 33 of them at 4 numbers a thread and 24 at 2; finding the ends of segments first costs 25 more.
"""

from __future__ import annotations

from typing import NamedTuple

from ..inputs import ScanInputs
from .rounding import cdiv, next_power_of_2

__all__ = ["Plan", "choose"]

SCHEDULERS = 528
REGISTERS = 180  # that waiting tokens and the state may take of 255 without a spill
SHORTEST = 64  # tokens of a segment
LONG = 8192  # tokens from which a second launch costs less than it saves
PROGRAMS = 1280  # that segments are cut for


class Plan(NamedTuple):
    """How a walk is cut up.

    Attributes:
        rows: channels of a program, a power of two.
        warps: of a program.
        ahead: tokens that are loaded before they are needed.
        segments: of time.
    """

    rows: int
    warps: int
    ahead: int
    segments: int = 1


def choose(x: ScanInputs, *, gate: bool = False) -> Plan:
    """The cut for a recurrence of these sizes.

    Where a head has one channel every number needs its own exponential, and programs are small (4 numbers a thread) to
    spread them over the chip; where channels share their decays, a thread has 16 or 32. Programs too few to occupy
    every scheduler are halved, but where segments would make at least four times as many, time is cut instead: two
    walks over a quarter of the tokens beat one over all.
    """
    n = next_power_of_2(x.d_state)
    channels = x.n_heads * x.head_dim
    batch = max(1, x.batch)
    if x.head_dim == 1 and 4 <= n <= 16 and not x.has_erase:
        return _measured(x, n, channels, batch, gate)
    warps = max(1, n // 256)
    each = 4 if x.head_dim == 1 else 16 if x.has_erase or _per_state(x) else 32
    rows = min(max(1, 32 * warps * each // n), next_power_of_2(channels))
    divides = x.head_dim & -x.head_dim
    if x.head_dim > 1:
        # Channels of one head, whose dt and decay are loaded once; few where they cannot be.
        rows = min(rows, divides if divides * n >= 32 else max(1, 128 // n))
    while rows * n > 256 * warps and cdiv(channels, rows) * batch < SCHEDULERS:
        rows //= 2
    programs = cdiv(channels, rows) * batch
    segments = 1
    if programs < SCHEDULERS and not x.has_erase:
        room = min(SCHEDULERS // programs, x.length // SHORTEST)
        if room >= 4:
            segments = 1 << room.bit_length() - 1
        elif x.head_dim == 1 and rows > 1:
            rows //= 2
    return Plan(rows, warps, _ahead(x, rows, warps, gate), segments)


def _measured(x: ScanInputs, n: int, channels: int, batch: int, gate: bool) -> Plan:
    """Long walks in segments with 8 numbers a thread; else 4 numbers where that fills the chip, and 2 where not."""
    most = next_power_of_2(channels)
    programs = cdiv(channels, 256 // n) * batch
    if x.length >= LONG and programs < SCHEDULERS:
        segments = next_power_of_2(cdiv(PROGRAMS, programs))
        rows = min(256 // n, most)
        return Plan(rows, 1, min(8, _ahead(x, rows, 1, gate)), min(segments, x.length // SHORTEST))
    if programs * 2 >= PROGRAMS:
        rows = min(128 // n, most)
        return Plan(rows, 1, min(12, _ahead(x, rows, 1, gate)))
    rows = min(64 // n, most)
    return Plan(rows, 1, _ahead(x, rows, 1, gate))


def _per_state(x: ScanInputs) -> bool:
    decay = x.log_decay if x.A is None else x.A
    return decay is not None and decay.shape[-1] > 1


def _ahead(x: ScanInputs, rows: int, warps: int, gate: bool) -> int:
    """As many tokens as fit into the registers: a load takes as long as 10 to 20 tokens."""
    n = next_power_of_2(x.d_state)
    numbers = max(1, rows * n // (32 * warps))  # of a thread's part of the tile
    across = min(numbers, max(4, n // (32 * warps)), n)  # of one channel
    down = max(1, numbers // across)  # channels
    decays = x.A is None and _per_state(x)
    own_head = x.head_dim % rows != 0
    directions = 2 + 2 * x.has_erase
    shared = all(z.shape[2] == 1 or (x.n_heads // z.shape[2] * x.head_dim) % rows == 0 for z in (x.write, x.read))
    token = across * directions * (1 if shared else down) + across * decays * (down if own_head else 1)
    token += down * (1 + gate + own_head) + (x.reset is not None)
    room = (REGISTERS - 2 * numbers) // token
    if n >= 256:
        room //= 2  # a channel's part is two vectors of a thread, and compiling shows twice the registers
    return max(1, min(16, 1 << max(1, room).bit_length() - 1))
