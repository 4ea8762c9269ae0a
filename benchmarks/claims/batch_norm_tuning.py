"""Batch norm with a fixed scale is a penalty whose rate the data choose."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import diagnostics, normalization

_SCALES, _NOISES = (0.25, 0.5, 1.0), (0.0, 0.1, 0.5)  # gamma over the least-squares one; variance
_COPIES, _EXAMPLES, _STEPS = 4, 1000, 400  # copies of an example with noise of their own
_MATCH, _RESIDUAL, _COSINE = 0.02, 1e-3, 0.999
_DATA: dict[str, tuple[Callable[[], _networks.Split], int]] = {
    "digits": (lambda: _networks.digits(1440), 5),
    "fashion_mnist": (_networks.fashion_mnist, 3),
}


def _settings(preset: str) -> Sequence[Settings]:
    data = {"digits": 2} if preset == "smoke" else {name: n for name, (_, n) in _DATA.items()}
    return [
        {
            "data": name,
            "scale": scale,
            "noise": noise,
            "seed": seed,
            "steps": 60 if preset == "smoke" else _STEPS,
        }
        for name, num_seeds in data.items()
        for scale in (_SCALES if preset != "smoke" else (0.5,))
        for noise in _NOISES
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, noise, seed = _DATA[settings["data"]][0](), settings["noise"], settings["seed"]
    x, y = _unit_problem(split, noise, seed)
    mean, sigma, target = _moments(x, y)
    best = float(np.sqrt(target @ _solve(sigma, target)))
    scale = settings["scale"] * best
    with jax.enable_x64(True):
        kernel = _trained(x, y, scale, seed, settings["steps"])
        equivalent = scale * kernel / np.sqrt(kernel @ sigma @ kernel)
        grad = sigma @ equivalent - target
        report = diagnostics.batch_norm_regularization(
            jnp.asarray(kernel[:, None]),
            scale,
            0.0,
            *map(jnp.asarray, (mean, sigma, grad[:, None])),
        )
        multiplier = float(report.multiplier[0])
    remainder = grad + 2 * multiplier * sigma @ equivalent
    # Ridge on the clean images; directions without variance do not count.
    _, clean, moment = _moments(*_unit_problem(split, 0.0, seed))
    ridge = _solve(clean + noise * np.eye(len(mean)), moment)
    along = lambda v, w: v @ sigma @ w
    return {
        "multiplier": multiplier,
        "closed": (best / scale - 1) / 2,  # of the penalty without 1/2
        "residual": float(np.linalg.norm(remainder) / np.linalg.norm(target)),
        "cosine": float(
            along(ridge, kernel) / np.sqrt(along(ridge, ridge) * along(kernel, kernel))
        ),
    }


def _unit_problem(split: _networks.Split, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of the first class against the rest, in float64, copied with noise of their own."""
    random = np.random.default_rng(seed)
    rows = random.choice(len(split.y), _EXAMPLES, replace=False)
    x, y = np.asarray(split.x, np.float64)[rows], (np.asarray(split.y)[rows] == 0) * 1.0
    if noise:
        x, y = np.tile(x, (_COPIES, 1)), np.tile(y, _COPIES)
        x = x + np.sqrt(noise) * _white_noise(x, y, random)
    return x, y - y.mean()


