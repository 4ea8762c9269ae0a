"""Data in a subspace: what a network does off it depends on the start, on depth and on noise."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks, _subspace
from regjax import diagnostics

_D, _K, _WIDTH, _CLASSES = 64, 16, 128, 10
_STEPS, _BATCH = 3_000, 30
_SMALL, _WRONG, _OFF = 0.1, 0.1, 0.5  # start of linear networks, wrong labels, size of a step off
_LENGTH = 14.3  # mean squared norm of the digits' coordinates; the other data are brought to it
_NOISE = (0.03, 0.1, 0.3, 1.0)
# One thing is changed at a time; two hidden layers, no noise and plain SGD are what it starts from.
_SWEEPS: dict[str, tuple[float, ...]] = {
    "depth": (1, 2, 4),
    "init": (0.5, 2.0),
    "decay": (1e-3, 1e-2),
    "noise": _NOISE,  # drawn once for each image
    "fresh": _NOISE,  # drawn at each step
    "labels": (0.0, *_NOISE),  # noise, drawn once, with wrong labels
    "adam": (0, 1),  # along the axes, rotated
    "linear": (1, 2, 3),  # number of factors, balanced and small
}
_SMOKE: dict[str, tuple[float, ...]] = {
    **{sweep: values[:: len(values) - 1] for sweep, values in _SWEEPS.items()},
    **dict.fromkeys(("depth", "linear"), (1, 2)),
}
# Seeds, and the losses at which depths are compared: of ReLU and of linear networks.
_DATA = {"digits": (5, 0.05, 0.3), "fashion_mnist": (3, 0.4, 1.0)}


class _Options(NamedTuple):
    depth: int = 2
    init: float = 1.0
    decay: float = 0.0
    noise: float = 0.0
    fresh: float = 0.0
    wrong: float = 0.0
    is_adam: bool = False
    is_aligned: bool = False
    is_linear: bool = False


def _options(sweep: str, value: float) -> _Options:
    changes: dict[str, dict[str, Any]] = {
        "depth": {"depth": int(value)},
        "labels": {"noise": value, "wrong": _WRONG},
        "adam": {"is_adam": True, "is_aligned": not value},
        "linear": {"depth": int(value), "is_linear": True},
    }
    return _Options(**changes.get(sweep, {sweep: value}))


def _settings(preset: str) -> Sequence[Settings]:
    sweeps, steps = (_SMOKE, 60) if preset == "smoke" else (_SWEEPS, _STEPS)
    seeds = {"digits": 2} if preset == "smoke" else {data: row[0] for data, row in _DATA.items()}
    return [
        {"data": data, "sweep": sweep, "value": value, "seed": seed, "steps": steps}
        for data, num_seeds in seeds.items()
        for sweep, values in sweeps.items()
        for value in values
        for seed in range(num_seeds)
    ]


@functools.cache
def _coordinates(data: str) -> _networks.Split:
    """The images along their first principal directions, which the training images give."""
    split = _networks.digits() if data == "digits" else _networks.fashion_mnist(300)
    basis = diagnostics.subspace_from_data(split.x, num_directions=_K).basis
    x, x_test = split.x @ basis, split.x_test @ basis
    scale = jnp.sqrt(_LENGTH / jnp.mean(jnp.sum(x**2, 1)))
    return split._replace(x=scale * x, x_test=scale * x_test)


def _run(settings: Settings) -> dict[str, float]:
    options, seed = _options(settings["sweep"], settings["value"]), settings["seed"]
    data, random = _coordinates(settings["data"]), np.random.default_rng(seed)
    basis = jnp.asarray(
        np.eye(_D)[:, :_K] if options.is_aligned else _subspace.orthonormal(random, _D, _K)
    )
    x, x_test = data.x @ basis.T, data.x_test @ basis.T
    noise, aside = (
        _subspace.off(jnp.asarray(random.normal(size=z.shape)), basis) for z in (x, x_test)
    )
    is_wrong = random.random(len(x)) < options.wrong
    y = np.where(is_wrong, random.integers(_CLASSES, size=len(x)), data.y).astype(np.int32)
    orders = [random.permutation(len(x)) for _ in range(settings["steps"] * _BATCH // len(x))]
    is_short = settings["steps"] < _STEPS
    stop = 3.0 if is_short else _DATA[settings["data"]][2 if options.is_linear else 1]
    start = _start(options, seed)
    end, at_stop, loss, reached = _subspace.train(
        options.is_adam, options.is_linear, start, x + options.noise * noise, y, basis,
        np.stack(orders).reshape(len(orders), -1, _BATCH), options.decay, options.fresh, stop,
        jax.random.key(seed),
    )  # fmt: skip
    model_fn = _subspace.linear if options.is_linear else _networks.outputs
    complexity = functools.partial(
        diagnostics.transversal_complexity, model_fn, inputs=x_test[:200], basis=basis
    )
    right = lambda x: jnp.mean(jnp.argmax(jax.jit(model_fn)(end, x), 1) == data.y_test)
    report = diagnostics.frozen_component(end[0]["kernel"], start[0]["kernel"], basis)
    values = {
        "complexity": complexity(end),
        "matched": complexity(at_stop) if reached else np.nan,
        "steps_to_loss": reached if reached else np.nan,
        "loss": loss,
        "accuracy": right(x_test),
        "accuracy_off": right(x_test + _OFF * aside),
        "change": report.change,
        "ratio": report.norm_ratio,
        "law": complexity(end) / _law(end) if options.is_linear else np.nan,
    }
    return {name: float(value) for name, value in values.items()}


def _start(options: _Options, seed: int) -> Any:
    if not options.is_linear:
        sizes = (_D, *(_WIDTH,) * options.depth, _CLASSES)
        first, *rest = _networks.he_network(sizes, jax.random.key(seed))
        return [{**first, "kernel": options.init * first["kernel"]}, *rest]
    # Balanced: factors of rank 10, all of their singular values the same small number.
    random, hidden = np.random.default_rng([seed, 1]), (_WIDTH,) * (options.depth - 1)
    frames = [
        _subspace.orthonormal(random, size, _K)[:, :_CLASSES] for size in (_D, *hidden, _CLASSES)
    ]
    return [{"kernel": jnp.asarray(_SMALL * a @ b.T)} for a, b in itertools.pairwise(frames)]


def _law(params: Any) -> float:
    """The complexity of balanced factors: all but the first multiply by s^((L - 1) / L)."""
    product = functools.reduce(np.matmul, [np.asarray(layer["kernel"]) for layer in params])
    power = 2 * (len(params) - 1) / len(params)
    return _SMALL**2 * (_D - _K) / _D * np.sum(np.linalg.svd(product, compute_uv=False) ** power)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    fresh, once = (functools.partial(_judge_noise, sweep) for sweep in ("fresh", "noise"))
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        for judge in (_judge_frozen, _judge_start, fresh, once, _judge_effects, _judge_depth):
            holds, text, evidence = judge(own)
            verdicts.append(Verdict(f"{_claims.word(holds)} ({data}): {text}", evidence))
    return verdicts


def _judge_frozen(own: Sequence[Record]) -> tuple[bool, str, str]:
    still = [r for sweep in ("depth", "init", "linear") for r in _claims.select(own, sweep=sweep)]
    change = max(_claims.numbers(still, "change"))
    decayed = _claims.select(own, sweep="decay")
    misses = [abs(r["ratio"] - (1 - _subspace.RATE * r["value"]) ** r["steps"]) for r in decayed]
    adam = [_claims.numbers(_claims.select(own, sweep="adam", value=v), "change") for v in (0, 1)]
    return (
        change < 1e-4 and max(misses) < 1e-3 and max(adam[0]) == 0 and min(adam[1]) > 100 * change,
        "SGD leaves the transversal weights, weight decay shrinks them at its own rate, Adam moves "
        "them unless the data lie along the axes",
        f"largest change {change:.1e} under SGD, {adam[1].mean():.2f} under Adam, "
        f"{max(adam[0]):.1g} under Adam along the axes; ratio under decay off the formula by "
        f"{max(misses):.1e} at most",
    )


def _judge_start(own: Sequence[Record]) -> tuple[bool, str, str]:
    (scales, rising), (decays, falling) = _means(own, "init", 1.0), _means(own, "decay", 0.0)
    on, off = (_claims.numbers(_base(own), name).mean() for name in ("accuracy", "accuracy_off"))
    return (
        bool(np.all(np.diff(rising) > 0) and np.all(np.diff(falling) < 0)),
        "variation off the data grows with the start of the first layer, falls with weight decay",
        f"transversal complexity, mean over seeds: {_list(rising)} at {_list(scales)} times He's "
        f"start; {_list(falling)} at decay {_list(decays)}. Without decay a normal step of "
        f"{_OFF:g} takes the test accuracy from {on:.3f} to {off:.3f}",
    )


def _judge_noise(sweep: str, own: Sequence[Record]) -> tuple[bool, str, str]:
    values, means = _means(own, sweep, 0.0)
    ranks = np.argsort(np.argsort(means))  # the values are in order
    correlation = np.corrcoef(np.arange(len(ranks)), ranks)[0, 1]
    drawn = "drawn at each step" if sweep == "fresh" else "drawn once for each image"
    return (
        bool(correlation <= -0.8),
        f"noise in the codimension, {drawn}, lowers the variation off the data",
        f"rank correlation {correlation:.2f}; transversal complexity {_list(means)} at noise "
        f"{_list(values)}",
    )


def _judge_effects(own: Sequence[Record]) -> tuple[bool, str, str]:
    parts = _base(own), *(_claims.select(own, sweep=s, value=1) for s in ("noise", "fresh"))
    steps = [_claims.numbers(part, "steps_to_loss") for part in parts]
    # What never arrives took all steps at least.
    quiet, once, fresh = (np.nan_to_num(values, nan=_STEPS).mean() for values in steps)
    wrong = _claims.groups(_claims.select(own, sweep="labels"), "value")
    zero, smallest = sorted(wrong)[:2]
    before, after = (_claims.numbers(wrong[value], "complexity") for value in (zero, smallest))
    gain, error = _claims.mean_and_error(after - before)
    return (
        bool(max(once, fresh) >= 1.2 * quiet or gain > 2 * error),
        "noise has side effects: slower training, or with wrong labels more variation",
        f"at noise 1 the steps to the loss go from {quiet:.4g} to {fresh:.4g} if drawn at each "
        f"step, {once:.4g} if once ({_STEPS} where it is not reached); with {_WRONG:.0%} wrong "
        f"labels noise {smallest:g} takes the complexity from {before.mean():.4g} to "
        f"{after.mean():.4g}, {gain:+.4g} ± {error:.2g}",
    )


def _judge_depth(own: Sequence[Record]) -> tuple[bool, str, str]:
    found, missed = [], 0
    for sweep in ("linear", "depth"):
        runs = _claims.select(own, sweep=sweep)
        missed += len(runs) - len(_arrived(runs))
        slopes = [
            np.polyfit(_claims.numbers(line, "value"), np.log(_claims.numbers(line, "matched")), 1)
            for line in _claims.groups(_arrived(runs), "seed").values()
            if len(line) > 1
        ]
        found.append(_claims.mean_and_error(np.asarray(slopes)[:, 0]))
    linear, relu = (f"{mean:+.2f} ± {error:.2f}" for mean, error in found)
    laws = _claims.numbers(_claims.select(own, sweep="linear"), "law")
    return (
        found[0][0] < -2 * found[0][1],
        "depth lowers the variation off the data (linear networks, small balanced start)",
        f"slope of the log of the transversal complexity per layer at the same loss: {linear}; "
        f"with ReLU and He's start {relu}; {missed} runs did not come down to it. Linear networks "
        f"end with {laws.min():.2f} to {laws.max():.2f} of what balance says, which grows with "
        "depth where the singular values of the product exceed 1",
    )


def _base(own: Sequence[Record]) -> list[Record]:
    return _claims.select(own, sweep="depth", value=2)


def _line(own: Sequence[Record], sweep: str, neutral: float) -> list[Record]:
    """The runs of a sweep in the order of its values, with what it starts from."""
    base = [{**record, "value": neutral} for record in _base(own)]
    return sorted([*base, *_claims.select(own, sweep=sweep)], key=lambda record: record["value"])


def _means(own: Sequence[Record], sweep: str, neutral: float) -> tuple[list[float], list[float]]:
    groups = _claims.groups(_line(own, sweep, neutral), "value")
    means = [float(_claims.numbers(part, "complexity").mean()) for part in groups.values()]
    return list(groups), means


def _arrived(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if not np.isnan(record["matched"])]


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


# Panel -> what stands side by side in it: label -> (sweep, value).
_COLUMNS = {
    "change": {"SGD": ("depth", 2), "decay": ("decay", 0.01), "noise": ("noise", 1),
               "Adam": ("adam", 1)},
    "complexity": {"start x 0.5": ("init", 0.5), "as it is": ("depth", 2),
                   "start x 2": ("init", 2.0), "decay 0.001": ("decay", 1e-3),
                   "decay 0.01": ("decay", 1e-2)},
}  # fmt: skip
_PANELS = {
    "change": "change of the weights\noff the data",
    "complexity": "variation of the outputs\noff the data",
    "noise": "variation of the outputs\noff the data",
    "matched": "variation off the data,\nat the same loss",
}


def _draw(records: Sequence[Record], figure: Any) -> str:
    for axes, own, name in _figures.panels(figure, records, _PANELS, height=2.1):
        if name in _COLUMNS:
            for place, (sweep, value) in enumerate(_COLUMNS[name].values()):
                part = _claims.select(own, sweep=sweep, value=value)
                _figures.column(axes, place, _claims.numbers(part, name))
            axes.set_xticks(range(len(_COLUMNS[name])), list(_COLUMNS[name]), rotation=90)
        elif name == "noise":
            lines = {
                "noise drawn at each step": _line(own, "fresh", 0.0),
                "noise drawn once per image": _line(own, "noise", 0.0),
                "the same, with wrong labels": _claims.select(own, sweep="labels"),
            }
            _figures.sweeps(axes, lines, "value", "complexity", values=(0, *_NOISE))
            _figures.label(axes, x="noise off the data")
        else:
            lines = {
                f"{text} nets, by depth": _arrived(_claims.select(own, sweep=sweep))
                for text, sweep in (("ReLU", "depth"), ("linear", "linear"))
            }
            _figures.sweeps(axes, lines, "value", name, values=(1, 2, 3, 4), first=3, of=8)
            _figures.label(axes, x="layers")
        _figures.logarithmic(axes)
        axes.yaxis.label.set_size(7)
    return (
        "First two columns: each dot is one seed. Lines: means over the seeds; bars: their "
        "standard deviation. Variation: the transversal complexity, a squared derivative."
    )


CLAIM = _claims.Claim(
    name="low_dimensional",
    paper="He, Tsai, Ward 2022 (arXiv:2203.00614)",
    statement="where the data do not vary a network stays as it was initialised; depth and noise "
    "regularise it there",
    printed="the abstract was read; its numbers were not available",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
