"""Batch norm puts the boundaries of the linear pieces around the data, and its batches move them.

One network for all parts: hidden layers of 128 with batch norm. Initialised from data, its
statistics are those of the training images; the kinds with biases have mean 0 and variance 1.

A random hyperplane through the mean of the data is, in the mean square, as far from all else with
that mean and total variance: against such noise the first layer can show nothing.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks, _perceptron
from regjax import diagnostics

_DEPTH, _STEPS = 4, 400
_KINDS = _FROM_DATA, _ZERO, _RANDOM, _TRAINED = "from data", "zero bias", "random bias", "trained"
_NEAR, _NUM_IMAGES = 0.25, 200  # share of the units within the radius, without biases
_SIZES = (8, 16, 32, 64, 128, 256)
# Examples in a step, and in the statistics of each: the second pair moves the statistics alone.
_ARMS = _LARGE, _, _ = (256, 256), (256, 16), (16, 16)
_ARM_NAMES = ("statistics of 16", "steps of 16 too")


class _Data(NamedTuple):
    """Seeds of density and jitter, and of margins; batches and inputs of the jitter."""

    load: Callable[[], _networks.Split]
    num_seeds: int
    num_margins: int
    num_batches: int
    num_inputs: int


@functools.cache
def _moons() -> _networks.Split:
    from sklearn.datasets import make_moons

    x, y = make_moons(1800, noise=0.15, random_state=0)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)
    return _networks.Split(x[:1440], y[:1440], x[1440:], y[1440:])


_DATA = {
    "digits": _Data(lambda: _networks.digits(1440), 5, 10, 200, 8),
    "fashion_mnist": _Data(_networks.fashion_mnist, 3, 3, 100, 8),
    "moons": _Data(_moons, 0, 10, 0, 0),
}


def _settings(preset: str) -> Sequence[Settings]:
    is_smoke = preset == "smoke"
    names, sizes = (list(_DATA)[:1], _SIZES[::3]) if is_smoke else (list(_DATA), _SIZES)
    length = {"depth": 2, "steps": 20} if is_smoke else {"depth": _DEPTH, "steps": _STEPS}
    spaces: list[Settings] = [{"part": "density", "kind": kind} for kind in _KINDS]
    spaces += [{"part": "jitter", "size": size} for size in sizes]
    arms = [{"part": "margin", "batch": batch, "statistics": size} for batch, size in _ARMS]
    return [
        {"data": name, "seed": seed, **length, **what}
        for name in names
        for whats, num in ((spaces, _DATA[name].num_seeds), (arms, _DATA[name].num_margins))
        for what in whats
        for seed in range(2 if is_smoke else num)
    ]


def _run(settings: Settings) -> dict[str, float]:
    run = {"density": _run_density, "jitter": _run_jitter, "margin": _run_margin}
    return run[settings["part"]](settings)


def _run_density(settings: Settings) -> dict[str, float]:
    inputs = _images_and_others(settings["data"], settings["seed"])
    layers_fn, plain = _perceptron.preactivations, _network({**settings, "kind": _ZERO})
    distances = diagnostics.boundary_distances(layers_fn, plain, inputs["on"])
    radius = jnp.quantile(jnp.concatenate(distances, 1), _NEAR)
    network, found = _network(settings), dict[str, float]()
    for name, part in inputs.items():
        report = diagnostics.boundary_density(layers_fn, network, part, radius=radius)
        shares = enumerate(report.shares)
        found |= {f"{name}_{i}": float(share) for i, share in shares}
    return found


def _run_jitter(settings: Settings) -> dict[str, float]:
    data, seed, size = _DATA[settings["data"]], settings["seed"], settings["size"]
    split, random = data.load(), np.random.default_rng([seed, size])
    rows = random.integers(len(split.y), size=(data.num_batches, size))  # with replacement
    inputs = split.x_test[: data.num_inputs]
    layers = _jitter(_trained(settings, *_LARGE), inputs, split.x[rows]).relative_std
    return {f"jitter_{i}": float(np.nanmedian(layer)) for i, layer in enumerate(layers)}


def _run_margin(settings: Settings) -> dict[str, float]:
    params = _trained(settings, settings["batch"], settings["statistics"])
    split, logits_fn = _DATA[settings["data"]].load(), _perceptron.outputs
    network = (params, _perceptron.statistics(params, split.x))
    margins = diagnostics.decision_margin(logits_fn, network, split.x, split.y)
    is_right = jnp.argmax(logits_fn(network, split.x_test), 1) == split.y_test
    return {
        "margin": float(jnp.median(margins)),
        "loss": float(_networks.cross_entropy(logits_fn(network, split.x), split.y)),
        "accuracy": float(jnp.mean(is_right)),
    }


def _network(settings: Settings) -> Any:
    """Parameters and statistics of one kind."""
    kind, x = settings["kind"], _DATA[settings["data"]].load().x
    params = _trained(settings, *_LARGE) if kind == _TRAINED else _initial(settings)
    if kind == _RANDOM:
        key = jax.random.key(settings["seed"] + 1000)
        biases = jax.random.normal(key, (settings["depth"], _perceptron.WIDTH))
        hidden = zip(params[:-1], biases, strict=True)
        params = [*({**layer, "bias": bias} for layer, bias in hidden), params[-1]]
    if kind in (_ZERO, _RANDOM):
        return params, _perceptron.no_states(params)
    return params, _perceptron.statistics(params, x)


def _initial(settings: Settings) -> Any:
    num_inputs = _DATA[settings["data"]].load().x.shape[1]
    return _perceptron.initial(num_inputs, settings["depth"], jax.random.key(settings["seed"]))


def _trained(settings: Settings, batch: int, size: int) -> Any:
    names = ("data", "seed", "depth", "steps")
    return _trained_once(tuple((name, settings[name]) for name in names), batch, size)


@functools.cache
def _trained_once(items: tuple[tuple[str, Any], ...], batch: int, size: int) -> Any:
    settings = dict(items)
    split, random = _DATA[settings["data"]].load(), np.random.default_rng(settings["seed"])
    num = range(settings["steps"])
    rows = np.stack([random.choice(len(split.y), batch, replace=False) for _ in num])
    return _perceptron.descend(_initial(settings), split.x, split.y, rows, num_together=size)


def _images_and_others(data: str, seed: int) -> dict[str, jax.Array]:
    """Test images, the same with shuffled pixels, noise of each pixel's mean and variance."""
    images = _DATA[data].load().x_test[:_NUM_IMAGES]
    order_key, noise_key = jax.random.split(jax.random.key(seed + 2000))
    noise = jnp.mean(images, 0) + jnp.std(images, 0) * jax.random.normal(noise_key, images.shape)
    shuffled = jax.random.permutation(order_key, images, axis=1, independent=True)
    return {"on": images, "shuffled": shuffled, "noise": noise}


