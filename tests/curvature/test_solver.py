"""What a method gets by being a `Solver`: power iteration, written here, through the one driver."""

import _thread
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import regjax
from regjax import curvature
from tests.curvature.streams import pair

VALUES = np.float32([5.0, 3.0, 2.0, 1.0, 0.5])
OPERATOR = curvature.from_matvec(Partial(jnp.multiply, jnp.asarray(VALUES)), jnp.zeros(5))
KEY = jax.random.key(0)


class PowerState(NamedTuple):
    vector: jax.Array
    value: jax.Array
    change: jax.Array


def power_solver(operator, *, key, num_steps=60, tol=1e-6):
    space = operator.space

    def init():
        vector = space.normal(key)
        infinite = jnp.asarray(jnp.inf, space.dtype)
        return space.replicate(PowerState(vector / space.norm(vector), infinite, infinite))

    def update(state, image):
        value = space.inner(state.vector, image)
        return PowerState(image / space.norm(image), value, jnp.abs(value - state.value))

    return curvature.Solver(
        name="power",
        operator=operator,
        arguments={"key": key, "num_steps": num_steps, "tol": tol},
        init=init,
        vectors=lambda state: state.vector,
        update=update,
        done=lambda state: state.change < tol,
        result=lambda state: (state.value, space.unravel(state.vector)),
        max_steps=num_steps,
        lower=("nothing",),
    )


def test_the_driver_runs_it_and_stops_early():
    calls = []
    value, vector = curvature.run(
        power_solver(OPERATOR, key=KEY), callback=lambda *call: calls.append(call[:2])
    )
    assert float(value) == pytest.approx(5, rel=1e-5)
    np.testing.assert_allclose(np.abs(vector), [1, 0, 0, 0, 0], atol=1e-2)
    assert calls == [(i + 1, 60) for i in range(len(calls))]
    assert 5 < len(calls) < 60


def test_compiled_by_hand_and_on_a_stream():
    driven, _ = curvature.run(power_solver(OPERATOR, key=KEY))
    run = jax.jit(lambda operator, key: curvature.run(power_solver(operator, key=key))[0])
    assert float(run(OPERATOR, KEY)) == pytest.approx(float(driven), rel=1e-6)
    solver = power_solver(OPERATOR, key=KEY)
    state = solver.init()
    while not solver.done(state):
        state = solver.step(state)
    assert float(solver.result(state)[0]) == float(driven)
    streamed, whole, source = pair("gauss_newton")
    found, _ = curvature.run(power_solver(streamed, key=KEY, num_steps=30, tol=0))
    assert source.passes == 30
    expected, _ = curvature.run(power_solver(whole, key=KEY, num_steps=30, tol=0))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_it_survives_interruptions(tmp_path):
    solver = power_solver(OPERATOR, key=KEY, tol=0)
    undisturbed = curvature.run(solver)
    checkpoint = curvature.Checkpoint(tmp_path, every=7)

    class Stopped(Exception):
        pass

    def stop(after):
        counts = []

        def callback(count, total, progress):
            counts.append(count)
            if count == after:
                raise Stopped

        with pytest.raises(Stopped):
            curvature.run(solver, callback=callback, checkpoint=checkpoint)
        return counts[0]

    assert [stop(after) for after in (10, 25, 40)] == [1, 8, 22]
    again = curvature.run(solver, checkpoint=checkpoint)
    jax.tree.map(np.testing.assert_array_equal, again, undisturbed)
    other = power_solver(OPERATOR, key=KEY, tol=0, num_steps=50)
    with pytest.raises(ValueError, match="`num_steps` must be 50, got 60"):
        curvature.run(other, checkpoint=checkpoint)


def test_ctrl_c_keeps_what_was_computed():
    def callback(count, total, progress):
        if count == 4:
            _thread.interrupt_main()

    with pytest.raises(regjax.Interrupted) as caught:
        curvature.run(power_solver(OPERATOR, key=KEY), callback=callback)
    assert 3 < float(caught.value.result[0]) <= 5


def test_its_memory_is_known():
    found = curvature.memory_estimate(power_solver(OPERATOR, key=KEY))
    assert found.state_bytes == 5 * 4 + 2 * 4
    assert found.result_bytes == pytest.approx(5 * 4 + 4, abs=32)
    assert found.operator_bytes == 2 * 5 * 4


class Stopped(Exception):
    pass


SOLVES = {
    "top_eigenpairs": lambda callback: curvature.top_eigenpairs(
        OPERATOR, 1, key=KEY, max_basis=4, callback=callback
    ),
    "lanczos": lambda callback: curvature.lanczos(
        OPERATOR, OPERATOR.space.unravel(jnp.ones(5)), 5, callback=callback
    ),
    "density": lambda callback: curvature.spectral_density(
        OPERATOR, key=KEY, num_steps=3, deflate=2, callback=callback
    ),
    "trace": lambda callback: curvature.trace(OPERATOR, key=KEY, num_matvecs=6, callback=callback),
    "hutch++": lambda callback: curvature.trace(
        OPERATOR, key=KEY, num_matvecs=6, method="hutch++", callback=callback
    ),
    "solve": lambda callback: curvature.solve(
        OPERATOR, OPERATOR.space.unravel(jnp.ones(5)), callback=callback
    ),
    "minres": lambda callback: curvature.solve(
        OPERATOR, OPERATOR.space.unravel(jnp.ones(5)), method="minres", callback=callback
    ),
    "function": lambda callback: curvature.apply_function(
        jnp.exp, OPERATOR, OPERATOR.space.unravel(jnp.ones(5)), callback=callback
    ),
    "power": lambda callback: curvature.run(power_solver(OPERATOR, key=KEY), callback=callback),
}


@pytest.mark.parametrize("name", SOLVES)
def test_a_callback_sees_the_result_so_far(name):
    seen = []
    found = SOLVES[name](lambda done, total, progress: seen.append((done, progress.result)))
    jax.tree.map(np.testing.assert_array_equal, seen[-1][1], found)
    assert [type(result) for _, result in seen] == [type(found)] * len(seen)
    # Asking changes nothing, and each call has its own.
    jax.tree.map(np.testing.assert_array_equal, SOLVES[name](None), found)
    first, last = (jax.tree.leaves(result) for _, result in (seen[0], seen[-1]))
    assert any(not np.array_equal(a, b) for a, b in zip(first, last, strict=True))


@pytest.mark.parametrize("name", SOLVES)
def test_what_a_callback_raises_has_the_partial_result(name):
    results = []

    def stop(done, total, progress):
        results.append(progress.result)
        if len(results) == 2:
            raise Stopped("enough")

    with pytest.raises(Stopped, match="enough") as caught:
        SOLVES[name](stop)
    jax.tree.map(np.testing.assert_array_equal, caught.value.result, results[1])
    assert "partial result is in `.result`" in caught.value.__notes__[0]
