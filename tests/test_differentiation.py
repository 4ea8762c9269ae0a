"""Functions with rules of their own: forward over reverse, reverse over reverse, differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from regjax import _differentiation, curvature, regularizers
from regjax.curvature._operators import _hessian
from regjax.curvature._operators._curvature import trace
from tests import oracles


@jax.custom_vjp
def implicit(x):
    """tanh by a rule that JAX can differentiate backwards only: it calls the function itself."""
    return jnp.tanh(x)


def _implicit_forward(x):
    return implicit(x), x


def _implicit_backward(x, cotangent):
    return (cotangent * (1 - implicit(x) ** 2),)


implicit.defvjp(_implicit_forward, _implicit_backward)


@jax.custom_vjp
def opaque(x):
    """tanh by a rule that nobody can differentiate."""
    return jnp.tanh(x)


@jax.custom_vjp
def _kernel(x, cotangent):
    """What a backward rule calls that has no rule itself, as kernels of fused attention."""
    return cotangent * (1 - jnp.tanh(x) ** 2)


def _no_rule(x, cotangent):
    raise NotImplementedError("no rule")


_kernel.defvjp(lambda x, u: (_kernel(x, u), x), _no_rule)


def _opaque_backward(x, cotangent):
    return (_kernel(x, cotangent),)


opaque.defvjp(lambda x: (opaque(x), x), _opaque_backward)


@jax.custom_vjp
def differentiable(x):
    """tanh by a rule of plain operations, which JAX can differentiate either way."""
    return jnp.tanh(x)


differentiable.defvjp(
    lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, cotangent: (cotangent * (1 - y**2),)
)


def model_with(activation):
    def model_fn(params, inputs):
        hidden = activation(inputs @ params["first"]["kernel"] + params["first"]["bias"][None])
        return hidden @ params["second"]["kernel"] + params["second"]["bias"][None]

    return model_fn


def loss_with(activation):
    model_fn = model_with(activation)
    return lambda params, inputs, targets: oracles.cross_entropy(model_fn(params, inputs), targets)


@pytest.fixture(name="double")
def _double():
    with jax.enable_x64(True):
        yield


def dense(loss_fn, params, *batch):
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda vector: loss_fn(unravel(vector), *batch))(flat)


MODES = {
    "plain": (jnp.tanh, "forward"),
    "differentiable": (differentiable, "forward"),
    "implicit": (implicit, "reverse"),
    "opaque": (opaque, "differences"),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", MODES)
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_the_hessian_in_each_way(case, chunk_size):
    activation, mode = MODES[case]
    problem = oracles.problem(dtype=np.float64)
    options = {"differences": True} if mode == "differences" else {}
    matrix = curvature.hessian(
        loss_with(activation), problem.params, *problem.batch, chunk_size=chunk_size, **options
    )
    expected = dense(oracles.loss_fn, problem.params, *problem.batch)
    tolerance = 1e-8 if mode == "differences" else 1e-14
    np.testing.assert_allclose(matrix.dense(), expected, atol=tolerance)
    assert (matrix.coarser is None) == (mode != "differences")


@pytest.mark.parametrize("case", MODES)
def test_the_way_is_chosen_when_an_operator_is_made(case, monkeypatch):
    activation, mode = MODES[case]
    problem, chosen = oracles.problem(), []
    keep = lambda mode, gradient: chosen.append(mode) or of_gradient(mode, gradient)
    of_gradient = _hessian.of_gradient
    monkeypatch.setattr("regjax.curvature._operators._hessian.of_gradient", keep)
    curvature.hessian(loss_with(activation), problem.params, *problem.batch, differences=True)
    assert chosen == [mode]


def sandwiches(activation, problem, **options):
    model_fn, output_loss_fn = model_with(activation), oracles.cross_entropy
    stream = lambda make, *functions, rows: curvature.stream(
        make, *functions, problem.params, rows, **options
    )
    parts = [tuple(x[rows] for x in problem.batch) for rows in (slice(10), slice(10, 23))]
    of = lambda make, *given: make(
        model_fn, output_loss_fn, problem.params, *problem.batch, *given, **options
    )
    return {
        "gauss_newton": of(curvature.gauss_newton),
        "empirical_fisher": curvature.empirical_fisher(
            model_fn, oracles.cross_entropy, problem.params, *problem.batch, **options
        ),
        "fisher": curvature.fisher(
            model_fn, problem.params, problem.inputs, key=jax.random.key(0), **options
        ),
        "streamed": stream(curvature.gauss_newton, model_fn, output_loss_fn, rows=parts),
        "streamed hessian": stream(curvature.hessian, loss_with(activation), rows=parts),
    }  # fmt: skip


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", ["implicit", "opaque"])
def test_gauss_newton_and_fisher_in_each_way(case):
    activation, mode = MODES[case]
    problem = oracles.problem(dtype=np.float64)
    options = {"differences": True} if mode == "differences" else {}
    found, expected = sandwiches(activation, problem, **options), sandwiches(jnp.tanh, problem)
    for name, matrix in found.items():
        error = 1e-7 if mode == "differences" else 1e-13
        np.testing.assert_allclose(matrix.dense(), expected[name].dense(), atol=error, err_msg=name)
        assert (matrix.coarser is None) == (mode != "differences"), name
        if mode == "differences":
            pairs = curvature.top_eigenpairs(matrix, 1, key=jax.random.key(0))
            value = np.linalg.eigvalsh(expected[name].dense())[-1]
            assert abs(pairs.values[0] - value) <= pairs.residual_norms[0], name


@jax.custom_vjp
def fused_cross_entropy(outputs, targets):
    """As kernels of fused losses are: a rule of its own that calls what has none."""
    return oracles.cross_entropy(outputs, targets)


def _fused_backward(residuals, cotangent):
    outputs, targets = residuals
    one_hot = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
    return cotangent * (_softmax(outputs) - one_hot) / outputs.shape[0], None


@jax.custom_vjp
def _softmax(outputs):
    return jax.nn.softmax(outputs)


_softmax.defvjp(lambda x: (_softmax(x), x), _no_rule)
fused_cross_entropy.defvjp(lambda o, t: (fused_cross_entropy(o, t), (o, t)), _fused_backward)


@pytest.mark.usefixtures("double")
def test_a_fused_loss_of_the_outputs():
    problem = oracles.problem(dtype=np.float64)
    of = lambda loss, **options: curvature.gauss_newton(
        model_with(jnp.tanh), loss, problem.params, *problem.batch, **options
    )
    with pytest.raises(TypeError, match=r"`output_loss_fn` must be made .*`fused_cross_entropy at"):
        of(fused_cross_entropy)
    with pytest.raises(TypeError, match=r"`model_fn` must be made .*`opaque at"):
        curvature.fisher(model_with(opaque), problem.params, problem.inputs, key=jax.random.key(0))
    found = of(fused_cross_entropy, differences=True)
    np.testing.assert_allclose(found.dense(), of(oracles.cross_entropy).dense(), atol=1e-8)
    assert found.coarser is not None


def test_a_second_operator_compiles_nothing():
    problem = oracles.problem()
    one, other = (
        curvature.hessian(loss_with(implicit), problem.params, *problem.batch) for _ in range(2)
    )
    assert one.function.code is other.function.code
    assert jax.tree.structure(one) == jax.tree.structure(other)
    one, other = (
        curvature.hessian(loss_with(opaque), problem.params, *problem.batch, differences=True)
        for _ in range(2)
    )
    # Whether two rules that cannot be applied compute the same nobody can tell.
    assert one.function.code is not other.function.code
    np.testing.assert_array_equal(one.dense(), other.dense())


@pytest.mark.parametrize("make", ["hessian", "hvp", "from_gradient"])
def test_one_error_names_the_function_and_the_three_ways(make):
    problem, loss_fn = oracles.problem(), loss_with(opaque)
    call = {
        "hessian": lambda: curvature.hessian(loss_fn, problem.params, *problem.batch),
        "hvp": lambda: curvature.hvp(loss_fn, problem.params, problem.params, *problem.batch),
        "from_gradient": lambda: curvature.from_gradient(
            lambda p: jax.grad(loss_fn)(p, *problem.batch), problem.params
        ),
    }[make]
    with pytest.raises(TypeError) as caught:
        call()
    text = str(caught.value)
    if make != "from_gradient":  # whose program is that of the rule
        assert "`opaque at " in text
        assert "test_differentiation.py" in text
    for word in ("forward rule", "reverse over reverse", "`differences=True`"):
        assert word in text, text


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", MODES)
def test_a_single_product(case):
    activation, mode = MODES[case]
    problem = oracles.problem(dtype=np.float64)
    vector = jax.tree.map(jnp.cos, problem.params)
    expected = curvature.hvp(oracles.loss_fn, problem.params, vector, *problem.batch)
    found = curvature.hvp(
        loss_with(activation), problem.params, vector, *problem.batch, differences=True
    )
    error = 1e-8 if mode == "differences" else 1e-14
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=error), found, expected)


def test_an_error_of_the_loss_itself_is_passed_on():
    def loss_fn(params, inputs):
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        curvature.hvp(loss_fn, jnp.ones(2), jnp.ones(2), jnp.ones(3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def opaque_power(x, exponent):
    return jnp.sum(x**exponent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _power_slope(x, exponent):
    return exponent * x ** (exponent - 1)


_power_slope.defvjp(lambda x, n: (_power_slope(x, n), x), lambda n, x, u: _no_rule(x, u))
opaque_power.defvjp(
    lambda x, n: (opaque_power(x, n), x), lambda n, x, cotangent: (cotangent * _power_slope(x, n),)
)


@pytest.mark.usefixtures("double")
def test_a_quadratic_is_exact_and_a_quartic_is_off_by_what_two_steps_tell():
    params = jnp.asarray([1.0, -2.0, 0.5])
    make = lambda n: curvature.hessian(
        lambda p, data: opaque_power(p, n) * data[0],
        params,
        jnp.ones(1),
        differences=True,
    )
    quadratic, quartic = make(2), make(4)
    reach = np.finfo(np.float64).eps ** (1 / 3) * (np.linalg.norm(params) + 1)
    vector = jnp.asarray([0.0, 1.0, 0.0])
    np.testing.assert_allclose(quadratic.product(vector), 2 * vector, rtol=1e-9)
    np.testing.assert_allclose(quadratic.coarser.product(vector), 2 * vector, rtol=1e-9)
    # d/dx x^4 = 4 x^3: ((x + e)^3 - (x - e)^3) / 2e = 3 x^2 + e^2.
    np.testing.assert_allclose(quartic.product(vector)[1], 48 + 4 * reach**2, rtol=2e-10)
    coarse = quartic.coarser.product(vector)[1]
    off = (coarse - quartic.product(vector)[1]) / 3
    np.testing.assert_allclose(off, 4 * reach**2, rtol=0.2)


@pytest.mark.parametrize("composed", ["plain", "shifted", "scaled", "restricted"])
def test_residual_norms_hold_what_differences_are_off_by(composed):
    """In float32 at a sharp quartic, where they are off by more than all else."""
    params = {"w": jnp.linspace(0.01, 0.05, 12), "v": jnp.ones(2)}
    loss_fn = lambda power: (
        lambda p, scale: (power(5 * p["w"], 4) + jnp.sum(p["v"] ** 2)) * jnp.mean(scale)
    )
    exact = curvature.hessian(
        lambda p, s: loss_fn(lambda x, n: jnp.sum(x**4))(p, s), params, jnp.ones(3)
    )
    found = curvature.hessian(loss_fn(opaque_power), params, jnp.ones(3), differences=True)
    change = {
        "plain": lambda matrix: matrix,
        "shifted": lambda matrix: 2.0 * matrix + curvature.identity(matrix.space),
        "scaled": lambda matrix: matrix.scaled(jax.tree.map(lambda x: 1 + x, params)),
        "restricted": lambda matrix: matrix.restricted({"w": True, "v": False}),
    }[composed]
    matrix, true = change(found), np.asarray(change(exact).dense(), np.float64)
    values = np.linalg.eigvalsh(true)
    pairs = curvature.top_eigenpairs(matrix, 3, key=jax.random.key(0), max_matvecs=40)
    for value, bound in zip(pairs.values, pairs.residual_norms, strict=True):
        assert np.min(np.abs(values - value)) <= bound
    # The error is seen: without it the bounds would be those of rounding.
    gap = np.linalg.norm(matrix.dense() - true, 2)
    rounding = curvature.top_eigenpairs(change(exact), 3, key=jax.random.key(0)).residual_norms
    assert gap > 5 * np.max(rounding[:1])
    assert np.max(pairs.residual_norms) > gap / 3

    run = curvature.lanczos(
        matrix,
        jax.tree.map(jnp.ones_like, pairs.vectors and matrix.space.unravel(jnp.ones(matrix.size))),
        6,
    )
    ritz = curvature.ritz_pairs(run)
    assert run.product_error > 0
    for value, bound in zip(ritz.values, ritz.residual_norms, strict=True):
        assert np.min(np.abs(values - value)) <= bound

    density = curvature.spectral_density(matrix, key=jax.random.key(0), num_steps=4, deflate=3)
    assert density.node_error_bound > 0
    for value, bound in zip(density.eigenvalues, density.residual_norms, strict=True):
        assert value == 0 or np.min(np.abs(values - value)) <= bound


def test_bfloat16_parameters_are_moved_in_float32():
    problem = oracles.problem()
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), problem.params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    make = lambda params: curvature.hessian(
        loss_with(opaque), params, *problem.batch, differences=True
    )
    found = make(narrow).dense()
    np.testing.assert_array_equal(found, make(wide).dense())
    np.testing.assert_allclose(found, dense(oracles.loss_fn, wide, *problem.batch), atol=5e-3)
    vector = jax.tree.map(jnp.ones_like, narrow)
    with jax.numpy_dtype_promotion("standard"):
        image = curvature.hvp(loss_with(opaque), narrow, vector, *problem.batch, differences=True)
    flat, _ = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), image))
    np.testing.assert_allclose(flat, jnp.sum(found, 1), atol=0.02, rtol=0.01)
    assert image["first"]["bias"].dtype == jnp.bfloat16


def test_inside_of_jit():
    problem = oracles.problem()

    @jax.jit
    def largest(params):
        matrix = curvature.hessian(loss_with(implicit), params, *problem.batch)
        return curvature.top_eigenpairs(matrix, 1, key=jax.random.key(0)).values[0]

    values = jnp.linalg.eigvalsh(dense(oracles.loss_fn, problem.params, *problem.batch))
    np.testing.assert_allclose(largest(problem.params), values[-1], rtol=1e-4)


def test_what_has_no_rule_is_found_within_compiled_functions_and_loops():
    def loss_fn(params, inputs):
        body = lambda carry, x: (carry + jnp.sum(opaque(params * x)), None)
        return jax.lax.scan(jax.jit(body), jnp.float32(0), inputs)[0]

    program = trace(loss_fn, (jnp.ones(2), jnp.ones(3)))
    found = _differentiation.without_rule(_differentiation.jaxpr_of(program))
    assert [name.split()[0] for name in found] == ["`opaque"]
    plain = jax.make_jaxpr(oracles.loss_fn)(*oracles.problem())
    assert _differentiation.without_rule(plain.jaxpr) == ()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", MODES)
def test_the_gradient_norm_penalty(case):
    activation, mode = MODES[case]
    problem = oracles.problem(dtype=np.float64)
    penalty = regularizers.gradient_norm_penalty
    slope = lambda loss_fn, **options: jax.jit(
        jax.grad(lambda p: penalty(loss_fn, p, *problem.batch, **options))
    )(problem.params)
    options = {"differences": True} if mode == "differences" else {}
    found, expected = slope(loss_with(activation), **options), slope(oracles.loss_fn)
    error = 1e-7 if mode == "differences" else 1e-13
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=error), found, expected)
    if mode == "differences":
        with pytest.raises(
            TypeError, match=r"`loss_fn` must be made of .* `opaque at .*`differences=True`"
        ):
            slope(loss_with(activation))
