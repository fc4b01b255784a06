"""The closed forms that this study is held to."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses import capacity
from ssmlens.analyses._check import Check
from ssmlens.kernels.inputs import ScanInputs
from ssmlens.recurrence import Recurrence

__all__ = ["CHECKS", "drive", "orthogonal", "random_recurrence", "selective"]

MEASURED = "measured in float64 before this study was written; no closed form"


def drive(
    step: Callable[[np.ndarray, float], np.ndarray], size: int, samples: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """States (t, n) of a reservoir step(h, u) and its input (t,), uniform in [-1, 1]."""
    inputs = np.random.default_rng(seed).uniform(-1, 1, samples)
    states, h = np.empty((samples, size)), np.zeros(size)
    for t, u in enumerate(inputs):
        states[t] = h = step(h, u)
    return torch.from_numpy(states), torch.from_numpy(inputs)


def orthogonal(size: int, radius: float, seed: int = 0) -> Callable[[np.ndarray, float], np.ndarray]:
    """One step of a linear reservoir with a random orthogonal matrix times ``radius``."""
    random = np.random.default_rng(seed)
    matrix = np.linalg.qr(random.normal(size=(size, size)))[0] * radius
    weight = random.normal(size=size)
    return lambda h, u: matrix @ h + weight * u


def selective(size: int, frozen: bool) -> Callable[[np.ndarray, float], np.ndarray]:
    """One step of a diagonal recurrence whose dt hangs on the input, or is held at the input 0."""
    rates = -0.3 * np.arange(1, size + 1)

    def step(h: np.ndarray, u: float) -> np.ndarray:
        dt = math.log1p(math.exp(-1.5 + (0.0 if frozen else 2.0 * u)))
        return np.exp(dt * rates) * h + dt * u

    return step


def random_recurrence(form: str, length: int = 48, heads: int = 4, d_state: int = 6, seed: int = 0) -> Recurrence:
    """A float64 recurrence with two groups; ``form`` is "scalar", "per-state" or "delta", with "reset" also reset."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    b, t, h, n = 2, length, heads, d_state
    pieces = {"value": draw(b, t, h, 3) - 0.5, "write": draw(b, t, 2, n) - 0.5, "read": draw(b, t, 2, n) - 0.5}
    pieces |= {"dt": 0.2 * draw(b, t, h), "A": -2 * draw(h, n if "per-state" in form else 1)}
    if "delta" in form:
        key = torch.nn.functional.normalize(draw(b, t, 2, n) - 0.5, dim=-1)
        pieces |= {"erase_read": key, "erase_write": key * draw(b, t, 2, 1)}
    if "reset" in form:
        pieces["reset"] = draw(b, t) < 0.08
    return Recurrence(ScanInputs(**pieces))


def _against_dense(form: str) -> tuple[float, float]:
    rec = random_recurrence(form)
    cuts, matrix = range(1, rec.length), rec.attention.dense()
    ours = capacity.hankel(rec, "all").value
    worst = 0.0
    for k, i in enumerate(cuts):
        exact = torch.linalg.svdvals(matrix[..., i:, :i])
        width = min(exact.shape[-1], ours.shape[-1])
        worst = max(worst, float(((exact[..., :width] - ours[:, :, k, :width]).abs().amax(-1) / exact[..., 0]).max()))
    return worst, 0.0


def _rank(matrix: Tensor, expected: Callable[[int], int]) -> tuple[float, float]:
    found = capacity.effective_state_size(matrix, "all", form="rank").value
    exact = torch.tensor([expected(i) for i in range(1, len(matrix))], dtype=torch.float64)
    return float((found - exact).abs().max()), 0.0


