"""Full-batch Adam hovers at its own edge: that of the preconditioned Hessian."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _full_batch

# b1 -> rates; the threshold is 38/r at b1 = 0.9 and 6/r at b1 = 0.5.
_RATES = {0.9: (1e-3, 2e-3), 0.5: (3e-4,)}
_NEAR = 0.1


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return _grid("fashion_mnist", 2, (0.9,), steps=800, every=100)
    return [
        settings
        for data, num_seeds in (("digits", 5), ("fashion_mnist", 3))
        for settings in _grid(data, num_seeds, tuple(_RATES), steps=3000, every=200)
    ]


def _grid(data: str, num_seeds: int, b1s: Sequence[float], **steps: int) -> list[Settings]:
    return [
        {"data": data, "b1": b1, "rate": rate, "seed": seed, **steps}
        for b1 in b1s
        for rate in _RATES[b1]
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    rate, b1 = settings["rate"], settings["b1"]
    look = _full_batch.edge_look("adam", rate, {"b1": b1})
    return _full_batch.followed(settings, optax.adam(rate, b1), look)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, everything in _claims.groups(records, "data").items():
        for b1, own in _claims.groups(everything, "b1").items():
            lines, holds = [], True
            for rate, line in _claims.groups(own, "rate").items():
                middle = [np.median(_full_batch.late(record, "ratio")) for record in line]
                first = np.mean([_full_batch.series(record, "ratio")[0] for record in line])
                holds &= bool(np.all(np.abs(np.asarray(middle) - 1) <= _NEAR))
                lines.append(
                    f"rate {rate:g}: {np.mean(middle):.3f} ({min(middle):.3f} to "
                    f"{max(middle):.3f}), {first:.2f} at the first look"
                )
            name = f"{(2 + 2 * b1) / (1 - b1):.0f}/r"
            verdicts.append(
                Verdict(
                    f"{_claims.word(holds)} ({data}, b1 = {b1:g}): the preconditioned sharpness "
                    f"hovers at {name}",
                    "median of the last third of the steps over the threshold, mean and range over "
                    f"seeds, {'; '.join(lines)}; within {_NEAR:g} of 1 counts",
                )
            )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    y = "preconditioned sharpness\n/ its threshold"
    for axes, own in _full_batch.panels(records, figure, y=y):
        axes.set_ylim(0, 1.25)
        colors = iter(_figures.COLORS)
        for b1, lines in _claims.groups(own, "b1").items():
            for rate, line in _claims.groups(lines, "rate").items():
                label = f"b1 = {b1:g}, learning rate {rate:g}"
                _full_batch.draw_series(axes, line, "ratio", color=next(colors), label=label)
    return _full_batch.NOTE


CLAIM = _claims.Claim(
    name="adaptive_edge",
    paper="Cohen et al. 2022 (arXiv:2207.14484)",
    statement="in full-batch training with Adam the largest eigenvalue of the preconditioned "
    "Hessian equilibrates at the threshold of stability, 38/r at b1 = 0.9",
    printed="38/r for a step size r and b1 = 0.9, in the abstract",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
