"""Dropout is a penalty on what each unit puts out: end points, condensation, flatness, noise."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import diagnostics, regularizers

_WIDTH, _RATE, _KEEPS = 300, 0.05, (0.5, 0.2)  # full-batch gradient descent
_LINE_WIDTH, _LINE_POINTS, _LINE_RATE, _LINE_SEEDS = 100, 20, 1e-3, 5  # Adam
_NOISE_KEEP, _MASKS, _DIRECTIONS = 0.5, 32, 10
_NOISE = {  # as recorded, and as measured
    "hessian_trace": "hessian_trace",
    "hessian_trace_error": "hessian_trace_standard_error",
    "alignment": "alignment",
    "alignment_error": "alignment_standard_error",
    "null_alignment": "null_alignment",
    "null_alignment_error": "null_alignment_standard_error",
    "null_deviation": "null_std",
}
_AGREE, _LOUD = 0.15, (0.01, 0.03, 0.1)  # the latter of the largest amplitude
_DATA: dict[str, tuple[Callable[[], _networks.Split], int, int]] = {  # with steps and seeds
    "digits": (_networks.digits, 5000, 5),
    "fashion_mnist": (lambda: _networks.fashion_mnist(300), 2000, 3),
}
_NAMES = {"plain": "R_S alone", "penalty": "R_S + R1", "dropout": "dropout"}
_LINE, _LINE_STEPS = "one_dimensional", 60_000
_KINDS = (("plain", 1.0), *((method, keep) for keep in _KEEPS for method in ("penalty", "dropout")))


def _settings(preset: str) -> Sequence[Settings]:
    smoke = preset == "smoke"
    data = {"digits": (20, 2)} if smoke else {name: known[1:] for name, known in _DATA.items()}
    data[_LINE] = (100, 2) if smoke else (_LINE_STEPS, _LINE_SEEDS)
    return [
        {"data": name, "method": method, "keep": keep, "seed": seed, "steps": steps}
        for name, (steps, num_seeds) in data.items()
        for method, keep in (_KINDS[:3] if smoke or name == _LINE else _KINDS)
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    data, method, keep, seed, steps = (
        settings[name] for name in ("data", "method", "keep", "seed", "steps")
    )
    if data == _LINE:
        ends = _line_ends(method, keep, steps)
        return {name: float(values[seed]) for name, values in ends.items()}
    split = _DATA[data][0]()
    x, y = split.x, jax.nn.one_hot(split.y, 10)
    params = _networks.he_network((x.shape[1], _WIDTH, 10), jax.random.key(seed))
    # Of the generator that is fast on CPU: a mask for each example and step.
    key = jax.random.key(seed, impl="rbg")
    params = _descend(_LOSSES["relu", method], _SGD, steps, params, key, x, y, keep)
    noise = diagnostics.dropout_noise_alignment(
        _RISK, Partial(_LOSSES["relu", "dropout"], x=x, y=y, keep=_NOISE_KEEP), params, x, y,
        key=jax.random.key(seed), num_samples=_MASKS, num_directions=_DIRECTIONS,
    )  # fmt: skip
    cosines = diagnostics.condensation(params[0]["kernel"], params[0]["bias"]).cosines
    return {
        "accuracy": _networks.accuracy(params, split),
        "risk": float(_risk(jax.nn.relu, params, x, y)),
        "penalty": float(_penalty(jax.nn.relu, params, x, 0.5)),
        "pairs": float(jnp.mean(cosines[jnp.triu_indices(_WIDTH, 1)] > 0.95)),
        **{name: float(getattr(noise, field)) for name, field in _NOISE.items()},
        "rank_correlation": _rank_correlation(noise.eigenvalues, noise.curvatures),
    }


@functools.cache
def _line_ends(method: str, keep: float, steps: int) -> dict[str, np.ndarray]:
    """All seeds in one program: the network is so small that they cost little more than one."""
    x = jnp.linspace(-15, 15, _LINE_POINTS)[:, None]
    y = jnp.tanh(x - 6) + jnp.tanh(x + 6)
    scale = _LINE_WIDTH**-0.1  # the variance is width^-0.2

    def end(seed: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(seed), 3)
        draw = lambda i, *shape: scale * jax.random.normal(keys[i], shape)
        params = [
            {"kernel": draw(0, 1, _LINE_WIDTH), "bias": draw(1, _LINE_WIDTH)},
            {"kernel": draw(2, _LINE_WIDTH, 1), "bias": jnp.zeros(1)},
        ]
        key = jax.random.key(seed, impl="rbg")
        return _descend(_LOSSES["tanh", method], _ADAM, steps, params, key, x, y, keep)

    return jax.tree.map(np.asarray, _line_reports(jax.vmap(end)(jnp.arange(_LINE_SEEDS)), x, y))


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, None))
def _line_reports(params: Any, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    kernel, bias = params[0]["kernel"], params[0]["bias"]
    report = diagnostics.condensation(kernel, bias)
    # |a| |w|, of which the cosines know nothing: neurons that put out next to nothing keep the
    # directions that they began with.
    gains = jnp.abs(params[1]["kernel"][:, 0])
    loudest = jnp.max(report.norms * gains)
    loud = {
        f"ratio_{share:g}": diagnostics.condensation(
            kernel * gains, bias * gains, min_norm=share * loudest
        ).effective_ratio
        for share in _LOUD
    }
    return {"risk": _risk(jnp.tanh, params, x, y), "ratio": report.effective_ratio, **loud}


def _hidden(activation: Any, params: Any, x: jax.Array) -> jax.Array:
    return activation(x @ params[0]["kernel"] + params[0]["bias"])


def _error(params: Any, hidden: jax.Array, y: jax.Array) -> jax.Array:
    outputs = hidden @ params[1]["kernel"] + params[1]["bias"]
    return jnp.mean(jnp.sum((outputs - y) ** 2, 1)) / 2


def _risk(activation: Any, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return _error(params, _hidden(activation, params, x), y)


def _penalty(activation: Any, params: Any, x: jax.Array, keep: Any) -> jax.Array:
    hidden = _hidden(activation, params, x)
    return regularizers.dropout_penalty(hidden, params[1]["kernel"], keep_probability=keep)


def _plain_loss(activation: Any, params: Any, key: Any, x: Any, y: Any, keep: Any) -> jax.Array:
    return _risk(activation, params, x, y)


def _penalty_loss(activation: Any, params: Any, key: Any, x: Any, y: Any, keep: Any) -> jax.Array:
    return _risk(activation, params, x, y) + _penalty(activation, params, x, keep)


def _dropout_loss(activation: Any, params: Any, key: Any, x: Any, y: Any, keep: Any) -> jax.Array:
    hidden = _hidden(activation, params, x)
    kept = jax.random.bernoulli(key, keep, hidden.shape)
    return _error(params, jnp.where(kept, hidden / keep, 0), y)


# The same objects again compile nothing again.
_SGD, _ADAM = optax.sgd(_RATE), optax.adam(_LINE_RATE)
_RISK = functools.partial(_risk, jax.nn.relu)
_LOSSES = {
    (name, method): functools.partial(loss, activation)
    for name, activation in (("relu", jax.nn.relu), ("tanh", jnp.tanh))
    for method, loss in zip(_NAMES, (_plain_loss, _penalty_loss, _dropout_loss), strict=True)
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _descend(
    loss: Any, tx: Any, num_steps: int, params: Any, key: Any, x: Any, y: Any, keep: Any
) -> Any:
    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(loss)(params, jax.random.fold_in(key, i), x, y, keep)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))[0][0]


def _rank_correlation(one: Any, other: Any) -> float:
    ranks = [np.argsort(np.argsort(np.asarray(values))).astype(float) for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        if data == _LINE:
            verdicts += _judge_condensation(own)
        else:
            verdicts += [
                _judge_means(data, own),
                _judge_accuracy(data, own),
                _judge_flatness(data, own),
                _judge_noise(data, own),
            ]
    return verdicts


def _judge_means(data: str, own: Sequence[Record]) -> Verdict:
    holds, shown = True, []
    for keep in _keeps(own):
        for name, text in (("risk", "R_S"), ("penalty", "R1")):
            factor = 1.0 if name == "risk" else (1 - keep) / keep  # recorded at p = 1/2
            plain, penalized, dropped = (
                factor * _claims.numbers(part, name).mean()
                for part in (
                    _claims.select(own, method="plain"),
                    _claims.select(own, method="penalty", keep=keep),
                    _claims.select(own, method="dropout", keep=keep),
                )
            )
            apart = min(abs(penalized / plain - 1), abs(dropped / plain - 1))
            holds = holds and bool(abs(dropped / penalized - 1) < _AGREE < apart)
            shown.append(f"{text} {penalized:.4f} and {dropped:.4f} (plain {plain:.4f})")
        shown[-1] += f" at p = {keep:g}"
    groups = _claims.groups(own, "method").items()
    pairs = ", ".join(f"{_claims.numbers(p, 'pairs').mean():.3f} ({name})" for name, p in groups)
    return Verdict(
        f"{_claims.word(holds)} ({data}): R1 is the mean effect of dropout",
        f"ends of R_S + R1 and of dropout, means over seeds: {', '.join(shown)}; share of pairs of "
        f"neurons with a cosine above 0.95: {pairs}",
    )


def _judge_accuracy(data: str, own: Sequence[Record]) -> Verdict:
    plain = _claims.numbers(_claims.select(own, method="plain"), "accuracy")
    gains, shown = {}, []
    for (keep, method), part in _regularized(own).items():
        gain, error = _claims.mean_and_error(_claims.numbers(part, "accuracy") - plain)
        gains[keep, method] = gain > 2 * error
        shown.append(f"{gain:+.4f} ± {error:.4f} ({method}, p = {keep:g})")
    keeps = _keeps(own)
    helps = [keep for keep in keeps if gains[keep, "penalty"] and gains[keep, "dropout"]]
    # At one of several probabilities it would be a choice made afterwards.
    only = f", only at p = {helps[0]:g}" if 0 < len(helps) < len(keeps) else ""
    word = _claims.word(len(helps) == len(keeps)) + only
    return Verdict(
        f"{word} ({data}): dropout and R1 raise the accuracy",
        f"gain over {plain.mean():.4f} without: {', '.join(shown)} (one standard error)",
    )


def _judge_flatness(data: str, own: Sequence[Record]) -> Verdict:
    plain = _claims.numbers(_claims.select(own, method="plain"), "hessian_trace")
    flatter, shown = [], [f"{plain.mean():.1f} without"]
    for (keep, method), part in _regularized(own).items():
        traces = _claims.numbers(part, "hessian_trace")
        flatter += list(traces < plain)
        shown.append(f"{traces.mean():.1f} ({method}, p = {keep:g})")
    error = _claims.numbers(own, "hessian_trace_error").max()
    return Verdict(
        f"{_claims.word(all(flatter))} ({data}): dropout and R1 end where R_S is flatter",
        f"trace of the Hessian of R_S lower in {sum(flatter)} of {len(flatter)} runs, at ends of "
        f"different R_S; means {', '.join(shown)}; standard errors up to {error:.1f}",
    )


def _judge_noise(data: str, own: Sequence[Record]) -> Verdict:
    alignment, null = (_claims.numbers(own, name) for name in ("alignment", "null_alignment"))
    errors = ("alignment_error", "null_alignment_error", "null_deviation")
    error = np.sqrt(sum(_claims.numbers(own, name) ** 2 for name in errors))
    beyond = alignment > null + 5 * error
    ratio, ranks = alignment / null, _claims.numbers(own, "rank_correlation")
    return Verdict(
        f"{_claims.word(np.all(beyond))} ({data}): dropout's noise is largest where R_S is curved",
        f"alignment of its covariance with the Hessian {alignment.mean():.2f}, "
        f"{ratio.min():.0f} to {ratio.max():.0f} times that of random eigenvectors, beyond it by "
        f"5 errors in {int(beyond.sum())} of {len(own)} runs; rank correlation of noise and "
        f"curvature along the first {_DIRECTIONS} eigenvectors {ranks.mean():.2f} ± "
        f"{ranks.std(ddof=1):.2f} (p = {_NOISE_KEEP:g}, {_MASKS} masks, all end points)",
    )


def _judge_condensation(own: Sequence[Record]) -> list[Verdict]:
    halved, shown = {}, {}
    for name in ("ratio", *(f"ratio_{share:g}" for share in _LOUD)):
        groups = _claims.groups(own, "method").items()
        ratios = {method: _claims.numbers(part, name) for method, part in groups}
        halved[name] = ratios["dropout"].mean() < ratios["plain"].mean() / 2
        shown[name] = ", ".join(
            f"{r.mean():.3f} ± {r.std(ddof=1):.3f} ({method})" for method, r in ratios.items()
        )
    loud = [name for name in shown if name != "ratio"]  # all agree: our choice decides nothing
    setting = (
        f"all neurons; width {_LINE_WIDTH}, p = {_KEEPS[0]:g} (one seed at the paper's 1000, 0.9 "
        f"showed no difference in 50000 steps)"
    )
    return [
        Verdict(
            f"{_claims.word(halved['ratio'])} ({_LINE}): dropout halves the effective ratio",
            f"{shown['ratio']}, {setting}",
        ),
        Verdict(
            f"{_claims.word(all(halved[name] for name in loud))} ({_LINE}): and that of neurons "
            f"that put something out, whatever the least share of the largest |a| |w|",
            "; ".join(f"share {name[6:]}: {shown[name]}" for name in loud)
            + "; ours, not the paper's",
        ),
    ]


def _keeps(own: Sequence[Record]) -> list[float]:
    return [keep for keep in _claims.groups(own, "keep") if keep < 1]


def _regularized(own: Sequence[Record]) -> dict[tuple[float, str], list[Record]]:
    return {
        (keep, method): _claims.select(own, method=method, keep=keep)
        for keep in _keeps(own)
        for method in ("penalty", "dropout")
    }


def _draw(records: Sequence[Record], figure: Any) -> str:
    images = [record for record in records if record["data"] != _LINE]
    sets = list(_claims.groups(images, "data"))
    figure.set_figheight(2 * len(sets))
    grid = figure.add_gridspec(len(sets), 4, width_ratios=[1.1, 1, 1, 0.9])
    words = {"plain": "loss R_S alone", "penalty": "R_S + R1", "dropout": "dropout"}
    for row, data in enumerate(sets):
        own = _claims.select(images, data=data)
        kinds = [kind for kind in _KINDS if _claims.select(own, method=kind[0], keep=kind[1])]
        ends, accuracy, flatness = (figure.add_subplot(grid[row, i]) for i in range(3))
        for place, (method, keep) in enumerate(kinds):
            part = _claims.select(own, method=method, keep=keep)
            look: dict[str, Any] = {"index": list(words).index(method), "name": words[method]}
            for axes, name in ((accuracy, "accuracy"), (flatness, "hessian_trace")):
                _figures.column(axes, place, _claims.numbers(part, name), **look)
            ends.plot(
                *(_claims.numbers(part, name) for name in ("risk", "penalty")), alpha=0.6,
                **{**_figures.look(look["index"]), "linestyle": "", "markersize": 4},
            )  # fmt: skip
        ticks = ["plain" if method == "plain" else f"p = {keep:g}" for method, keep in kinds]
        for axes in (accuracy, flatness):
            axes.set_xticks(range(len(kinds)), ticks, rotation=60)
        _figures.logarithmic(ends)
        flatness.set_ylim(bottom=0)
        _figures.label(ends, x="loss R_S at the end", y="R1 at the end")
        _figures.label(accuracy, y="test accuracy")
        _figures.label(flatness, y="Hessian trace of R_S")
        for axes in (ends, accuracy, flatness):
            axes.set_title(_figures.NAMES[data], fontsize=8)
    line = figure.add_subplot(grid[:, 3])
    for place, method in enumerate(words):
        own = _claims.select(records, data=_LINE, method=method)
        _figures.column(line, place, _claims.numbers(own, "ratio"), index=place)
    line.set_xticks(range(3), words.values(), rotation=60)
    line.set(xlim=(-0.5, 2.5), ylim=(0, None))
    line.set_title(_figures.NAMES[_LINE], fontsize=8)
    _figures.label(line, y="effective ratio: neurons that differ / all")
    return (
        f"{_figures.DOTS} p: share of units that are kept. R1 is what dropout adds to the loss on "
        f"the average (at p = {_NOISE_KEEP:g} in the first column)."
    )


CLAIM = _claims.Claim(
    name="dropout",
    paper="Zhang & Xu 2024 (arXiv:2207.05952)",
    statement="dropout acts like a penalty R1 on the loss R_S, which condenses neurons and "
    "flattens minima",
    printed="MNIST, 1000 images: R_S alone 79 %, dropout and R_S + R1 both above 88 %",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
