"""A density's band holds the exact curve, and so do the bounds of numbers of eigenvalues."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import curvature, transforms

_SIZES = (64, 16, 10)
# Of trained networks, and others that are hard in ways of their own.
_NETWORKS = ("sgd", "sam", "adam", "untrained", "gauss newton")
_OTHERS = ("flat", "semicircle", "two bands", "powers", "crowded")
_SCALES = ("linear", "symlog")
# Ends of intervals, in units of the largest magnitude.
_ENDS = (-np.inf, -1e-2, -1e-3, 1e-3, 1e-2, 1e-1, np.inf)
_PROMISED, _STANDARD_ERRORS = 0.95, 2


def _settings(preset: str) -> Sequence[Settings]:
    smoke = preset == "smoke"
    names = ("sgd", "flat") if smoke else (*_NETWORKS, *_OTHERS)
    return [{"spectrum": name, "seed": seed} for name in names for seed in range(2 if smoke else 8)]


def _run(settings: Settings) -> dict[str, float]:
    operator, exact = _matrix(settings["spectrum"])
    density = curvature.spectral_density(operator, key=jax.random.key(settings["seed"]))
    numbers = {"steps": float(np.mean(density.num_steps)), "order": float(exact.size)}
    for scale in _SCALES:
        curve = curvature.density_curve(density, axis_scale=scale)
        wanted, least = _through_kernel(curve, exact)
        shown = wanted > least
        inside = (curve.band_low <= wanted) & (wanted <= curve.band_high)
        ratio = np.asarray(curve.band_high)[shown] / wanted[shown]
        numbers[f"{scale} inside"] = float(np.mean(np.asarray(inside)[shown]))
        numbers[f"{scale} above"] = float(np.log10(np.median(ratio)))
    ends = np.asarray(_ENDS) * np.max(np.abs(exact))
    found = curvature.eigenvalue_count(density, ends[:-1], ends[1:])
    counts = np.histogram(exact, ends)[0]
    reach = _STANDARD_ERRORS * np.asarray(found.standard_error, np.float64)
    lower, upper = (np.asarray(end, np.float64) for end in (found.lower_bound, found.upper_bound))
    # A hundredth of an eigenvalue is rounding.
    holds = (counts >= lower - reach - 0.01) & (counts <= upper + reach + 0.01)
    plain = np.abs(np.asarray(found.value) - counts) <= reach + 0.01
    return {
        **numbers,
        "counts inside": float(np.mean(holds)),
        "counts within the error alone": float(np.mean(plain)),
        "open": float(np.max(upper - lower) / exact.size),
    }


def _through_kernel(
    curve: curvature.DensityCurveResult, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The exact density seen through the curve's kernel, and a tenth of what one eigenvalue is."""
    grid, widths = np.asarray(curve.grid, np.float64), np.asarray(curve.kernel_width, np.float64)
    threshold = float(curve.linear_threshold)
    place = (lambda x: x) if np.isinf(threshold) else (lambda x: np.arcsinh(x / threshold))
    slope = np.ones_like(grid) if np.isinf(threshold) else 1 / np.hypot(grid, threshold)
    own = np.interp(place(exact), place(grid), widths)
    distance = (place(grid)[:, None] - place(exact)) / own
    top = np.sqrt(2 * np.pi) * own
    one = slope / (np.sqrt(2 * np.pi) * widths * exact.size)
    return slope * np.mean(np.exp(-0.5 * distance**2) / top, 1), 0.1 * one


@functools.cache
def _matrix(name: str) -> tuple[curvature.Operator, np.ndarray]:
    """The matrix in float32 and its eigenvalues in float64."""
    if name in _OTHERS:
        exact = _other(name)
        diagonal = jnp.asarray(exact, jnp.float32)
        return curvature.from_matvec(jax.tree_util.Partial(jnp.multiply, diagonal), diagonal), exact
    split, params = _networks.digits(), _networks.he_network(_SIZES, jax.random.key(0))
    climb = transforms.sam(0.2) if name == "sam" else optax.identity()
    tx = optax.adam(3e-3) if name == "adam" else optax.chain(climb, optax.sgd(0.1))
    if name != "untrained":
        params = _networks.train(params, tx, split, batch_size=30, num_steps=2000, seed=0).params
    with jax.enable_x64(True):
        wide, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, split.x))
        exact = np.asarray(curvature.exact_spectrum(_operator(name, wide, x, split.y)))
    return _operator(name, params, split.x, split.y), exact


def _operator(name: str, params: Any, x: jax.Array, y: jax.Array) -> curvature.Operator:
    if name == "gauss newton":
        return curvature.gauss_newton(_networks.outputs, _networks.cross_entropy, params, x, y)
    return curvature.hessian(_networks.loss_fn, params, x, y)


