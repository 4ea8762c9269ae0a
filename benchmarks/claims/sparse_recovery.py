"""Diagonal linear networks: stopped in time they find sparse weights, the deeper the longer."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import diagnostics, models

_NUM_EXAMPLES, _NUM_WEIGHTS, _NOISE, _SCALE = 100, 200, 0.5, 1e-5
_DEPTHS, _IMAGE_DEPTHS = (2, 3, 4), (2, 3, 5)
_SEEDS = 10
_IMAGES = {"digits": (40, 5), "fashion_mnist": (392, 3)}
# Of these images at most so many of the pixels are not black; handwriting has as many.
_LIT = {"digits": 1.0, "fashion_mnist": 0.25}
_IMAGE_STEPS = {2: 20_000, 3: 100_000, 5: 400_000}


def _settings(preset: str) -> Sequence[Settings]:
    smoke = preset == "smoke"
    seeds, depths = range(2 if smoke else _SEEDS), _DEPTHS[: 2 if smoke else 3]
    scales = (1e-4, _SCALE) if smoke else (1e-3, _SCALE, 1e-7)
    shared = {"data": "synthetic", "scale": _SCALE}
    found: list[Settings] = []
    for seed in seeds:
        for depth in depths:
            one = {**shared, "depth": depth, "seed": seed}
            found += [
                {**one, "part": "window", "scale": scale, "rate": 1e-2,
                 "steps": 500 if smoke else _window_steps(scale, depth)}
                for scale in scales
            ]  # fmt: skip
            found.append(
                {**one, "part": "incremental", "rate": 4e-3 / depth**2,
                 "steps": 500 if smoke else 4000 * 10 ** (depth - 2)}
            )  # fmt: skip
            # The same rate for the weights at every depth: 0.1 of the gradient.
            rate = 0.1 / (2 * depth**2 * 1e3 ** (2 - 2 / depth))
            found.append(
                {**one, "part": "kernel", "scale": 1e3, "rate": rate,
                 "steps": 200 if smoke else 3000}
            )  # fmt: skip
    for data, (_, num_seeds) in _IMAGES.items():
        if smoke and data != "digits":
            continue
        found += [
            {"data": data, "part": "image", "scale": _SCALE, "depth": depth, "seed": seed,
             "rate": 0.05 / depth**2, "steps": 500 if smoke else _IMAGE_STEPS[depth]}
            for depth in _IMAGE_DEPTHS[: 2 if smoke else 3]
            for seed in range(2 if smoke else num_seeds)
        ]  # fmt: skip
    return found


def _window_steps(scale: float, depth: int) -> int:
    """Twice as far as noise of the usual size needs to come, in round numbers."""
    window = models.early_stopping_window(
        depth=depth,
        init_scale=scale ** (1 / depth),
        learning_rate=1e-2,
        smallest_signal=1.0,
        noise_level=0.142,
    )
    return max(3000, int(round(2 * float(window.last), -3)))


def _run(settings: Settings) -> dict[str, float]:
    return {"window": _window, "incremental": _incremental, "kernel": _kernel, "image": _image}[
        settings["part"]
    ](settings)


def _window(settings: Settings) -> dict[str, float]:
    x, y, true = _problem(settings["seed"], np.ones(5))
    path = _descend(settings, True, x, y, true)
    baselines = diagnostics.recovery_baselines(x, y, true_weights=true)
    errors = np.asarray(path["error"])
    best = int(errors.argmin())
    near = errors <= 2 * errors[best]
    window = models.early_stopping_window(
        depth=settings["depth"],
        init_scale=_alpha(settings),
        learning_rate=settings["rate"],
        smallest_signal=1.0,
        noise_level=float(baselines.noise_level),
    )
    return {
        "best": float(errors[best]),
        "first": int(near.argmax()),
        "last": int(len(near) - 1 - near[::-1].argmax()),
        "length": int(near.sum()),
        "final": float(errors[-1]),
        "oracle": float(baselines.oracle_squared_error),
        "least_norm": float(baselines.least_norm_squared_error),
        "distance": _distance(path["weights"], x, y),
        "predicted_first": float(window.first),
        "predicted_last": float(window.last),
        "positive": float(path["positive"]),
    }


def _incremental(settings: Settings) -> dict[str, float]:
    """When each of four signals is half there, and how far the next smaller one is by then."""
    x, y, true = _problem(settings["seed"], np.arange(1.0, 5.0))
    shares = np.asarray(_descend(settings, True, x, y, true)["first"]) / np.arange(1.0, 5.0)
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
    path = _descend(settings, True, x, y, true)
    return {"distance": _distance(path["weights"], x, y), "final": float(path["error"][-1])}


def _image(settings: Settings) -> dict[str, float]:
    num_examples, _ = _IMAGES[settings["data"]]
    true = jnp.asarray(_signal(settings["data"], settings["seed"]))
    random = np.random.default_rng(settings["seed"])
    # A quarter more measurements say when to stop.
    signs = random.choice([-1.0, 1.0], size=(num_examples * 5 // 4, len(true)))
    sums = signs @ np.asarray(true) + 0.1 * random.normal(size=len(signs))
    x, y = _arrays(signs), _arrays(sums)
    held = (x[num_examples:], y[num_examples:])
    x, y = x[:num_examples], y[:num_examples]
    path = _descend(settings, False, x, y, true, held)
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
    return _arrays(x), _arrays(y), _arrays(true)


def _arrays(values: np.ndarray) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def _alpha(settings: Settings) -> float:
    """Depths are compared at equal alpha^N."""
    return float(settings["scale"] ** (1 / settings["depth"]))


def _distance(weights: jax.Array, x: jax.Array, y: jax.Array) -> float:
    """To the solution of least norm, relative to its norm."""
    least = jnp.linalg.lstsq(x, y)[0]
    return float(jnp.linalg.norm(weights - least) / jnp.linalg.norm(least))


def _descend(
    settings: Settings, signed: bool, x: Any, y: Any, true: Any, held: Any = None
) -> dict[str, Any]:
    depth, num_steps = settings["depth"], settings["steps"]
    return _path(depth, signed, num_steps, _alpha(settings), settings["rate"], x, y, true, held)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _path(
    depth: int, signed: bool, num_steps: int, alpha: Any, rate: Any, x: Any, y: Any, true: Any,
    held: Any,
) -> dict[str, Any]:  # fmt: skip
    """Plain descent on ||X w - y||^2 / n, looked at before each step."""
    start = jnp.full(x.shape[1], alpha, x.dtype)
    columns = x.T

    def step(pair: Any, _: Any) -> Any:
        u, v = pair
        weights = models.diagonal_weights(u, v, depth=depth)
        residual = (2 / len(y)) * (columns @ (x @ weights - y))
        seen = {"error": jnp.sum((weights - true) ** 2), "first": weights[:4]}
        if held is not None:
            seen["held"] = jnp.mean((held[0] @ weights - held[1]) ** 2)
        move = lambda one, sign: one - sign * rate * depth * residual * one ** (depth - 1)
        return (move(u, 1.0), None if v is None else move(v, -1.0)), seen

    (u, v), seen = jax.lax.scan(step, (start, start if signed else None), None, length=num_steps)
    report = diagnostics.sparse_recovery(u, v, depth=depth, true_weights=true)
    return {
        **seen,
        "weights": models.diagonal_weights(u, v, depth=depth),
        "positive": report.is_positive,
    }


def _judge(records: Sequence[Record]) -> list[Verdict]:
    windows = _claims.select(records, part="window")
    same = _claims.select(windows, scale=_SCALE)
    deep = [record for record in same if record["depth"] > 2]
    ratios = _claims.numbers(deep, "best") / _claims.numbers(deep, "oracle")
    over = _claims.numbers(same, "final") / _claims.numbers(same, "best")
    per_depth = {d: np.median(_claims.numbers(own, "length")) for d, own in _by_depth(same)}
    rising = _rising(same, "depth")
    by_scale = {d: _rising(part, "scale", falling=True) for d, part in _by_depth(windows)}
    sharper = _rising(_claims.select(records, part="incremental"), "depth", "next", falling=True)
    own = _claims.select(records, part="incremental")
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
    _figures.logarithmic(errors)
    _figures.label(errors, x="depth N", y="squared error")
    errors.set_title("errors", fontsize=8)
    own = _claims.select(records, part="incremental")
    for place, (_, part) in enumerate(_by_depth(own)):
        _figures.column(order, place, _claims.numbers(part, "next"))
    order.set_xticks(range(len(_by_depth(own))), [str(depth) for depth, _ in _by_depth(own)])
    _figures.logarithmic(order)
    order.set_title("when one signal is half there", fontsize=8)
    _figures.label(order, x="depth N", y="the next one / its size")
    shown = [
        {**r, "share": r["stopped"] / r["least_norm"]} for r in records if r["part"] == "image"
    ]
    for i, (data, part) in enumerate(_claims.groups(shown, "data").items()):
        values = sorted(_claims.groups(part, "depth"))
        for place, depth in enumerate(values):
            share = _claims.numbers(_claims.select(part, depth=depth), "share")
            at = place + _figures.side(i, 2)
            _figures.column(images, at, share, index=4 + i, of=2, name=_figures.NAMES[data])
        images.set_xticks(range(len(values)), [str(depth) for depth in values])
    images.set_yscale("log")
    images.set_ylim(top=3)
    _figures.logarithmic(images)
    _figures.level(images, 0.5, "claimed: below 0.5")
    images.set_title("images from too few measurements", fontsize=8)
    _figures.label(images, x="depth N", y="error / that of least norm")
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
            first, last = (np.median(_claims.numbers(part, name)) for name in ("first", "last"))
            at = depths.index(depth) + _figures.side(i, len(scales))
            axes.plot(
                [at, at], [max(first, 1), last], color=color, linewidth=4, solid_capstyle="butt",
                label=text if depth == depths[0] else None,
            )  # fmt: skip
            foretold = [
                np.median(_claims.numbers(part, f"predicted_{name}")) for name in ("first", "last")
            ]
            axes.plot([at, at], foretold, "k_", markersize=7)
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.legend(frameon=False, fontsize=7, loc="upper left")
    _figures.logarithmic(axes)
    axes.set_title("when to stop", fontsize=8)
    _figures.label(axes, x="depth N", y="step of training")


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
