"""Diagonal linear networks: stopped in time they find sparse weights, the deeper the longer."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _diagonal, _figures, _networks
from regjax import diagnostics, models

_NUM_EXAMPLES, _NUM_WEIGHTS, _NOISE, _SCALE = 100, 200, 0.5, 1e-5
_DEPTHS, _SCALES, _SEEDS = (2, 3, 4), (1e-3, _SCALE, 1e-7), 10
_IMAGES = {"digits": (40, 5), "fashion_mnist": (392, 3)}
# Of these images at most so many of the pixels are not black; handwriting has as many.
_LIT = {"digits": 1.0, "fashion_mnist": 0.25}
_IMAGE_STEPS = {2: 20_000, 3: 100_000, 5: 400_000}


def _settings(preset: str) -> Sequence[Settings]:
    found: list[Settings] = [
        {"data": "synthetic", "depth": depth, "seed": seed, **one}
        for seed in range(_SEEDS)
        for depth in _DEPTHS
        for one in _parts(depth)
    ]
    found += [
        {"data": data, "part": "image", "scale": _SCALE, "depth": depth, "seed": seed,
         "rate": 0.05 / depth**2, "steps": steps}
        for data, (_, num_seeds) in _IMAGES.items()
        for depth, steps in _IMAGE_STEPS.items()
        for seed in range(num_seeds)
    ]  # fmt: skip
    if preset != "smoke":
        return found
    few = [one for one in found if one["seed"] < 2 and one["depth"] < 4]
    few = [one for one in few if one["scale"] != _SCALES[-1] and one["data"] != "fashion_mnist"]
    return [{**one, "steps": 500} for one in few]


@functools.cache
def _parts(depth: int) -> list[Settings]:
    """What is run of each depth."""
    windows = [
        {"part": "window", "scale": scale, "rate": 1e-2, "steps": _window_steps(scale, depth)}
        for scale in _SCALES
    ]
    steps = 4000 * 10 ** (depth - 2)
    signals = {"part": "incremental", "scale": _SCALE, "rate": 4e-3 / depth**2, "steps": steps}
    # The same rate for the weights at every depth: 0.1 of the gradient.
    rate = 0.1 / (2 * depth**2 * 1e3 ** (2 - 2 / depth))
    return [*windows, signals, {"part": "kernel", "scale": 1e3, "rate": rate, "steps": 3000}]


def _window_steps(scale: float, depth: int) -> int:
    """Twice as far as noise of the usual size needs to come, in round numbers."""
    window = _foretold(scale, depth, noise_level=0.142)
    return max(3000, int(round(2 * float(window.last), -3)))


def _foretold(scale: float, depth: int, *, noise_level: float) -> Any:
    """The formula for descent at the rate 0.01; depths are compared at equal alpha^N."""
    return models.early_stopping_window(
        depth=depth, init_scale=scale ** (1 / depth), learning_rate=1e-2, smallest_signal=1.0,
        noise_level=noise_level,
    )  # fmt: skip


def _run(settings: Settings) -> dict[str, float]:
    return {"window": _window, "incremental": _incremental, "kernel": _kernel, "image": _image}[
        settings["part"]
    ](settings)


def _window(settings: Settings) -> dict[str, float]:
    x, y, true = _problem(settings["seed"], np.ones(5))
    path = _diagonal.descend(settings, True, x, y, true)
    baselines = diagnostics.recovery_baselines(x, y, true_weights=true)
    errors = np.asarray(path["error"])
    best = int(errors.argmin())
    near = errors <= 2 * errors[best]
    noise_level = float(baselines.noise_level)
    window = _foretold(settings["scale"], settings["depth"], noise_level=noise_level)
    return {
        "best": float(errors[best]),
        "first": int(near.argmax()),
        "last": int(len(near) - 1 - near[::-1].argmax()),
        "length": int(near.sum()),
        "final": float(errors[-1]),
        "oracle": float(baselines.oracle_squared_error),
        "least_norm": float(baselines.least_norm_squared_error),
        "distance": _diagonal.distance(path["weights"], x, y),
        "predicted_first": float(window.first),
        "predicted_last": float(window.last),
        "positive": float(path["positive"]),
    }


def _incremental(settings: Settings) -> dict[str, float]:
    """When each of four signals is half there, and how far the next smaller one is by then."""
    x, y, true = _problem(settings["seed"], np.arange(1.0, 5.0))
    shares = np.asarray(_diagonal.descend(settings, True, x, y, true)["first"]) / np.arange(
        1.0, 5.0
    )
    half = (shares >= 0.5).argmax(0)
    reached = bool((shares >= 0.5).any(0).all())
    next_shares = [shares[half[i], i - 1] for i in range(3, 0, -1)]
    return {
        "ordered": float(reached and bool(np.all(np.diff(half) < 0))),
        "next": float(np.mean(next_shares)),
        **{f"half_{i + 1}": float(half[i]) for i in range(4)},
    }


def _kernel(settings: Settings) -> dict[str, float]:
    x, y, true = _problem(settings["seed"], np.ones(5))
    path = _diagonal.descend(settings, True, x, y, true)
    return {
        "distance": _diagonal.distance(path["weights"], x, y),
        "final": float(path["error"][-1]),
    }


def _image(settings: Settings) -> dict[str, float]:
    num_examples, _ = _IMAGES[settings["data"]]
    true = jnp.asarray(_signal(settings["data"], settings["seed"]))
    random = np.random.default_rng(settings["seed"])
    # A quarter more measurements say when to stop.
    signs = random.choice([-1.0, 1.0], size=(num_examples * 5 // 4, len(true)))
    sums = signs @ np.asarray(true) + 0.1 * random.normal(size=len(signs))
    x, y = _diagonal.arrays(signs), _diagonal.arrays(sums)
    held = (x[num_examples:], y[num_examples:])
    x, y = x[:num_examples], y[:num_examples]
    path = _diagonal.descend(settings, False, x, y, true, held)
    errors = np.asarray(path["error"])
    return {
        "best": float(errors.min()),
        "stopped": float(errors[int(np.argmin(path["held"]))]),
        "final": float(errors[-1]),
        "least_norm": float(
            diagnostics.recovery_baselines(x, y, true_weights=true).least_norm_squared_error
        ),
        "lit": float(jnp.mean(true != 0)),
        "positive": float(path["positive"]),
    }


def _signal(data: str, seed: int) -> np.ndarray:
    split = _networks.digits() if data == "digits" else _networks.fashion_mnist()
    images = np.asarray(split.x)
    sparse = np.flatnonzero((images > 0).mean(1) <= _LIT[data])
    return images[sparse[seed]]


def _problem(seed: int, signals: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """X of fair signs, y with noise, and w* with the signals first."""
    random = np.random.default_rng(seed)
    x = random.choice([-1.0, 1.0], size=(_NUM_EXAMPLES, _NUM_WEIGHTS))
    true = np.zeros(_NUM_WEIGHTS)
    true[: len(signals)] = signals
    y = x @ true + _NOISE * random.normal(size=_NUM_EXAMPLES)
    return _diagonal.arrays(x), _diagonal.arrays(y), _diagonal.arrays(true)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    windows = _claims.select(records, part="window")
    same = _claims.select(windows, scale=_SCALE)
    deep = [record for record in same if record["depth"] > 2]
    ratios = _claims.numbers(deep, "best") / _claims.numbers(deep, "oracle")
    over = _claims.numbers(same, "final") / _claims.numbers(same, "best")
    per_depth = {d: np.median(_claims.numbers(own, "length")) for d, own in _by_depth(same)}
    rising = _rising(same, "depth")
    by_scale = {d: _rising(part, "scale", falling=True) for d, part in _by_depth(windows)}
    own = _claims.select(records, part="incremental")
    sharper = _rising(own, "depth", "next", falling=True)
    kernel = _claims.numbers(_claims.select(records, part="kernel"), "distance")
    rich = _claims.numbers(same, "distance")
    return [
        Verdict(
            f"{_claims.word(np.median(ratios) <= 1.5)}: the best of the run is as good as "
            "least squares on the true support (N >= 3)",
            f"squared error over the support's: median {np.median(ratios):.2f}, "
            f"{ratios.min():.2f} to {ratios.max():.2f} (bar 1.5); of the least norm "
            f"{_claims.numbers(same, 'least_norm').mean():.2f}, of the support "
            f"{_claims.numbers(same, 'oracle').mean():.4f}",
        ),
        Verdict(
            f"{_claims.word(all(rising) and over.min() >= 5)}: stopping matters, and the window "
            "grows with depth",
            f"in {sum(rising)} of {len(rising)} seeds; median steps within twice the best error "
            + ", ".join(f"{length:.0f} at N = {d}" for d, length in per_depth.items())
            + f"; at the end {over.min():.1f} to {over.max():.1f} times the best (bar 5)",
        ),
        Verdict(
            f"{_claims.word(all(all(values) for values in by_scale.values()))}: the window grows "
            "as the start shrinks",
            ", ".join(f"N = {d}: in {sum(v)} of {len(v)} seeds" for d, v in by_scale.items())
            + " (the best error, which the window is measured by, is larger from larger starts)",
        ),
        Verdict(
            f"{_claims.word(all(r['ordered'] for r in own) and all(sharper))}: signals come one "
            "after the other, the deeper the more",
            f"largest first in {sum(int(r['ordered']) for r in own)} of {len(own)} runs; when one "
            "is half there, the next smaller has come to "
            + ", ".join(
                f"{_claims.numbers(part, 'next').mean():.3f} of its size (N = {d})"
                for d, part in _by_depth(own)
            ),
        ),
        Verdict(
            f"{_claims.word(kernel.max() < 0.05 < rich.min())}: from a large start the end is the "
            "solution of least norm",
            f"relative distance to it at most {kernel.max():.4f} with alpha^N = 1000, at least "
            f"{rich.min():.2f} with {_SCALE:g}",
        ),
        *_judge_images(_claims.select(records, part="image")),
    ]


def _judge_images(records: Sequence[Record]) -> list[Verdict]:
    found = []
    for data, own in _claims.groups(records, "data").items():
        shares = {
            d: _claims.numbers(part, "stopped") / _claims.numbers(part, "least_norm")
            for d, part in _by_depth(own)
        }
        holds = all(share.max() < 0.5 for share in shares.values())
        text = ", ".join(
            f"{share.mean():.3f} ({share.min():.3f} to {share.max():.3f}) at N = {d}"
            for d, share in shares.items()
        )
        found.append(
            Verdict(
                f"{_claims.word(holds)} ({data}): an image from {_IMAGES[data][0]} measurements",
                f"squared error at the stop over the least norm's: {text} (bar 0.5 for each); "
                f"{_claims.numbers(own, 'lit').mean():.0%} of the pixels are not black",
            )
        )
    return found


def _by_depth(records: Sequence[Record]) -> list[tuple[int, list[Record]]]:
    return sorted(_claims.groups(records, "depth").items())


def _rising(
    records: Sequence[Record], by: str, name: str = "length", *, falling: bool = False
) -> list[bool]:
    """For each seed whether `name` rises (or falls) with `by`."""
    sign = -1 if falling else 1
    found = []
    for own in _claims.groups(records, "seed").values():
        values = [record[name] for record in sorted(own, key=lambda record: record[by])]
        found.append(bool(np.all(sign * np.diff(values) > 0)))
    return found


def _draw(records: Sequence[Record], figure: Any) -> str:
    figure.set_figheight(3.9)
    (windows, errors), (order, images) = figure.subplots(2, 2)
    _draw_windows(windows, _claims.select(records, part="window"))
    same = _claims.select(records, part="window", scale=_SCALE)
    depths = sorted({record["depth"] for record in same})
    words = {"best": "stopped at the best step", "final": "at the end",
             "oracle": "least squares on the true support", "least_norm": "least norm"}  # fmt: skip
    for i, (name, text) in enumerate(words.items()):
        _figures.sweep(errors, same, "depth", name, values=depths, index=i, of=4, name=text)
    _finish(errors, "errors", "squared error")
    own = _claims.select(records, part="incremental")
    for place, (_, part) in enumerate(_by_depth(own)):
        _figures.column(order, place, _claims.numbers(part, "next"))
    order.set_xticks(range(len(_by_depth(own))), [str(depth) for depth, _ in _by_depth(own)])
    _finish(order, "when one signal is half there", "the next one / its size")
    shown = [
        {**r, "share": r["stopped"] / r["least_norm"]} for r in records if r["part"] == "image"
    ]
    for i, (data, part) in enumerate(_claims.groups(shown, "data").items()):
        for place, (_, runs) in enumerate(_by_depth(part)):
            at, share = place + _figures.side(i, 2), _claims.numbers(runs, "share")
            _figures.column(images, at, share, index=4 + i, of=2, name=_figures.NAMES[data])
        images.set_xticks(range(len(_by_depth(part))), [str(depth) for depth, _ in _by_depth(part)])
    images.set_yscale("log")
    images.set_ylim(top=3)
    _finish(images, "images from too few measurements", "error / that of least norm")
    _figures.level(images, 0.5, "claimed: below 0.5")
    return (
        "Windows: medians over the seeds of the steps within twice the best error; black ticks: "
        "what the formula foretells. Errors: means, bars: standard deviation. Below: a dot per "
        "seed, black bars are means."
    )


def _draw_windows(axes: Any, records: Sequence[Record]) -> None:
    scales = sorted(_claims.groups(records, "scale"), reverse=True)
    depths = sorted({record["depth"] for record in records})
    for i, (color, scale) in enumerate(zip(_figures.COLORS, scales, strict=False)):
        text = rf"start $\alpha^N = 10^{{{round(np.log10(scale))}}}$"
        for depth, part in _by_depth(_claims.select(records, scale=scale)):
            first, last, *foretold = (
                np.median(_claims.numbers(part, name))
                for name in ("first", "last", "predicted_first", "predicted_last")
            )
            at = depths.index(depth) + _figures.side(i, len(scales))
            axes.plot(
                [at, at], [max(first, 1), last], color=color, linewidth=4, solid_capstyle="butt",
                label=text if depth == depths[0] else None,
            )  # fmt: skip
            axes.plot([at, at], foretold, "k_", markersize=7)
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.legend(frameon=False, fontsize=7, loc="upper left")
    _finish(axes, "when to stop", "step of training")


def _finish(axes: Any, title: str, y: str) -> None:
    _figures.logarithmic(axes)
    axes.set_title(title, fontsize=8)
    _figures.label(axes, x="depth N", y=y)


CLAIM = _claims.Claim(
    name="sparse_recovery",
    paper="Li et al. 2021 (arXiv:2108.05574)",
    statement="stopped in time, diagonal networks find sparse weights; deeper ones leave more time",
    printed="settings only; the errors are in figures",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
