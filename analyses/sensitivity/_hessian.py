"""Curvature of the loss in the weights: the ends of the Hessian's spectrum, its trace, and its negative share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmlens.analyses._ledger import Ledger, Progress
from ssmlens.analyses._result import Result
from ssmlens.analyses.sensitivity._removal import fingerprint
from ssmlens.analyses.sensitivity._text import Text
from ssmlens.errors import SsmlensError
from ssmlens.lens import Lens
from ssmlens.quiet import quiet_transformers

__all__ = ["Curvature", "hessian", "spectrum_ends", "spectrum_moments"]


@dataclass(frozen=True, eq=False)
class Curvature:
    """Hessian times vector, of a loss in some tensors; the graph of the gradient is kept.

    Args:
        loss: a scalar, twice differentiable.
        parameters: leaves of its graph; those that it does not depend on count as flat.
    """

    loss: Tensor
    parameters: Sequence[Tensor]

    def __post_init__(self) -> None:
        found = torch.autograd.grad(self.loss, self.parameters, create_graph=True, allow_unused=True)
        slopes = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.parameters)]
        object.__setattr__(self, "slopes", slopes)

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        """H v for v (size,), in float64 outside and the parameters' dtype inside."""
        flat = torch.from_numpy(np.ascontiguousarray(vector).reshape(-1)).to(self.parameters[0])
        pieces = flat.split([p.numel() for p in self.parameters])
        slopes: Sequence[Tensor] = self.slopes  # type: ignore[attr-defined]
        curved = [i for i, g in enumerate(slopes) if g.requires_grad]
        out = torch.autograd.grad(
            [slopes[i] for i in curved], self.parameters, [pieces[i].view_as(slopes[i]) for i in curved],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(out, self.parameters)]
        return torch.cat([g.reshape(-1) for g in parts]).double().cpu().numpy()


def spectrum_ends(
    product: Callable[[np.ndarray], np.ndarray], size: int, k: int, end: str = "largest", *, tolerance: float = 1e-4,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Eigenvalues at one end of a symmetric operator's spectrum, by Lanczos (scipy's eigsh).

    Args:
        product: v (size,) to H v.
        size: of the vectors; larger than k.
        k: how many.
        end: "largest" or "smallest", by value and not by magnitude.
        tolerance: relative accuracy at which an eigenvalue counts as found.
        seed: of the first vector.

    Returns:
        Eigenvalues (k,) from the end inwards, eigenvectors (size, k), and residuals ||H v - l v|| (k,): within each
        distance of its number there is an eigenvalue.

    Raises:
        SsmlensError: for a k that is not below the size, or when Lanczos does not settle.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    if not 1 <= k < size:
        raise SsmlensError(f"k is from 1 to below the {size} parameters, got {k}")
    if end not in ("largest", "smallest"):
        raise SsmlensError(f"unknown end {end!r}: choose largest or smallest")
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    which: Any = "LA" if end == "largest" else "SA"
    try:
        values, vectors = eigsh(operator, k=k, which=which, tol=tolerance, v0=start, ncv=min(size, max(2 * k + 1, 12)))
    except ArpackNoConvergence as error:
        raise SsmlensError(f"Lanczos found {len(error.eigenvalues)} of {k} eigenvalues: ask for fewer") from error
    order = np.argsort(-values) if end == "largest" else np.argsort(values)
    values, vectors = values[order], vectors[:, order]
    residuals = [np.linalg.norm(product(v) - value * v) for value, v in zip(values, vectors.T)]
    return values, vectors, np.array(residuals)


