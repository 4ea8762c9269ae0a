"""A monitor beside a training loop: its numbers, its share of the time, its file, its refusals."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import regjax
from regjax import curvature, diagnostics
from regjax.diagnostics import _monitor
from tests import oracles
from tests.transforms import modules

PROBLEM = oracles.problem(num_examples=24)
TX = optax.sgd(0.1)
ALL = ("loss", "sharpness", "trace", "noise", "gradient_share")


@jax.jit
def train_step(params):
    grads = jax.grad(oracles.loss_fn)(params, *PROBLEM.batch)
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)


def make(**options):
    options = {"every": 2, "key": jax.random.key(0), "share": None, **options}
    return diagnostics.Monitor(oracles.loss_fn, PROBLEM.batch, **options)


def trained(monitor, num_steps=5, params=PROBLEM.params, first=0):
    for step in range(first, first + num_steps):
        monitor(step, params)
        params = train_step(params)
    return params


def test_rows_hold_what_the_functions_give():
    monitor, params = make(measures=ALL, num_eigenvalues=3, batch_size=6), PROBLEM.params
    for step in range(4):
        row = monitor(step, params)
        assert (row is None) == (step % 2 == 1)
        params = train_step(params) if step < 2 else params
    assert [row["step"] for row in monitor.rows] == [0, 2]
    assert all(isinstance(value, int | float) for row in monitor.rows for value in row.values())
    row = monitor.rows[1]
    loss, grads = jax.value_and_grad(oracles.loss_fn)(params, *PROBLEM.batch)
    matrix = oracles.dense_hessian(oracles.loss_fn, params, *PROBLEM.batch)
    values, vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(row["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(row["gradient_norm"], optax.tree.norm(grads), rtol=1e-5)
    bound = row["sharpness_error_bound"]
    assert abs(row["sharpness"] - values[-1]) <= bound <= 0.02 * values[-1]
    assert row["sharpness_converged"] == 1
    # The tolerance is relative to the largest.
    found = [row["eigenvalue_2"], row["eigenvalue_3"]]
    np.testing.assert_allclose(found, values[[-2, -3]], atol=0.01 * values[-1])
    assert abs(row["trace"] - np.trace(matrix)) < 5 * row["trace_standard_error"]
    noise = diagnostics.gradient_noise(oracles.loss_fn, params, *PROBLEM.batch, batch_size=6)
    np.testing.assert_allclose(row["noise_trace"], noise.noise_trace, rtol=1e-4)
    np.testing.assert_allclose(row["gradient_noise_scale"], noise.gradient_noise_scale, rtol=1e-4)
    assert row["noise_resolved"] == float(noise.resolved)
    flat = jax.flatten_util.ravel_pytree(grads)[0]
    share = np.sum((vectors[:, -3:].T @ flat) ** 2) / np.sum(flat**2)
    np.testing.assert_allclose(row["gradient_share"], share, atol=0.02)


def test_measures_of_ones_own_and_what_fails_is_seen():
    def own(point):
        return {"step_again": point.step, "norm": optax.tree.norm(point.params)}

    monitor = make(measures=(own, "sharpness"))
    row = monitor(4, PROBLEM.params)
    assert row["step_again"] == 4.0
    np.testing.assert_allclose(row["norm"], optax.tree.norm(PROBLEM.params), rtol=1e-6)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, PROBLEM.params)
    with pytest.warns(UserWarning, match="got sharpness nan at step 6; rows say NaN"):
        row = monitor(6, broken)
    assert math.isnan(row["sharpness"])
    assert row["sharpness_converged"] == 0
    monitor(8, broken)  # says it once
    twice = make(measures=(own, lambda point: {"norm": 1.0}))
    with pytest.raises(ValueError, match="`measures` must give each name once, got 'norm' twice"):
        twice(0, PROBLEM.params)


def test_a_share_of_the_time_is_kept(monkeypatch):
    """By a clock of its own: steps take 1 s, a row 30 s, the first one 1000 s more."""
    now = [0.0]
    monkeypatch.setattr(_monitor.time, "perf_counter", lambda: now[0])
    costs = iter([1000.0])

    def slow(point):
        now[0] += 30.0 + next(costs, 0.0)
        return {"x": 1.0}

    monitor = make(measures=(slow,), share=0.1, every=50)
    for step in range(2001):
        monitor(step, PROBLEM.params)
        now[0] += 1.0
    skipped = [row["skipped"] for row in monitor.rows]
    assert skipped[0] == 0
    assert all("x" not in row for row in monitor.rows if row["skipped"])
    assert max(row["time_share"] for row in monitor.rows) <= 0.1
    # 2000 s of training allow 200 s of rows: 6 after the first, which nobody counts.
    assert len(skipped) - sum(skipped) == 7
    assert monitor.rows[0]["seconds"] == 1060
    unlimited = make(measures=(slow,), every=50)
    for step in range(0, 201, 50):
        assert unlimited(step, PROBLEM.params)["skipped"] == 0


def test_rows_survive_on_disk(tmp_path):
    path = tmp_path / "rows.jsonl"
    monitor = make(path=path, measures=("loss", lambda point: {"bad": math.inf}))
    params = trained(monitor, 7)
    assert [row["step"] for row in map(json.loads, path.read_text().splitlines())] == [0, 2, 4, 6]
    read = diagnostics.read_monitor(path)
    assert math.isnan(read[0]["bad"])
    assert read[1]["loss"] == monitor.rows[1]["loss"]
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed here
    for one, other in zip(diagnostics.read_monitor(path), read, strict=True):
        assert one == pytest.approx(other, nan_ok=True)
    with pytest.raises(ValueError, match="`path` must not exist yet, or `resume` be True"):
        make(path=path)
    # The run goes on from a checkpoint at step 5: the row of 6 is made again.
    resumed = make(path=path, resume=True, measures=("loss",))
    assert [row["step"] for row in resumed.rows] == [0, 2, 4, 6]
    trained(resumed, 4, params, first=5)
    assert [row["step"] for row in diagnostics.read_monitor(path)] == [0, 2, 4, 6, 8]
    assert "bad" not in diagnostics.read_monitor(path)[3]
    with path.open("a") as file:
        file.write('{"step": 10, "lo')  # and again, with nothing to make anew
    make(path=path, resume=True, measures=("loss",))(10, params)
    assert [row["step"] for row in diagnostics.read_monitor(path)] == [0, 2, 4, 6, 8, 10]
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"`path` must hold a JSON object of numbers .* line 2"):
        diagnostics.read_monitor(path)


def test_a_network_with_batch_norm_and_the_state_of_now():
    x, y = modules.data()
    model = regjax.from_nnx(modules.Net(nnx.Rngs(0)))
    loss = lambda outputs, targets: jnp.mean((outputs - targets) ** 2)
    loss_of = lambda state: regjax.model_loss(model._replace(state=state), loss)
    monitor = diagnostics.Monitor(
        loss_of(model.state), (x, y), every=1, key=jax.random.key(0), share=None
    )
    first = monitor(0, model.params)["sharpness"]
    norm = model.state["norm"]
    state = {**model.state, "norm": {**norm, "var": 4 * norm["var"]}}
    row = monitor(1, model.params, loss_fn=loss_of(state))
    expected = oracles.dense_hessian(loss_of(state), model.params, x, y)
    # Without a search for larger ones it is the second eigenvalue, a tenth below.
    np.testing.assert_allclose(row["sharpness"], np.linalg.eigvalsh(expected)[-1], rtol=0.02)
    assert abs(row["sharpness"] - first) > 0.05 * first


def test_with_convolutions_the_host_drives():
    kernel = {"k": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 1, 2)), jnp.float32)}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 6, 1)), jnp.float32)

    def loss_fn(params, inputs):
        out = jax.lax.conv_general_dilated(
            inputs, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.tanh(out) ** 2)

    monitor = diagnostics.Monitor(loss_fn, (x,), every=1, key=jax.random.key(0))
    row = monitor(0, kernel)  # a compiled loop would warn, which is an error here
    expected = oracles.dense_hessian(loss_fn, kernel, x)
    np.testing.assert_allclose(row["sharpness"], np.linalg.eigvalsh(expected)[-1], rtol=0.02)


def test_bad_arguments(tmp_path):
    for options, text in (
        ({"every": 0}, "`every` must be at least 1, got 0"),
        ({"measures": ("sharpnes",)}, "`measures` must be among loss, "),
        ({"measures": ()}, "`measures` must be one or more different ones"),
        ({"measures": ("loss", "loss")}, "`measures` must be one or more different ones"),
        ({"share": 1.5}, "`share` must be between 0 and 1, got 1.5"),
        ({"num_eigenvalues": 0}, "`num_eigenvalues` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"tol": -1.0}, "`tol` must be non-negative, got -1.0"),
        ({"measures": ("preconditioned",)}, "`optimizer` must be one with second moments"),
        ({"optimizer": "adamm"}, "`optimizer` must be"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive, got 0.0"),
        ({"resume": True}, "`path` must be given to resume from, got None"),
    ):
        with pytest.raises(ValueError, match=text):
            make(**options)
    for options, text in (
        ({"measures": "loss"}, "`measures` must be a sequence of names or functions, got"),
        ({"tx": 3}, "`tx` must be a transformation such as"),
        ({"key": 0}, "`key` must be a typed key"),
        ({"every": 2.0}, "`every` must be a Python integer"),
    ):
        with pytest.raises(TypeError, match=text):
            make(**options)
    with pytest.raises(TypeError, match="`batch` must be a tuple of the loss's arguments, got"):
        diagnostics.Monitor(oracles.loss_fn, PROBLEM.inputs, every=1, key=jax.random.key(0))
    monitor = make()
    with pytest.raises(ValueError, match=r"`params` must be known numbers.*not inside of jax\.jit"):
        jax.jit(lambda params: monitor(0, params))(PROBLEM.params)
    with pytest.raises(ValueError, match="`step` must be known numbers"):
        jax.jit(lambda step: monitor(step, PROBLEM.params))(jnp.int32(0))
    with pytest.raises(TypeError, match="`step` must be a Python integer, got"):
        monitor(0.5, PROBLEM.params)
    with pytest.raises(ValueError, match="`step` must be at least 0, got -2"):
        monitor(-2, PROBLEM.params)
    assert monitor(jnp.int32(2), PROBLEM.params)["step"] == 2


def test_the_edge_of_adam_and_the_rate_that_would_climb(default_promotion):
    tx, params = optax.adam(1e-2), PROBLEM.params
    monitor = make(
        measures=("sharpness", "preconditioned", "critical"), every=1, optimizer="adam",
        learning_rate=optax.constant_schedule(1e-2), tx=tx,
    )  # fmt: skip
    state = tx.init(params)
    before = monitor(0, params, state)
    assert math.isnan(before["preconditioned_sharpness"])
    assert before["preconditioned_sharpness_converged"] == 0
    for _ in range(5):
        grads = jax.grad(oracles.loss_fn)(params, *PROBLEM.batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    row = monitor(5, params, state)
    assert row["preconditioned_threshold"] == pytest.approx(3800)
    root = diagnostics.preconditioner(state, params, optimizer="adam").inverse_root
    scale = np.asarray(jax.flatten_util.ravel_pytree(root)[0], np.float64)
    matrix = oracles.dense_hessian(oracles.loss_fn, params, *PROBLEM.batch)
    largest = np.linalg.eigvalsh(scale[:, None] * matrix * scale)[-1]
    np.testing.assert_allclose(row["preconditioned_sharpness"], largest, rtol=0.02)
    updates, _ = tx.update(jax.grad(oracles.loss_fn)(params, *PROBLEM.batch), state, params)
    critical = diagnostics.critical_sharpness(
        oracles.loss_fn, params, updates, *PROBLEM.batch, learning_rate=1e-2
    )
    np.testing.assert_allclose(row["critical_sharpness"], critical.value, rtol=0.05)
    assert row["critical_sharpness_resolved"] == 1


def test_an_earlier_row_spares_products():
    monitor = make(every=1, optimizer="sgd", learning_rate=0.1, search=False)
    row = monitor(0, PROBLEM.params)  # which measures twice
    hessian = curvature.hessian(oracles.loss_fn, PROBLEM.params, *PROBLEM.batch)
    cold = curvature.top_eigenpairs(hessian, 1, key=jax.random.key(0), tol=1e-2, search=False)
    assert row["sharpness_num_matvecs"] < int(cold.num_matvecs) - 2
    assert row["stability_threshold"] == pytest.approx(20)
