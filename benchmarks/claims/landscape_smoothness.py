"""Batch norm makes loss and gradient predictable along a step; it does not hold layers still."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import regjax
from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import diagnostics, normalization

_NORMS, _RATES = ("none", "batch", "noisy"), (0.03, 0.1)
_WIDTH, _DEPTH, _BATCH, _STEPS = 64, 6, 64, 200
_LINEAR_DEPTH, _LINEAR_WIDTH, _LINEAR_STEPS, _LINEAR_EVERY = 12, 10, 2000, 20
_TIMES = 3.0  # as narrow as without batch norm
_GLOROT = nnx.initializers.glorot_normal()  # the same object again compiles nothing again
_DATA: dict[str, tuple[Callable[[], _networks.Split], int]] = {
    "digits": (lambda: _networks.digits(1440), 5),
    "fashion_mnist": (_networks.fashion_mnist, 3),
}


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [
            {"data": "digits", "norm": norm, "rate": 0.1, "seed": seed, "steps": 20}
            for norm in _NORMS
            for seed in (0, 1)
        ]
    nets = [
        {"data": data, "norm": norm, "rate": rate, "seed": seed, "steps": _STEPS}
        for data, (_, num_seeds) in _DATA.items()
        for norm in _NORMS
        for rate in _RATES
        for seed in range(num_seeds)
    ]
    linear = [
        {"data": "linear", "norm": norm, "rate": rate, "seed": seed, "steps": _LINEAR_STEPS}
        for norm in _NORMS[:2]
        for rate in (0.001, 0.01)
        for seed in range(5)
    ]
    return nets + linear


def _run(settings: Settings) -> dict[str, float]:
    run = _run_linear if settings["data"] == "linear" else _run_net
    return run(settings)


def _run_net(settings: Settings) -> dict[str, float]:
    split, rate = _DATA[settings["data"]][0](), jnp.float32(settings["rate"])
    model = _model(split.x.shape[1], _DEPTH, settings["norm"], settings["seed"])
    layers = (*((f"layers/{i}", f"norms/{i}") for i in range(_DEPTH)), "head")
    if settings["norm"] == "none":
        layers = (*(f"layers/{i}" for i in range(_DEPTH)), "head")
    orders = np.random.default_rng(settings["seed"])
    found, key = [], jax.random.key(settings["seed"])
    for step in range(settings["steps"]):
        rows = orders.choice(len(split.y), _BATCH, replace=False)
        loss = regjax.model_loss(
            model, _networks.cross_entropy, mode="train", key=jax.random.fold_in(key, step)
        )
        model, numbers = _step(layers, model.apply, loss, model, split.x[rows], split.y[rows], rate)
        found.append(numbers)
    trace = np.asarray(jax.device_get(found))
    band, distance, smoothness, shift, fourth = np.median(trace, 0).tolist()
    return {
        "band": band,
        "distance": distance,
        "smoothness": smoothness,
        "cosine": shift,
        "layer 4": fourth,
        "accuracy": _networks.model_accuracy(model, split),
    }


def _squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, 1))


def _step(
    layers: Any, apply: Any, loss: Any, model: regjax.Model, x: Any, y: Any, rate: Any
) -> Any:
    params, state, numbers = _probed_step(
        layers, apply, loss, model.params, model.state, x, y, rate
    )
    return model._replace(params=params, state=state), numbers


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probed_step(
    layers: Any, apply: Any, loss: Any, params: Any, state: Any, x: Any, y: Any, rate: Any
) -> Any:
    probe = diagnostics.line_probe(
        loss, params, x, y, learning_rates=rate * jnp.geomspace(0.5, 4.0, 8)
    )
    moved = jax.tree.map(lambda w, g: w - rate * g, params, jax.grad(loss)(params, x, y))
    shift = diagnostics.internal_covariate_shift(loss, params, moved, x, y, layers=layers)
    _, state = apply(params, state, x, train=True, key=loss.function.key)
    numbers = (
        jnp.max(probe.losses) - jnp.min(probe.losses),
        jnp.max(probe.gradient_distances),
        jnp.max(probe.smoothness),
        jnp.mean(shift.cosines[1:]),
        shift.cosines[3],
    )
    return moved, state, jnp.stack(numbers)


def _run_linear(settings: Settings) -> dict[str, float]:
    """A linear network on a linear target, full batch."""
    seed, rate = settings["seed"], jnp.float32(settings["rate"])
    model = _model(_LINEAR_WIDTH, _LINEAR_DEPTH, f"linear {settings['norm']}", seed)
    x_key, target_key = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(x_key, (1000, _LINEAR_WIDTH))
    y = x @ jax.random.normal(target_key, (_LINEAR_WIDTH, 10)) / _LINEAR_WIDTH**0.5
    loss = regjax.model_loss(model, _squared_error, mode="train")
    layers = (*(f"layers/{i}" for i in range(_LINEAR_DEPTH)), "head")
    cosines, final = _descend_linear(
        layers, settings["steps"] // _LINEAR_EVERY, loss, model.params, x, y, rate
    )
    return {
        "cosine": float(np.nanmean(cosines)),
        "lowest cosine": float(np.nanmean(np.nanmin(cosines, 1))),
        "loss": float(final),
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _descend_linear(
    layers: Any, num_looks: int, loss: Any, params: Any, x: Any, y: Any, rate: Any
) -> Any:
    def descend(params: Any) -> Any:
        return jax.tree.map(lambda w, g: w - rate * g, params, jax.grad(loss)(params, x, y))

    def look(params: Any, _: Any) -> Any:
        shift = diagnostics.internal_covariate_shift(
            loss, params, descend(params), x, y, layers=layers
        )
        params = jax.lax.fori_loop(0, _LINEAR_EVERY, lambda _, p: descend(p), params)
        return params, shift.cosines[1:]

    params, cosines = jax.lax.scan(look, params, None, length=num_looks)
    return cosines, loss(params, x, y)


def _model(num_inputs: int, depth: int, norm: str, seed: int) -> regjax.Model:
    rngs, is_linear = nnx.Rngs(seed), norm.startswith("linear")
    width = _LINEAR_WIDTH if is_linear else _WIDTH
    sizes = (num_inputs, *[width] * depth)
    has_bias = norm == "none"
    linear = functools.partial(nnx.Linear, kernel_init=_GLOROT, rngs=rngs)
    layers = [
        (linear(n, m, use_bias=has_bias), _norm(norm, width, rngs))
        for n, m in itertools.pairwise(sizes)
    ]
    activation = _identity if is_linear else jax.nn.relu
    head = linear(width, 10, use_bias=not is_linear)
    return regjax.from_nnx(_networks.Net(layers, head, activation))


def _identity(x: jax.Array) -> jax.Array:
    return x


def _norm(norm: str, width: int, rngs: nnx.Rngs) -> Any:
    if norm == "linear batch":
        return normalization.nnx.BatchNorm(width, use_scale=False, use_bias=False)
    if norm in ("none", "linear none"):
        return None
    kind = {"batch": normalization.nnx.BatchNorm, "noisy": normalization.nnx.NoisyBatchNorm}[norm]
    return kind(width, momentum=0.9, rngs=rngs)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, everything in _claims.groups(records, "data").items():
        for rate, own in _claims.groups(everything, "rate").items():
            judge = _judge_linear if data == "linear" else _judge_net
            verdicts += judge(f"{data}, rate {rate:g}", own)
    return verdicts


def _judge_net(where: str, records: Sequence[Record]) -> list[Verdict]:
    norms = _claims.groups(records, "norm")
    mean = lambda norm, name: _claims.numbers(norms[norm], name).mean()
    times = {name: mean("none", name) / mean("batch", name) for name in ("band", "distance")}
    texts = {
        name: ", ".join(f"{norm} {_spread(own, name)}" for norm, own in norms.items())
        for name in ("band", "distance", "smoothness", "cosine", "layer 4", "accuracy")
    }
    shifts = mean("batch", "cosine") <= mean("none", "cosine")
    still = mean("noisy", "band") * _TIMES <= mean("none", "band")
    return [
        Verdict(
            f"{_claims.word(min(times.values()) >= _TIMES)} ({where}): loss and gradient vary at "
            f"most a third as much along the step",
            f"width of the loss band: {texts['band']}; largest distance of gradients: "
            f"{texts['distance']}; effective smoothness: {texts['smoothness']} (medians over the "
            "steps, mean and standard deviation over seeds)",
        ),
        Verdict(
            f"{_claims.word(shifts)} ({where}): covariate shift is not smaller with batch norm",
            f"cosine of a layer's gradients before and after the others moved: {texts['cosine']}; "
            f"of the fourth layer: {texts['layer 4']}",
        ),
        Verdict(
            f"{_claims.word(still)} ({where}): with noise behind batch norm the band stays narrow",
            f"test accuracy after {records[0]['steps']} steps: {texts['accuracy']}",
        ),
    ]


def _judge_linear(where: str, records: Sequence[Record]) -> list[Verdict]:
    norms = _claims.groups(records, "norm")
    cosine = {norm: _claims.numbers(own, "cosine").mean() for norm, own in norms.items()}
    texts = {
        name: ", ".join(f"{norm} {_spread(own, name)}" for norm, own in norms.items())
        for name in ("cosine", "lowest cosine", "loss")
    }
    return [
        Verdict(
            f"{_claims.word(cosine['batch'] < cosine['none'])} ({where}): batch norm shifts a deep "
            "linear net's layers more",
            f"mean cosine over layers and steps: {texts['cosine']}; lowest layer: "
            f"{texts['lowest cosine']}; final loss: {texts['loss']}",
        )
    ]


def _spread(records: Sequence[Record], name: str) -> str:
    values = _claims.numbers(records, name)
    return f"{values.mean():.3g} ± {values.std(ddof=1):.2g}"


def _draw(records: Sequence[Record], figure: Any) -> str:
    nets = [record for record in records if record["data"] != "linear"]
    names = {
        "band": "spread of the loss\nalong the step",
        "distance": "largest change of the\ngradient along the step",
        "cosine": "cosine of a layer's gradient\nbefore and after the shift",
    }
    words = {"none": "none", "batch": "batch", "noisy": "noisy batch"}
    rates = sorted(_claims.groups(nets, "rate"))
    norms = [norm for norm in _NORMS if _claims.select(nets, norm=norm)]
    left, right = figure.subfigures(1, 2, width_ratios=(3.4, 1))
    _draw_linear(right.subplots(), _claims.select(records, data="linear"))
    for axes, own, name in _figures.panels(left, nets, names):
        for place, norm in enumerate(norms):
            for i, rate in enumerate(rates):
                part = _claims.numbers(_claims.select(own, norm=norm, rate=rate), name)
                at = place + _figures.side(i, len(rates))
                _figures.column(axes, at, part, index=i, of=2, name=f"learning rate {rate:g}")
        axes.set_xticks(range(len(norms)), [words[norm] for norm in norms], rotation=60)
        axes.set_xlim(-0.5, len(norms) - 0.5)
        if name == "cosine":
            axes.set_ylim(0, 1.03)
        else:
            _figures.logarithmic(axes)
    return (
        f"{_figures.DOTS} Spread and change: low is smooth. Cosine: low is much covariate shift. "
        "Norms: none, batch norm, batch norm with noise behind it."
    )


def _draw_linear(axes: Any, records: Sequence[Record]) -> None:
    groups = _claims.groups(records, "rate")
    for i, (rate, own) in enumerate(groups.items(), 2):
        for place, norm in enumerate(("none", "batch")):
            values = _claims.numbers(_claims.select(own, norm=norm), "cosine")
            at = place + _figures.side(i - 2, 2)
            _figures.column(axes, at, values, index=i, of=2, name=f"linear net, rate {rate:g}")
    axes.set_xticks(range(2), ["none", "batch"], rotation=60)
    axes.set(xlim=(-0.5, 1.5), ylim=(0, 1.03))
    axes.set_title(_figures.NAMES["linear"], fontsize=8)
    _figures.label(axes, y="cosine of a layer's gradient before and after the shift")


CLAIM = _claims.Claim(
    name="landscape_smoothness",
    paper="Santurkar et al. 2018 (arXiv:1805.11604)",
    statement="batch norm smooths the loss along the step and does not reduce covariate shift",
    printed="VGG, CIFAR-10: predictiveness apart by about two orders of magnitude early on; a "
    "25-layer linear net's gradients nearly uncorrelated with batch norm, hardly shifted without",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