def spectrum_moments(
    product: Callable[[np.ndarray], np.ndarray], size: int, depth: int = 16, seed: int = 0
) -> dict[str, float]:
    """One probe of stochastic Lanczos quadrature: trace, and share of the absolute spectrum that is negative.

    Args:
        product: v (size,) to H v.
        size: of the vectors.
        depth: Lanczos steps; the spectrum is exact when it has at most this many different eigenvalues.
        seed: of the probe, of +1 and -1.

    Returns:
        "trace", "absolute" (sum of magnitudes) and "negative" (sum of magnitudes of negative eigenvalues): unbiased
        for the trace, and as good as the quadrature for the others.
    """
    v = np.random.default_rng(seed).choice([-1.0, 1.0], size) / math.sqrt(size)
    basis, diagonal, beside = [v], [], []
    for step in range(min(depth, size)):
        w = product(basis[-1])
        diagonal.append(float(basis[-1] @ w))
        for _ in range(2):  # against every vector, twice: plain Lanczos loses orthogonality
            for u in basis:
                w = w - (u @ w) * u
        length = float(np.linalg.norm(w))
        if step + 1 == min(depth, size) or length < 1e-10 * max(1e-300, abs(diagonal[0])):
            break
        beside.append(length)
        basis.append(w / length)
    beside = beside[: len(diagonal) - 1]
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    weights = size * vectors[0] ** 2
    return {
        "trace": float(weights @ values),
        "absolute": float(weights @ np.abs(values)),
        "negative": float(weights @ np.maximum(-values, 0)),
    }


