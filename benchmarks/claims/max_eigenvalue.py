"""The largest Hessian eigenvalue falls with the learning rate; the accuracy need not follow."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import curvature, diagnostics, transforms

_BATCHES, _WIDTH, _LIMIT = (30, 300), 128, 40_000
_RATES, _RHOS, _DROPS = (0.02, 0.05, 0.1, 0.2, 0.4), (0.1, 0.4), (0.1, 0.2, 0.4, 0.7)
_RATE = 0.1  # of SAM, dropout and batch norm
_PLAIN = {"kind": "plain", "batch": 300, "rate": _RATE, "rho": 0.0, "drop": 0.0}


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [
            {**_PLAIN, "data": "digits", **varied, "seed": seed, "stop": 1.0}
            for varied in _grid((0.1, 0.4), (0.4,), (), ())
            for seed in (0, 1)
        ]
    return [
        {**_PLAIN, "data": data, **varied, "seed": seed, "stop": stop}
        for data, num_seeds, stop in (("digits", 8, 0.02), ("fashion_mnist", 5, 0.05))
        for varied in _grid(_RATES, _RHOS, _DROPS, _BATCHES)
        for seed in range(num_seeds)
    ]


def _grid(
    rates: Sequence[float], rhos: Sequence[float], drops: Sequence[float], normed: Sequence[int]
) -> list[dict[str, Any]]:
    """What differs from `_PLAIN`."""
    return [
        *({"batch": batch, "rate": rate} for batch in _BATCHES for rate in rates),
        *({"kind": "sam", "batch": batch, "rho": rho} for batch in _BATCHES for rho in rhos),
        *({"kind": "dropout", "batch": 30, "drop": drop} for drop in drops),
        *({"kind": "batch norm", "batch": batch} for batch in normed),
    ]


_DATA = {"digits": _networks.digits, "fashion_mnist": _networks.small_fashion_mnist}


def _run(settings: Settings) -> dict[str, float]:
    split, seed = _DATA[settings["data"]](), settings["seed"]
    sizes = (split.x.shape[1], _WIDTH, _WIDTH, 10)
    numbers = {name: jnp.float32(settings[name]) for name in ("rate", "rho", "drop", "stop")}
    params, other_params, loss, steps = _train(
        _networks.he_network(sizes, jax.random.key(seed)), split.x, split.y,
        jax.random.key(1000 + seed), numbers, kind=settings["kind"], batch=settings["batch"],
    )  # fmt: skip
    key, normalizes = jax.random.key(seed), settings["kind"] == "batch norm"
    if normalizes:
        between = diagnostics.lambda_max_between(
            _normalized_loss, params, other_params, split.x, split.y, key=key
        )
        sharpness, residual_norm = between.value, between.residual_norm
    else:
        hessian = curvature.hessian(_networks.loss_fn, params, split.x, split.y)
        top = curvature.top_eigenpairs(hessian, 1, key=key)
        sharpness, residual_norm = top.values[0], top.residual_norms[0]
    return {
        "accuracy": float(_accuracy(params, split, normalizes)),
        "sharpness": float(sharpness),
        "residual": float(residual_norm),
        "loss": float(loss),
        "steps": int(steps),
    }


@functools.partial(jax.jit, static_argnums=2)
def _accuracy(params: Any, split: _networks.Split, normalizes: bool) -> jax.Array:
    logits = _outputs(params, split.x_test, split.x, normalizes)
    return jnp.mean(jnp.argmax(logits, 1) == split.y_test)


def _outputs(params: Any, x: jax.Array, reference: jax.Array, normalizes: bool) -> jax.Array:
    """Logits; batch norm has the statistics of the reference, and no affine map."""
    for layer in params[:-1]:
        x, reference = (a @ layer["kernel"] + layer["bias"] for a in (x, reference))
        if normalizes:
            mean, deviation = reference.mean(0), jnp.sqrt(reference.var(0) + 1e-5)
            x, reference = (x - mean) / deviation, (reference - mean) / deviation
        x, reference = jax.nn.relu(x), jax.nn.relu(reference)
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def _normalized_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return _networks.cross_entropy(_outputs(params, x, x, True), y)


def _dropped_loss(params: Any, x: jax.Array, y: jax.Array, key: jax.Array, drop: Any) -> jax.Array:
    """Mean cross-entropy with units dropped, the others divided by what is kept."""
    for i, layer in enumerate(params[:-1]):
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        kept = jax.random.uniform(jax.random.fold_in(key, i), x.shape) >= drop
        x = jnp.where(kept, x / (1 - drop), 0)
    return _networks.loss_fn(params[-1:], x, y)


@functools.partial(jax.jit, static_argnames=("kind", "batch"))
def _train(
    params: Any, x: jax.Array, y: jax.Array, key: jax.Array, numbers: Any, *, kind: str, batch: int
) -> Any:
    """Plain descent until the loss of all examples is small, and one step more.

    The loss is looked at after each epoch, without dropout.
    """
    loss_fn = _normalized_loss if kind == "batch norm" else _networks.loss_fn
    climb = transforms.sam(numbers["rho"]) if kind == "sam" else optax.identity()
    tx = optax.chain(climb, optax.sgd(numbers["rate"]))

    def step(params: Any, rows_and_key: Any) -> Any:
        rows, key = rows_and_key

        def grad_fn(params: Any, i: Any) -> Any:
            if kind == "dropout":
                return jax.grad(_dropped_loss)(params, x[rows], y[rows], key, numbers["drop"])
            return jax.grad(loss_fn)(params, x[rows], y[rows])

        state = tx.init(params)  # holds a count at most
        updates, _ = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), None

    def epoch(carry: Any) -> Any:
        params, _, steps = carry
        order_key, drop_key = jax.random.split(jax.random.fold_in(key, steps))
        order = jax.random.permutation(order_key, len(y)).reshape(-1, batch)
        keys = jax.random.split(drop_key, len(order))
        params, _ = jax.lax.scan(step, params, (order, keys))
        return params, loss_fn(params, x, y), steps + len(order)

    params, loss, steps = jax.lax.while_loop(
        lambda carry: (carry[1] >= numbers["stop"]) & (carry[2] < _LIMIT),
        epoch,
        (params, loss_fn(params, x, y), jnp.int32(0)),
    )
    other_params, _ = step(params, (jax.random.permutation(key, len(y))[:batch], key))
    return params, other_params, loss, steps


def _judge(records: Sequence[Record]) -> list[Verdict]:
    return [
        judge(data, own)
        for data, own in _claims.groups(records, "data").items()
        for judge, kind in _JUDGES
        if _claims.select(own, kind=kind)
    ]


def _judge_rates(data: str, own: Sequence[Record]) -> Verdict:
    holds, shown = True, []
    for batch in _BATCHES:
        lines = _reached(_claims.select(own, kind="plain", batch=batch), "rate")
        values = [_claims.numbers(line, "sharpness") for line in lines.values()]
        holds &= _significant(values[0] - values[-1]) > 0
        holds &= all(_significant(b - a) <= 0 for a, b in itertools.pairwise(values))
        means = ", ".join(f"{value.mean():.3g}" for value in values)
        shown.append(f"batch {batch}: {means} at rates {', '.join(f'{r:g}' for r in lines)}")
    return Verdict(
        f"{_claims.word(holds)} ({data}): the eigenvalue falls with the rate at both batch sizes",
        f"{'; '.join(shown)} (means over seeds; a rise would count beyond two standard errors)",
    )


def _judge_accuracy(data: str, own: Sequence[Record]) -> Verdict:
    lines = _reached(_claims.select(own, kind="plain", batch=max(_BATCHES)), "rate")
    values = [_claims.numbers(line, "accuracy") for line in lines.values()]
    means = [value.mean() for value in values]
    spread, deviation = max(means) - min(means), np.mean([value.std(ddof=1) for value in values])
    eigenvalues = [_claims.numbers(line, "sharpness").mean() for line in lines.values()]
    return Verdict(
        f"{_claims.word(spread <= deviation)} ({data}): at full batch the accuracy does not care",
        f"means {min(means):.4f} to {max(means):.4f} over the rates, standard deviation over seeds "
        f"{deviation:.4f}; the eigenvalue {max(eigenvalues):.3g} to {min(eigenvalues):.3g}",
    )


def _judge_climbing(data: str, own: Sequence[Record]) -> Verdict:
    gains, shown = [], []
    for batch in _BATCHES:
        lines = _reached(_claims.select(own, kind="sam", batch=batch), "rho")
        if not lines:
            return Verdict(f"not testable at this size ({data}): SAM missed the loss", "")
        gain, _, text = _against_plain(own, max(lines.items())[1])
        gains.append(gain)
        shown.append(f"rho {max(lines):g}, {text}")
    margin = gains[0] - gains[1]
    word = _claims.word(margin.mean() > 0)
    if _significant(margin) == 0:
        word = "not testable at this size"
    difference, error = _claims.mean_and_error(margin)
    return Verdict(
        f"{word} ({data}): SAM gains more accuracy at the small batch",
        f"{'; '.join(shown)}; difference {difference:+.4f} ± {error:.4f}",
    )


def _judge_dropout(data: str, own: Sequence[Record]) -> Verdict:
    plain = _claims.select(own, kind="plain", batch=30, rate=_RATE)
    lines = {0.0: plain, **_reached(_claims.select(own, kind="dropout"), "drop")}
    values = [_claims.numbers(line, "sharpness").mean() for line in lines.values()]
    accuracy = {drop: _claims.numbers(line, "accuracy") for drop, line in lines.items()}
    best = max(accuracy, key=lambda drop: accuracy[drop].mean())
    loss = accuracy[best] - accuracy[max(accuracy)]
    holds = all(b < a for a, b in itertools.pairwise(values)) and _significant(loss) > 0
    shown = "; ".join(
        f"{drop:g}: {accuracy[drop].mean():.4f}, {value:.3g}"
        for drop, value in zip(lines, values, strict=True)
    )
    return Verdict(
        f"{_claims.word(holds)} ({data}): much dropout costs accuracy while the eigenvalue falls",
        f"accuracy and eigenvalue by dropout probability, batch 30: {shown}",
    )


def _judge_norm(data: str, own: Sequence[Record]) -> Verdict:
    lines = [_claims.select(own, kind="batch norm", batch=batch) for batch in _BATCHES]
    found = [_against_plain(own, line) for line in lines]
    holds = all(_significant(gain) > 0 and factor > 0.5 for gain, factor, _ in found)
    return Verdict(
        f"{_claims.word(holds)} ({data}): batch norm helps though the eigenvalue stays",
        f"{'; '.join(text for *_, text in found)} (with it: the maximum of 8 points between two "
        "iterates)",
    )


def _against_plain(own: Sequence[Record], line: Sequence[Record]) -> tuple[np.ndarray, float, str]:
    """The gain in accuracy of each seed, the factor of the mean eigenvalue, and both in words."""
    plain = _claims.select(own, kind="plain", batch=line[0]["batch"], rate=_RATE)
    gain = _claims.numbers(line, "accuracy") - _claims.numbers(plain, "accuracy")
    before, after = (_claims.numbers(part, "sharpness").mean() for part in (plain, line))
    mean, error = _claims.mean_and_error(gain)
    text = f"accuracy {mean:+.4f} ± {error:.4f}, eigenvalue {before:.3g} to {after:.3g}"
    return gain, after / before, f"batch {line[0]['batch']}: {text}"


_METHODS = {  # marker, and what is varied
    "plain": ("o", "rate"),
    "sam": ("s", "rho"),
    "dropout": ("^", "drop"),
    "batch norm": ("*", "rate"),
}
_JUDGES = (
    (_judge_rates, "plain"),
    (_judge_accuracy, "plain"),
    (_judge_climbing, "sam"),
    (_judge_dropout, "dropout"),
    (_judge_norm, "batch norm"),
)


def _reached(records: Sequence[Record], name: str) -> dict[float, list[Record]]:
    """The records by the value of a setting, where every seed came down to the common loss."""
    lines = sorted(_claims.groups(records, name).items())
    return {value: line for value, line in lines if all(r["loss"] < r["stop"] for r in line)}


def _significant(values: np.ndarray) -> int:
    """The sign of the mean if it is more than two standard errors from zero, else 0."""
    mean, error = _claims.mean_and_error(values)
    return int(np.sign(mean)) if abs(mean) > 2 * error else 0


def _draw(records: Sequence[Record], figure: Any) -> str:
    names = {
        "sharpness": "largest Hessian eigenvalue",
        "gain": "points of accuracy over\nthe lowest rate",
        "accuracy": "test accuracy",
    }
    rates = sorted(_claims.groups(_claims.select(records, kind="plain"), "rate"))
    for axes, own, name in _figures.panels(figure, records, names, height=2):
        if name == "accuracy":
            _draw_methods(axes, own)
            continue
        lines = {
            f"batches of {batch}{' (all images)' if batch == max(_BATCHES) else ''}": _with_gain(
                _claims.select(own, kind="plain", batch=batch)
            )
            for batch in _BATCHES
        }
        _figures.sweeps(axes, lines, "rate", name, values=rates)
        _figures.label(axes, x="learning rate (plain SGD)")
        if name == "sharpness":
            _figures.logarithmic(axes)
        else:
            _figures.level(axes, 0, "")
    return (
        f"Left and middle: {_figures.BARS[0].lower()}{_figures.BARS[1:-1]}. Right: each point is "
        "the mean of one setting (rate, rho or share of dropped units), in the same two colours."
    )


def _draw_methods(axes: Any, own: Sequence[Record]) -> None:
    """Means over seeds of every setting; the colours are the batch sizes of the other panels."""
    words = {"plain": "SGD at several rates", "sam": "SAM"}
    for color, batch in zip(_figures.COLORS, _BATCHES, strict=False):
        for kind, (marker, varied) in _METHODS.items():
            for line in _claims.groups(
                _claims.select(own, kind=kind, batch=batch), varied
            ).values():
                point = [[_claims.numbers(line, name).mean()] for name in ("sharpness", "accuracy")]
                axes.plot(*point, marker, markersize=4, color=color, alpha=0.8)
    for kind, (marker, _) in _METHODS.items():
        text = f"right: {words.get(kind, kind)}"
        axes.plot([], [], marker, markersize=4, color="0.4", label=text)
    _figures.logarithmic(axes, "x")
    _figures.label(axes, x="largest Hessian eigenvalue")


def _with_gain(records: Sequence[Record]) -> list[Record]:
    """The records, with the accuracy less that of the same seed at the lowest rate, in percent."""
    lowest = min(record["rate"] for record in records)
    start = {r["seed"]: r["accuracy"] for r in _claims.select(records, rate=lowest)}
    return [{**r, "gain": 100 * (r["accuracy"] - start[r["seed"]])} for r in records]


CLAIM = _claims.Claim(
    name="max_eigenvalue",
    paper="Kaur et al. 2023 (arXiv:2206.10654)",
    statement="the largest Hessian eigenvalue falls with the rate, SAM and dropout; the accuracy "
    "follows at small batches and moderate doses only",
    printed="plots of VGG11 on CIFAR-10, read off: batch 100, rates 5e-4 to .15: accuracy .718 to "
    ".777, eigenvalue 2.6e3 to 25; batch 5000, rates 5e-3 to .15: .738 to .723",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
