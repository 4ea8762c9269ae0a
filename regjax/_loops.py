"""How a loop over an expensive body runs; nobody else chooses.

XLA on CPU runs a convolution inside any control-flow region 12 to 50 times slower than outside of
one, without a warning (jax issue 12868). So a loop is a `lax` loop on accelerators and for bodies
without convolution. On CPU a body with convolutions is repeated by the host over one compiled
step that donates its carry; inside somebody's own jit, where no host can loop, it is unrolled up
to eight times and beyond that compiled as a loop, with one warning. Which platform that is the
operands say, and inside of a jit the lowering (`_platforms.py`). The words are those of `jax.lax`:
scan, map, while_loop, cond, switch.
"""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from regjax import _jaxprs, _manual_axes, _platforms, _programs
from regjax._base import Tree

# Compile time grows with every copy of the body; eight is where the unrolled form still compiles
# about as fast as one training step does.
_MAX_UNROLL = 8
# A loop keeps XLA on CPU from working on two turns at once: four shards of m-sharpness take 1.4
# times as long in one as unrolled (measured).
_SHORT_LOOP = 4
# Beyond, compiling a copy for each row costs more than it gains.
_MAX_ROWS = 16

_SLOW_LOOP = (
    f"A loop of more than {_MAX_UNROLL} steps with convolutions inside jit runs 12 to 50 times "
    "slower on CPU than the same steps outside of one: call it without jit, and the host drives "
    "the loop."
)
_SLOW_BRANCH = (
    "A branch with convolutions inside jit runs 12 to 50 times slower on CPU than outside of one: "
    "let the host decide between the steps, and call there what is in the branch."
)

Body = Callable[[Tree, Tree, jax.Array], Tree]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a solver runs outside of `jax.jit`.

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
    if _platforms.is_in_program():
        return False
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


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
    turns, loop = functools.partial(_turns, body, length), functools.partial(_loop, body, length)
    is_slow = _may_be_on_cpu(operands, carry) and _is_slow_in_loops(body, operands, carry)
    if not is_concrete(operands, carry):
        is_short = length <= _MAX_UNROLL and (unroll or is_slow)
        return _traced(turns, loop, (operands, carry), is_slow, is_short=is_short)
    if not is_slow:
        unrolls = unroll and length <= _MAX_UNROLL and _may_be_on_cpu(operands, carry)
        return (_compiled_turns if unrolls else _compiled_scan)(body, length, operands, carry)
    carry = jax.tree.map(jnp.copy, carry)
    for i in range(length):
        carry = _compiled_turn(body, carry, operands, jnp.int32(i))
    return carry


def _scan_captured(body: Body, carry: Tree, length: int) -> Tree:
    if is_concrete(carry):
        return _turns(body, length, None, carry)
    first = jax.ShapeDtypeStruct((), jnp.int32)
    is_slow = _may_be_on_cpu(carry) and _has_convolution(body, None, carry, first)
    turns, loop = functools.partial(_turns, body, length), functools.partial(_loop, body, length)
    is_short = length <= (_MAX_UNROLL if is_slow else _SHORT_LOOP)
    return _traced(turns, loop, (None, carry), is_slow, is_short=is_short)


def map(function: Callable[[Tree], Tree], rows: Tree) -> Tree:
    """`function` of each entry along the leading axis of `rows`, stacked.

    All in one vmapped call, but up to sixteen one after the other where XLA on CPU takes 1.4 times
    as long for convolutions with another batch axis.
    """
    length = jax.tree.leaves(rows)[0].shape[0]
    row = lambda rows, i: jax.tree.map(lambda leaf: leaf[i], rows)
    at_once = jax.vmap(function)
    may_gain = length <= _MAX_ROWS and _may_be_on_cpu(rows)
    if not may_gain or not _has_convolution(function, row(rows, 0)):
        return at_once(rows)

    def one_by_one(rows: Tree) -> Tree:
        found = [function(row(rows, i)) for i in range(length)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return _platforms.depending(one_by_one, at_once, rows)


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

    def turns(operands: Tree, state: Tree) -> Tree:
        for _ in range(max_steps):
            keep = functools.partial(jnp.where, done(state))
            state = jax.tree.map(keep, state, step(operands, state))
        return state

    def loop(operands: Tree, state: Tree, *, warning: str | None = None) -> Tree:
        limit = _noticed(max_steps, warning)
        state = _manual_axes.varying(functools.partial(step, operands), state)
        return lax.while_loop(
            lambda pair: (pair[0] < limit) & ~jnp.asarray(done(pair[1]), bool),
            lambda pair: (pair[0] + 1, step(operands, pair[1])),
            (jnp.int32(0), state),
        )[1]

    is_slow = _may_be_on_cpu(operands, state) and _has_convolution(step, operands, state)
    is_short = is_slow and max_steps <= _MAX_UNROLL
    return _traced(turns, loop, (operands, state), is_slow, is_short=is_short)


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
    if holds_products and _may_be_on_cpu(state) and _has_convolution(change, state):
        condition = condition & _platforms.warned(_SLOW_BRANCH)
    # As a call: what `change` only hands through would leave the branch otherwise, and nothing told
    # the compiler that who read an array before comes before it is changed in place. It copied it.
    return lax.cond(condition, jax.jit(change), lambda unchanged: unchanged, state)


def switch(
    index: int | jax.Array, functions: Sequence[Callable[[Tree], Tree]], operand: Tree
) -> Tree:
    """`functions[index](operand)`; they must not hold a product, but may send and receive.

    Under `jax.vmap` an index that is mapped over computes all of them.
    """
    if is_concrete(index):
        return functions[int(index)](operand)
    return lax.switch(index, functions, operand)


def _may_be_on_cpu(*operands: Tree) -> bool:
    return _platforms.platform_of(*operands) in (None, _platforms.CPU)


def _traced(
    turns: Callable[[Tree, Tree], Tree],
    loop: Callable[..., Tree],
    operands: tuple[Tree, Tree],
    is_slow: bool,
    *,
    is_short: bool,
) -> Tree:
    """A loop inside of a program: on CPU turn by turn if it is short, elsewhere always a loop."""
    if is_short:
        return _platforms.depending(turns, loop, *operands)
    return loop(*operands, warning=_SLOW_LOOP if is_slow else None)


def _loop(
    body: Body, length: int, operands: Tree, carry: Tree, *, warning: str | None = None
) -> Tree:
    indices = _noticed(jnp.arange(length, dtype=jnp.int32), warning)
    carry = _manual_axes.varying(lambda carry: body(operands, carry, jnp.int32(0)), carry)
    return lax.scan(lambda carry, i: (body(operands, carry, i), None), carry, indices)[0]


def _noticed(number: ArrayLike, warning: str | None) -> jax.Array:
    """`number`, on which a loop depends; one lowered for the CPU warns."""
    number = jnp.asarray(number, jnp.int32)
    return number if warning is None else jnp.where(_platforms.warned(warning), number, 0)


def _turns(body: Body, length: int, operands: Tree, carry: Tree) -> Tree:
    for i in range(length):
        carry = body(operands, carry, jnp.int32(i))
    return carry


_compiled_scan = _programs.bounded(jax.jit(_loop, static_argnums=(0, 1)))
_compiled_turns = _programs.bounded(jax.jit(_turns, static_argnums=(0, 1)))
_compiled_turn = _programs.bounded(
    jax.jit(
        lambda body, carry, operands, i: body(operands, carry, i),
        static_argnums=0,
        donate_argnums=1,
    )
)


def _is_slow_in_loops(body: Body, operands: Tree, carry: Tree) -> bool:
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
