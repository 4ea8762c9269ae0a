"""From cold: what a user waits for the first time, in a process of its own for each call.

The ten largest eigenvalues and the spectral density of a small network, without a cache of compiled
programs; JAX is imported and the network loaded before the clock starts. And the main job of the
command line, all of its process, without such a cache and with one that an earlier run has filled.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
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
    small = ("--epochs=1", "--num-train=256", "--num-test=64", "--num-steps=4", "--tol=0.1")
    return {
        "top10_small_mlp": functools.partial(_top, tools),
        "density_small_mlp": _density,
        "main_job": functools.partial(_main_job, small if preset == "smoke" else ()),
    }


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
        found = _in_a_process(label, str(num_steps))
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
        bars={"regjax, first call": 2.5, **({"regjax / matfree": 1.0} if tools else {})},
    )  # fmt: skip


def _density() -> Case:
    problem = _problems.trained(_NETWORK, _NUM_EXAMPLES)
    operator = curvature.hessian(problem.loss_fn, problem.params, problem.x, problem.y)
    trace = float(np.sum(np.asarray(curvature.exact_spectrum(operator), np.float64)))
    seen: list[dict[str, Any]] = []

    def run() -> dict[str, Any]:
        seen.append(_in_a_process("density", "0"))
        return seen[-1]

    def error(_: str, found: dict[str, Any]) -> float:
        value, standard_error = found["values"]
        return abs(value - trace) / standard_error

    return Case(
        candidates={"regjax": run},
        error=error,
        tolerance=4,  # standard errors of the trace
        sizes={"parameters": operator.size, "examples": _NUM_EXAMPLES},
        facts=lambda answers, seconds: {
            f"{call} call": float(np.median([found[call] for found in seen]))
            for call in ("first", "second")
        },
    )


def _main_job(options: Sequence[str]) -> Case:
    folder = tempfile.TemporaryDirectory()

    def run(cache: str) -> dict[str, Any]:
        place = tempfile.mkdtemp(dir=folder.name)
        command = [sys.executable, "-m", "regjax", "spectrum", f"--out={place}", *options]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        start = time.perf_counter()
        subprocess.run(
            [*command, f"--cache-dir={cache}"], env=environment, check=True, capture_output=True
        )
        seconds.setdefault(cache, []).append(time.perf_counter() - start)
        found: dict[str, Any] = json.loads((Path(place) / "spectrum.json").read_text())
        return found

    seconds: dict[str, list[float]] = {}
    kept = str(Path(folder.name) / "programs")
    run(kept)
    seconds.clear()
    return Case(
        candidates={
            "without a cache": functools.partial(run, "off"),
            "with a filled cache": functools.partial(run, kept),
        },
        error=lambda label, found: float(
            not all(found["blocks"]["network"]["eigenvalues"]["converged"])
        ),
        tolerance=0.5,
        sizes={"options": " ".join(options)},
        facts=lambda answers, _: {
            "seconds without a cache": float(np.median(seconds["off"])),
            "seconds with a filled cache": float(np.median(seconds[kept])),
        },
        bars={"seconds without a cache": 10, "seconds with a filled cache": 6},
    )


def _in_a_process(*arguments: str) -> dict[str, Any]:
    """What a cold process of this file prints last."""
    command = [sys.executable, "-m", __name__, *arguments]
    done = subprocess.run(
        command, env=_timing.cold_environment(), check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(label: str, num_steps: int) -> dict[str, Any]:
    """The seconds of the first and of the second call in this process."""
    problem = _problems.trained(_NETWORK, _NUM_EXAMPLES)
    batch = problem.x, problem.y
    jax.block_until_ready(batch)

    def ours() -> np.ndarray:
        operator = curvature.hessian(problem.loss_fn, problem.params, *batch)
        found = curvature.top_eigenpairs(operator, _NUM_EIGENVALUES, key=jax.random.key(0))
        return np.asarray(found.values)

    def density() -> np.ndarray:
        operator = curvature.hessian(problem.loss_fn, problem.params, *batch)
        found = curvature.spectral_density(operator, key=jax.random.key(0))
        return np.asarray([found.trace, found.trace_standard_error])

    own = {"regjax": ours, "density": density}
    if label in own:
        solve = own[label]
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
