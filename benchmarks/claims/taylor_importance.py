"""Taylor importance: the oracle's ranking at the price of a gradient, and pruning by it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import regjax
from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks, _pruning
from regjax import Model, pruning
from regjax.typing import LossFn

_METHODS = ("random", "norm", "scale", "first", "second", "oracle")
_EVERY, _BATCHES = 10, 10  # steps between rounds; batches of a score
_SHARE = 0.6  # of the operations
_SECOND, _ORACLE = 128, 320  # examples, fewer for what takes a pass over them for each gate
_BLOCK = 1  # gates at a time: with convolutions more would only be compiled
_PEARSON, _ENOUGH = 0.9, 0.8  # what the paper says; share of the seeds
_ROOM = 0.01  # accuracy that chance has to lose


def _settings(preset: str) -> Sequence[Settings]:
    common = {"channels": [16, 32, 64], "each": 4, "tuning": 5}
    plans = {"digits": (range(5), 20), "fashion_mnist": (range(3), 20)}
    methods: tuple[str, ...] = _METHODS
    if preset == "smoke":
        common = {"channels": [4, 8], "each": 3, "tuning": 1}
        plans, methods = {"digits": (range(2), 1)}, ("random", "norm", "first")
    parts = [("half", "correlation"), ("end", "correlation"), *(("end", m) for m in methods)]
    return [
        {"data": data, "part": part, "stage": stage, "seed": seed, "epochs": epochs, **common}
        for data, (seeds, epochs) in plans.items()
        for seed in seeds
        for stage, part in parts
    ]


class _Context(NamedTuple):
    """What a score may look at."""

    structure: pruning.Structure
    model: Model
    gates: Any
    images: _networks.Split
    rows: np.ndarray
    key: jax.Array

    def gate_loss(self) -> LossFn:
        """In evaluation mode, as it is what is deployed that should change little."""
        loss = regjax.model_loss(self.model, _networks.cross_entropy)
        return pruning.gated_loss(self.structure, loss, self.model.params)

    def batch(self, limit: int | None = None) -> tuple[jax.Array, jax.Array]:
        return self.images.x[self.rows[:limit]], self.images.y[self.rows[:limit]]


def _first(at: _Context) -> Any:
    size = _pruning.BATCH
    return pruning.taylor_scores(at.gate_loss(), at.gates, *at.batch(), batch_size=size).scores


def _second(at: _Context) -> Any:
    return pruning.taylor_scores_second_order(
        at.gate_loss(), at.gates, *at.batch(_SECOND), batch_size=_pruning.BATCH, block_size=_BLOCK
    ).scores


def _oracle(at: _Context, limit: int | None = _ORACLE) -> Any:
    return pruning.oracle_importance(at.gate_loss(), at.gates, *at.batch(limit), block_size=_BLOCK)


_SCORES: Mapping[str, Callable[[_Context], Any]] = {
    "random": lambda at: pruning.random_scores(at.gates, key=at.key),
    "norm": lambda at: pruning.incoming_norm(at.structure, at.model.params),
    "scale": lambda at: pruning.scale_magnitude(at.structure, at.model.params),
    "first": _first,
    "second": _second,
    "oracle": _oracle,
}


def _run(settings: Settings) -> dict[str, float]:
    data, channels, seed = settings["data"], tuple(settings["channels"]), settings["seed"]
    steps = len(_pruning.split(data).y) // _pruning.BATCH
    problem = _pruning.trained(data, channels, settings["epochs"] * steps, seed)
    structure = _pruning.structure(data, channels)
    if settings["part"] == "correlation":
        return _correlations(structure, problem, getattr(problem, settings["stage"]), seed)
    return _pruned(structure, problem, settings, settings["tuning"] * steps)


def _context(
    structure: pruning.Structure, problem: _pruning.Problem, model: Model, masks: Any, number: int
) -> _Context:
    random = np.random.default_rng(number)
    rows = random.permutation(len(problem.split.y))[: _BATCHES * _pruning.BATCH]
    gates = pruning.gates_from_masks(masks)
    return _Context(structure, model, gates, problem.split, rows, jax.random.key(number))


def _correlations(
    structure: pruning.Structure, problem: _pruning.Problem, model: Model, seed: int
) -> dict[str, float]:
    """Of scores with the oracle on the same examples, over all gates."""
    gates = pruning.unit_gates(structure, model.params)
    at = _context(structure, problem, model, pruning.full_masks(gates), seed)
    oracle, second_oracle = _flat(_oracle(at, None)), _flat(_oracle(at, _SECOND))
    # One batch of all: without the variance that the mean over batches of squares adds.
    whole = pruning.taylor_scores(at.gate_loss(), gates, *at.batch(), batch_size=len(at.rows))
    found = {
        "first": (_flat(_first(at)), oracle),
        "first_whole": (_flat(whole.scores), oracle),
        "second": (_flat(_second(at)), second_oracle),
        "norm": (_flat(_SCORES["norm"](at)), oracle),
        "scale": (_flat(_SCORES["scale"](at)), oracle),
    }
    pearson = {f"pearson_{k}": float(np.corrcoef(*pair)[0, 1]) for k, pair in found.items()}
    spearman = {f"spearman_{k}": float(stats.spearmanr(*pair)[0]) for k, pair in found.items()}
    loss = at.gate_loss()(gates, *at.batch())
    return {**pearson, **spearman, "loss": float(loss)}


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)])


def _pruned(
    structure: pruning.Structure, problem: _pruning.Problem, settings: Settings, tuning: int
) -> dict[str, float]:
    """Down to half of the units, with a look at the first model that saves enough operations."""
    score, seed = _SCORES[settings["part"]], settings["seed"]
    side, model, state = problem.split.x.shape[1], problem.end, None
    masks = pruning.full_masks(pruning.unit_gates(structure, model.params))
    total, whole = _count(masks) // 2, _operations(masks, side)
    weights = pruning.full_masks(model.params)
    record = {"accuracy": _networks.model_accuracy(model, problem.split)}
    for number in range(-(-total // settings["each"])):
        if number:
            model, state = _pruning.train(
                model, problem.split, weights, _EVERY, 1000 * seed + number, state
            )
        scores = score(_context(structure, problem, model, masks, 1000 * seed + number))
        target = pruning.linear_removal(
            (number + 1) * _EVERY, every=_EVERY, num_each=settings["each"], total=total
        )
        to_remove = int(pruning.num_missing(masks, target))
        enough = _first_below(scores, masks, to_remove, _SHARE * whole, side)
        if "flops_units" not in record and enough is not None:
            record |= _end(structure, problem, model, enough, state, tuning, "flops")
        masks = pruning.mask_lowest(scores, masks, to_remove)
        weights = pruning.parameter_masks(structure, model.params, masks)
        model = _pruning.without(model, weights)
    return record | _end(structure, problem, model, masks, state, tuning, "half")


def _count(masks: Any) -> int:
    return int(sum(jnp.sum(mask) for mask in jax.tree.leaves(masks)))


def _operations(masks: Any, side: int) -> float:
    """Multiplications and additions of the layers for one example, valid taps only, as XLA does."""
    n = [1, *(int(jnp.sum(masks[name])) for name in sorted(masks))]
    sides = (side, side, *[side // 2] * (len(masks) - 2))
    convolutions = [
        2 * (3 * s - 2) ** 2 * i * o for s, i, o in zip(sides, n[:-1], n[1:], strict=True)
    ]
    return sum(convolutions) + 2 * 10 * (side // 2) ** 2 * n[-1]


def _first_below(scores: Any, masks: Any, to_remove: int, limit: float, side: int) -> Any:
    """The masks with the fewest units removed that stay within the limit, or None."""
    for count in range(to_remove + 1):
        fewer = pruning.mask_lowest(scores, masks, count)
        if _operations(fewer, side) <= limit:
            return fewer
    return None


def _end(
    structure: pruning.Structure, problem: _pruning.Problem, model: Model, masks: Any,
    state: Any, tuning: int, name: str,
) -> dict[str, float]:  # fmt: skip
    """Accuracy before and after training on, and what is left once the units are really removed."""
    weights = pruning.parameter_masks(structure, model.params, masks)
    zeroed = _pruning.without(model, weights)
    tuned, _ = _pruning.train(zeroed, problem.split, weights, tuning, 7, state)
    small = pruning.remove_units(structure, tuned, masks)
    x = problem.split.x_test[:64]
    costs = [_cost(model, x) for model in (problem.end, small)]
    outputs = [jax.jit(regjax.model_function(m))(m.params, x) for m in (tuned, small)]
    return {
        f"{name}_units": _count(masks) / sum(mask.size for mask in masks.values()),
        f"{name}_operations": costs[1].flops / costs[0].flops,
        f"{name}_parameters": costs[1].num_params / costs[0].num_params,
        f"{name}_before": _networks.model_accuracy(zeroed, problem.split),
        f"{name}_after": _networks.model_accuracy(tuned, problem.split),
        f"{name}_difference": float(jnp.max(jnp.abs(outputs[0] - outputs[1]))),
    }


def _cost(model: Model, x: jax.Array) -> pruning.CostResult:
    return pruning.count_cost(regjax.model_function(model), model.params, x)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        correlations = _claims.select(own, part="correlation")
        end, half = (_claims.select(correlations, stage=stage) for stage in ("end", "half"))
        values = _claims.numbers(end, "pearson_first")
        above = int(np.sum(values > _PEARSON))
        verdicts.append(
            Verdict(
                f"{_claims.word(above >= _ENOUGH * len(values))} ({data}): the first-order score "
                f"correlates above {_PEARSON} with the oracle",
                f"Pearson {_spread(end, 'pearson_first')} over all gates after training, above "
                f"{_PEARSON} in {above} of {len(values)} seeds (Spearman "
                f"{_spread(end, 'spearman_first')}; half-way {_spread(half, 'pearson_first')}; "
                f"with one batch of all examples {_spread(end, 'pearson_first_whole')}; second "
                f"order {_spread(end, 'pearson_second')}; |w| {_spread(end, 'pearson_norm')}; "
                f"|gamma| {_spread(end, 'pearson_scale')})",
            )
        )
        for name, text in (
            ("flops", f"{1 - _SHARE:.0%} fewer operations"), ("half", "half of the units")
        ):  # fmt: skip
            verdicts.append(_better(data, own, name, text))
    return verdicts


def _better(data: str, records: Sequence[Record], name: str, text: str) -> Verdict:
    """Whether the first-order score ends above magnitude and chance by two standard errors."""
    runs = {part: _claims.select(records, part=part) for part in _METHODS}
    runs = {part: own for part, own in runs.items() if own}
    after = {part: _claims.numbers(own, f"{name}_after") for part, own in runs.items()}
    gains = {
        part: _claims.mean_and_error(after["first"] - after[part]) for part in ("norm", "random")
    }
    holds = all(gain > 2 * error for gain, error in gains.values())
    # Where chance loses next to nothing there is nothing to gain, but still something to lose.
    has_room = _drop(runs["random"], name, "after").mean() > _ROOM
    is_worse = any(gain < -2 * error for gain, error in gains.values())
    is_decided = holds or has_room or is_worse
    losses = ", ".join(
        f"{part} {100 * _drop(own, name, 'before').mean():.1f} / "
        f"{100 * _drop(own, name, 'after').mean():.1f}"
        for part, own in runs.items()
    )
    first = runs["first"]
    counted = [f"{_claims.numbers(first, f'{name}_{what}').mean():.0%} of the {what}"
               for what in ("operations", "parameters", "units")]  # fmt: skip
    return Verdict(
        f"{_claims.word(holds) if is_decided else 'not testable at this size'} ({data}): "
        f"at {text} it beats magnitude and chance",
        f"accuracy gained over |w| {_points(gains['norm'])}, over chance "
        f"{_points(gains['random'])} points (mean over seeds, one standard error) after training "
        f"on; lost against the whole network, before / after training on: {losses} points; by "
        f"first order {', '.join(counted)} are left, counted after removal",
    )


def _drop(records: Sequence[Record], name: str, when: str) -> np.ndarray:
    return _claims.numbers(records, "accuracy") - _claims.numbers(records, f"{name}_{when}")


def _points(gain: tuple[float, float]) -> str:
    return f"{100 * gain[0]:+.2f} ± {100 * gain[1]:.2f}"


def _spread(records: Sequence[Record], name: str) -> str:
    values = _claims.numbers(records, name)
    return f"{values.mean():.2f} [{values.min():.2f}, {values.max():.2f}]"


def _draw(records: Sequence[Record], figure: Any) -> str:
    runs = [
        {**record, f"{name}_lost": 100 * (record["accuracy"] - record[f"{name}_after"])}
        for record in records
        for name in ("flops", "half")
        if record["part"] != "correlation"
    ]
    ends = _claims.select(records, part="correlation", stage="end")
    scores = ("first", "second", "norm", "scale")
    bars = [
        {"data": record["data"], "part": score, "pearson": record[f"pearson_{score}"]}
        for record in ends
        for score in scores
    ]
    words = {"first": "1st order", "second": "2nd order", "norm": "|weights|", "scale": "|scale|"}
    names = {
        "pearson": "correlation with the oracle",
        "flops_lost": f"points lost at {1 - _SHARE:.0%}\nfewer operations",
        "half_lost": "points lost at half\nof the units",
    }
    for axes, own, name in _figures.panels(figure, [*bars, *runs], names, height=2):
        shown = [record for record in own if name in record]
        parts = [words.get(part, part) for part in _claims.groups(shown, "part")]
        _figures.dots(axes, shown, "part", name, parts)
        axes.tick_params(axis="x", labelsize=7, rotation=60)
        if name == "pearson":
            _figures.level(axes, _PEARSON, "claimed", left=0.98)
            axes.set_ylim(top=1.2)
        else:
            _figures.level(axes, 0, "", left=0)
    return (
        f"{_figures.DOTS} Points of test accuracy after training on; below the dashed line the "
        "smaller network is better than the whole one."
    )


CLAIM = _claims.Claim(
    name="taylor_importance",
    paper="Molchanov et al. 2019 (arXiv:1906.10771)",
    statement="the squared first-order change of the loss at gates ranks units as the oracle does, "
    "and beats magnitude",
    printed="above 93 % correlation with the oracle; ResNet-101 with 40 % fewer operations loses "
    "0.02 points",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)
