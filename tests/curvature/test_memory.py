import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from regjax import _platforms, curvature
from regjax.curvature._engine import _memory
from regjax.curvature._operators import _stream

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
    assert found.result_bytes >= 10 * ROW
    assert found.operator_bytes == 2 * ROW
    assert found.product_bytes == pytest.approx(ROW, abs=100)
    beside = max(found.product_bytes, found.update_bytes, found.result_bytes)
    assert found.total_bytes == found.operator_bytes + found.state_bytes + beside
    assert all(type(number) is int for number in found)


def test_of_every_solver():
    matrix, key = diagonal(), jax.random.key(0)
    found = estimate(curvature.lanczos_solver, matrix, jnp.ones(SIZE), num_steps=32)
    assert found.state_bytes == pytest.approx(34 * ROW, rel=1e-2)
    assert found.result_bytes == pytest.approx(33 * ROW, rel=1e-2)
    # While the pairs that were found are taken out, their basis and the probes' are both there.
    found = estimate(curvature.spectral_density_solver, matrix, num_steps=16, deflate=32, key=key)
    assert found.state_bytes == pytest.approx((32 + 2) * ROW, rel=1e-2)
    assert found.result_bytes >= (32 + 16 + 2) * ROW
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
    monkeypatch.setattr(_platforms, "platform_of", lambda *trees: "gpu")
    one = estimate(
        curvature.spectral_density_solver, diagonal(), num_steps=8, num_probes=1, deflate=0
    )
    four = estimate(
        curvature.spectral_density_solver, diagonal(), num_steps=8, num_probes=4, deflate=0
    )
    assert four.product_bytes >= 4 * ROW
    assert four.product_bytes >= 3.9 * one.product_bytes
    assert four.state_bytes == pytest.approx(4 * one.state_bytes, rel=1e-2)


def model_fn(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["second"]


def square_loss(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def of_model(name, **options):
    params = {"first": jnp.full((WIDTH, 150), 0.01), "second": jnp.full((150, 10), 0.01)}
    inputs, targets = jnp.ones((EXAMPLES, WIDTH)), jnp.ones((EXAMPLES, 10))
    if name == "fisher":
        return curvature.fisher(model_fn, params, inputs, key=jax.random.key(1), **options)
    operator_fn = getattr(curvature, name)
    return operator_fn(model_fn, square_loss, params, inputs, targets, **options)


def of_source():
    batches = [(jnp.ones((EXAMPLES, WIDTH)),)] * 3
    return curvature.stream(curvature.hessian, loss_fn, jnp.full(SIZE, 0.01), batches)


def closing_over_data():
    inputs = jnp.ones((20 * EXAMPLES, WIDTH))
    return curvature.hessian(lambda params: loss_fn(params, inputs), jnp.full(SIZE, 0.01))


EIGENPAIRS, DENSITY = curvature.top_eigenpairs_solver, curvature.spectral_density_solver
TRACE = curvature.trace_solver
CASES = {
    "eigenpairs": lambda: (EIGENPAIRS, operator(), {"k": 10, "max_basis": 40}),
    "density": lambda: (DENSITY, operator(), {"num_steps": 16, "deflate": 32}),
    "plain density": lambda: (DENSITY, operator(), {"num_steps": 16, "deflate": 0}),
    "trace": lambda: (TRACE, operator(), {"num_matvecs": 30}),
    "Hutch++": lambda: (TRACE, operator(), {"num_matvecs": 30, "method": "hutch++"}),
    "diagonal": lambda: (curvature.diagonal_solver, operator(), {"num_matvecs": 30}),
    "chunks": lambda: (TRACE, operator(chunk_size=5), {"num_matvecs": 30}),
    "stream": lambda: (TRACE, of_source(), {"num_matvecs": 30}),
    "Gauss-Newton": lambda: (TRACE, of_model("gauss_newton"), {"num_matvecs": 9}),
    "Fisher": lambda: (TRACE, of_model("fisher", num_samples=4), {"num_matvecs": 4}),
    "empirical": lambda: (TRACE, of_model("empirical_fisher", chunk_size=9), {"num_matvecs": 4}),
    "closure": lambda: (TRACE, closing_over_data(), {"num_matvecs": 4}),
}


def of_programs(solver):
    """Bytes that the programs of a run on the host have at most, each with what else is there."""

    def account(function, *arguments, donated=()):
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
        found = compiled.memory_analysis()
        beside = found.temp_size_in_bytes + found.output_size_in_bytes
        return found.argument_size_in_bytes, beside - found.alias_size_in_bytes

    operator, state = solver.operator, jax.eval_shape(solver.init)
    vectors = jax.eval_shape(solver.vectors, state)
    if isinstance(operator, _stream.StreamedOperator):
        batch = operator.source.first()
        held = actual(operator.params)
        one = curvature.hessian(loss_fn, operator.params, *batch, chunk_size=EXAMPLES)
        _, product = account(lambda of, row: of.product(row), one, jnp.zeros(SIZE))
        # What was read, the sum and the product before.
        product += 3 * actual(batch) + 2 * ROW
    else:
        held = actual(operator)
        multiply = lambda of, rows: of.product(rows.reshape(-1, rows.shape[-1])[0])
        product = account(multiply, operator, vectors)[1]
    whole, _ = account(lambda state: state, state)
    _, update = account(solver.update, state, vectors, donated=0)
    _, result = account(solver.beside, state)
    return held + whole + max(product, update + 4 * vectors.size, result)


@pytest.mark.parametrize("name", CASES)
def test_within_a_tenth_of_the_compilers_account(name):
    solver, matrix, options = CASES[name]()
    key = jax.random.key(0)
    solver = solver(matrix, key=key, **options)
    found = curvature.memory_estimate(solver)
    assert found.total_bytes == pytest.approx(of_programs(solver), rel=0.1)


def test_wrong_arguments_are_named():
    matrix = diagonal(8)
    with pytest.raises(TypeError, match="max_bases"):
        estimate(curvature.top_eigenpairs_solver, matrix, 2, max_bases=4)
    with pytest.raises(ValueError, match=r"`max_basis` must be between 4 .* and 8 .*, got 9"):
        estimate(curvature.top_eigenpairs_solver, matrix, 2, max_basis=9)


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


def refuse(monkeypatch, message):
    """A compiler for devices into which the program does not fit."""

    def compile_(self, *arguments, **options):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)


def test_a_program_that_the_compiler_refuses_counts_by_its_message(monkeypatch):
    """XLA for TPUs has all that the program holds in its message, arguments as well."""
    refuse(
        monkeypatch,
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (27.97G) exceeds available HBM (15.75G).",
    )
    solver = curvature.lanczos_solver(diagonal(), jnp.ones(SIZE), 12)
    found = curvature.memory_estimate(solver)
    required = round(27.97 * 1024**3)
    assert found.result_bytes == required - found.state_bytes
    # A product has the operator's arrays and a vector before it, a step the state and a vector.
    assert found.product_bytes == required - found.operator_bytes - ROW
    assert found.update_bytes == required - found.state_bytes
    assert found.total_bytes == found.operator_bytes + found.state_bytes + found.product_bytes


def test_other_messages_of_a_compiler_are_handed_on(monkeypatch):
    refuse(monkeypatch, "INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        curvature.memory_estimate(curvature.lanczos_solver(diagonal(), jnp.ones(SIZE), 12))
