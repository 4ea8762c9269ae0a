"""Unit-norm filters keep the effective learning rate that weight decay only settles at."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import normalization, schedules, transforms

_DATA: dict[str, tuple[Callable[[], _networks.Split], int]] = {
    "digits": (_networks.digits, 5),
    "fashion_mnist": (_networks.fashion_mnist, 3),
}
_WIDTH, _BATCH, _STEPS, _RATE, _DECAY = 128, 50, 3_000, 0.1, 5e-3
_ADAM_RATE, _ADAM_DECAY = 1e-3, 1e-2  # of AdamP; the rate is its default
_LAYERS = ("first", "second")  # those with a batch norm
_MATCHED = "decay, then rescaled at the matched rate"
_BASELINES = ("none", "decay", "standardized", "adamp")
_METHODS = (*_BASELINES, "rescaled", _MATCHED)
_SETTLED = 0.2  # decay is in equilibrium if its angle is the predicted one up to this share
_AFTER = 300  # steps over which the two ways to go on from the decayed run are compared


class _Motion(NamedTuple):
    """Of each step, means over the filters of both layers.

    Attributes:
      angle: (steps,), by which the filters turned.
      predicted: (steps,), rate |g| / |w|, whose arctangent that is for a plain or rescaled step.
      gradient: (steps,), |g| |w|, the gradient at unit norm.
      norm: (steps,), |w|.
    """

    angle: jax.Array
    predicted: jax.Array
    gradient: jax.Array
    norm: jax.Array


def _settings(preset: str) -> Sequence[Settings]:
    data = {"digits": (_networks.digits, 2)} if preset == "smoke" else _DATA
    return [
        {
            "data": name,
            "method": method,
            "seed": seed,
            "steps": 60 if preset == "smoke" else _STEPS,
        }
        for name, (_, num_seeds) in data.items()
        for method in _METHODS
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> Mapping[str, float]:
    split, seed, steps = _DATA[settings["data"]][0](), settings["seed"], settings["steps"]
    params, method = _initial(split.x.shape[1], seed), settings["method"]
    if method == _MATCHED:
        return _matched(params, split, seed, steps)
    standardizes = method == "standardized"
    start = _unit(params, method == "rescaled")
    end, motion = _train(_chain(method, _RATE), start, split, seed, steps, standardizes)
    measured = _measured(end, split, standardizes)
    return {**measured, **_summary(motion), "rate": _RATE, "decayed_angle": 0.0}


def _matched(params: Any, split: _networks.Split, seed: int, steps: int) -> Mapping[str, float]:
    """From the end of the decayed run: on with decay, or rescaled at the matched rate."""
    decay = _chain("decay", _RATE)
    params, motion = _train(decay, params, split, seed, steps)
    gradient = float(motion.gradient[-_AFTER:].mean())
    rate = float(
        schedules.matched_learning_rate(
            learning_rate=_RATE, weight_decay=_DECAY, gradient_norm=gradient
        )
    )
    _, decayed = _train(decay, params, split, seed + 1000, _AFTER)
    rescaled = _chain("rescaled", rate)
    end, motion = _train(rescaled, _unit(params, True), split, seed + 1000, _AFTER)
    angle = float(decayed.angle.mean())
    return {**_measured(end, split), **_summary(motion), "rate": rate, "decayed_angle": angle}


def _measured(
    params: Any, split: _networks.Split, standardizes: bool = False
) -> Mapping[str, float]:
    """Loss, and accuracy with the batch statistics of the test images."""
    right = jnp.argmax(_outputs(params, split.x_test, standardizes), 1) == split.y_test
    return {
        "loss": float(_loss(params, split.x, split.y, standardizes)),
        "accuracy": float(jnp.mean(right)),
    }


def _summary(motion: _Motion) -> Mapping[str, float]:
    return {
        "first_norm": float(motion.norm[0]),
        "norm": float(motion.norm[-1]),
        "angle": float(motion.angle[-_AFTER:].mean()),
        "predicted": float(jnp.arctan(motion.predicted[-_AFTER:]).mean()),
    }


def _initial(num_inputs: int, seed: int) -> Any:
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = (num_inputs, _WIDTH, _WIDTH, 10)
    kernels = [
        jnp.sqrt(2 / n) * jax.random.normal(key, (n, m))
        for n, m, key in zip(sizes[:-1], sizes[1:], keys, strict=True)
    ]
    layers: Any = {
        name: {"kernel": kernel, "scale": jnp.ones(_WIDTH), "bias": jnp.zeros(_WIDTH)}
        for name, kernel in zip(_LAYERS, kernels, strict=False)
    }
    return {**layers, "head": {"kernel": kernels[-1], "bias": jnp.zeros(10)}}


def _outputs(params: Any, x: jax.Array, standardizes: bool = False) -> jax.Array:
    """Dense, batch norm with the statistics of `x`, ReLU, twice; then dense."""
    for name in _LAYERS:
        kernel = params[name]["kernel"]
        hidden = x @ (normalization.standardize_weight(kernel) if standardizes else kernel)
        hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
        x = jax.nn.relu(params[name]["scale"] * hidden + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def _loss(params: Any, x: jax.Array, y: jax.Array, standardizes: bool = False) -> jax.Array:
    logits = _outputs(params, x, standardizes)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def _mask(params: Any) -> Any:
    """The kernels that a batch norm follows."""
    return {
        name: {leaf: leaf == "kernel" and name in _LAYERS for leaf in layer}
        for name, layer in params.items()
    }


def _unit(params: Any, rescales: bool) -> Any:
    """The weights with unit filters, the same network, where they will be kept so."""
    if not rescales:
        return params
    tx = transforms.rescale_weights(mask=_mask)
    zero = jax.tree.map(jnp.zeros_like, params)
    return optax.apply_updates(params, tx.update(zero, tx.init(params), params)[0])


@functools.cache
def _chain(method: str, rate: float) -> Any:
    """Descent without momentum, so that the identities hold of each step; other leaves at 0.1.

    AdamP is as its authors have it, on all leaves.
    """
    if method == "adamp":
        inner = transforms.remove_radial(optax.scale_by_adam(), weight_decay=_ADAM_DECAY)
        return optax.chain(inner, optax.scale_by_learning_rate(_ADAM_RATE))
    corrections = {
        "decay": optax.masked(optax.add_decayed_weights(-rate * _DECAY), _mask),
        "rescaled": transforms.rescale_weights(mask=_mask),
    }
    return optax.chain(
        optax.sgd(_RATE),
        optax.masked(optax.scale(rate / _RATE), _mask),
        corrections.get(method, optax.identity()),
    )


def _train(
    tx: Any,
    params: Any,
    split: _networks.Split,
    seed: int,
    num_steps: int,
    standardizes: bool = False,
) -> tuple[Any, _Motion]:
    random = np.random.default_rng(seed)
    order = [random.choice(len(split.y), _BATCH, replace=False) for _ in range(num_steps)]
    batches = jnp.asarray(np.stack(order), jnp.int32)
    return _scan(tx.update, standardizes, tx.init(params), params, split.x, split.y, batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(
    update: Any, standardizes: bool, state: Any, params: Any, x: Any, y: Any, batches: Any
) -> Any:
    def step(carry: Any, batch: jax.Array) -> tuple[Any, _Motion]:
        params, state = carry
        grads = jax.grad(_loss)(params, x[batch], y[batch], standardizes)
        updates, state = update(grads, state, params)
        new = optax.apply_updates(params, updates)
        return (new, state), _motion(params, new, grads)

    (end, _), motion = jax.lax.scan(step, (params, state), batches)
    return end, motion


def _motion(params: Any, new: Any, grads: Any) -> _Motion:
    angles, ratios, gradients, norms = [], [], [], []
    for name in _LAYERS:
        w, v, g = (tree[name]["kernel"] for tree in (params, new, grads))
        norm, slope = jnp.linalg.norm(w, axis=0), jnp.linalg.norm(g, axis=0)
        along = jnp.sum(v * w, 0) / norm
        # From the part across the weights: an arccosine of nearly one would be rounding.
        across = jnp.linalg.norm(v - w * along / norm, axis=0)
        angles.append(jnp.arctan2(across, along))
        ratios.append(slope / norm)
        gradients.append(slope * norm)
        norms.append(norm)
    means = [jnp.mean(jnp.stack(values)) for values in (angles, ratios, gradients, norms)]
    return _Motion(means[0], _RATE * means[1], means[2], means[3])


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        methods = _claims.groups(own, "method")
        none, decay, rescaled = (methods[name] for name in ("none", "decay", "rescaled"))
        matched = methods[_MATCHED]
        norms = [_claims.numbers(part, "norm") for part in (none, decay, rescaled)]
        kept = bool(np.all(np.abs(norms[2] - 1) < 1e-4))
        verdicts.append(
            Verdict(
                f"{_claims.word(kept)} ({data}): the norm stays where it is put",
                f"mean norm of a filter from {_claims.numbers(none, 'first_norm').mean():.2f} to "
                f"{norms[0].mean():.2f} without, {norms[1].mean():.2f} with decay; rescaled "
                f"{norms[2].mean():.4f}",
            )
        )
        angle, predicted = (_claims.numbers(rescaled, name) for name in ("angle", "predicted"))
        worst = float(np.max(np.abs(angle / predicted - 1)))
        verdicts.append(
            Verdict(
                f"{_claims.word(worst < 0.01)} ({data}): a rescaled step turns a filter by "
                "arctan(rate |g|)",
                f"{angle.mean():.3g} rad a step, off by {worst:.1%} at most in {len(angle)} seeds",
            )
        )
        ratio = _claims.numbers(matched, "angle") / _claims.numbers(matched, "decayed_angle")
        mean, error = _claims.mean_and_error(ratio)
        settled, expected = _claims.numbers(matched, "decayed_angle"), np.sqrt(2 * _RATE * _DECAY)
        word = _claims.word(bool(np.all(np.abs(ratio - 1) < 0.1)))
        if np.any(np.abs(settled / expected - 1) > _SETTLED):
            word = "not testable at this size, the gradient fades before decay comes to rest"
        verdicts.append(
            Verdict(
                f"{word} ({data}): at the matched rate rescaled filters turn as fast as decayed "
                "ones",
                f"decayed filters turn by {settled.mean():.2g} rad a step, in equilibrium "
                f"{expected:.2g}; rescaled over decayed, from the same weights: {mean:.3g} ± "
                f"{error:.2g}",
            )
        )
        ours, gains = _claims.numbers(rescaled, "accuracy"), []
        for method in _BASELINES:
            gain = ours - _claims.numbers(methods[method], "accuracy")
            gains.append("{}: {:+.4f} ± {:.4f}".format(method, *_claims.mean_and_error(gain)))
        verdicts.append(
            Verdict(
                f"not testable at this size ({data}): accuracy like that of the other methods",
                f"test accuracy rescaled {ours.mean():.4f}; less that of {', '.join(gains)}",
            )
        )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    shown = [record for record in records if record["method"] != _MATCHED]
    words = {"none": "plain", "decay": "weight\ndecay", "standardized": "standard-\nized",
             "adamp": "AdamP"}  # fmt: skip
    labels = {
        "norm": "norm of a filter at the end",
        "angle": "turn per step (radians)",
        "accuracy": "test accuracy",
    }
    for axes, own, name in _figures.panels(figure, shown, labels, height=2):
        methods = [words.get(method, method) for method in _claims.groups(own, "method")]
        _figures.dots(axes, own, "method", name, methods)
        axes.tick_params(axis="x", labelsize=7, rotation=50)
        if name == "norm":
            axes.set_ylim(bottom=0)
        if name == "angle":
            _figures.logarithmic(axes)
    return f"{_figures.DOTS} Rescaled: every filter is put back to norm 1 after each step."


CLAIM = _claims.Claim(
    name="weight_rescaling",
    paper="Liu et al. 2021 (arXiv:2102.03497)",
    statement="filters that are kept at norm 1 have the effective learning rate at which weight "
    "decay would let it settle",
    printed="only the abstract was read; no number may be quoted",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
