"""Jacobians, tangent kernels, alignments and linearised models against dense ones in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import regjax
from regjax import curvature
from tests import oracles

PROBLEM = oracles.problem(num_examples=7)
N, C = 7, 3


@functools.cache
def dense():
    """(N, C, n), in float64."""
    return oracles.dense_jacobian(oracles.model_fn, PROBLEM.params, PROBLEM.inputs)


@functools.cache
def kernel():
    """(N, C, N, C), in float64."""
    return np.einsum("icd,jed->icje", dense(), dense())


@functools.cache
def ours(chunk_size=None):
    return curvature.jacobian(
        oracles.model_fn, PROBLEM.params, PROBLEM.inputs, chunk_size=chunk_size
    )


def trees_model(params, inputs):
    """A tree of outputs, one of them integers and one in two axes."""
    logits = oracles.model_fn(params, inputs)
    return {"class": jnp.argmax(logits, 1), "a": logits[:, 0], "b": jnp.stack([logits, -logits], 1)}


def coupled_model(params, inputs):
    """Batch norm in train mode, of which nobody has said that it is one."""
    hidden = inputs - jnp.mean(inputs, 0, keepdims=True)
    return oracles.model_fn(params, hidden / jnp.std(hidden, 0, keepdims=True))


def ravel(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_products_with_the_jacobian_and_its_transpose(chunk_size):
    jacobian, random = ours(chunk_size), np.random.default_rng(0)
    assert jacobian.shape == (N * C, 57)
    vector = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32),
                          PROBLEM.params)  # fmt: skip
    found = jacobian.matvec(vector)
    np.testing.assert_allclose(found, dense() @ ravel(vector), rtol=1e-4, atol=1e-5)
    outputs = jnp.asarray(random.normal(size=(N, C)), jnp.float32)
    back = ravel(jacobian.rmatvec(outputs))
    np.testing.assert_allclose(back, np.einsum("ic,icd->d", outputs, dense()), rtol=1e-4, atol=1e-5)
    gram = jacobian.gram()
    right = np.einsum("icje,je->ic", kernel(), outputs)
    np.testing.assert_allclose(gram.matvec(outputs), right, rtol=1e-4, atol=1e-4)
    assert gram.shape == (N * C, N * C)


def test_the_gram_matrix_goes_wherever_an_operator_goes():
    exact = np.linalg.eigvalsh(kernel().reshape(N * C, N * C))
    found = jax.jit(lambda gram: gram.dense())(ours(3).gram())
    np.testing.assert_allclose(found, kernel().reshape(N * C, N * C), rtol=1e-4, atol=1e-4)
    top = curvature.top_eigenpairs(ours(3).gram(), 2, key=jax.random.key(0), search=False)
    np.testing.assert_allclose(top.values, exact[::-1][:2], rtol=1e-4)


@pytest.mark.parametrize("output_axes", ["full", "trace", "diagonal"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_kernels(output_axes, chunk_size):
    right = {
        "full": kernel(),
        "trace": np.einsum("icjc->ij", kernel()),
        "diagonal": np.einsum("icjc->ijc", kernel()),
    }[output_axes]
    options = {"output_axes": output_axes, "chunk_size": chunk_size}
    compute = lambda *others: curvature.neural_tangent_kernel(
        oracles.model_fn, PROBLEM.params, PROBLEM.inputs, *others, **options
    )
    np.testing.assert_allclose(compute(), right, rtol=1e-4, atol=1e-4)
    # Of five other examples as columns.
    part = right[:, :, :5] if output_axes == "full" else right[:, :5]
    np.testing.assert_allclose(compute(PROBLEM.inputs[:5]), part, rtol=1e-4, atol=1e-4)


def test_the_spectrum_is_that_of_the_square_losss_gauss_newton_matrix():
    operator = curvature.gauss_newton(
        oracles.model_fn, oracles.squared_error, PROBLEM.params, *PROBLEM.batch
    )
    found = curvature.neural_tangent_kernel(oracles.model_fn, PROBLEM.params, PROBLEM.inputs)
    of_kernel = np.linalg.eigvalsh(np.asarray(found, np.float64).reshape(N * C, N * C)) / N
    exact = np.linalg.eigvalsh(kernel().reshape(N * C, N * C)) / N
    np.testing.assert_allclose(of_kernel, exact, rtol=1e-4, atol=1e-5)
    of_matrix = np.asarray(curvature.exact_spectrum(operator))
    np.testing.assert_allclose(of_matrix[-N * C :], exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_matrix[: -N * C], 0, atol=1e-5)


def test_singular_values_keep_what_a_float32_kernel_loses():
    scales = 10.0 ** -np.arange(6)
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.normal(size=(6, 6)))[0] for _ in range(2))
    matrix = jnp.asarray((left * scales) @ right, jnp.float32)
    model = lambda params, inputs: inputs @ params
    linear = curvature.jacobian(model, jnp.zeros(6), matrix)
    np.testing.assert_allclose(linear.singular_values(), scales, rtol=2e-2)
    gram = curvature.neural_tangent_kernel(model, jnp.zeros(6), matrix).reshape(6, 6)
    roots = np.sqrt(np.abs(np.linalg.eigvalsh(np.asarray(gram, np.float64))))[::-1]
    assert np.abs(roots[-1] / scales[-1] - 1) > 1
    assert linear.dense().shape == (6, 6)


def test_outputs_that_are_trees_and_parameters_that_are_chosen():
    wrt = {"first": False, "second": True}
    jacobian = curvature.jacobian(trees_model, PROBLEM.params, PROBLEM.inputs, wrt=wrt)
    # Those of an example in the order of the tree: a, then b.
    rows = np.stack([*dense()[:, :1].swapaxes(0, 1), *dense().swapaxes(0, 1),
                     *-dense().swapaxes(0, 1)], 1)[:, :, 36:]  # fmt: skip
    assert jacobian.shape == (N * 7, 21)
    np.testing.assert_allclose(jacobian.dense(), rows.reshape(N * 7, 21), rtol=1e-4, atol=1e-5)
    found = curvature.neural_tangent_kernel(
        trees_model, PROBLEM.params, PROBLEM.inputs, output_axes="trace", wrt=wrt, chunk_size=4
    )
    np.testing.assert_allclose(found, np.einsum("icd,jcd->ij", rows, rows), rtol=1e-4, atol=1e-4)
    image = jacobian.matvec(jax.tree.map(jnp.ones_like, jacobian.params))
    assert image["class"] is None
    assert image["b"].shape == (N, 2, 3)
    assert jacobian.rmatvec(image)["first"] == {"kernel": None, "bias": None}


def test_inside_of_jit():
    compute = jax.jit(
        lambda params, inputs: curvature.neural_tangent_kernel(
            oracles.model_fn, params, inputs, output_axes="trace", chunk_size=3
        )
    )
    right = np.einsum("icjc->ij", kernel())
    np.testing.assert_allclose(compute(PROBLEM.params, PROBLEM.inputs), right, rtol=1e-4)


def test_kernels_that_do_not_fit_are_refused_with_the_bytes_that_they_need():
    make = functools.partial(
        curvature.neural_tangent_kernel, oracles.model_fn, PROBLEM.params, PROBLEM.inputs
    )
    of_kernel, each = 4 * (N * C) ** 2, 4 * C * 57
    with pytest.raises(
        MemoryError, match=rf"at least {of_kernel + N * each} .* got 4000. `chunk_s"
    ):
        make(max_bytes=4000)
    fitting = (4000 - of_kernel) // (2 * each)
    np.testing.assert_allclose(make(max_bytes=4000, chunk_size=fitting), kernel(), atol=1e-4)
    with pytest.raises(MemoryError, match=r"`output_axes=\"trace\"` .*gram"):
        make(max_bytes=1000, chunk_size=1)
    # Of a million examples nothing is allocated before that is said.
    many = jax.ShapeDtypeStruct((10**6, 5), jnp.float32)
    with pytest.raises(MemoryError, match=r"`max_bytes` must be at least 4\d{12} for a kernel"):
        jax.eval_shape(
            lambda x: curvature.neural_tangent_kernel(
                oracles.model_fn, PROBLEM.params, x, output_axes="trace", chunk_size=10
            ),
            many,
        )


def test_models_that_couple_examples_have_no_jacobian():
    said = lambda params, inputs: oracles.model_fn(params, inputs)
    said.couples_examples = True
    for function in (curvature.jacobian, curvature.neural_tangent_kernel):
        with pytest.raises(ValueError, match=r"must not couple .*evaluation"):
            function(said, PROBLEM.params, PROBLEM.inputs)
        with pytest.raises(ValueError, match="`model_fn` must be the mean over independent"):
            function(coupled_model, PROBLEM.params, PROBLEM.inputs)


def test_alignments():
    random = np.random.default_rng(0)
    factors = [random.normal(size=(6, 4)) for _ in range(2)]
    one, other = (factor @ factor.T for factor in factors)
    cosine = lambda a, b: np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    single = lambda array: jnp.asarray(array, jnp.float32)
    middle = np.eye(6) - 1 / 6
    found = curvature.kernel_alignment(single(one), single(other))
    assert float(found) == pytest.approx(cosine(one, other), rel=1e-5)
    found = curvature.kernel_alignment(single(one), single(other), centered=True)
    right = cosine(middle @ one @ middle, middle @ other @ middle)
    assert float(found) == pytest.approx(right, rel=1e-5)
    y = random.normal(size=6)
    right = y @ one @ y / np.linalg.norm(one) / (y @ y)
    assert float(curvature.target_alignment(single(one), single(y))) == pytest.approx(
        right, rel=1e-5
    )
    several = random.normal(size=(6, 2))
    right = cosine(one, several @ several.T)
    found = curvature.target_alignment(single(one), single(several))
    assert float(found) == pytest.approx(right, rel=1e-5)
    # Of all outputs, and of sizes whose squares are no numbers.
    full, y = kernel(), random.normal(size=(N, C))
    flat = full.reshape(N * C, N * C)
    right = y.ravel() @ flat @ y.ravel() / np.linalg.norm(flat) / np.sum(y**2)
    for size in (1.0, 1e-30, 1e25):
        found = curvature.target_alignment(single(full * size), single(y * size))
        assert float(found) == pytest.approx(right, rel=1e-5)
        same = curvature.kernel_alignment(single(full * size), single(full), centered=True)
        assert float(same) == pytest.approx(1, rel=1e-5)
    assert float(curvature.kernel_alignment(single(0 * one), single(one))) == 0
    assert float(curvature.target_alignment(single(one), jnp.zeros(6))) == 0


def test_a_linearised_model_is_linear_and_agrees_to_first_order():
    linear = curvature.linearized_model(oracles.model_fn, PROBLEM.params)
    at = oracles.model_fn(PROBLEM.params, PROBLEM.inputs)
    np.testing.assert_allclose(linear(PROBLEM.params, PROBLEM.inputs), at, rtol=1e-6)
    moved = jax.tree.map(lambda leaf: leaf + 2, PROBLEM.params)
    right = np.asarray(at, np.float64) + dense() @ np.full(57, 2.0)
    np.testing.assert_allclose(linear(moved, PROBLEM.inputs), right, rtol=1e-4, atol=1e-4)
    # Its Jacobian is the same everywhere, and it goes wherever a model goes.
    found = curvature.jacobian(linear, moved, PROBLEM.inputs).dense()
    np.testing.assert_allclose(found, dense().reshape(N * C, -1), rtol=1e-4, atol=1e-5)
    outputs = curvature.linearized_model(trees_model, PROBLEM.params)(moved, PROBLEM.inputs)
    np.testing.assert_array_equal(outputs["class"], jnp.argmax(at, 1))
    coupled = curvature.linearized_model(regjax.assume_separable(oracles.model_fn), PROBLEM.params)
    assert regjax.couples_examples(coupled) is False
    loss = lambda params: oracles.squared_error(linear(params, PROBLEM.inputs), PROBLEM.targets)
    slope = lambda params: oracles.squared_error(
        oracles.model_fn(params, PROBLEM.inputs), PROBLEM.targets
    )
    ours, theirs = jax.grad(loss)(PROBLEM.params), jax.grad(slope)(PROBLEM.params)
    np.testing.assert_allclose(ravel(ours), ravel(theirs), rtol=1e-4, atol=1e-5)


def test_kernel_gradient_descent_is_the_linearised_models_training():
    """One step of descent on the linearised model moves the outputs by -rate / N K residuals."""
    linear = curvature.linearized_model(oracles.model_fn, PROBLEM.params)
    residuals = oracles.model_fn(PROBLEM.params, PROBLEM.inputs) - jax.nn.one_hot(
        PROBLEM.targets, C
    )
    loss = lambda params: oracles.squared_error(linear(params, PROBLEM.inputs), PROBLEM.targets)
    updates = jax.tree.map(lambda g: -0.1 * g, jax.grad(loss)(PROBLEM.params))
    moved = optax.apply_updates(PROBLEM.params, updates)
    change = linear(moved, PROBLEM.inputs) - linear(PROBLEM.params, PROBLEM.inputs)
    right = -0.1 / N * np.einsum("icje,je->ic", kernel(), residuals)
    np.testing.assert_allclose(change, right, rtol=1e-3, atol=1e-5)


def test_error_texts():
    params, inputs = PROBLEM.params, PROBLEM.inputs
    with pytest.raises(ValueError, match=r"`vector\['first'\]\['bias'\]` must have shape \(6,\)"):
        ours().matvec(jax.tree.map(lambda leaf: leaf[:1], params))
    with pytest.raises(ValueError, match="`vector` must have the tree structure"):
        ours().rmatvec(params)
    with pytest.raises(TypeError, match="`vector` must be real, got complex64"):
        ours().rmatvec(jnp.ones((N, C), jnp.complex64))
    with pytest.raises(ValueError, match=r"leading axis of its inputs, 7, got shape \(5,\)"):
        curvature.jacobian(lambda p, x: x[0], params, inputs)
    with pytest.raises(TypeError, match="`model_fn` must return real floating point, got none"):
        curvature.jacobian(lambda p, x: jnp.ones(len(x), int), params, inputs)
    with pytest.raises(TypeError, match="must be real, got complex64"):
        curvature.jacobian(lambda p, x: oracles.model_fn(p, x).astype(complex), params, inputs)
    with pytest.raises(ValueError, match="`output_axes` must be one of full, trace, diagonal"):
        curvature.neural_tangent_kernel(oracles.model_fn, params, inputs, output_axes="none")
    with pytest.raises(ValueError, match=r"`other_matrix` must have the shape of `matrix`"):
        curvature.kernel_alignment(jnp.eye(3), jnp.eye(4))
    with pytest.raises(ValueError, match=r"`matrix` must have shape \(N, N\) or .* got \(3, 2\)"):
        curvature.kernel_alignment(jnp.ones((3, 2)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"`targets` must have shape \(3,\) beside .* got \(4,\)"):
        curvature.target_alignment(jnp.eye(3), jnp.ones(4))
    with pytest.raises(TypeError, match="`targets` must be real floating point, got int32"):
        curvature.target_alignment(jnp.eye(3), jnp.ones(3, int))
    with pytest.raises(ValueError, match="`params` must have the tree structure"):
        curvature.linearized_model(oracles.model_fn, params)(params["first"], inputs)
