"""What a solver takes of a device's memory, and what to lower when that is too much."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from regjax import _programs
from regjax._printing import legible
from regjax.curvature._engine._solver import Solver

_EXHAUSTED = "RESOURCE_EXHAUSTED"


@legible
class MemoryResult(NamedTuple):
    """Bytes on each device that a solver needs; Python integers.

    Attributes:
      operator_bytes: the operator's own arrays: parameters, batch, what functions close over, and
        what is kept of a linearisation.
      state_bytes: the solver's state: the rows of its bases and a few vectors.
      product_bytes: temporaries and result of one product (of all that are made at once); of a
        stream its batches as well.
      update_bytes: temporaries of what the method makes of the product, and the product itself.
      result_bytes: temporaries and arrays of what is made beside the state: eigenvectors, or the
        probes of a density.
      total_bytes: those of operator and state, and the largest of product, update and result.
    """

    operator_bytes: int
    state_bytes: int
    product_bytes: int
    update_bytes: int
    result_bytes: int
    total_bytes: int


def memory_estimate(solver: Solver[Any, Any]) -> MemoryResult:
    """Adds up the memory that a solver needs on each device, without running it.

    Arrays count by their shapes. A product, a step and the result are compiled, not run, and count
    by the compiler's own account, or by the bytes in the message of one that refuses what does not
    fit (XLA for TPUs). Of a source of batches all are taken to be as large as the first.
    Not included are what libraries need for themselves and what fragments of freed memory cost:
    leave 10 % free.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> solver = curvature.lanczos_solver(hessian, jnp.ones(8), 8)
      >>> print(curvature.memory_estimate(solver).operator_bytes)  # parameters and the arange
      64

    Args:
      solver: from a function such as `top_eigenpairs_solver`.

    Returns:
      A `MemoryResult`, in bytes.
    """
    operator, space = solver.operator, solver.operator.space
    state = space.shapes_of(jax.eval_shape(solver.init))
    vectors = space.shapes_of(jax.eval_shape(solver.vectors, state))
    held, basis = space.num_bytes(operator), space.num_bytes(state)
    product = operator.product_bytes(1 if len(vectors.shape) == 1 else vectors.shape[0])
    # As a step has it (see `Solver.follow`).
    follow = lambda state, images: space.keep(solver.update(state, images))
    update = _programs.num_bytes(follow, state, vectors, donate_argnums=(0,))
    update += space.num_bytes(vectors)
    result = _programs.num_bytes(solver.beside, state)
    total = held + basis + max(product, update, result)
    return MemoryResult(held, basis, product, update, result, total)


@contextlib.contextmanager
def explained(solver: Solver[Any, Any]) -> Iterator[None]:
    """Says what to lower when a device has no more memory.

    Raises:
      MemoryError: it has not, with the estimate.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _EXHAUSTED not in str(error):
            raise
        names = " or ".join(f"`{name}`" for name in solver.lower) + ", or " * bool(solver.lower)
        raise MemoryError(
            f"`{solver.name}` must fit into the memory of the device, got out of memory. Lower "
            f"{names}the `chunk_size` of the operator.{_needed(solver)}"
        ) from error


def _needed(solver: Solver[Any, Any]) -> str:
    try:
        found = memory_estimate(solver)
    except (TypeError, jax.errors.JaxRuntimeError):  # no account of a product
        return ""
    return (
        f" It needs about {_short(found.total_bytes)} on each device: "
        f"{_short(found.state_bytes)} for its basis, {_short(found.product_bytes)} for a product, "
        f"{_short(found.update_bytes)} for a step, {_short(found.result_bytes)} for its result, "
        f"{_short(found.operator_bytes)} for parameters, data and what is kept of them."
    )


def _short(num_bytes: int) -> str:
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, 4)
    return f"{num_bytes / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
