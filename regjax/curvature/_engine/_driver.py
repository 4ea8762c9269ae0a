"""Runs any solver: by the host or as one compiled loop, with callback, Ctrl-C and checkpoint."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from regjax import _loops
from regjax._base import Callback, Progress, Tree
from regjax._meshes import on_one_mesh
from regjax.curvature._engine._checkpoint import Chain, Checkpoint, Position
from regjax.curvature._engine._memory import explained
from regjax.curvature._engine._solver import Solver, multiply
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

    With concrete arrays the host drives it: it stops early, reports, writes checkpoints and holds
    Ctrl-C back to the end of a step. Inside of `jax.jit` it is one compiled loop.

    Args:
      solver: from a function such as `top_eigenpairs_solver`.
      callback: called as callback(steps, all steps, progress) after each step when the host drives;
        `progress.result` is the result so far. What it raises ends the run, and has that result as
        its `.result`.
      checkpoint: where the state is kept every few steps, and found again by the same call.

    Returns:
      The solver's result.

    Raises:
      ValueError: a checkpoint inside of `jax.jit`, or one of another problem.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device has no room; names what to lower, with the bytes that are needed.
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
    vectors = solver.vectors(state)
    images = multiply(operator, vectors)
    if chain is None:
        return solver.follow(operator, state, vectors, images)
    chain.look(vectors, images)
    state = solver.follow(operator, state, vectors, images)
    chain.follow(stage, state)
    return state
