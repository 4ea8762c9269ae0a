"""What it costs to keep a solver's state on the disk."""

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks._timing import Case
from benchmarks.speed import _problems
from regjax import curvature

_BAR = 1.05


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    if preset == "smoke":
        return {"top10_small_mlp": functools.partial(_top, "small_mlp", 64, {})}
    return {"top10_mlp": functools.partial(_top, "mlp", 4096, {"every 10 products": _BAR})}


def _top(name: str, num_examples: int, bars: dict[str, float]) -> Case:
    """The ten largest eigenvalues with a checkpoint every 10 products over none; same bits."""
    problem = _problems.trained(name, num_examples)
    operator = curvature.hessian(problem.loss_fn, problem.params, problem.x, problem.y)
    solve = functools.partial(curvature.top_eigenpairs, operator, 10, key=jax.random.key(0))
    expected = solve()
    written: list[int] = []

    def checkpointed() -> curvature.EigenResult:
        # On the disk of the repository: a temporary folder may be in memory.
        with tempfile.TemporaryDirectory(dir=pathlib.Path(__file__).parent) as folder:
            result = solve(checkpoint=curvature.Checkpoint(folder, every=10))
            files = pathlib.Path(folder).iterdir()
            written.append(sum(file.stat().st_size for file in files))
        return result

    def error(label: str, answer: Any) -> float:
        del label
        pairs = zip(jax.tree.leaves(answer), jax.tree.leaves(expected), strict=True)
        return float(any(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs))

    row = operator.shape[0] * operator.dtype.itemsize
    return Case(
        candidates={"no checkpoint": solve, "every 10 products": checkpointed},
        error=error,
        tolerance=0.0,
        sizes={
            "parameters": operator.shape[0],
            "examples": num_examples,
            "products": int(expected.num_matvecs),
        },
        facts=lambda answers, seconds: {
            "rows written / products": written[-1] / row / int(expected.num_matvecs)
        },
        bars=bars,
    )
