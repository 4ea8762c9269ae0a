"""Runs any solver: by the host or as one compiled loop, with callback, Ctrl-C and checkpoint."""

from collections.abc import Callable
from typing import Any, TypeVar

from regjax import _loops
from regjax._base import Callback
from regjax.curvature._engine._checkpoint import Chain, Checkpoint, Position
from regjax.curvature._engine._memory import explained
from regjax.curvature._engine._solver import Solver, multiply
from regjax.curvature._operators._operator import Operator

Result = TypeVar("Result")


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
      callback: called as callback(steps, all steps) after each step when the host drives.
      checkpoint: where the state is kept every few steps, and found again by the same call.

    Returns:
      The solver's result.

    Raises:
      ValueError: a checkpoint inside of `jax.jit` or of several processes, or one of another
        problem.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device has no room; names what to lower, with the bytes that are needed.
      Interrupted: Ctrl-C; its `.result` is the result so far.
    """
    total = solver.max_steps + solver.later_steps

    def report(count: int) -> None:
        if callback is not None:
            callback(count, total)

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


def _drive(position: Position, report: Callable[[int], None], chain: Chain | None) -> Any:
    """The result, from a position on."""
    solver, state, stage, first, done = position

    def step(operator: Operator, state: Any) -> Any:
        vectors = solver.vectors(state)
        images = multiply(operator, vectors)
        if chain is None:
            return solver.update(state, images)
        chain.look(vectors, images)
        state = solver.update(state, images)
        chain.follow(stage, state)
        return state

    state = _loops.while_loop(
        step,
        state,
        operands=solver.operator,
        done=solver.done,
        max_steps=first + solver.max_steps - done,
        result=solver.result,
        callback=lambda steps, _: report(done + steps),
    )
    if solver.then is None:
        if chain is not None:
            chain.wait()
        return solver.result(state)
    first += solver.max_steps
    solver = solver.then(state)
    return _drive(Position(solver, solver.init(), stage + 1, first, first), report, chain)
