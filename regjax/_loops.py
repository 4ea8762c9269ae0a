"""How a loop over an expensive body runs; nobody else chooses.

XLA on CPU runs a convolution inside any control-flow region 12 to 50 times slower than outside of
one, without a warning (jax issue 12868). So a loop is a `lax` loop on accelerators and for bodies
without convolution. On CPU a body with convolutions is repeated by the host over one compiled
step that donates its carry; inside somebody's own jit, where no host can loop, it is unrolled up
to eight times and beyond that compiled as a loop, with one warning. The words are those of
`jax.lax`: scan, map, while_loop, cond, switch.
"""

import contextlib
import functools
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from regjax import _jaxprs, _programs
from regjax._base import Tree

# Compile time grows with every copy of the body; eight is where the unrolled form still compiles
# about as fast as one training step does.
_MAX_UNROLL = 8
# A loop keeps XLA on CPU from working on two turns at once: four shards of m-sharpness take 1.4
# times as long in one as unrolled (measured).
_SHORT_LOOP = 4
# Beyond, compiling a copy for each row costs more than it gains.
_MAX_ROWS = 16

Body = Callable[[Tree, Tree, jax.Array], Tree]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a host-driven solver.

    Attributes:
      result: what the solver had computed so far, in the form of its ordinary result.
    """

    def __init__(self, result: Tree):
        super().__init__("interrupted; the partial result is in `.result`")
        self.result = result


def is_concrete(*trees: Tree) -> bool:
    """Whether the host may look and loop: no leaf is a tracer, nor will what is computed of them.

    Inside of somebody's jit arrays that it closed over are known, but all results are tracers.
    """
    leaves = jax.tree.leaves(trees)
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in (*leaves, jnp.zeros(())))


def scan(
    body: Body, carry: Tree, length: int, *, operands: Tree = None, unroll: bool = False
) -> Tree:
    """The carry after `body(operands, carry, i)` for i = 0, ..., length - 1.

    Args:
      body: a function of (operands, carry, i) -> carry. With operands it is a cache key: pass the
        same object again (a module-level function) and nothing is compiled again.
      carry: a tree of arrays; the body keeps structure, shapes and dtypes. Not donated.
      length: a Python integer, the number of turns.
      operands: a tree of arrays that the body reads and that stay the same. None: the body
        captures what it reads, tracers perhaps; nothing remembers it, and with a concrete carry
        the host calls it turn by turn.
      unroll: whether turns cost about a gradient each, and are few: up to eight are unrolled on
        CPU in one compiled program. For a perceptron they take two thirds of the loop's time, for
        eight times its compilation.

    Returns:
      The last carry.
    """
    if length == 0:
        return carry
    if operands is None:
        return _scan_captured(body, carry, length)
    slow_in_loops = _is_slow_in_loops(body, operands, carry)
    if unroll and jax.default_backend() == "cpu" and length <= _MAX_UNROLL and not slow_in_loops:
        return _compiled_turns(body, carry, length, operands)
    if is_concrete(operands, carry):
        if not slow_in_loops:
            return _compiled_scan(body, carry, length, operands)
        carry = jax.tree.map(jnp.copy, carry)
        for i in range(length):
            carry = _compiled_turn(body, carry, operands, jnp.int32(i))
        return carry
    if slow_in_loops and length <= _MAX_UNROLL:
        return _turns(body, carry, length, operands)
    if slow_in_loops:
        _warn_slow(length)
    return _loop(body, carry, length, operands)


def _scan_captured(body: Body, carry: Tree, length: int) -> Tree:
    host_loops, on_cpu = is_concrete(carry), jax.default_backend() == "cpu"
    first = jax.ShapeDtypeStruct((), jnp.int32)
    has_convolution = on_cpu and not host_loops and _has_convolution(body, None, carry, first)
    limit = _MAX_UNROLL if has_convolution else _SHORT_LOOP
    if host_loops or (on_cpu and length <= limit):
        return _turns(body, carry, length, None)
    if has_convolution:
        _warn_slow(length)
    return _loop(body, carry, length, None)


def map(function: Callable[[Tree], Tree], rows: Tree) -> Tree:
    """`function` of each entry along the leading axis of `rows`, stacked.

    All in one vmapped call, but up to sixteen one after the other where XLA on CPU takes 1.4 times
    as long for convolutions with another batch axis.
    """
    length = jax.tree.leaves(rows)[0].shape[0]
    row = lambda i: jax.tree.map(lambda leaf: leaf[i], rows)
    is_slow = jax.default_backend() == "cpu" and _has_convolution(function, row(0))
    if not is_slow or length > _MAX_ROWS:
        return jax.vmap(function)(rows)
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(function(row(i)) for i in range(length))
    )


def while_loop(
    step: Callable[[Tree, Tree], Tree],
    state: Tree,
    *,
    operands: Tree,
    done: Callable[[Tree], Tree],
    max_steps: int,
    result: Callable[[Tree], Tree],
    callback: Callable[[int, Tree], None] | None = None,
) -> Tree:
    """The state after `step(operands, state)` until `done(state)`, `max_steps` at most.

    With concrete arrays the host drives: it stops early, calls `callback(steps, state)` after
    each step and holds Ctrl-C back to the end of the step, for the caller's own handler if there is
    one. With tracers it is one compiled loop.

    Raises:
      Interrupted: Ctrl-C, unless the caller's handler returns; its `.result` is `result(state)` at
        that moment. So is that of an exception of the callback.
    """
    if is_concrete(operands, state):
        with _held_interrupt() as interrupted:
            for count in range(1, max_steps + 1):
                if done(state):
                    break
                state = step(operands, state)
                if callback is not None:
                    with _keeping(functools.partial(result, state)):
                        callback(count, state)
                if interrupted():
                    raise Interrupted(result(state))
        return state

    def unless_done(state: Tree) -> Tree:
        keep = functools.partial(jnp.where, done(state))
        return jax.tree.map(keep, state, step(operands, state))

    if jax.default_backend() == "cpu" and _has_convolution(step, operands, state):
        if max_steps <= _MAX_UNROLL:
            for _ in range(max_steps):
                state = unless_done(state)
            return state
        _warn_slow(max_steps)
    _, state = lax.while_loop(
        lambda pair: (pair[0] < max_steps) & ~jnp.asarray(done(pair[1]), bool),
        lambda pair: (pair[0] + 1, step(operands, pair[1])),
        (jnp.int32(0), state),
    )
    return state


def cond(
    condition: ArrayLike,
    change: Callable[[Tree], Tree],
    state: Tree,
    *,
    holds_products: bool = False,
) -> Tree:
    """`change(state)` where `condition` holds, else `state`.

    Args:
      condition: (), bool; one that is not traced is decided by the host.
      change: state -> state.
      state: a tree of arrays.
      holds_products: whether `change` holds products or gradients and is made too rarely to
        compute it each time and select. Convolutions in it are slow on CPU inside of `jit`, with
        one warning.
    """
    if is_concrete(condition):
        return change(state) if condition else state
    if holds_products and jax.default_backend() == "cpu" and _has_convolution(change, state):
        _warn_slow_branch()
    return lax.cond(condition, change, lambda unchanged: unchanged, state)


def switch(
    index: int | jax.Array, functions: Sequence[Callable[[Tree], Tree]], operand: Tree
) -> Tree:
    """`functions[index](operand)`; they must not hold a product, but may send and receive.

    Under `jax.vmap` an index that is mapped over computes all of them.
    """
    if is_concrete(index):
        return functions[int(index)](operand)
    return lax.switch(index, functions, operand)


def _loop(body: Body, carry: Tree, length: int, operands: Tree) -> Tree:
    return lax.scan(
        lambda carry, i: (body(operands, carry, i), None),
        carry,
        jnp.arange(length, dtype=jnp.int32),
    )[0]


_compiled_scan = _programs.bounded(
    jax.jit(
        lambda body, carry, length, operands: _loop(body, carry, length, operands),
        static_argnums=(0, 2),
    )
)


def _turns(body: Body, carry: Tree, length: int, operands: Tree) -> Tree:
    for i in range(length):
        carry = body(operands, carry, jnp.int32(i))
    return carry


_compiled_turns = _programs.bounded(jax.jit(_turns, static_argnums=(0, 2)))
_compiled_turn = _programs.bounded(
    jax.jit(
        lambda body, carry, operands, i: body(operands, carry, i),
        static_argnums=0,
        donate_argnums=1,
    )
)


def _is_slow_in_loops(body: Body, operands: Tree, carry: Tree) -> bool:
    if jax.default_backend() != "cpu":
        return False
    leaves, treedef = jax.tree.flatten((operands, carry))
    return _remembered(body, treedef, tuple(jax.typeof(leaf) for leaf in leaves))


@functools.lru_cache(maxsize=256)
def _remembered(body: Body, treedef: Any, types: tuple[Any, ...]) -> bool:
    structs = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in types]
    operands, carry = jax.tree.unflatten(treedef, structs)
    return _has_convolution(body, operands, carry, jax.ShapeDtypeStruct((), jnp.int32))


def _has_convolution(function: Callable[..., Tree], *arguments: Tree) -> bool:
    traced = _jaxprs.equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    return any(equation.primitive.name == "conv_general_dilated" for equation in traced)


@functools.cache
def _warn_slow(length: int) -> None:
    warnings.warn(
        f"A loop of {length} steps with convolutions inside jit runs 12 to 50 times slower on CPU "
        "than the same steps outside of one: call it without jit, and the host drives the loop.",
        stacklevel=3,
    )


@functools.cache
def _warn_slow_branch() -> None:
    warnings.warn(
        "A branch with convolutions inside jit runs 12 to 50 times slower on CPU than outside of "
        "one: let the host decide between the steps, and call there what is in the branch.",
        stacklevel=3,
    )


@contextlib.contextmanager
def _keeping(result: Callable[[], Tree]) -> Iterator[None]:
    """An exception within takes the result so far along, as Ctrl-C does."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(AttributeError):  # some exceptions hold nothing else
            error.__setattr__("result", result())
            error.add_note("raised by a callback; the partial result is in `.result`")
        raise


@contextlib.contextmanager
def _held_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C back until the block asks for it, so that no donated state is lost.

    Then the handler that was there is called, the caller's own or Python's; what is asked tells
    whether it raised KeyboardInterrupt. A second Ctrl-C before that acts at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):
        yield lambda: False
        return
    received: list[tuple[int, Any]] = []

    def hold(number: int, frame: Any) -> None:
        if received:
            previous(number, frame)
        else:
            received.append((number, frame))

    def interrupted() -> bool:
        try:
            while received:
                previous(*received.pop())
        except KeyboardInterrupt:
            return True
        return False

    signal.signal(signal.SIGINT, hold)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
    # It came after the block had asked for the last time.
    while received:
        previous(*received.pop())
