"""The critical sharpness of the next step beside the largest Hessian eigenvalue, in training."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _full_batch
from regjax import diagnostics

_RATES = {"digits": 0.05, "fashion_mnist": 0.03}
_BATCHES = (0, 30)  # all images, and the paper's noise
_EDGE, _FACTOR = 0.97, 2.0


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return _grid("fashion_mnist", 2, steps=400, every=100)
    return [
        settings
        for data, num_seeds in (("digits", 5), ("fashion_mnist", 3))
        for settings in _grid(data, num_seeds, steps=3600, every=200)
    ]


def _grid(data: str, num_seeds: int, **steps: int) -> list[Settings]:
    return [
        {"data": data, "batch": batch, "rate": _RATES[data], "seed": seed, **steps}
        for batch in _BATCHES
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    rate, split = settings["rate"], _full_batch.DATA[settings["data"]]()
    edge = _full_batch.edge_look("sgd", rate, {})

    def look(params: Any, state: Any, updates: Any, x: jax.Array, y: jax.Array) -> Any:
        # Loss and direction are of the same batch; the eigenvalue is that of all images.
        found = diagnostics.critical_sharpness(
            _full_batch.loss_fn, params, updates, x, y, learning_rate=rate
        )
        return {
            **edge(params, state, updates, split.x, split.y),
            "critical": float(found.value) * rate / 2,
            "resolved": bool(found.resolved),
            "passes": int(found.num_evaluations),
        }

    return _full_batch.followed(settings, optax.sgd(rate), look)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, everything in _claims.groups(records, "data").items():
        for batch, own in _claims.groups(everything, "batch").items():
            name = f"{data}, {f'batches of {batch}' if batch else 'full batch'}"
            ratio, critical, resolved, passes = (
                np.concatenate([_full_batch.series(record, part) for record in own])
                for part in ("ratio", "critical", "resolved", "passes")
            )
            seen = f"resolved at {resolved.mean():.0%} of {len(ratio)} looks, {passes.mean():.1f} "
            seen += f"forward passes on the average, {passes.max():.0f} at most"
            shares = critical / ratio
            at_edge = (ratio >= _EDGE) & (resolved > 0)
            before = (ratio < _EDGE) & (resolved > 0)
            for label, part in (("before the edge", before), ("at the edge", at_edge)):
                if part.sum() < 5:
                    word, text = "not testable at this size", f"{part.sum()} looks"
                else:
                    low, middle, high = np.quantile(shares[part], (0.1, 0.5, 0.9))
                    holds = low > 1 / _FACTOR and high < _FACTOR
                    word = _claims.word(holds)
                    text = (
                        f"critical sharpness over the largest eigenvalue {middle:.3g} "
                        f"({low:.3g} to {high:.3g} from the 10th to the 90th percentile of "
                        f"{part.sum()} looks); within a factor of {_FACTOR:g} counts; {seen}"
                    )
                verdicts.append(Verdict(f"{word} ({name}): they move together {label}", text))
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    for axes, everything in _full_batch.panels(records, figure, y="curvature x learning rate / 2"):
        for color, (batch, own) in zip(
            _figures.COLORS, _claims.groups(everything, "batch").items(), strict=False
        ):
            where = f"batches of {batch}" if batch else "full batch"
            for name, line, what in (
                ("ratio", "-", "largest Hessian eigenvalue"),
                ("critical", ":", "critical sharpness"),
            ):
                _full_batch.draw_series(
                    axes, own, name, color=color, label=f"{what}, {where}", line=line
                )
        _figures.logarithmic(axes)
    return (
        f"{_full_batch.NOTE} The claim holds where a dotted line lies on the solid one of its "
        "colour."
    )


CLAIM = _claims.Claim(
    name="critical_sharpness",
    paper="Kalra et al. 2026 (arXiv:2601.16979)",
    statement="the critical sharpness, found in fewer than ten forward passes, shows progressive "
    "sharpening and the edge of stability as the largest Hessian eigenvalue does",
    printed="fewer than 10 forward passes, in the abstract; plots",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
