"""The ten largest eigenvalues of a small network from cold: what a user waits for the first time.

Each call is a process of its own, without a cache of compiled programs, that has imported JAX and
loaded the network before the clock starts.
"""

import functools
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import _timing
from benchmarks._timing import Case
from benchmarks.speed import _competitors, _problems
from regjax import curvature

_NETWORK, _NUM_EXAMPLES, _NUM_EIGENVALUES = "small_mlp", 1437, 10


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name; smoke runs no other tool."""
    tools = () if preset == "smoke" else _competitors.TOOLS
    return {"top10_small_mlp": functools.partial(_top, tools)}


def _top(tools: Sequence[Any]) -> Case:
    problem = _problems.trained(_NETWORK, _NUM_EXAMPLES)
    operator = curvature.hessian(problem.loss_fn, problem.params, problem.x, problem.y)
    exact = np.asarray(curvature.exact_spectrum(operator), np.float64)
    reference = np.sort(exact)[::-1][:_NUM_EIGENVALUES]
    # Some more than from the starts that are tried: other tools draw their own.
    num_steps = 10 + _competitors.fewest_steps(problem, (problem.x, problem.y), reference)
    labels = ["regjax"]
    for label, modules, _ in tools:
        if all(map(importlib.util.find_spec, modules)):
            labels.append(label)
    seen: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}

    def run(label: str) -> np.ndarray:
        command = [sys.executable, "-m", __name__, label, str(num_steps)]
        done = subprocess.run(
            command, env=_timing.cold_environment(), check=True, capture_output=True, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        seen[label].append(found)
        return np.asarray(found["values"])

    def facts(answers: Any, seconds: Any) -> dict[str, float]:
        medians = {
            f"{label}, {call} call": float(np.median([found[call] for found in seen[label]]))
            for label in labels
            for call in ("first", "second")
        }
        ours = medians["regjax, first call"]
        others = {
            f"regjax / {label}": ours / medians[f"{label}, first call"] for label in labels[1:]
        }
        return medians | others

    return Case(
        candidates={label: functools.partial(run, label) for label in labels},
        error=lambda label, values: _competitors.relative_error(values, reference),
        tolerance=1e-3,
        sizes={"parameters": operator.size, "examples": _NUM_EXAMPLES, "other steps": num_steps},
        facts=facts,
        bars={"regjax, first call": 2.5} | dict.fromkeys(["regjax / matfree"] * bool(tools), 1.0),
    )  # fmt: skip


def _measure(label: str, num_steps: int) -> dict[str, Any]:
    """The seconds of the first and of the second call in this process."""
    problem = _problems.trained(_NETWORK, _NUM_EXAMPLES)
    batch = problem.x, problem.y
    jax.block_until_ready(batch)

    def ours() -> np.ndarray:
        operator = curvature.hessian(problem.loss_fn, problem.params, *batch)
        found = curvature.top_eigenpairs(operator, _NUM_EIGENVALUES, key=jax.random.key(0))
        return np.asarray(found.values)

    if label == "regjax":
        solve = ours
    else:
        prepare = {tool: prepare for tool, _, prepare in _competitors.TOOLS}[label]
        solve = prepare(_competitors.Problem(problem, batch, _NUM_EIGENVALUES, num_steps))
    found: dict[str, Any] = {}
    for call in ("first", "second"):
        start = time.perf_counter()
        found["values"] = np.asarray(solve(), np.float64).tolist()
        found[call] = time.perf_counter() - start
    return found


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