def _band(length: int = 24, width: int = 5) -> tuple[float, float]:
    ones = torch.randn(length, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return _rank(ones.tril().triu(1 - width), lambda i: min(width - 1, i, length - i))


def _delay(length: int = 24, delay: int = 4) -> tuple[float, float]:
    matrix = torch.diag(torch.ones(length - delay, dtype=torch.float64), -delay)
    return _rank(matrix, lambda i: min(delay, i, length - i))


def _attention(length: int = 20) -> tuple[float, float]:
    scores = torch.randn(length, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    return _rank(scores.masked_fill(~mask, -torch.inf).softmax(-1), lambda i: min(i, length - i))


def _modes(count: int = 4, length: int = 32) -> tuple[float, float]:
    decay = torch.tensor([0.9, 0.6, 0.3, 0.1][:count], dtype=torch.float64).log()
    ones = torch.ones(1, length, 1, count, dtype=torch.float64)
    rec = Recurrence(ScanInputs(value=ones[..., :1], write=ones, read=ones, log_decay=decay.expand_as(ones)))
    found = capacity.effective_state_size(rec, length // 2, form="rank").value
    return float(found), count


def _semiseparable() -> tuple[float, float]:
    rec = random_recurrence("per-state")
    matrix = rec.attention.dense()
    return float(capacity.effective_state_size(matrix, "all", form="rank").value.max()), rec.d_state


def _leaky() -> tuple[float, float]:
    a, lags = 0.9, torch.arange(201, dtype=torch.float64)
    found = capacity.memory_capacity_exact([a], lags=200).value
    return float((found - (1 - a**2) * a ** (2 * lags)).abs().max()), 0.0


def _mutual_information() -> tuple[float, float]:
    a = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    found = capacity.memory_capacity_exact(a, lags=30).columns["information"]
    gram, worst = 1 / (1 - a[:, None] * a), 0.0
    for k in range(31):
        past = (a**k)[:, None]
        joint = torch.cat([torch.cat([gram, past], 1), torch.cat([past.mT, torch.ones(1, 1)], 1)])
        worst = max(worst, abs(float(found[k] - 0.5 * (gram.logdet() - joint.logdet()))))
    return worst, 0.0


def _noisy(eps: float) -> Callable[[], tuple[float, float]]:
    exact = {1e-8: 8.390, 1e-4: 5.484, 1e-2: 3.794}
    decay = torch.exp(-0.01 * torch.arange(1, 17, dtype=torch.float64))
    return lambda: (float(capacity.memory_capacity_exact(decay, lags=5000, noise=eps).value.sum()), exact[eps])


def _orthogonal() -> tuple[float, float]:
    states, inputs = drive(orthogonal(20, 0.9), 20, 60000)
    return float(capacity.memory_capacity(states, inputs, 200).value.sum()), 20.0


def _diagonal_sampled() -> tuple[float, float]:
    decay = np.array([0.95, 0.8, 0.5, 0.1])
    states, inputs = drive(lambda h, u: decay * h + u, 4, 30000)
    found = capacity.memory_capacity(states, inputs, 60, noise=1e-3)
    exact = capacity.memory_capacity_exact(decay, lags=60, noise=1e-3)
    return float(found.value.sum()), float(exact.value.sum())


def _fisher(kind: str, size: int = 20, gain: float = 1.5) -> tuple[float, float]:
    first = torch.eye(size, dtype=torch.float64)[0]
    shift = torch.diag(torch.ones(size - 1, dtype=torch.float64), -1)
    if kind == "normal":
        decay = torch.linspace(0.1, 0.9, size, dtype=torch.float64)
        even = torch.full((size,), size**-0.5, dtype=torch.float64)
        return float(capacity.fisher_memory(decay, even, 400).value.sum()), 1.0
    found = capacity.fisher_memory(shift if kind == "delay" else gain**0.5 * shift, first, size).value
    k = torch.arange(size, dtype=torch.float64)
    exact = 1 / (k + 1) if kind == "delay" else gain**k * (gain - 1) / (gain ** (k + 1) - 1)
    return float(found.sum()), float(exact.sum())


def _null(decay: float, n: int, p: int, steps: int, trials: int = 24) -> tuple[float, float]:
    """Simulated over exact; the writes before the window are what a stationary state would hold."""
    generator = torch.Generator().manual_seed(0)
    age = decay ** torch.arange(steps, dtype=torch.float64)
    squares = fourth = 0.0
    for _ in range(trials):
        keys = torch.randn(steps, n, generator=generator, dtype=torch.float64)
        values = torch.randn(steps, p, generator=generator, dtype=torch.float64)
        s = torch.linalg.svdvals((values * age[:, None]).mT @ keys).square()
        squares, fourth = squares + float(s.sum()) ** 2, fourth + float(s.square().sum())
    return squares / fourth / float(capacity.rank_null(decay, n, p).value), 1.0


def _rank_examples() -> tuple[float, float]:
    """Flat, geometric and diag(2, 1, 1) spectra against their ranks, the worst relative error."""
    q, k = 0.5, torch.arange(60, dtype=torch.float64)
    flat = capacity.rank_statistics(torch.diag(torch.tensor([1.0] * 5 + [0.0] * 3)).double())
    geometric = capacity.rank_statistics(torch.diag(q ** (k / 2)))
    halves = capacity.rank_statistics(torch.diag(0.5**k))
    small = capacity.rank_statistics(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
    pairs = [(flat.columns[x], 5.0) for x in ("entropy_rank", "stable_rank", "threshold_rank")]
    pairs += [(flat.value, 5.0), (geometric.value, (1 + q) / (1 - q))]
    pairs += [(halves.columns["entropy_rank"], 4.0), (small.columns["stable_rank"], 1.5)]
    return max(abs(float(found) / exact - 1) for found, exact in pairs), 0.0


def _half_load() -> tuple[float, float]:
    found = capacity.hebbian_load(64, 64, 1024, [round(64 * 64 / (2 * math.log(1024)))], simulate=8000)
    return float(found.columns["simulated"]), 0.5


def _linear_processing() -> tuple[float, float]:
    states, inputs = drive(orthogonal(5, 0.8), 5, 20000)
    found = capacity.information_processing_capacity(states, inputs, lags=(60, 12, 6)).value
    return float(found[0]), 5.0


def _only_linear() -> tuple[float, float]:
    states, inputs = drive(orthogonal(5, 0.8), 5, 20000)
    return float(capacity.information_processing_capacity(states, inputs, lags=(60, 12, 6)).value[1:].abs().sum()), 0.0


def _budget() -> tuple[float, float]:
    """By how much a selective recurrence of 4 states exceeds 4; its frozen twin has 4, all linear."""
    states, inputs = drive(selective(4, frozen=False), 4, 20000)
    found = capacity.information_processing_capacity(states, inputs, lags=(60, 12, 8)).value
    return max(0.0, float(found.sum()) - 4.0), 0.0


def _copy() -> tuple[float, float]:
    """A memory of 8 symbols of 3 bits copies 8; its accuracy on longer strings is the bound itself."""
    lengths = list(range(1, 17))
    accuracy = [min(1.0, 8.0 ** (8 - n)) for n in lengths]
    found = capacity.effective_bits(lengths, accuracy, 8, elements=24, bits=1)
    apart = float((found.value - found.control["bound"]).abs().max())
    # Linear interpolation to 0.9 between 1 at 8 symbols and 1/8 at 9.
    return float(found.columns["effective_bits"]) / 3 + apart, 8 + 0.1 / (1 - 1 / 8)


def _truncated_pairs() -> tuple[float, float]:
    """Of 4 pairs with orthogonal keys and values of sizes 4, 3, 2, 1 a state of rank 2 answers the largest two."""
    eye = torch.eye(8, dtype=torch.float64)
    values = torch.cat([eye[:4] * torch.tensor([[4.0], [3.0], [2.0], [1.0]]), torch.zeros(4, 8)])[None, :, None]
    keys = torch.cat([eye[:4], eye[:4]])[None, :, None]
    zero = torch.zeros(1, 8, 1, 1, dtype=torch.float64)
    write = torch.cat([keys[:, :4], torch.zeros_like(keys[:, 4:])], dim=1)
    rec = Recurrence(ScanInputs(value=values, write=write, read=keys, log_decay=zero))
    found = capacity.rank_floor(
        rec, metric=lambda y: (y[0, 4:, 0].norm(dim=-1) > 0.5).double().mean(), r_grid=range(9), token_cut=4
    )
    exact = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1], dtype=torch.float64)
    return float((found.value - exact).abs().max()), 0.0


DENSE = "singular values from square-root Gramians equal a dense SVD of the block"

CHECKS: tuple[Check, ...] = (
    *(
        Check(f"capacity: Gramians, {form}", DENSE, lambda form=form: _against_dense(form), 1e-12)  # type: ignore[misc]
        for form in ("scalar", "per-state", "scalar reset", "delta", "delta per-state reset")
    ),
    Check("capacity: band operator", "a band of width w has rank w - 1 across every cut", _band, 0),
    Check("capacity: delay", "a delay of d tokens has rank d across every cut", _delay, 0),
    Check(
        "capacity: running sum",
        "a running sum has rank 1 across every cut",
        lambda: _rank(torch.ones(24, 24, dtype=torch.float64).tril(), lambda i: 1),
        0,
    ),
    Check("capacity: attention", "softmax attention has rank min(i, t - i) at cut i", _attention, 0),
    Check("capacity: distinct modes", "n different constant decays have rank n", _modes, 0),
    Check("capacity: semiseparable", "every block below the diagonal of M has rank at most n", _semiseparable, 0),
    Check("capacity: leaky unit", "MC_k = (1 - a^2) a^(2k)", _leaky, 1e-12),
    Check("capacity: mutual information", "I(u[t-k]; h[t]) = -ln(1 - MC_k) / 2 nats", _mutual_information, 1e-10),
    *(
        Check(
            f"capacity: memory at noise {eps:g}",
            "MC of 16 real poles exp(-0.01 (n + 1))",
            _noisy(eps),
            1e-3,
            False,
            MEASURED,
        )
        for eps in (1e-8, 1e-4, 1e-2)
    ),
    Check("capacity: orthogonal reservoir", "20 states with an orthogonal matrix have MC 20", _orthogonal, 0.2),
    Check("capacity: sampled poles", "sampled MC with noise equals the closed form", _diagonal_sampled, 0.05),
    Check("capacity: Fisher, normal", "sum of J is 1 for a normal matrix", lambda: _fisher("normal"), 1e-10),
    Check("capacity: Fisher, delay", "J_k = 1 / (k + 1) for a delay line", lambda: _fisher("delay"), 1e-10),
    Check(
        "capacity: Fisher, amplified",
        "J_k = g^k (g - 1) / (g^(k+1) - 1) for a delay line of power gain g",
        lambda: _fisher("amplified"),
        1e-10,
    ),
    *(
        Check(
            f"capacity: rank null {a:g}, {n} x {p}",
            "participation ratio of random writes at decay a",
            lambda a=a, n=n, p=p: _null(a, n, p, round(4 / (1 - a))),  # type: ignore[misc]
            0.03,
        )
        for a, n, p in ((0.9, 16, 64), (0.99, 16, 64), (0.99, 64, 64))
    ),
    Check(
        "capacity: rank statistics",
        "flat r, geometric (1 + q) / (1 - q) and 4, diag(2, 1, 1) 1.5",
        _rank_examples,
        1e-12,
    ),
    Check("capacity: load law", "half of the pairs are right at K* = n p / (2 ln V)", _half_load, 0.02),
    Check("capacity: linear processing", "5 linear states have capacity 5 of degree 1", _linear_processing, 0.01),
    Check("capacity: no other degree", "5 linear states have none of degree 2 and 3", _only_linear, 0.01),
    Check("capacity: budget", "4 selective states have at most 4 in all degrees", _budget, 0.01),
    Check("capacity: copied bits", "a memory of m symbols has m log2 V bits and meets the bound", _copy, 1e-12),
    Check("capacity: rank floor", "r of 4 orthogonal pairs survive in a state of rank r", _truncated_pairs, 0),
)