def _other(name: str) -> np.ndarray:
    random = np.random.default_rng(0)
    if name == "semicircle":
        matrix = random.normal(size=(1000, 1000)) / np.sqrt(2000)
        return np.linalg.eigvalsh(matrix + matrix.T)
    spectra = {
        "flat": np.linspace(-1, 5, 1000),
        "two bands": np.concatenate([np.linspace(-1, -0.5, 300), np.linspace(1, 2, 700)]),
        "powers": 1 / np.arange(1.0, 2001) ** 1.5,
        "crowded": np.concatenate([1e-3 * random.normal(size=2000) ** 3, np.geomspace(0.05, 1, 9)]),
    }
    return np.sort(spectra[name])


def _judge(records: Sequence[Record]) -> Sequence[Verdict]:
    curves = np.stack([_claims.numbers(records, f"{scale} inside") for scale in _SCALES])
    above = [np.median(_claims.numbers(records, f"{scale} above")) for scale in _SCALES]
    worst = {
        name: np.mean([_claims.numbers(own, f"{scale} inside") for scale in _SCALES])
        for name, own in _claims.groups(records, "spectrum").items()
    }
    least = min(worst, key=worst.__getitem__)
    counts = _claims.numbers(records, "counts inside").mean()
    alone = _claims.numbers(records, "counts within the error alone").mean()
    steps = _claims.numbers(records, "steps")
    return [
        Verdict(
            f"{_claims.word(curves.mean() >= _PROMISED)}: the band holds the exact curve",
            f"at {curves.mean():.1%} of the places of {len(worst)} spectra (linear "
            f"{curves[0].mean():.1%}, symmetric-log {curves[1].mean():.1%}; least {least}, "
            f"{worst[least]:.1%}); half of the bands end below {10 ** above[0]:.2f} and "
            f"{10 ** above[1]:.2f} times the exact density",
        ),
        Verdict(
            f"{_claims.word(counts >= _PROMISED)}: numbers of eigenvalues lie in the bounds",
            f"with two standard errors around them {counts:.1%} do, within two standard errors "
            f"alone {alone:.1%}; {steps.min():.0f} to {steps.max():.0f} steps a probe",
        ),
    ]


def _draw(records: Sequence[Record], figure: Any) -> str:
    figure.set_figheight(2.9)
    left, right = figure.subplots(1, 2)
    groups = _claims.groups(records, "spectrum")
    words = {"linear": "linear axis", "symlog": "symmetric-log axis"}
    for index, scale in enumerate(_SCALES):
        for place, own in enumerate(groups.values()):
            at = place + _figures.side(index, len(_SCALES))
            inside = _claims.numbers(own, f"{scale} inside")
            _figures.column(left, at, inside, index=index, of=2, name=words[scale])
    _figures.level(left, _PROMISED, name=f"promised on the average: {_PROMISED:.0%}")
    left.set_xticks(range(len(groups)), groups, rotation=60)
    left.set_title("ten spectra", fontsize=8)
    _figures.label(left, y="share of places at which\nthe band holds the exact density")
    name = next(name for name in ("sgd", *groups) if name in groups)
    operator, exact = _matrix(name)
    density = curvature.spectral_density(operator, key=jax.random.key(0))
    curve = curvature.density_curve(density, axis_scale="symlog")
    wanted, least = _through_kernel(curve, exact)
    right.fill_between(
        curve.grid, np.maximum(curve.band_low, least), np.maximum(curve.band_high, least),
        color=_figures.COLORS[0], alpha=0.3, linewidth=0, label="band",
    )  # fmt: skip
    right.plot(curve.grid, curve.density, color=_figures.COLORS[0], linewidth=1, label="estimate")
    right.plot(curve.grid, wanted, "k--", linewidth=0.8, label="exact density")
    right.set_xscale("symlog", linthresh=float(curve.linear_threshold))
    shown = wanted > least
    right.set_ylim(0.1 * np.min(wanted[shown]), 3 * np.max(wanted))
    _figures.logarithmic(right)
    right.set_xticks([-1e-2, 0, 1e-2, 1])
    right.minorticks_off()
    right.set_title(f"an example: Hessian, {name}", fontsize=8)
    _figures.label(right, x="eigenvalue of the Hessian", y="density")
    return _figures.DOTS.replace("seed", "draw of the probes")


CLAIM = _claims.Claim(
    name="density_bands",
    paper="ours (`spectral_density`)",
    statement="the band around a spectral density holds the exact curve, seen through the same "
    "kernel, at 95 % of the places, and bounds of numbers of eigenvalues hold",
    printed="a promise of this library, measured on ten dense spectra",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