def _given(params: Any, x: jax.Array, batch: jax.Array) -> Any:
    return _perceptron.preactivations((params, _perceptron.statistics(params, batch)), x)


_jitter = jax.jit(functools.partial(diagnostics.boundary_jitter, _given))


def _judge(records: Sequence[Record]) -> list[Verdict]:
    judges = {"density": _judge_density, "jitter": _judge_jitter, "margin": _judge_margin}
    return [
        verdict
        for data, everything in _claims.groups(records, "data").items()
        for part, own in _claims.groups(everything, "part").items()
        for verdict in judges[part](data, own)
    ]


def _judge_density(data: str, records: Sequence[Record]) -> Iterator[Verdict]:
    for other, text in (
        ("shuffled", "the same images with shuffled pixels"),
        ("noise", "noise of the same mean and variance of each pixel"),
    ):
        kinds = _claims.groups(records, "kind").items()
        ratios = {kind: _ratios(own, other) for kind, own in kinds}
        gathers = np.all(ratios[_FROM_DATA].mean(0) > 1.5)
        is_even = np.all(np.abs(ratios[_ZERO].mean(0) - 1) <= 0.15)
        shown = "; ".join(f"{kind} {_listed(ratio.mean(0))}" for kind, ratio in ratios.items())
        deviation = max(ratio.std(0, ddof=1).max() for ratio in ratios.values())
        yield Verdict(
            f"{_claims.word(gathers and is_even)} ({data}): statistics of data gather the "
            f"boundaries there, zero biases do not, against {text}",
            f"units near images over units near these, by layer: {shown} (means over "
            f"{len(ratios[_ZERO])} seeds, deviation {deviation:.2f} at most)",
        )


def _ratios(records: Sequence[Record], other: str) -> np.ndarray:
    """The share on the images over that on the others, (seeds, layers)."""
    return _layers(records, "on") / _layers(records, other)


def _layers(records: Sequence[Record], name: str) -> np.ndarray:
    columns = range(records[0]["depth"])
    return np.stack([_claims.numbers(records, f"{name}_{i}") for i in columns], 1)


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _judge_jitter(data: str, records: Sequence[Record]) -> Iterator[Verdict]:
    slopes = np.stack([_slopes(own) for own in _claims.groups(records, "seed").values()])
    holds = np.all(np.abs(slopes.mean(0) + 0.5) <= 0.05)
    size = min(_claims.groups(records, "size"))
    smallest = _layers(_claims.select(records, size=size), "jitter").mean(0) * size**0.5
    yield Verdict(
        f"{_claims.word(holds)} ({data}): boundaries move by 1 over the root of the batch",
        f"slope of the log by layer: {', '.join(f'{s:.3f}' for s in slopes.mean(0))} (means over "
        f"{len(slopes)} seeds, deviation {slopes.std(0, ddof=1).max():.3f} at most); movement "
        f"times root of the batch at {size}, in RMS distances: {_listed(smallest)}",
    )


def _slopes(records: Sequence[Record]) -> np.ndarray:
    sizes, layers = _claims.numbers(records, "size"), _layers(records, "jitter")
    return np.polyfit(np.log(sizes), np.log(layers), 1)[0]


