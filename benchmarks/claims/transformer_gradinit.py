"""GradInit: a transformer with its norms behind the sums trains without warm-up.

Depth, rates, steps and GradInit's bound were chosen after a look at seed 0; the runs here have
other seeds. That a mean within two standard errors must be within 0.1 nats too was added after
them: on digits, where some seeds fail, the errors are wide. GradInit's iterations come on top of
the steps that are compared.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _tokens
from regjax import initializers, model_loss

# Of GradInit: the bound of |g|_1, or None without GradInit. Before it, |g|_1 is 160 to 200 here, so
# that 150 binds from the start; the authors' 1000, for a far larger net, hardly ever does.
_BOUNDS = {"plain": None, "warm-up": None, "gradinit, 150": 150.0, "gradinit, 1000": 1000.0}
# 780 iterations at 2.5e-3 in the authors' runs: as far in a quarter of the time.
_ITERATIONS, _SCALE_RATE, _HALF = 200, 1e-2, 16
_RATES: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
_DEPTH, _STEPS, _RISING = 6, 200, 0.25
_POINTS, _CLEAR = 10, 0.1  # nats by which a net is clearly worse than one with warm-up
_DATA: dict[str, tuple[Callable[[], _tokens.Images], int]] = {
    "digits": (_tokens.digits, 5),
    "fashion_mnist": (_tokens.fashion_mnist, 3),
}


def _settings(preset: str) -> Sequence[Settings]:
    data, rates = {name: n for name, (_, n) in _DATA.items()}, _RATES
    size = {"depth": _DEPTH, "steps": _STEPS, "iterations": _ITERATIONS}
    if preset == "smoke":
        data, rates = {"digits": 2}, _RATES[:2]
        size = {"depth": 1, "steps": 20, "iterations": 5}
    return [
        {"data": name, "seed": seed, "method": method, "rate": rate, **size}
        for name, num_seeds in data.items()
        for seed in range(1, 1 + num_seeds)
        for method in _BOUNDS
        for rate in rates
    ]


def _run(settings: Settings) -> dict[str, float]:
    data, depth, seed, method = (settings[name] for name in ("data", "depth", "seed", "method"))
    images, loss_fn, num_steps = _DATA[data][0](), _loss_fn(data, depth), settings["steps"]
    bound = _BOUNDS[method]
    if bound is None:
        params, found = _model(data, depth, seed).params, {}
    else:
        result = _gradinit(data, depth, seed, bound, settings["iterations"])
        params = result.params
        found = {
            "norm_before": float(result.gradient_norms[0]),
            "norm": float(result.gradient_norms[-1]),
            "constrained": float(np.mean(result.constrained)),
        }
    num_rising = round(_RISING * num_steps) if method == "warm-up" else 0
    rates = _tokens.warm_up(settings["rate"], num_steps, num_rising)
    params, losses = _tokens.train(loss_fn, params, images, rates, seed)
    return {
        "test_loss": float(_test_loss(loss_fn, params, images.x_test)),
        "by_position": images.by_position,
        **_tokens.smoothed(losses, _POINTS),
        **found,
    }


def _model(data: str, depth: int, seed: int) -> Any:
    return _tokens.transformer(_DATA[data][0]().x.shape[1] - 1, depth, seed)


@functools.cache
def _loss_fn(data: str, depth: int) -> Any:
    return model_loss(_model(data, depth, 0), _tokens.cross_entropy)


@functools.cache
def _gradinit(data: str, depth: int, seed: int, bound: float, iterations: int) -> Any:
    """The same for all rates."""
    random, x = np.random.default_rng(seed), _DATA[data][0]().x
    rows = np.stack(
        [random.choice(len(x), (3, _HALF), replace=False) for _ in range(iterations)]
    )  # fmt: skip
    return initializers.gradinit(
        _loss_fn(data, depth),
        _model(data, depth, seed).params,
        _tokens.inputs_and_targets(x[rows]),
        gradient_norm_bound=bound,
        learning_rate=_SCALE_RATE,
        first_step="adam",
    )


@jax.jit
def _test_loss(loss_fn: Any, params: Any, x: jax.Array) -> jax.Array:
    return loss_fn(params, *_tokens.inputs_and_targets(x))


def _judge(records: Sequence[Record]) -> list[Verdict]:
    return [
        _on_method(data, method, own)
        for data, own in _claims.groups(records, "data").items()
        for method, bound in _BOUNDS.items()
        if bound is not None
    ]


def _on_method(data: str, method: str, records: Sequence[Record]) -> Verdict:
    wins, texts = [], []
    for rate, own in _claims.groups(records, "rate").items():
        loss = {name: _losses(own, name) for name in ("plain", "warm-up", method)}
        lost, lost_error = _claims.mean_and_error(loss["plain"] - loss["warm-up"])
        gap, gap_error = _claims.mean_and_error(loss[method] - loss["warm-up"])
        gain, gain_error = _claims.mean_and_error(loss["plain"] - loss[method])
        shown = ", ".join(f"{name} {values.mean():.3f}" for name, values in loss.items())
        trained = sum(loss[method] < own[0]["by_position"])
        texts.append(
            f"rate {rate:g}: {shown} (less warm-up's {gap:+.3f} ± {gap_error:.3f}; {trained} of "
            f"{len(loss[method])} seeds trained)"
        )
        if lost > max(_CLEAR, 2 * lost_error):  # only there is warm-up needed
            # A wide spread must not pass for a tie.
            is_level = gap <= min(2 * gap_error, _CLEAR)
            wins.append(bool(is_level and gain > 2 * gain_error))
    question = f"({data}, {method}): in place of warm-up"
    first = records[0]
    evidence = (
        f"test loss in nats after {first['steps']} steps, a net blind to the pixels before has "
        f"{first['by_position']:.3f}. {'; '.join(texts)}; {_norms(records, method)}"
    )
    if not wins:
        return Verdict(
            f"not testable at this size {question}", f"no rate needs warm-up: {evidence}"
        )
    needed = f"as good as warm-up at {sum(wins)} of {len(wins)} rates that need it"
    return Verdict(f"{_claims.word(all(wins))} {question}", f"{needed}: {evidence}")


def _losses(records: Sequence[Record], method: str) -> np.ndarray:
    return _claims.numbers(_claims.select(records, method=method), "test_loss")


def _norms(records: Sequence[Record], method: str) -> str:
    own = _claims.select(records, method=method)
    before, after = (_claims.numbers(own, name).mean() for name in ("norm_before", "norm"))
    share = _claims.numbers(own, "constrained").mean()
    return f"l1 norm {before:.0f} to {after:.0f}, above its bound in {share:.0%} of the iterations"


def _draw(records: Sequence[Record], figure: Any) -> str:
    words = {"gradinit, 150": "GradInit, bound 150", "gradinit, 1000": "GradInit, bound 1000"}
    rates = sorted(_claims.groups(records, "rate"))
    names = {
        "test_loss": "test loss (nats)",
        "loss": f"training loss (nats)\nat rate {rates[-1]:g}",
    }
    for axes, own, name in _figures.panels(figure, records, names, height=2):
        for i, method in enumerate(_BOUNDS):
            part = _claims.select(own, method=method)
            text = words.get(method, method)
            if name == "test_loss":
                _figures.sweep(
                    axes, part, "rate", name, values=rates, index=i, of=len(_BOUNDS), name=text
                )
                continue
            for record in _claims.select(part, rate=rates[-1]):
                values = [record[f"loss_{j}"] for j in range(_POINTS)]
                steps = record["steps"] * (np.arange(_POINTS) + 0.5) / _POINTS
                axes.plot(steps, values, color=_figures.COLORS[i], linewidth=0.8, alpha=0.8)
        if name == "test_loss":
            _figures.level(
                axes, own[0]["by_position"], name="a network blind to the earlier pixels"
            )
        _figures.label(axes, x="learning rate" if name == "test_loss" else "training step")
    return (
        f"Left: {_figures.BARS[0].lower()}{_figures.BARS[1:-1]}. Right: one line per seed, in the "
        "same colours. The claim holds where GradInit stays as low as warm-up at the highest rate."
    )


CLAIM = _claims.Claim(
    name="transformer_gradinit",
    paper="Zhu et al. 2021 (arXiv:2102.08098), on transformers",
    statement="after GradInit a transformer with its norms behind the sums trains without warm-up",
    printed="numbers for transformers were not checked; none is quoted",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
