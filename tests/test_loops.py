import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import _jaxprs, _loops


def add_dense(operands, carry, i):
    return carry + operands @ carry * 0.1 + i.astype(carry.dtype)


def add_convolved(operands, carry, i):
    image = carry.reshape(1, 1, 2, 2)
    return (
        carry + jax.lax.conv(image, operands, (1, 1), "SAME").ravel() * 0.1 + i.astype(carry.dtype)
    )


DENSE = (add_dense, jnp.eye(4), jnp.arange(4.0))
CONVOLVED = (add_convolved, jnp.ones((1, 1, 3, 3)), jnp.arange(4.0))


def by_hand(body, operands, carry, length):
    for i in range(length):
        carry = body(operands, carry, jnp.int32(i))
    return carry


@pytest.mark.parametrize("case", [DENSE, CONVOLVED], ids=["dense", "convolved"])
@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("unroll", [False, True])
def test_scan_is_the_loop_by_hand(case, length, traced, unroll):
    body, operands, carry = case

    def scan(carry):
        return _loops.scan(body, carry, length, operands=operands, unroll=unroll)

    result = (jax.jit(scan) if traced else scan)(carry)
    np.testing.assert_allclose(result, by_hand(body, operands, carry, length), rtol=1e-6)
    assert not carry.is_deleted()


def test_few_turns_are_unrolled_and_more_are_a_loop():
    body, operands, carry = DENSE
    few = lambda length: jax.make_jaxpr(
        lambda c: _loops.scan(body, c, length, operands=operands, unroll=True)
    )(carry)
    assert "scan" not in primitives(few(8).jaxpr)
    assert "scan" in primitives(few(9).jaxpr)


@pytest.mark.parametrize("num_rows", [3, 17])
def test_rows_are_mapped_in_one_call_but_for_convolutions(num_rows):
    rows = jnp.arange(4.0 * num_rows).reshape(num_rows, 4)
    for body, operands in ((add_dense, DENSE[1]), (add_convolved, CONVOLVED[1])):
        turn = lambda row, body=body, operands=operands: (
            body(operands, row, jnp.int32(0)),
            row[0],
        )
        image, first = _loops.map(turn, rows)
        expected = np.stack([turn(row)[0] for row in rows])
        np.testing.assert_allclose(image, expected, rtol=1e-6)
        np.testing.assert_array_equal(first, rows[:, 0])
        jaxpr = jax.make_jaxpr(lambda rows, turn=turn: _loops.map(turn, rows))(rows)
        follow = body is add_convolved and num_rows <= 16
        convolutions = str(jaxpr).count("conv_general_dilated[")
        assert convolutions == (num_rows if follow else int(body is add_convolved))


def primitives(jaxpr):
    return {equation.primitive.name for equation in _jaxprs.equations(jaxpr)}


def test_convolutions_never_enter_a_compiled_region_on_cpu(monkeypatch):
    body, operands, carry = CONVOLVED
    unrolled = jax.make_jaxpr(lambda c: _loops.scan(body, c, 8, operands=operands))(carry)
    assert "scan" not in primitives(unrolled.jaxpr)
    scanned = jax.make_jaxpr(lambda c: _loops.scan(DENSE[0], c, 8, operands=DENSE[1]))(carry)
    assert "scan" in primitives(scanned.jaxpr)
    # On the host the body is compiled once and called, without a region around it.
    monkeypatch.setattr(_loops, "_compiled_scan", None)
    turns = []
    turn = _loops._compiled_turn
    monkeypatch.setattr(_loops, "_compiled_turn", lambda *a: turns.append(a[3]) or turn(*a))
    _loops.scan(body, carry, 9, operands=operands)
    assert [int(i) for i in turns] == list(range(9))


