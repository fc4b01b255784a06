"""Laws of associative storage: how many pairs one head can hold, and how many bits a copying model shows it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses._layers import listed
from ssmlens.analyses._result import Result

__all__ = ["effective_bits", "hebbian_load", "wilson"]

DEFAULT_LOADS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)

HEBBIAN = (
    "pairs are written as a plain sum of outer products of random unit keys and Gaussian values and read with the key; "
    "learned keys, erasing writes and other readouts can hold more"
)
ASYMPTOTIC = (
    "half of the answers are right at K* where there are many values; with few, trust the prediction, not the law"
)
BOUND = "states of b bits cannot name more than 2^b strings: above it the accuracy on random strings falls as 2^b / V^n"
ONE_TASK = "bits of this one task, on random strings; a needle of a few digits in filler says little about capacity"


def hebbian_load(
    d_state: int,
    channels: int,
    vocabulary: int,
    pairs: int | Sequence[int] | None = None,
    *,
    decay: float = 1.0,
    age: int = 0,
    simulate: int = 0,
    seed: int = 0,
) -> Result:
    """How well a head recalls key-value pairs that it holds as a plain sum of outer products.

    The state sum_j v_j k_j' of ``pairs`` random unit keys (n) and values (p, entries of variance 1 / p) is read with
    one of the keys; the answer is the one of ``vocabulary`` values with the largest inner product. Crosstalk has
    variance pairs / (n p), the largest of V wrong answers is about sqrt(2 ln V) of its deviations, so that half of
    the answers are right near K* = n p / (2 ln V).

    Args:
        d_state: n.
        channels: p.
        vocabulary: V, the values to choose from.
        pairs: loads; by default 1/8 to 4 times K*.
        decay: of the state per pair.
        age: how many pairs were written after the one asked for; matters where the state decays.
        simulate: trials of a simulation beside the prediction; 0 for none.
        seed: of the simulation.

    Returns:
        Result with axis (pairs): predicted accuracy. Columns: ``load``, pairs / K*; ``half_load``, K*; with
        ``simulate`` also ``simulated`` with its 95 % Wilson interval ``low`` to ``high``. Control: ``chance``, 1 / V.

    Raises:
        ValueError: for sizes that are no sizes, a decay outside (0, 1], or an age that no pair has.
    """
    if min(d_state, channels) < 1 or vocabulary < 2:
        raise ValueError(f"d_state and channels are at least 1, vocabulary 2: got {d_state}, {channels}, {vocabulary}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay lies above 0 and is at most 1, got {decay}")
    half = d_state * channels / (2 * math.log(vocabulary))
    loads = [max(1 + age, round(x * half)) for x in DEFAULT_LOADS] if pairs is None else listed(pairs)
    loads = sorted(set(loads))
    if not loads or loads[0] < 1 + age or age < 0:
        raise ValueError("pairs lists numbers of pairs, each above the age of the one asked for")
    sizes = (d_state, channels, vocabulary)
    value = _float([_predict(*sizes, _fading(k, decay), age) for k in loads])
    columns = {"load": _float(loads) / half, "half_load": _float(half)}
    if simulate:
        right = _float([_simulate(*sizes, _fading(k, decay), age, simulate, seed) for k in loads])
        low, high = wilson(right, simulate)
        columns |= {"simulated": right / simulate, "low": low, "high": high}
    return Result(
        name="recall_accuracy",
        value=value,
        dims=("pairs",),
        units="1",
        coords={"pairs": loads},
        columns=columns,
        control={"chance": _float(1 / vocabulary)},
        settings={
            "d_state": d_state,
            "channels": channels,
            "vocabulary": vocabulary,
            "decay": decay,
            "age": age,
            "trials": simulate,
            "seed": seed,
        },
        assumes=(HEBBIAN, ASYMPTOTIC),
        checked_by="simulation at K*: half of the answers are right within 0.02: checks.py of this study",
    )


def effective_bits(
    lengths: Sequence[int],
    accuracy: Sequence[float] | Tensor | np.ndarray,
    vocabulary: int,
    *,
    trials: int | None = None,
    level: float = 0.9,
    elements: int | None = None,
    bits: int = 32,
) -> Result:
    """How many bits a model shows that it holds: the longest random string it copies, times log2 of the vocabulary.

    n_90 is where the share of strings (or symbols) copied falls below ``level`` for the first time, interpolated
    between the measured lengths; b_eff = n_90 log2 V.

    Args:
        lengths: n, increasing.
        accuracy: share copied right at each length, in [0, 1].
        vocabulary: V, symbols drawn uniformly.
        trials: strings measured at each length, for an interval.
        level: accuracy that counts as copied.
        elements: numbers in the state, for the efficiency and the bound.
        bits: of each number.

    Returns:
        Result with axis (length): the accuracy. Columns: ``effective_length``, ``effective_bits``, with ``trials``
        their ``effective_bits_low`` and ``effective_bits_high`` (where the 95 % Wilson limits of the accuracy cross
        the level), with ``elements`` ``efficiency``, the share of the state's bits. Controls: ``chance``, V^-n, and
        with ``elements`` ``bound``, the largest accuracy that a state of that many bits allows on whole strings.
        ``effective_length`` is the largest length measured where the accuracy never falls below the level: a lower
        bound then, as ``reached`` = 0 says.

    Raises:
        ValueError: when lengths and accuracies do not fit, or are out of range.

    Source:
        The bound: Jelassi et al., "Repeat after me: transformers are better than state space models at copying" (2024).
    """
    n = _float(lengths)
    value = torch.as_tensor(accuracy, dtype=torch.float64)
    if value.shape != n.shape or not len(n) or not bool((n[1:] > n[:-1]).all()) or not n[0] > 0:
        raise ValueError("lengths are increasing numbers above 0, with one accuracy for each")
    if not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError("an accuracy lies between 0 and 1")
    if vocabulary < 2 or not 0 < level < 1:
        raise ValueError(f"vocabulary is at least 2 and level between 0 and 1, got {vocabulary} and {level}")
    symbol = math.log2(vocabulary)
    columns: dict[str, Tensor] = {}
    longest, reached = _crossing(n, value, level)
    columns |= {"effective_length": _float(longest), "effective_bits": _float(longest * symbol)}
    columns["reached"] = _float(float(reached))
    if trials is not None:
        low, high = wilson(value * trials, trials)
        columns |= {"low": low, "high": high}
        columns["effective_bits_low"] = _float(_crossing(n, low, level)[0] * symbol)
        columns["effective_bits_high"] = _float(_crossing(n, high, level)[0] * symbol)
    control = {"chance": torch.exp2(-n * symbol)}
    if elements is not None:
        columns["efficiency"] = _float(longest * symbol / (elements * bits))
        control["bound"] = torch.exp2((elements * bits - n * symbol).clamp(max=0))
    return Result(
        name="copy_accuracy",
        value=value,
        dims=("length",),
        units="1",
        coords={"length": list(lengths)},
        columns=columns,
        control=control,
        settings={
            "vocabulary": vocabulary,
            "level": level,
            "elements": elements,
            "bits": bits,
            "trials": trials,
            "interval": "95 % Wilson" if trials is not None else None,
        },
        assumes=(BOUND, ONE_TASK),
        checked_by="a memory of m symbols has m log2 V bits, and meets the bound: checks.py of this study",
    )


def wilson(right: Tensor, trials: int, z: float = 1.959963984540054) -> tuple[Tensor, Tensor]:
    """95 % Wilson interval of a share, from ``right`` out of ``trials``."""
    p = right.double() / trials
    centre = p + z**2 / (2 * trials)
    half = z * (p * (1 - p) / trials + z**2 / (4 * trials**2)).sqrt()
    scale = 1 + z**2 / trials
    return ((centre - half) / scale).clamp(0, 1), ((centre + half) / scale).clamp(0, 1)


def _float(x: float | Sequence[float]) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def _fading(pairs: int, decay: float) -> Tensor:
    """(pairs,) what is left of each write, the newest first."""
    return decay ** torch.arange(pairs, dtype=torch.float64)


def _predict(n: int, p: int, vocabulary: int, fading: Tensor, age: int) -> float:
    """Expected accuracy, over what the right answer's score and the length of what is read out depend on.

    With r = |v|^2 of the asked value, f what is left of it, q the energy of the other pairs under the asked key and x
    the crosstalk along v, the right answer scores f r + x with x ~ N(0, r q / p), and a wrong one
    N(0, (f^2 r + 2 f x + q) / p). Values stored with several keys get 1 / n of variance for each.
    """
    from scipy.stats import chi2, gamma

    signal = float(fading[age])
    others = torch.cat([fading[:age], fading[age + 1 :]]).square()
    count, middle = len(others), (np.arange(16) + 0.5) / 16
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    x, w = torch.from_numpy(nodes)[:, None], torch.from_numpy(weights / weights.sum())
    r = torch.from_numpy(chi2.ppf(middle, p) / p)[:, None, None, None]
    mean = float(others.sum()) / n
    spread = float(others.square().sum()) * 2 * (n - 1) / (n * n * (n + 2))
    energy = gamma.ppf(middle, mean**2 / spread, scale=spread / mean) if spread > 0 else np.array([mean])
    q = torch.from_numpy(energy)[:, None, None]
    expected = count / vocabulary
    copies = torch.arange(int(expected + 6 * expected**0.5) + 3, dtype=torch.float64)
    chances = (copies * math.log(max(expected, 1e-300)) - expected - torch.lgamma(copies + 1)).exp()
    extra = copies * (float(others.mean()) if count else 0.0) / n
    noise = (r * q / p + extra).sqrt() * x
    right = signal * r + noise
    length = (signal**2 * r + 2 * signal * noise + q).clamp(min=1e-12)
    wrong = sum(c * torch.special.ndtr(right / (length / p + e).sqrt()) for c, e in zip(chances, extra))
    assert isinstance(wrong, Tensor)
    return float(((wrong.log() * (vocabulary - 1)).exp() @ chances @ w).mean())


def _simulate(n: int, p: int, vocabulary: int, fading: Tensor, age: int, trials: int, seed: int) -> int:
    """Right answers out of ``trials``; every pair is asked where none fades, else the one of that age."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs, right, done = len(fading), 0, 0
    while done < trials:
        values = normal(vocabulary, p) / p**0.5
        keys = torch.nn.functional.normalize(normal(pairs, n), dim=-1)
        chosen = torch.randint(vocabulary, (pairs,), generator=generator)
        state = (values[chosen] * fading[:, None]).mT @ keys
        asked = torch.arange(pairs)[: trials - done] if bool((fading == 1).all()) else torch.tensor([age])
        best = (keys[asked] @ state.mT @ values.mT).argmax(1)
        right += int((best == chosen[asked]).sum())
        done += len(asked)
    return right


def _crossing(n: Tensor, accuracy: Tensor, level: float) -> tuple[float, bool]:
    """Length at which the accuracy first falls below the level, and whether it does; 0 below the first length."""
    below = (accuracy < level).nonzero()
    if not len(below):
        return float(n[-1]), False
    i = int(below[0])
    if i == 0:
        return 0.0, True
    share = float((accuracy[i - 1] - level) / (accuracy[i - 1] - accuracy[i]))
    return float(n[i - 1] + share * (n[i] - n[i - 1])), True
