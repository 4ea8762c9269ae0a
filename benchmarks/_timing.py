"""Times functions against each other; a wrong answer is never timed.

Machines change speed while one measures, so absolute times mislead and ratios mislead too if one
candidate is timed after the other. Here the candidates take turns, A B A B ..., and each ratio is
formed within a round, between neighbours.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

# Shorter samples would measure the clock: a call is repeated until a sample takes this long.
_MIN_SAMPLE_S = 5e-3
_PACKAGES = (
    "jax", "jaxlib", "flax", "numpy", "scipy", "torch", "matfree", "curvlinops-for-pytorch",
    "hessian-eigenthings", "pyhessian",
)  # fmt: skip


class WrongAnswer(Exception):
    """A candidate's answer is off by more than the case's tolerance."""


class Case(NamedTuple):
    """Functions that compute the same or related things, and how to tell a right answer.

    Attributes:
      candidates: label -> function of no arguments; the first one is the baseline of the ratios.
        What is compiled or built only once belongs outside of the function.
      error: (label, answer) -> error against the oracle.
      tolerance: largest error that is timed at all.
      sizes: what the numbers depend on (parameters, examples, dtype, ...).
      facts: (answers, medians in seconds), both by label -> further numbers by name.
      bars: ratio (by label) or fact (by name) -> the most that it should be; reported only.
    """

    candidates: Mapping[str, Callable[[], Any]]
    error: Callable[[str, Any], float]
    tolerance: float
    sizes: Mapping[str, Any] = {}
    facts: Callable[[Mapping[str, Any], Mapping[str, float]], Mapping[str, float]] | None = None
    bars: Mapping[str, float] = {}


class Spread(NamedTuple):
    """Median and 10-90 % range of the rounds."""

    median: float
    low: float
    high: float


class Result(NamedTuple):
    """What was measured.

    Attributes:
      case: the case's name.
      sizes: as in `Case`.
      errors: label -> error against the oracle.
      first_call: label -> seconds of the first call, compilation included.
      seconds: label -> seconds a call, warm.
      ratios: label -> seconds over those of the baseline in the same round.
      facts: name -> number.
      bars: as in `Case`.
      rounds: number of rounds.
    """

    case: str
    sizes: dict[str, Any]
    errors: dict[str, float]
    first_call: dict[str, float]
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    facts: dict[str, float]
    bars: dict[str, float]
    rounds: int


def measure(
    name: str, case: Case, *, budget: float = 20.0, min_rounds: int = 3, max_rounds: int = 30
) -> Result:
    """Checks every candidate, then times them in turns.

    Args:
      name: name of the case.
      case: what to compare.
      budget: seconds that the timed rounds may take together; `min_rounds` are run in any case.
      min_rounds: least number of rounds.
      max_rounds: largest number of rounds.

    Returns:
      A `Result`; ratios are medians of the ratios within the rounds, not ratios of the medians.

    Raises:
      WrongAnswer: an error is above the tolerance, or not a number. Nothing has been timed then.
    """
    answers, first_call, errors = {}, {}, {}
    for label, run in case.candidates.items():
        first_call[label], answers[label] = _timed(run)
        errors[label] = float(case.error(label, answers[label]))
        if not errors[label] <= case.tolerance:
            raise WrongAnswer(
                f"{name}: {label} is off by {errors[label]:.2g}, allowed {case.tolerance:.2g}."
            )
    warm = {label: _timed(run)[0] for label, run in case.candidates.items()}
    repeats = {label: max(1, math.ceil(_MIN_SAMPLE_S / warm[label])) for label in warm}
    round_s = sum(repeats[label] * warm[label] for label in warm)
    rounds = max(min_rounds, min(max_rounds, int(budget / round_s)))
    samples: dict[str, list[float]] = {label: [] for label in warm}
    for _ in range(rounds):
        for label, run in case.candidates.items():
            total = sum(_timed(run)[0] for _ in range(repeats[label]))
            samples[label].append(total / repeats[label])
    seconds = {label: _spread(values) for label, values in samples.items()}
    baseline = np.asarray(next(iter(samples.values())))
    medians = {label: spread.median for label, spread in seconds.items()}
    facts = {} if case.facts is None else dict(case.facts(answers, medians))
    return Result(
        case=name,
        sizes=dict(case.sizes),
        errors=errors,
        first_call=first_call,
        seconds=seconds,
        ratios={label: _spread(np.asarray(values) / baseline) for label, values in samples.items()},
        facts={fact: float(value) for fact, value in facts.items()},
        bars=dict(case.bars),
        rounds=rounds,
    )


def json_line(result: Result) -> str:
    """The result with machine, versions and date as one line of JSON."""
    record = result._asdict()
    for field in ("seconds", "ratios"):
        record[field] = {label: spread._asdict() for label, spread in record[field].items()}
    return json.dumps(record | environment())


def bytes_of(compiled: Any) -> dict[str, int]:
    """What a compiled program holds by the compiler's account, and all of it in total."""
    memory = compiled.memory_analysis()
    found = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    return {**found, "total": sum(found.values())}


def cold_environment() -> dict[str, str]:
    """The environment of a process that compiles everything that it runs, on the CPU."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}


def environment() -> dict[str, Any]:
    """The machine, the versions and the date, for every record."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": num_cores(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def summary(result: Result) -> str:
    """The result for people: one short line a candidate, then the facts."""
    lines = [f"{result.case}  {_join(result.sizes)}  ({result.rounds} rounds)"]
    for label, seconds in result.seconds.items():
        low, high = seconds.low, seconds.high
        lines.append(
            f"  {label:<26}{_duration(seconds.median):>9} [{_duration(low)}, {_duration(high)}]"
            f"  x{result.ratios[label].median:.2f}{_verdict(result, label)}"
            f"  first {_duration(result.first_call[label])}  error {result.errors[label]:.1e}"
        )
    lines += [
        f"  {name}: {value:.4g}{_verdict(result, name)}" for name, value in result.facts.items()
    ]
    return "\n".join(lines)


def use_cores(count: int) -> None:
    """Leaves this process `count` cores, so that every tool's thread pool has the same size.

    To be called before anything computes; where the system cannot do it, nothing happens.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    answer = jax.block_until_ready(run())
    return time.perf_counter() - start, answer


def _spread(values: Any) -> Spread:
    low, median, high = np.percentile(values, [10, 50, 90])
    return Spread(median=float(median), low=float(low), high=float(high))


def _verdict(result: Result, name: str) -> str:
    if name not in result.bars:
        return ""
    value = result.facts[name] if name in result.facts else result.ratios[name].median
    relation = "<=" if value <= result.bars[name] else "MISSES"
    return f" ({relation} {result.bars[name]:g})"


def versions() -> dict[str, str]:
    """Of the packages that this process has imported."""
    import regjax

    modules = {"curvlinops-for-pytorch": "curvlinops", "hessian-eigenthings": "hessian_eigenthings"}
    return {"regjax": regjax.__version__} | {
        package: importlib.metadata.version(package)
        for package in _PACKAGES
        if modules.get(package, package) in sys.modules
    }


def _duration(seconds: float) -> str:
    unit, scale = next(
        ((unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e3)) if seconds * scale >= 1),
        ("us", 1e6),
    )
    return f"{seconds * scale:.3g} {unit}"


def _join(sizes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items())
