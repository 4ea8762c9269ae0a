import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from regjax import curvature
from regjax.curvature._engine import _memory

SIZE, EXAMPLES, WIDTH = 20_000, 64, 100
ROW = 4 * SIZE


def loss_fn(params, inputs):
    hidden = jnp.tanh(inputs @ params.reshape(WIDTH, -1))
    return jnp.mean(jnp.sum(hidden**4, axis=1))


def operator(chunk_size=None):
    params, inputs = jnp.full(SIZE, 0.01), jnp.ones((EXAMPLES, WIDTH))
    return curvature.hessian(loss_fn, params, inputs, chunk_size=chunk_size)


def diagonal(size=SIZE):
    values = jnp.ones(size)
    return curvature.from_matvec(Partial(jnp.multiply, values), values)


def estimate(solver, *arguments, key=jax.random.key(0), **options):  # noqa: B008
    """The shapes do not depend on the key."""
    options = options if solver is curvature.lanczos_solver else {"key": key, **options}
    return curvature.memory_estimate(solver(*arguments, **options))


def actual(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if isinstance(leaf.dtype, np.dtype))


def test_bytes_of_the_basis_are_those_of_the_state():
    matrix, key = diagonal(), jax.random.key(0)
    found = estimate(curvature.top_eigenpairs_solver, matrix, 10, max_basis=40)
    state = curvature.top_eigenpairs_solver(matrix, 10, key=key, max_basis=40).init()
    # Booleans and keys are a few bytes.
    assert found.state_bytes == pytest.approx(actual(state), abs=200)
    assert found.state_bytes >= 40 * ROW
    assert found.result_bytes == pytest.approx(10 * ROW, rel=1e-3)
    assert found.operator_bytes == 2 * ROW
    assert found.product_bytes == pytest.approx(ROW, abs=100)
    assert found.total_bytes == found.operator_bytes + found.state_bytes + found.result_bytes
    assert all(type(number) is int for number in found)


def test_of_every_solver():
    matrix, key = diagonal(), jax.random.key(0)
    found = estimate(curvature.lanczos_solver, matrix, jnp.ones(SIZE), num_steps=32)
    assert found.state_bytes == pytest.approx(34 * ROW, rel=1e-2)
    assert found.result_bytes == pytest.approx(33 * ROW, rel=1e-2)
    # While the pairs that were found are taken out, their basis and the probes' are both there.
    found = estimate(curvature.spectral_density_solver, matrix, num_steps=16, deflate=32, key=key)
    assert found.state_bytes == pytest.approx((32 + 2) * ROW, rel=1e-2)
    assert found.result_bytes == pytest.approx((32 + 16 + 2) * ROW, rel=1e-2)
    plain = estimate(curvature.spectral_density_solver, matrix, num_steps=16, deflate=0)
    assert plain.state_bytes == pytest.approx(18 * ROW, rel=1e-2)
    found = estimate(curvature.trace_solver, matrix, num_matvecs=30, method="hutch++")
    assert found.state_bytes == pytest.approx((10 + 10 + 1) * ROW, rel=1e-2)
    found = estimate(curvature.diagonal_solver, matrix, num_matvecs=30)
    assert found.state_bytes == pytest.approx(3 * ROW, rel=1e-2)


def test_a_product_in_chunks_takes_less():
    whole = estimate(curvature.top_eigenpairs_solver, operator(), 3)
    chunked = estimate(curvature.top_eigenpairs_solver, operator(chunk_size=4), 3)
    assert whole.state_bytes == chunked.state_bytes
    assert whole.operator_bytes > chunked.operator_bytes  # the linearisation is kept
    recomputed = ROW + 4 * EXAMPLES * WIDTH
    assert chunked.operator_bytes == recomputed
    # Of all examples the hidden layer alone is kept, and it is more than all that four need.
    hidden = 4 * EXAMPLES * SIZE // WIDTH
    assert whole.operator_bytes >= recomputed + hidden
    assert 2 * ROW <= chunked.product_bytes < 4 * ROW + 16 * hidden


def test_several_products_at_once_take_more(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    one = estimate(
        curvature.spectral_density_solver, diagonal(), num_steps=8, num_probes=1, deflate=0
    )
    four = estimate(
        curvature.spectral_density_solver, diagonal(), num_steps=8, num_probes=4, deflate=0
    )
    assert four.product_bytes >= 4 * ROW
    assert four.product_bytes >= 3.9 * one.product_bytes
    assert four.state_bytes == pytest.approx(4 * one.state_bytes, rel=1e-2)


def test_wrong_arguments_are_named():
    matrix = diagonal(8)
    with pytest.raises(TypeError, match="max_bases"):
        estimate(curvature.top_eigenpairs_solver, matrix, 2, max_bases=4)
    with pytest.raises(ValueError, match="`max_basis` must be between 4 and 8, got 9"):
        estimate(curvature.top_eigenpairs_solver, matrix, 2, max_basis=9)
    batches = [(jnp.ones((EXAMPLES, WIDTH)),)]
    streamed = curvature.stream(curvature.hessian, loss_fn, jnp.ones(SIZE), batches)
    with pytest.raises(TypeError, match="one that reads them; take that of one batch"):
        estimate(curvature.top_eigenpairs_solver, streamed, 2)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (3 * 2**29, "1.5 GiB"), (2**53, "8.19e+03 TiB")],
)
def test_bytes_are_written_in_a_unit_that_fits(number, text):
    assert _memory._short(number) == text


def test_nothing_is_allocated():
    # 64 vectors of a gigabyte and more: an estimate of what no test machine holds.
    size = 2**28
    matrix = curvature.from_matvec(
        Partial(jnp.multiply, 2.0), jax.ShapeDtypeStruct((size,), np.float32)
    )
    found = estimate(curvature.top_eigenpairs_solver, matrix, 10, max_basis=64)
    assert found.state_bytes >= 64 * 4 * size
