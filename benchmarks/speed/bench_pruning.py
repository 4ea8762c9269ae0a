"""Taylor scoring over plain gradients, and what real removal saves beside what is counted."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import regjax
from benchmarks._timing import Case
from benchmarks.speed import _problems
from regjax import pruning

_TAYLOR = 1.2
_BATCHES = 4


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    found: dict[str, Callable[[], Case]] = {}
    # Network, examples a batch of the scores, examples of the forward pass.
    sizes: tuple[tuple[str, int, int], ...] = (
        ("mlp", 128, 512),
        ("mlp", 512, 4096),
        ("resnet", 64, 256),
    )
    if preset == "smoke":
        sizes = (("small_mlp", 16, 64),)
    for name, batch_size, examples in sizes:
        found[f"taylor_{name}_{batch_size}"] = functools.partial(
            _taylor, name, batch_size, preset != "smoke"
        )
        found[f"removal_{name}_{examples}"] = functools.partial(_removal, name, examples)
    return found


def _problem(name: str, examples: int) -> _problems.Problem:
    problem = _problems.trained(name, 1437 if name == "small_mlp" else max(examples, 512))
    return problem._replace(x=problem.x[:examples], y=problem.y[:examples])


def _taylor(name: str, batch_size: int, has_bars: bool) -> Case:
    loss_fn, params, x, y = _problem(name, _BATCHES * batch_size)
    batches = [(x[i : i + batch_size], y[i : i + batch_size])
               for i in range(0, len(x), batch_size)]  # fmt: skip
    structure = pruning.find_structure(loss_fn.function, params, x)
    gates = pruning.unit_gates(structure, params)
    gate_loss = pruning.gated_loss(structure, loss_fn, params)
    gradient = jax.jit(jax.grad(loss_fn))

    @jax.jit
    def with_scores(params: Any, x: jax.Array, y: jax.Array) -> Any:
        grads = jax.grad(loss_fn)(params, x, y)
        return grads, pruning.taylor_importance(pruning.gate_gradients(structure, params, grads))

    expected = np.mean([_squares(structure, params, gradient(params, *b)) for b in batches], 0)

    def error(label: str, answer: Any) -> float:
        if label == "gradients":
            return 0.0
        found = answer.scores if label == "taylor_scores" else _mean([s for _, s in answer])
        return float(np.max(np.abs(_flat(found) - expected)) / expected.max())

    return Case(
        candidates={
            "gradients": lambda: [gradient(params, *batch) for batch in batches],
            "taylor_scores": lambda: pruning.taylor_scores(
                gate_loss, gates, x, y, batch_size=batch_size
            ),
            "gradients with scores": lambda: [with_scores(params, *batch) for batch in batches],
        },
        error=error,
        tolerance=1e-3,
        sizes={"network": name, "batch": batch_size, "batches": _BATCHES, "gates": expected.size},
        bars=dict.fromkeys(("taylor_scores", "gradients with scores"), _TAYLOR) if has_bars else {},
    )


def _squares(structure: Any, params: Any, grads: Any) -> np.ndarray:
    """The squared gate gradients in NumPy, from the kernels that each unit goes into."""
    weights, slopes = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (params, grads)
    )
    found = []
    for group in (structure.groups[name] for name in sorted(structure.groups)):
        total = np.zeros(group.num_units)
        for part in group.consumers:
            products = np.moveaxis(weights[part.leaf] * slopes[part.leaf], part.axis, 0)
            owned = part.units >= 0
            np.add.at(total, part.units[owned], products.reshape(len(owned), -1).sum(1)[owned])
        found.append(total**2)
    return np.concatenate(found)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)])


def _mean(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def _removal(name: str, examples: int) -> Case:
    """A forward pass with half of all units over the whole one; no bar."""
    problem = _problem(name, examples)
    model = _problems.network(name)[0]._replace(params=problem.params)
    function, x = problem.loss_fn.function, problem.x
    structure = pruning.find_structure(function, model.params, x)
    scores = pruning.incoming_norm(structure, model.params)
    masks = {
        name: pruning.mask_lowest({name: s}, pruning.full_masks({name: s}), s.size // 2)[name]
        for name, s in scores.items()
    }
    smaller = pruning.remove_units(structure, model, masks)
    forward, smaller_function = jax.jit(function), regjax.model_function(smaller)
    pruned_forward = jax.jit(smaller_function)
    gated = pruning.apply_gates(structure, model.params, pruning.gates_from_masks(masks))
    expected = {"whole": forward(model.params, x), "pruned": forward(gated, x)}
    whole_cost = pruning.count_cost(function, model.params, x)
    pruned_cost = pruning.count_cost(smaller_function, smaller.params, x)
    return Case(
        candidates={
            "whole": lambda: forward(model.params, x),
            "pruned": lambda: pruned_forward(smaller.params, x),
        },
        error=lambda label, answer: float(
            jnp.max(jnp.abs(answer - expected[label])) / jnp.max(jnp.abs(expected[label]))
        ),
        tolerance=1e-4,
        sizes={"network": name, "examples": examples, "parameters": whole_cost.num_params},
        facts=lambda *_: {
            "operations counted, pruned over whole": pruned_cost.flops / whole_cost.flops,
            "parameters, pruned over whole": pruned_cost.num_params / whole_cost.num_params,
        },
    )
