"""A trace held against the float64 models of `reference`, number by number."""

from __future__ import annotations

from typing import Any

import reference
import torch
from checkpoints import GROUPED_NORM, gap

import ssmlens

__all__ = ["IDS", "compare", "mixer_gaps", "truth_of"]

IDS = [3, 17, 0, 36, 5, 5, 21, 9, 30, 2, 11]


def truth_of(model: Any, ids: list[int] = IDS) -> reference.Model:
    """The reference run with the weights and the settings of a transformers model."""
    c, weights = model.config, model.state_dict()
    if c.model_type == "mamba2":
        limit = tuple(float(x) for x in c.time_step_limit)
        return reference.mamba2(
            weights,
            ids,
            groups=c.n_groups,
            eps=c.layer_norm_epsilon,
            dt_limit=limit,
            act=c.hidden_act,
            norm_groups=None if GROUPED_NORM else 1,
        )
    bcdt = c.mixer_rms_eps if c.model_type == "falcon_mamba" else None
    return reference.mamba1(weights, ids, eps=c.layer_norm_epsilon, bcdt_eps=bcdt, act=c.hidden_act)


def compare(trace: ssmlens.Trace, truth: reference.Model, limit: float) -> None:
    """Every public number of a one-row trace against the truth."""
    assert len(trace) == len(truth.layers)
    assert gap(trace.logits[0], truth.logits) <= limit
    for k, residual in enumerate(truth.residuals):
        assert gap(trace.residual(k)[0], residual) <= limit, k
    for k, layer in enumerate(truth.layers):
        wrong = {name: e for name, e in mixer_gaps(trace[k], layer).items() if not e <= limit}
        assert not wrong, (k, wrong)


def mixer_gaps(mixer: ssmlens.MixerTrace, layer: reference.Layer) -> dict[str, float]:
    rec = mixer.recurrence
    pairs = {
        "log_decay": (rec.log_decay, layer.log_decay),
        "write": (rec.write, layer.write),
        "value": (rec.value, layer.x),
        "read": (rec.read, layer.C),
        "skip": (rec.skip, layer.skip),
        "dt": (rec.dt, layer.dt),
        "A": (rec.A[None], layer.A),
        "y": (rec.run(), layer.y),
        "states": (rec.states(), layer.states),
        "chosen states": (rec.states(at=[-1, 0, 2]), layer.states[[-1, 0, 2]]),
        "final state": (rec.final_state(), layer.states[-1]),
        "gate": (mixer.gate, layer.z),
        "input": (mixer.input, layer.input),
        "output": (mixer.output, layer.output),
        "rebuilt output": (mixer.rebuild(), layer.output),
        "later half": (rec[:, 4:].run(), layer.y[4:]),
        "final state of the later half": (rec[:, 4:].final_state(), layer.states[-1]),
    }
    gaps = {name: gap(ours[0], theirs) for name, (ours, theirs) in pairs.items()}
    return gaps | attention_gaps(rec.attention, layer)


def attention_gaps(attention: ssmlens.ImplicitAttention, layer: reference.Layer) -> dict[str, float]:
    M, scan = layer.M, layer.scan
    back = torch.einsum("hts,thp->shp", M, scan)
    dtype = attention.dense().dtype
    pairs = {
        "dense": (attention.dense(), M),
        "some heads": (attention.dense(heads=[1, 0]), M[[1, 0]]),
        "a slice of heads": (attention.dense(heads=slice(1, None)), M[1:]),
        "row": (attention.row(5), M[:, 5]),
        "last row": (attention.row(-1), M[:, -1]),
        "first column": (attention.column(0), M[:, :, 0]),
        "column": (attention.column(6), M[:, :, 6]),
        "apply": (attention.apply(layer.x[None].to(dtype)), scan),
        "T.apply": (attention.T.apply(scan[None].to(dtype)), back),
        "T.row": (attention.T.row(6), M[:, :, 6]),
        "T.dense": (attention.T.dense(), M.mT),
        "mean": (attention.reduce("mean"), M.mean(0)),
        "mean_abs": (attention.reduce("mean_abs"), M.abs().mean(0)),
        "max_abs": (attention.reduce("max_abs"), M.abs().amax(0)),
        "norm": (attention.reduce("norm"), M.square().sum(0).sqrt()),
        "distance": (attention.distance(), layer.distance),
        "some distances": (attention.distance(rows=[-1, 2]), layer.distance[:, [-1, 2]]),
    }
    gaps = {name: gap(ours[0], theirs) for name, (ours, theirs) in pairs.items()}
    above = torch.ones(M.shape[1:], dtype=torch.bool).triu(1)
    gaps["above the diagonal"] = attention.dense()[..., above].abs().max().item()
    return gaps
