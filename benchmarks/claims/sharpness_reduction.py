"""With weight decay, descent goes on to flatter minima after the fit: weights without a scale.

The network is fully scale-invariant: two layers with batch norm behind them, the head frozen. Its
inputs are standardised pixel by pixel; with raw pixels it is run, and judged, as well.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import diagnostics

_WIDTH, _RATE, _DECAYS, _EPSILON = 64, 0.5, (0.0, 1e-4, 1e-3), 1e-8
_PIXELS = ("standardised", "raw")
_MASK = {"head": False, "layers": [True, True]}
_FALL, _EDGE = 0.6, 0.2  # of the sharpness, and around 2


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return _grid("digits", 2, _PIXELS[:1], (0.0, 1e-3), steps=600, every=100)
    return [
        settings
        for data, num_seeds in (("digits", 5), ("fashion_mnist", 3))
        for settings in _grid(data, num_seeds, _PIXELS, _DECAYS, steps=8000, every=500)
    ]


def _grid(
    data: str, num_seeds: int, pixels: Sequence[str], decays: Sequence[float], **steps: int
) -> list[Settings]:
    return [
        {"data": data, "pixels": p, "decay": decay, "seed": seed, **steps}
        for p in pixels
        for decay in decays
        for seed in range(num_seeds)
    ]


@functools.cache
def _split(data: str, pixels: str) -> _networks.Split:
    split = _networks.digits() if data == "digits" else _networks.small_fashion_mnist()
    x, x_test = split.x, split.x_test
    if pixels == "standardised":
        mean, deviation = x.mean(0), x.std(0)
        scale = jnp.where(deviation > 0, 1 / jnp.where(deviation > 0, deviation, 1), 0)
        x, x_test = ((a - mean) * scale for a in (x, x_test))
    return split._replace(x=x, x_test=x_test)


def _run(settings: Settings) -> dict[str, float]:
    split, seed = _split(settings["data"], settings["pixels"]), settings["seed"]
    decay = jnp.float32(settings["decay"])
    params = _initial(split.x.shape[1], jax.random.key(seed))
    found: dict[str, float] = {}
    for step in _checkpoints(settings):
        params = _descend(params, split.x, split.y, decay, settings["every"])
        other_params = _descend(params, split.x, split.y, decay, 1)
        edge = _edge(params, other_params, split.x, split.y, jax.random.key(seed), decay)
        # The norms of two successive iterates are the same but for a part in a thousand.
        middle = jax.tree.map(lambda a, b: (a + b) / 2, params, other_params)
        found |= {
            f"sharpness_{step}": float(edge.sharpness),
            f"residual_{step}": float(edge.residual_norm),
            f"ratio_{step}": float(edge.edge_ratio),
            f"fitted_{step}": float(_accuracy(middle, split.x, split.x, split.y)),
            f"accuracy_{step}": float(_accuracy(middle, split.x_test, split.x, split.y_test)),
        }
    return found


def _checkpoints(settings: Settings) -> range:
    return range(settings["every"], settings["steps"] + 1, settings["every"])


def _initial(num_inputs: int, key: jax.Array) -> Any:
    """He weights of two layers, and a head that stays as it is drawn."""
    sizes = (num_inputs, _WIDTH, _WIDTH)
    first, second, head = jax.random.split(key, 3)
    layers = [
        jnp.sqrt(2 / n) * jax.random.normal(k, (n, _WIDTH))
        for n, k in zip(sizes, (first, second), strict=False)
    ]
    return {"head": jax.random.normal(head, (_WIDTH, 10)) / 4, "layers": layers}


def _outputs(params: Any, x: jax.Array, reference: jax.Array) -> jax.Array:
    """Batch norm without an affine map behind each layer, with the reference's statistics."""
    for kernel in params["layers"]:
        x, reference = x @ kernel, reference @ kernel
        mean, deviation = reference.mean(0), jnp.sqrt(reference.var(0) + _EPSILON)
        x, reference = (jax.nn.relu((a - mean) / deviation) for a in (x, reference))
    return x @ params["head"]


