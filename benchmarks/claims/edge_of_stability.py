"""Full-batch descent sharpens until it is at the edge of stability, and hovers there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _full_batch

# Data -> momentum -> rates. The sharpness at the start is below the thresholds 2/r and 3.8/r.
_RATES = {
    "digits": {0.0: (0.05, 0.06), 0.9: (0.08, 0.1)},
    "fashion_mnist": {0.0: (0.03, 0.04), 0.9: (0.05, 0.07)},
}
_NEAR, _ARRIVED = 0.1, 0.98


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return _grid("fashion_mnist", 2, (0.0,), steps=600, every=100)
    return [
        settings
        for data, num_seeds in (("digits", 5), ("fashion_mnist", 3))
        for settings in _grid(data, num_seeds, (0.0, 0.9), steps=3600, every=200)
    ]


def _grid(data: str, num_seeds: int, momenta: Sequence[float], **steps: int) -> list[Settings]:
    return [
        {"data": data, "momentum": momentum, "rate": rate, "seed": seed, **steps}
        for momentum in momenta
        for rate in _RATES[data][momentum]
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    rate, momentum = settings["rate"], settings["momentum"] or None
    look = _full_batch.edge_look("sgd", rate, {"momentum": momentum})
    return _full_batch.followed(settings, optax.sgd(rate, momentum), look)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    return [
        verdict
        for data, everything in _claims.groups(records, "data").items()
        for momentum, own in _claims.groups(everything, "momentum").items()
        for verdict in (
            _judge_rise(f"{data}, {'momentum 0.9' if momentum else 'plain'}", own),
            _judge_hovering(
                f"{data}, {'momentum 0.9' if momentum else 'plain'}",
                own,
                "(2 + 2b)/r" if momentum else "2/r",
            ),
        )
    ]


def _judge_rise(name: str, own: Sequence[Record]) -> Verdict:
    """What is at the edge at the first look already has nowhere to go."""
    below = [r for r in own if _full_batch.series(r, "ratio")[0] < 1 - _NEAR]
    if len(below) < 3:
        return Verdict(
            f"not testable at this size ({name}): the sharpness rises",
            f"below {1 - _NEAR:g} of the threshold at the first look in {len(below)} of {len(own)} "
            "runs",
        )
    rises = np.asarray([_rise(record) for record in below])
    return Verdict(
        f"{_claims.word(np.all(rises > 1))} ({name}): the sharpness rises",
        f"last third over first look {rises.mean():.2f} ± {rises.std(ddof=1):.2f} "
        f"({rises.min():.2f} to {rises.max():.2f}) in the {len(below)} of {len(own)} runs that "
        f"began below {1 - _NEAR:g} of the threshold",
    )


def _rise(record: Record) -> float:
    ratios = _full_batch.series(record, "ratio")
    return float(np.median(_full_batch.late(record, "ratio")) / ratios[0])


def _judge_hovering(name: str, own: Sequence[Record], threshold: str) -> Verdict:
    """Of the runs that came to the threshold: a fit that ends before has no edge to be at."""
    arrived = [r for r in own if _full_batch.series(r, "ratio").max() > _ARRIVED]
    middle = np.asarray([np.median(_full_batch.late(record, "ratio")) for record in arrived])
    lines = [
        f"rate {rate:g}: {np.mean(m):.3f} ({np.min(m):.3f} to {np.max(m):.3f})"
        for rate, line in _claims.groups(arrived, "rate").items()
        if (m := [np.median(_full_batch.late(record, "ratio")) for record in line])
    ]
    word = _claims.word(np.all(np.abs(middle - 1) <= _NEAR))
    if 2 * len(arrived) < len(own):
        word = "not testable at this size"
    return Verdict(
        f"{word} ({name}): it hovers at {threshold}",
        f"median sharpness of the last third of the steps over the threshold, mean and range over "
        f"seeds, {'; '.join(lines)}; within {_NEAR:g} of 1 counts; {len(arrived)} of {len(own)} "
        f"runs came to {_ARRIVED:g} of it, the others end below",
    )


def _draw(records: Sequence[Record], figure: Any) -> str:
    y = "largest Hessian eigenvalue\n/ its threshold"
    for axes, own in _full_batch.panels(records, figure, y=y):
        colors = iter(_figures.COLORS)
        for momentum, lines in _claims.groups(own, "momentum").items():
            for rate, line in _claims.groups(lines, "rate").items():
                label = f"{'momentum 0.9' if momentum else 'plain'}, rate {rate:g}"
                _full_batch.draw_series(axes, line, "ratio", color=next(colors), label=label)
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    return _full_batch.NOTE


CLAIM = _claims.Claim(
    name="edge_of_stability",
    paper="Cohen et al. 2021 (arXiv:2103.00065)",
    statement="in full-batch descent the largest Hessian eigenvalue rises to the threshold of "
    "stability, 2/r or (2 + 2b)/r with momentum, and hovers there",
    printed="plots; the thresholds are in the text",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
