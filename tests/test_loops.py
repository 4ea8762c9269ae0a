import functools
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import _loops, _platforms


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
    few = lambda length: lambda c: _loops.scan(body, c, length, operands=operands, unroll=True)
    assert not has_loop(few(8), carry)
    assert has_loop(few(9), carry)


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
        program = lowered(lambda rows, turn=turn: _loops.map(turn, rows), rows)
        follow = body is add_convolved and num_rows <= 16
        convolutions = program.count("stablehlo.convolution")
        assert convolutions == (num_rows if follow else int(body is add_convolved))


def lowered(function, *arguments, platform="cpu"):
    """The program of a function as it is lowered for a platform, which need not be here."""
    exported = jax.export.export(jax.jit(function), platforms=[platform])
    return exported(*arguments).mlir_module()


def has_loop(function, *arguments, platform="cpu"):
    return "stablehlo.while" in lowered(function, *arguments, platform=platform)


def test_convolutions_never_enter_a_compiled_region_on_cpu(monkeypatch):
    body, operands, carry = CONVOLVED
    assert not has_loop(lambda c: _loops.scan(body, c, 8, operands=operands), carry)
    assert has_loop(lambda c: _loops.scan(DENSE[0], c, 8, operands=DENSE[1]), carry)
    # On the host the body is compiled once and called, without a region around it.
    monkeypatch.setattr(_loops, "_compiled_scan", None)
    turns = []
    turn = _loops._compiled_turn
    monkeypatch.setattr(_loops, "_compiled_turn", lambda *a: turns.append(a[3]) or turn(*a))
    _loops.scan(body, carry, 9, operands=operands)
    assert [int(i) for i in turns] == list(range(9))


def until_five(state, max_steps=8):
    return _loops.while_loop(
        lambda operands, state: add_convolved(operands, state, jnp.int32(0)),
        state,
        operands=CONVOLVED[1],
        done=lambda state: jnp.max(state) > 5,
        max_steps=max_steps,
        result=lambda state: state,
    )


def scan_of(case, length, **options):
    body, operands, _ = case
    if options.pop("captures", False):
        return lambda carry: _loops.scan(lambda _, c, i: body(operands, c, i), carry, length)
    return lambda carry: _loops.scan(body, carry, length, operands=operands, **options)


CHOICES = {
    "scan of convolutions": scan_of(CONVOLVED, 3),
    "short scan of products": scan_of(DENSE, 3, unroll=True),
    "captured convolutions": scan_of(CONVOLVED, 8, captures=True),
    "captured products": scan_of(DENSE, 4, captures=True),
    "while": until_five,
    "slope": jax.grad(lambda carry: scan_of(CONVOLVED, 3)(carry).sum()),
    "mapped": jax.vmap(scan_of(CONVOLVED, 3), in_axes=1, out_axes=1),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_platform_is_that_of_the_lowering(name, monkeypatch):
    """Whatever the default backend says: from a CPU a program is lowered for others."""
    carry = jnp.arange(8.0).reshape(4, 2) if name == "mapped" else jnp.arange(4.0)
    for default in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda default=default: default)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loops = [has_loop(CHOICES[name], carry, platform=p) for p in ("cpu", "cuda", "tpu")]
        assert loops == [False, True, True]


def test_arrays_on_a_cpu_take_its_path_whatever_the_default(monkeypatch):
    """As on a machine with a GPU, where arrays have been put on the CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    body, operands, carry = CONVOLVED
    monkeypatch.setattr(_loops, "_compiled_scan", None)
    expected = by_hand(body, operands, carry, 3)
    np.testing.assert_allclose(_loops.scan(body, carry, 3, operands=operands), expected, rtol=1e-6)
    # Neither do those of a derivative outside of any jit, of which nothing is lowered.
    rows = jnp.arange(12.0).reshape(3, 4)
    turn = lambda row: body(operands, row, jnp.int32(0))
    seen = []

    def total(rows):
        return jnp.sum(_loops.map(lambda row: seen.append(0) or turn(row), rows))

    jax.grad(total)(rows)
    assert len(seen) == 1 + len(rows)  # traced once to see what is in it


def test_accelerators_take_rows_of_convolutions_at_once():
    rows = jnp.arange(12.0).reshape(3, 4)
    turn = lambda row: add_convolved(CONVOLVED[1], row, jnp.int32(0))
    program = lowered(lambda rows: _loops.map(turn, rows), rows, platform="cuda")
    assert program.count("stablehlo.convolution") == 1


def test_both_branches_live_under_shard_map():
    """Inside of somebody's own map a carry may differ from device to device after a turn."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    for case in (DENSE, CONVOLVED):
        body, operands, carry = case

        def turns(own, body=body, operands=operands):
            add = lambda _, total, i: body(operands, own, i) + total
            return _loops.scan(add, jnp.zeros(4), 3)

        mapped = jax.shard_map(turns, mesh=mesh, in_specs=spec, out_specs=spec)
        turn = functools.partial(body, operands, carry)
        expected = turn(jnp.int32(0)) + turn(jnp.int32(1)) + turn(jnp.int32(2))
        np.testing.assert_allclose(jax.jit(mapped)(carry), expected, rtol=1e-6)


def test_long_traced_convolutions_warn_once_and_on_the_cpu_alone():
    body, operands, carry = CONVOLVED
    long = lambda c: _loops.scan(body, c, 9, operands=operands)
    _platforms._told.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert has_loop(long, carry, platform="tpu")
    with pytest.warns(UserWarning, match="12 to 50 times slower on CPU.*without jit"):
        lowered(long, carry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(long, carry)


def test_a_branch_of_convolutions_warns_once():
    body, operands, carry = CONVOLVED
    change = lambda state: body(operands, state, jnp.int32(0))
    branch = lambda c: _loops.cond(c.sum() > 0, change, c, holds_products=True)
    _platforms._told.clear()
    with pytest.warns(UserWarning, match=r"A branch.*slower on CPU.*let the host decide"):
        found = jax.jit(branch)(carry)
    np.testing.assert_allclose(found, change(carry), rtol=1e-6)


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
    start = jnp.arange(4.0)
    np.testing.assert_allclose(jax.jit(until_five)(start), until_five(start), rtol=1e-6)


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