def _loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Half the squared error against one-hot targets, mean over the examples."""
    errors = _outputs(params, x, x) - jax.nn.one_hot(y, 10)
    return jnp.mean(jnp.sum(errors**2, 1)) / 2


@jax.jit
def _descend(params: Any, x: jax.Array, y: jax.Array, decay: Any, num_steps: Any) -> Any:
    """Full-batch descent with decay on the layers."""

    def step(_: Any, layers: Any) -> Any:
        grads = jax.grad(lambda layers: _loss({**params, "layers": layers}, x, y))(layers)
        move = lambda w, g: (1 - _RATE * decay) * w - _RATE * g
        return jax.tree.map(move, layers, grads)

    return {**params, "layers": jax.lax.fori_loop(0, num_steps, step, params["layers"])}


@jax.jit
def _edge(
    params: Any, other_params: Any, x: jax.Array, y: jax.Array, key: jax.Array, decay: Any
) -> diagnostics.SphericalEdgeResult:
    return diagnostics.spherical_edge_of_stability(
        _loss, params, other_params, x, y,
        key=key, learning_rate=_RATE, weight_decay=decay, mask=_MASK,
    )  # fmt: skip


@jax.jit
def _accuracy(params: Any, x: jax.Array, reference: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(_outputs(params, x, reference), 1) == y)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    return [
        verdict
        for data, everything in _claims.groups(records, "data").items()
        for pixels, own in _claims.groups(everything, "pixels").items()
        for verdict in _judge_one(f"{data}, {pixels} pixels", own)
    ]


def _judge_one(name: str, own: Sequence[Record]) -> list[Verdict]:
    fitted = [r for r in own if r[f"fitted_{_fit(r)}"] == 1]
    lines = dict(sorted(_claims.groups(fitted, "decay").items()))
    missed = f"; {len(own) - len(fitted)} runs missed the fit" if len(fitted) < len(own) else ""
    if len(lines) < len(_claims.groups(own, "decay")) or min(map(len, lines.values())) < 2:
        return [Verdict(f"not testable at this size ({name})", f"too few runs{missed}")]

    falls = [
        np.log([_late(r, "sharpness") / _at_fit(r, "sharpness") for r in line])
        for line in lines.values()
    ]
    gains = [
        np.asarray([_late(r, "accuracy") - _at_fit(r, "accuracy") for r in line])
        for line in lines.values()
    ]
    ratios = [np.mean([_after_fit(r, "ratio") for r in line]) for line in lines.values()]
    rise, error = _claims.mean_and_error(falls[0])
    down = np.exp(falls[-1].mean()) <= _FALL and rise >= -2 * error
    (flat, flat_error), (gain, gain_error) = (
        _claims.mean_and_error(g) for g in (gains[0], gains[-1])
    )
    up = gain > 2 * gain_error and gain - flat > 2 * np.hypot(gain_error, flat_error)
    away = np.abs(np.asarray(ratios) - 2)
    edge = away[0] <= _EDGE and np.all(np.diff(away[1:]) >= 0)

    def listed(texts: Iterable[str]) -> str:
        return ", ".join(f"{t} (decay {decay:g})" for t, decay in zip(texts, lines, strict=True))

    shown = ("{:+.3f} ± {:.3f}".format(*_claims.mean_and_error(gain)) for gain in gains)
    return [
        Verdict(
            f"{_claims.word(down)} ({name}): after the fit the sharpness falls, by decay alone",
            "in the last quarter of the steps it is that of the fit times "
            f"{listed(map(_with_range, falls))}; mean and range over seeds{missed}",
        ),
        Verdict(
            f"{_claims.word(up)} ({name}): and the test accuracy rises, more than without decay",
            f"since the fit {listed(shown)}, mean over seeds and one standard error",
        ),
        Verdict(
            f"{_claims.word(edge)} ({name}): training stays at the edge of stability, the nearer "
            "the smaller the decay",
            f"the edge ratio, a median after the fit, is {listed(f'{r:.2f}' for r in ratios)}",
        ),
    ]


def _with_range(logarithms: np.ndarray) -> str:
    low, mean, high = np.exp([logarithms.min(), logarithms.mean(), logarithms.max()])
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _fit(record: Record) -> int:
    """The first checkpoint at which all training images are right, or the last quarter's first."""
    steps = _checkpoints(record)
    early = steps[: -_quarter(record)]
    fitted = (step for step in early if record[f"fitted_{step}"] == 1)
    return next(fitted, steps[-_quarter(record)])


def _quarter(record: Record) -> int:
    return max(1, len(_checkpoints(record)) // 4)


def _at_fit(record: Record, name: str) -> float:
    return record[f"{name}_{_fit(record)}"]


def _late(record: Record, name: str) -> float:
    """The median over the last quarter: bursts of the loss throw single checkpoints off."""
    steps = _checkpoints(record)[-_quarter(record) :]
    return float(np.median([record[f"{name}_{step}"] for step in steps]))


def _after_fit(record: Record, name: str) -> float:
    steps = [step for step in _checkpoints(record) if step >= _fit(record)]
    return float(np.median([record[f"{name}_{step}"] for step in steps]))


def _draw(records: Sequence[Record], figure: Any) -> str:
    names = {
        "sharpness": "spherical sharpness",
        "accuracy": "test accuracy",
        "ratio": "effective rate\nx sharpness",
    }
    groups = {
        (data, pixels): part
        for data, own in _claims.groups(records, "data").items()
        for pixels, part in _claims.groups(own, "pixels").items()
    }
    rows = [{**r, "data": key} for key, own in groups.items() for r in own]
    for axes, own, name in _figures.panels(figure, rows, names, height=1.4):
        data, pixels = own[0]["data"]
        axes.set_title(f"{_figures.NAMES[data]}, {pixels} pixels", fontsize=7)
        for color, (decay, line) in zip(
            _figures.COLORS, _claims.groups(own, "decay").items(), strict=False
        ):
            steps = list(_checkpoints(line[0]))
            values = np.asarray([[r[f"{name}_{step}"] for step in steps] for r in line])
            text = f"weight decay {decay:g}"
            axes.plot(steps, np.median(values, 0), color=color, linewidth=1.1, label=text)
            low, high = values.min(0), values.max(0)
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        if name == "sharpness":
            _figures.logarithmic(axes)
        if name == "ratio":
            axes.set_ylim(1.5, 4)
            _figures.level(axes, 2, "edge of stability: 2", left=0.4, above=False)
        if axes.get_subplotspec().is_last_row():
            _figures.label(axes, x="training step")
    return (
        "Lines: median over the seeds; bands: their range. Ratios above 4, in bursts of the loss, "
        "are cut off."
    )


CLAIM = _claims.Claim(
    name="sharpness_reduction",
    paper="Lyu et al. 2022 (arXiv:2206.07085)",
    statement="at the edge of stability weight decay goes on to reduce the spherical sharpness of "
    "networks with normalization after the fit, and the test accuracy rises",
    printed="the paper's body was not at hand; nothing is quoted",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