def _judge_margin(data: str, records: Sequence[Record]) -> Iterator[Verdict]:
    arms = [_claims.select(records, batch=batch, statistics=size) for batch, size in _ARMS]
    large, ghost, small = (_claims.numbers(own, "margin") for own in arms)
    shown = []
    for name, own in zip(("steps and statistics of 256", *_ARM_NAMES), arms, strict=True):
        means = [_claims.numbers(own, key).mean() for key in ("margin", "loss", "accuracy")]
        shown.append("{}: {:.3f} ({:.3f}, {:.3f})".format(name, *means))
    wins, gain = int(np.sum(ghost > large)), _claims.mean_and_error(ghost / large)
    yield Verdict(
        f"{_claims.word(wins >= 0.8 * len(large))} ({data}): statistics of small batches enlarge "
        "the margins",
        f"larger in {wins} of {len(large)} seeds, {gain[0]:.2f} ± {gain[1]:.2f} times; with steps "
        f"of 16 too in {int(np.sum(small > large))}; median training margin of the linear piece "
        f"(training loss, test accuracy): {'; '.join(shown)}",
    )


def _draw(records: Sequence[Record], figure: Any) -> str:
    sets = [data for data in _claims.groups(records, "data") if data != "moons"]
    figure.set_figheight(2 * len(sets))
    grid = figure.add_gridspec(len(sets), 4, width_ratios=[1, 1, 1.2, 0.9])
    for row, data in enumerate(sets):
        own = _claims.select(records, data=data)
        near, noise, jitter = (figure.add_subplot(grid[row, i]) for i in range(3))
        density = _claims.select(own, part="density")
        _draw_density(near, density, "shuffled", "shuffled ones")
        _draw_density(noise, density, "noise", "noise")
        _draw_jitter(jitter, _claims.select(own, part="jitter"))
        for axes in (near, noise, jitter):
            axes.set_title(_figures.NAMES[data], fontsize=8)
    _draw_margin(figure.add_subplot(grid[:, 3]), _claims.select(records, part="margin"))
    return (
        "Lines: means over the seeds; bars: their standard deviation. Margins: a dot per seed, "
        "black bars are means."
    )


def _draw_density(axes: Any, records: Sequence[Record], other: str, text: str) -> None:
    kinds = _claims.groups(records, "kind")
    for i, (kind, own) in enumerate(kinds.items()):
        ratios = _ratios(own, other)
        places = np.arange(1, ratios.shape[1] + 1) + _figures.side(i, len(kinds))
        axes.errorbar(
            places, ratios.mean(0), ratios.std(0, ddof=1), capsize=2,
            label=f"boundaries: {kind}", **_figures.look(i),
        )  # fmt: skip
        axes.set_xticks(range(1, ratios.shape[1] + 1))
    axes.set_ylim(0.4, 2.4)
    _figures.level(axes, 1, "", left=0)
    _figures.label(axes, x="layer", y=f"boundaries near images\n/ near {text}")


def _draw_jitter(axes: Any, records: Sequence[Record]) -> None:
    sizes = np.unique(_claims.numbers(records, "size"))
    for i in range(records[0]["depth"]):
        values = [_claims.numbers(_claims.select(records, size=s), f"jitter_{i}") for s in sizes]
        look = {**_figures.look(i), "color": str(0.15 * i)}
        axes.errorbar(
            sizes, [v.mean() for v in values], [v.std(ddof=1) for v in values], capsize=2,
            label=f"movement in layer {i + 1}", **look,
        )  # fmt: skip
    axes.plot(sizes, 0.9 * sizes**-0.5, color=_figures.COLORS[1], linewidth=1,
              linestyle=(0, (4, 2)), label="1 / root of the batch size")  # fmt: skip
    _figures.logarithmic(axes, "y")
    axes.set_xscale("log")
    _figures.ticks(axes, "x", [float(size) for size in sizes[::2]])
    _figures.label(axes, x="batch size", y="movement of a boundary\n/ its RMS distance")


def _draw_margin(axes: Any, records: Sequence[Record]) -> None:
    groups = _claims.groups(records, "data")
    for place, own in enumerate(groups.values()):
        large, *others = (
            _claims.numbers(_claims.select(own, batch=batch, statistics=size), "margin")
            for batch, size in _ARMS
        )
        for i, (margins, name) in enumerate(zip(others, _ARM_NAMES, strict=True)):
            at = place + _figures.side(i, 2)
            _figures.column(axes, at, margins / large, index=4 + i, of=2, name=f"margin: {name}")
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_xticks(range(len(groups)), [_figures.NAMES[name] for name in groups], rotation=60)
    axes.set_ylim(0, 2.4)
    _figures.level(axes, 1, "")
    _figures.label(axes, y="median margin / that with batches of 256")


CLAIM = _claims.Claim(
    name="spline_partition",
    paper="Balestriero & Baraniuk 2022 (arXiv:2209.14778)",
    statement="batch norm gathers the boundaries of units around the data; its batches move them",
    printed="only the first page was read: no numbers there",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
