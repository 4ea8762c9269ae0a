"""Runs any solver: by the host or as one compiled loop, with callback, Ctrl-C and checkpoint."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from regjax import _loops
from regjax._base import Callback, Progress, Tree
from regjax._meshes import on_one_mesh
from regjax.curvature._engine._checkpoint import Chain, Checkpoint, Position
from regjax.curvature._engine._memory import explained
from regjax.curvature._engine._solver import Solver
from regjax.curvature._operators._operator import Operator

Result = TypeVar("Result")
Report: TypeAlias = Callable[[int, Callable[[], Any]], None]
"""(steps, () -> the result so far) -> None."""


@on_one_mesh
def run(
    solver: Solver[Any, Result],
    *,
    callback: Callback | None = None,
    checkpoint: Checkpoint | None = None,
) -> Result:
    """Runs a solver to its end.

    Called from Python it stops as soon as the solver is done, calls back after each step, writes
    checkpoints, and ends at Ctrl-C with the result so far. Inside of `jax.jit` it is one compiled
    loop.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> solver = curvature.lanczos_solver(hessian, jnp.ones(8), 8)
      >>> show = lambda done, total, progress: print(done, end=" ")
      >>> result = curvature.run(solver, callback=show)
      1 2 3 4 5 6 7 8
      >>> print(result.num_steps)
      8

    Args:
      solver: from a function such as `top_eigenpairs_solver`.
      callback: called as callback(steps, all steps, progress) after each step, outside of
        `jax.jit`; `progress.result` is the result so far. If it raises, the run ends, and the
        exception has that result as its `.result`.
      checkpoint: a `Checkpoint`: the state is saved every few steps, and after the process was
        killed the same call goes on from there. Not inside of `jax.jit`.

    Returns:
      The solver's result.

    Raises:
      ValueError: a checkpoint inside of `jax.jit`, or one of another problem.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device is out of memory; the message says how much is needed, and what to
        lower.
      NotFiniteError: a product is NaN or infinite; the message says where that comes from, and
        `.result` is the result so far. Inside of `jax.jit` the result is NaN instead.
      Interrupted: Ctrl-C; its `.result` is the result so far.
    """
    total = solver.max_steps + solver.later_steps

    def report(count: int, find: Callable[[], Any]) -> None:
        if callback is not None:
            callback(count, total, Progress(find))

    with explained(solver):
        begin = Position(solver, solver.init(), stage=0, first=0, steps=0)
        if checkpoint is None:
            return _drive(begin, report, None)
        if not _loops.is_concrete(solver.operator, begin.state):
            raise ValueError(
                "`checkpoint` must be None inside of jax.jit, where no host can write it."
            )
        with Chain(checkpoint, begin) as chain:
            return _drive(chain.newest(), report, chain)


def _drive(position: Position, report: Report, chain: Chain | None) -> Any:
    """The result, from a position on."""
    solver, state, stage, first, done = position
    while True:
        state = _loops.while_loop(
            functools.partial(_step, solver, stage, chain),
            state,
            operands=solver.operator,
            done=solver.done,
            max_steps=first + solver.max_steps - done,
            result=solver.result,
            callback=functools.partial(_tell, report, done, solver.result),
        )
        if solver.then is None:
            break
        first += solver.max_steps
        # From here on nothing holds what the solver before had.
        stage, done, (solver, state) = stage + 1, first, solver.then(state)
    if chain is not None:
        chain.wait()
    return solver.result(state)


def _tell(
    report: Report, done: int, result: Callable[[Tree], Any], steps: int, state: Tree
) -> None:
    report(done + steps, functools.partial(result, state))


def _step(
    solver: Solver[Tree, Any], stage: int, chain: Chain | None, operator: Operator, state: Tree
) -> Tree:
    vectors, images = solver.multiplied(operator, state)
    if chain is None:
        return solver.follow(operator, state, vectors, images)
    chain.look(vectors, images)
    state = solver.follow(operator, state, vectors, images)
    chain.follow(stage, state)
    return state
