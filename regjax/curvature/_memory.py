"""How much memory a solver will need, before it runs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from regjax import _checks
from regjax.curvature._allocation import MemoryEstimate, Plan, estimate
from regjax.curvature._density import (
    spectral_density,
    spectral_density_beside,
    spectral_density_init,
)
from regjax.curvature._eigen import top_eigenpairs, top_eigenpairs_init, top_eigenpairs_result
from regjax.curvature._estimators import (
    diagonal,
    diagonal_init,
    diagonal_result,
    trace,
    trace_init,
    trace_result,
)
from regjax.curvature._lanczos import lanczos, lanczos_init, lanczos_result
from regjax.curvature._operators import Operator

_INITS: dict[Callable[..., Any], Callable[..., Any]] = {
    diagonal: diagonal_init,
    lanczos: lanczos_init,
    spectral_density: spectral_density_init,
    top_eigenpairs: top_eigenpairs_init,
    trace: trace_init,
}


def memory_estimate(
    solver: Callable[..., Any], operator: Operator, *arguments: Any, **options: Any
) -> MemoryEstimate:
    """The memory that a solver needs on each device, without running it.

    For example `memory_estimate(top_eigenpairs, operator, 10, max_basis=64)`. A product is
    compiled, not run; of the basis and the results the shapes are enough. What the compiler adds
    to run a program (workspaces of libraries) and what fragments of freed memory cost is not in
    it: leave a tenth.

    Args:
      solver: `lanczos`, `top_eigenpairs`, `spectral_density`, `trace` or `diagonal`.
      operator: the matrix.
      *arguments: what `solver` takes after its operator.
      **options: its keyword options; `key` may be left out.

    Returns:
      A `MemoryEstimate`, in bytes.

    Raises:
      ValueError: `solver` is none of these, or as from the solver itself.
      TypeError: the arguments are not the solver's, or the operator reads its data in batches.
    """
    names = [known.__name__ for known in _INITS]
    _checks.choice("solver", getattr(solver, "__name__", repr(solver)), names)
    # The shapes do not depend on the key.
    options.setdefault("key", jax.random.key(0))
    _, *given = inspect.signature(solver).bind(operator, *arguments, **options).arguments.items()
    wanted = inspect.signature(_INITS[solver]).parameters
    init = functools.partial(
        _INITS[solver], operator, **{name: value for name, value in given if name in wanted}
    )
    beside: dict[Callable[..., Any], Callable[[Any], Any]] = {
        diagonal: functools.partial(diagonal_result, operator),
        lanczos: lambda state: lanczos_result(state, dict(given)["num_steps"]),
        spectral_density: spectral_density_beside,
        top_eigenpairs: functools.partial(top_eigenpairs_result, operator),
        trace: trace_result,
    }
    return estimate(Plan(solver.__name__, operator, init, beside[solver], ()))