def _white_noise(x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Noise whose covariance on these examples is the identity, uncorrelated with x and y."""
    drawn, known = random.normal(size=x.shape), np.column_stack([np.ones(len(y)), x, y])
    drawn -= known @ np.linalg.lstsq(known, drawn, rcond=None)[0]
    return np.linalg.qr(drawn)[0] * np.sqrt(len(y))


def _moments(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = x.mean(0)
    return mean, np.cov(x.T, bias=True), (x - mean).T @ y / len(y)


def _solve(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(matrix, vector, rcond=1e-10)[0]


def _trained(x: np.ndarray, y: np.ndarray, scale: float, seed: int, num_steps: int) -> np.ndarray:
    """The kernel of a batch-normalized linear unit of fixed scale, by L-BFGS on all examples."""
    layer = normalization.BatchNorm(epsilon=0.0)
    params, state = {"scale": jnp.full(1, scale), "bias": jnp.zeros(1)}, layer.init_state(1)
    start = 0.01 * np.random.default_rng(seed).normal(size=x.shape[1])
    return np.asarray(_descend(layer, params, state, start, x, y, num_steps))


@functools.partial(jax.jit, static_argnums=(0, 6))
def _descend(
    layer: Any, params: Any, state: Any, kernel: Any, x: Any, y: Any, num_steps: int
) -> jax.Array:
    tx = optax.lbfgs()

    def loss(kernel: jax.Array) -> jax.Array:
        outputs, _ = layer.apply(params, state, (x @ kernel)[:, None], train=True)
        return jnp.mean((outputs[:, 0] - y) ** 2) / 2

    def step(carry: Any, _: None) -> tuple[Any, None]:
        kernel, state = carry
        value, grad = optax.value_and_grad_from_state(loss)(kernel, state=state)
        updates, state = tx.update(grad, state, kernel, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(kernel, updates), state), None

    return jax.lax.scan(step, (kernel, tx.init(kernel)), length=num_steps)[0][0]


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        settled = [record for record in own if record["residual"] < _RESIDUAL]
        # In units of 1 where the closed form is near 0.
        off = np.abs(_claims.numbers(settled, "multiplier") - _claims.numbers(settled, "closed"))
        off = off / np.maximum(_claims.numbers(settled, "closed"), 1)
        means = [
            f"{scale:g}: {_claims.numbers(part, 'multiplier').mean():.4f} "
            f"({_claims.numbers(part, 'closed').mean():.4f})"
            for scale, part in _claims.groups(own, "scale").items()
        ]
        # Without noise some directions have next to no variance, and the descent is slow.
        holds = len(settled) > len(own) / 2 and bool(np.all(off < _MATCH))
        verdicts.append(
            Verdict(
                f"{_claims.word(holds)} ({data}): the scale sets the rate of the penalty",
                f"multiplier (closed form) at gamma over its least-squares value "
                f"{'; '.join(means)}; {len(settled)} of {len(own)} runs at a minimum, there off "
                f"by {off.max(initial=0):.1%} at most",
            )
        )
        noisy = [record for record in settled if record["noise"]]
        cosines = {
            noise: _claims.numbers(part, "cosine")
            for noise, part in _claims.groups(noisy, "noise").items()
        }
        shown = [f"variance {noise:g}: {value.min():.4f}" for noise, value in cosines.items()]
        tuned = bool(noisy) and all(np.all(value > _COSINE) for value in cosines.values())
        verdicts.append(
            Verdict(
                f"{_claims.word(tuned)} ({data}): input noise acts as ridge on the clean images",
                f"least cosine to ridge over seeds and scales, noise of {'; '.join(shown)} "
                f"({_COPIES} noisy copies of each image)",
            )
        )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    names = {
        "multiplier": "rate of the penalty,\nfrom the trained unit",
        "cosine": "cosine between the\ntrained unit and ridge",
    }
    noises = sorted(_claims.groups(records, "noise"))
    for axes, own, name in _figures.panels(figure, records, names):
        if name == "cosine":
            for place, noise in enumerate(noises):
                values = _claims.numbers(_claims.select(own, noise=noise), name)
                _figures.column(axes, place, values)
            axes.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
            axes.ticklabel_format(axis="y", useOffset=False)
            _figures.label(axes, x="variance of the input noise")
            continue
        for at_minimum, index, text in (
            (True, 0, "a unit at a minimum"),
            (False, 1, f"not yet (gradient above {_RESIDUAL:g})"),
        ):
            part = [r for r in own if (r["residual"] < _RESIDUAL) == at_minimum]
            style = {**_figures.look(index), "linestyle": "", "alpha": 0.7, "label": text}
            if not at_minimum:
                style |= {"markerfacecolor": "none", "markersize": 7}
            closed, found = (_claims.numbers(part, what) for what in ("closed", name))
            axes.plot(closed, found, **style)
        axes.axline((0, 0), slope=1, color="0.35", linewidth=0.9, linestyle=(0, (4, 2)),
                    label="equal")  # fmt: skip
        _figures.label(axes, x="rate of the penalty, closed form")
    return f"One point per seed and setting. {_figures.DOTS.split(';')[1].strip().capitalize()}"


CLAIM = _claims.Claim(
    name="batch_norm_tuning",
    paper="Annamalai & Thakur 2022 (arXiv:2209.07587)",
    statement="batch norm tunes the rate of a quadratic penalty to the data",
    printed="only the abstract was read; the identities are our own",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