def hessian(
    lens: Lens, prompt: Any, k: int = 5, *, only: Iterable[str] | None = None, probes: int = 2, depth: int = 16,
    tolerance: float = 1e-3, seed: int = 0, resume: str | Path | None = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Largest eigenvalues of the Hessian of the mean next-token loss, by Lanczos on Hessian-vector products.

    Args:
        lens: any model that torch can differentiate twice.
        prompt: whatever `Lens.trace` takes; the cost of a product grows with its tokens.
        k: how many of the largest eigenvalues.
        only: parts of parameter names, such as "A_log"; the Hessian in those alone.
        probes: random vectors of the trace and of the negative share; none leave both out.
        depth: Lanczos steps of each probe.
        tolerance: relative accuracy of the eigenvalues.
        seed: of all random vectors and of the shuffled targets.
        resume: file that keeps each part that is done; a run with the same settings goes on there.
        progress: called with the parts done and the parts there are.

    Returns:
        Eigenvalues (k,) from the largest on, nats a token per squared unit of the weights. Columns: ``residual``
        ||H v - l v||, ``low`` and ``high`` (the value less and plus it: an eigenvalue lies between), ``smallest`` (the
        most negative eigenvalue), ``trace`` with ``trace_error`` (standard error over probes), ``negative_share`` of
        the absolute spectrum, ``scaled`` (eigenvalue times the squared norm of the weights it acts in). Control:
        ``shuffled_targets``, the largest eigenvalue when each token has another token's target. ``settings["where"]``
        tells, for each eigenvector, its share in the weights of each name.

    Raises:
        SsmlensError: when no parameter is chosen, or k does not fit.
    """
    text = Text.of(lens, prompt)
    named = [
        (name, p) for name, p in lens.model.named_parameters()
        if p.requires_grad and (only is None or any(part in name for part in only))
    ]  # fmt: skip
    if not named or probes < 0 or depth < 1:
        known = sorted({_short(name) for name, _ in lens.model.named_parameters()})
        raise SsmlensError(f"no trainable parameter is called {only}: names hold {', '.join(known)}")
    about = {"only": None if only is None else list(only), "k": k, "probes": probes, "depth": depth,
             "tolerance": tolerance, "seed": seed, **fingerprint(text)}  # fmt: skip
    ledger = Ledger(resume, {**text.settings, **about})
    parameters = [p for _, p in named]
    total = 3 + probes

    def tick(done: int) -> None:
        if progress is not None:
            progress(done, total)

    built: dict[bool, Curvature] = {}

    def curvature(shuffled: bool = False) -> Curvature:
        if shuffled not in built:
            built.clear()  # a graph of two derivatives is large: one at a time
            built[shuffled] = Curvature(_loss(lens, text, seed if shuffled else None), parameters)
        return built[shuffled]

    def top() -> dict[str, Any]:
        h = curvature()
        values, vectors, residuals = spectrum_ends(h, h.size, k, tolerance=tolerance, seed=seed)
        return {"values": values, "residuals": residuals, "where": [_where(named, v) for v in vectors.T],
                "loss": float(h.loss.detach())}  # fmt: skip

    def one(end: str, shuffled: bool) -> float:
        h = curvature(shuffled)
        return float(spectrum_ends(h, h.size, 1, end, tolerance=tolerance, seed=seed)[0][0])

    def probe(number: int) -> dict[str, float]:
        h = curvature()
        return spectrum_moments(h, h.size, depth, number)

    found = ledger.get("largest", top)
    tick(1)
    smallest = float(ledger.get("smallest", lambda: one("smallest", False)))
    tick(2)
    moments = []
    for i in range(probes):
        moments.append(ledger.get(f"probe {i}", partial(probe, seed + i)))
        tick(3 + i)
    shuffled = float(ledger.get("shuffled", lambda: one("largest", True)))
    tick(total)
    return _result(found, smallest, moments, shuffled, parameters, {**text.settings, **about})


def _result(
    found: dict[str, Any], smallest: float, moments: list[dict[str, float]], shuffled: float,
    parameters: Sequence[Tensor], settings: dict[str, Any],
) -> Result:  # fmt: skip
    values, residuals = (torch.tensor(found[name], dtype=torch.float64) for name in ("values", "residuals"))
    traces = [x["trace"] for x in moments]
    trace = float(np.mean(traces)) if traces else math.nan
    error = float(np.std(traces, ddof=1) / math.sqrt(len(traces))) if len(traces) > 1 else math.nan
    absolute, negative = (sum(x[name] for x in moments) for name in ("absolute", "negative"))
    norm = sum(float(p.detach().double().square().sum()) for p in parameters)
    single = {"smallest": smallest, "trace": trace, "trace_error": error,
              "negative_share": negative / absolute if absolute else math.nan}  # fmt: skip
    return Result(
        name="eigenvalue",
        value=values,
        dims=("index",),
        units="nats per token and squared unit of the weights",
        columns={
            "residual": residuals,
            "low": values - residuals,
            "high": values + residuals,
            "scaled": values * norm,
            **{name: torch.tensor([x], dtype=torch.float64) for name, x in single.items()},
        },
        control={"shuffled_targets": torch.tensor([shuffled], dtype=torch.float64)},
        settings={**settings, "loss": found["loss"], "parameters": sum(p.numel() for p in parameters),
                  "squared_norm": norm, "where": found["where"]},
        assumes=(
            "Curvature depends on how the weights are written: scaling one matrix up and the next one down changes it "
            "and not the model. Compare models at equal loss, learning rate and scale, if at all.",
            "The loss is that of this text alone; on few tokens it is sharper than on the training data.",
            "The Hessian is symmetric and Lanczos exact up to the residual; float32 products add noise of 1e-6.",
        ),
        checked_by="a quadratic of known spectrum; tests/analyses/sensitivity/test_hessian.py",
    )  # fmt: skip


def _loss(lens: Lens, text: Text, shuffle: int | None) -> Tensor:
    """Mean loss of the model's own forward, differentiable; with a seed, the targets change places."""
    real = text.real
    targets = text.ids[:, 1:][real]
    if shuffle is not None:
        targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(shuffle))]
    mask = (torch.arange(text.ids.shape[1]) < text.lengths[:, None]).long().to(lens.device)
    extra = {"attention_mask": mask} if bool((mask == 0).any()) else {}
    with quiet_transformers(), torch.enable_grad():
        logits = lens.model(input_ids=text.ids.to(lens.device), return_dict=True, use_cache=False, **extra).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1][real.to(lens.device)], targets.to(lens.device))


def _where(named: Sequence[tuple[str, Tensor]], vector: np.ndarray) -> dict[str, float]:
    """Share of an eigenvector's squared length in the weights of each name, layers put together, largest first."""
    shares: dict[str, float] = {}
    start = 0
    for name, p in named:
        part = vector[start : start + p.numel()]
        shares[_short(name)] = shares.get(_short(name), 0.0) + float(part @ part)
        start += p.numel()
    total = sum(shares.values()) or 1.0
    return {name: share / total for name, share in sorted(shares.items(), key=lambda pair: -pair[1])}


def _short(name: str) -> str:
    """ "backbone.layers.3.mixer.A_log" as "mixer.A_log"."""
    return ".".join(part for part in name.split(".")[-3:] if not part.isdigit() and part not in ("backbone", "layers"))