def test_accelerators_scan_convolutions(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    body, operands, carry = CONVOLVED
    jaxpr = jax.make_jaxpr(lambda c: _loops.scan(body, c, 3, operands=operands))(carry)
    assert "scan" in primitives(jaxpr.jaxpr)


def test_long_traced_convolutions_warn_once():
    body, operands, carry = CONVOLVED
    _loops._warn_slow.cache_clear()
    with pytest.warns(UserWarning, match="12 to 50 times slower on CPU.*without jit"):
        jax.make_jaxpr(lambda c: _loops.scan(body, c, 9, operands=operands))(carry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.make_jaxpr(lambda c: _loops.scan(body, c, 9, operands=operands))(carry)


def count_up(operands, state):
    return state + operands


def run(state, max_steps, **options):
    return _loops.while_loop(
        count_up,
        state,
        operands=jnp.float32(1),
        done=lambda state: state >= 5,
        max_steps=max_steps,
        result=lambda state: ("partial", float(state)),
        **options,
    )


@pytest.mark.parametrize(("max_steps", "expected"), [(3, 3), (5, 5), (100, 5)])
@pytest.mark.parametrize("traced", [False, True])
def test_while_loop_stops_at_done_or_at_the_limit(max_steps, expected, traced):
    function = jax.jit(run, static_argnums=1) if traced else run
    assert float(function(jnp.float32(0), max_steps)) == expected


def test_traced_convolution_steps_unroll_and_stop():
    def step(operands, state):
        return add_convolved(operands, state, jnp.int32(0))

    def solve(state, max_steps):
        return _loops.while_loop(
            step,
            state,
            operands=CONVOLVED[1],
            done=lambda state: jnp.max(state) > 5,
            max_steps=max_steps,
            result=lambda state: state,
        )

    start = jnp.arange(4.0)
    jaxpr = jax.make_jaxpr(lambda state: solve(state, 8))(start)
    assert "while" not in primitives(jaxpr.jaxpr)
    np.testing.assert_allclose(
        jax.jit(solve, static_argnums=1)(start, 8), solve(start, 8), rtol=1e-6
    )


def test_first_ctrl_c_waits_for_the_step_and_the_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)

    def callback(done, total):
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(regjax.Interrupted) as caught:
        run(jnp.float32(0), 100, callback=callback)
    assert caught.value.result == ("partial", 2.0)
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_acts_at_once():
    def callback(done, total):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        run(jnp.float32(0), 100, callback=callback)
    assert not isinstance(caught.value, regjax.Interrupted)


def interrupted_at(count, handler):
    """What a loop of five steps gives when Ctrl-C comes in one of them, and how far it had come."""
    done, before = [], signal.signal(signal.SIGINT, handler)

    def step(operands, state):
        done.append(len(done) + 1)
        if len(done) == count:
            signal.raise_signal(signal.SIGINT)
            done[-1] = f"{done[-1]} to its end"
        return state + operands

    try:
        state = _loops.while_loop(
            step, jnp.float32(0), operands=jnp.float32(1), done=lambda state: False, max_steps=5,
            result=lambda state: state,
        )  # fmt: skip
    finally:
        assert signal.signal(signal.SIGINT, before) is handler
    return state, done


@pytest.mark.parametrize("count", [3, 5])
def test_the_callers_own_handler_is_called_after_the_step(count):
    calls = []
    state, done = interrupted_at(count, lambda number, frame: calls.append((number, frame)))
    assert state == 5
    assert done[count - 1] == f"{count} to its end"
    ((number, frame),) = calls
    assert number == signal.SIGINT
    assert frame is not None


def test_a_handler_may_stop_the_loop_in_its_own_way():
    class Enough(Exception):
        pass

    def enough(number, frame):
        raise Enough

    with pytest.raises(Enough):
        interrupted_at(3, enough)

    def stop(number, frame):
        raise KeyboardInterrupt

    with pytest.raises(regjax.Interrupted) as caught:
        interrupted_at(3, stop)
    assert caught.value.result == 3


def test_cond_chooses_on_the_host_and_in_the_program():
    double = lambda state: 2 * state
    for condition, expected in ((True, 6.0), (False, 3.0)):
        assert float(_loops.cond(jnp.bool_(condition), double, jnp.float32(3))) == expected
        traced = jax.jit(lambda c: _loops.cond(c, double, jnp.float32(3)))
        assert float(traced(jnp.bool_(condition))) == expected


@pytest.mark.parametrize("traced", [False, True])
def test_switch_calls_one_of_several(traced):
    functions = [lambda x, k=k: x * k for k in range(3)]
    switch = lambda index: _loops.switch(index, functions, jnp.float32(2))
    switch = jax.jit(switch) if traced else switch
    np.testing.assert_array_equal([switch(jnp.int32(i)) for i in range(3)], [0, 2, 4])


@pytest.mark.parametrize("traced", [False, True])
def test_a_body_that_captures_is_never_remembered(traced):
    def solve(factor, start):
        return _loops.scan(lambda _, carry, i: factor * carry + i.astype(carry.dtype), start, 6)

    solve = jax.jit(solve) if traced else solve
    by_numbers = lambda factor: sum(i * factor ** (5 - i) for i in range(6)) + factor**6
    for factor in (2.0, 3.0):
        assert float(solve(jnp.float32(factor), jnp.float32(1))) == by_numbers(factor)
