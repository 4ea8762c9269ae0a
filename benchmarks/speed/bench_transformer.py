"""Products of a small transformer over its gradient: memory, and time beside what was counted."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks._timing import Case
from benchmarks.speed import _programs

_TOLERANCE = 1e-4
_MEMORY, _TIME = 2.5, 1.1


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    if preset == "smoke":
        return {"products_depth1": functools.partial(_products, 4, 1, 16, 16, False, False)}
    # The larger one with half of the sequences: as much memory, which the system has to clear.
    return {
        f"products_depth{depth}{'_remat' if remat else ''}": functools.partial(
            _products, num_examples, depth, 128, 64, remat, True
        )
        for depth, num_examples in ((4, 32), (8, 16))
        for remat in (False, True)
    }


def _products(
    num_examples: int, depth: int, width: int, context: int, remat: bool, has_bars: bool
) -> Case:
    problem = _programs.gpt(num_examples, depth=depth, width=width, context=context, remat=remat)
    programs = _programs.products(problem)
    bars = {
        f"{_programs.HESSIAN}: memory over gradient": _MEMORY,
        f"{_programs.HESSIAN}: time over operations": _TIME,
        f"{_programs.HESSIAN}: time over compiled operations": _TIME,
    }
    return Case(
        candidates=programs,
        error=_programs.Oracle(problem, programs).error,
        tolerance=_TOLERANCE,
        sizes={
            "parameters": problem.size,
            "examples": num_examples,
            "depth": depth,
            "width": width,
            "context": context,
            "remat": remat,
            "dtype": "float32",
        },
        facts=functools.partial(_facts, programs),
        bars=bars if has_bars else {},
    )


def _facts(
    programs: Mapping[str, _programs.Program], answers: Any, seconds: Mapping[str, float]
) -> dict[str, float]:
    """The ratios, by what was traced and by the compiler's count of what it made of it.

    Which differ: XLA on CPU keeps a part of what `remat` recomputes, and counts every operation.
    """
    del answers
    gradient = programs[_programs.GRADIENT]
    found = _programs.over_gradient(programs, seconds)
    for label, program in programs.items():
        if label != _programs.GRADIENT:
            compiled = program.flops / gradient.flops
            found[f"{label}: compiled operations over gradient"] = compiled
            found[f"{label}: time over compiled operations"] = (
                seconds[label] / seconds[_programs.GRADIENT] / compiled
            )
    return {"gradient: memory, MB": gradient.memory / 1e6, **found}
