"""Small functions evaluated by NumPy: as the program would, where it should, without a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from regjax import _on_host
from regjax._jaxprs import equations
from regjax._numpy_programs import _RULES
from regjax._on_host import on_host

NUMBERS = np.array([[3.0, -1.5, 0.0], [0.25, 7.0, -2.0]], np.float32)
WHOLE = np.array([7, -7, 3, 0], np.int32)
MATRIX = np.array([[2.0, 1.0, 0.5], [1.0, -3.0, 0.0], [0.5, 0.0, 1.0]], np.float32)


def turns(x):
    return lax.fori_loop(0, jnp.int32(x.shape[1]), lambda i, total: total + x[:, i] * i, x[:, 0])


def rows(x):
    return lax.scan(lambda sums, row: (sums + row, sums * 2), x[0], x, reverse=True)


FUNCTIONS = {
    "arithmetic": (
        lambda x: (
            x + 1, x - 2, x * x, x / 3, -x, abs(x), x**2, x**3, jnp.square(x), jnp.sign(x),
            jnp.floor(x), jnp.ceil(x), jnp.clip(x, -1, 2), jnp.minimum(x, 1), jnp.maximum(x, 0),
            lax.clamp(jnp.float32(-1), x, jnp.float32(1)), jnp.power(abs(x), 1.5),
        ),
        NUMBERS,
    ),
    "functions": (
        lambda x: (
            jnp.exp(x), jnp.expm1(x), jnp.log(x), jnp.log1p(x), jnp.sqrt(x), jnp.sin(x),
            jnp.cos(x), jnp.tanh(x), jnp.isfinite(jnp.log(x)), lax.stop_gradient(x), jnp.copy(x),
        ),
        NUMBERS,
    ),
    "choices": (
        lambda x: (
            jnp.where(x > 0, x, 0), x == 0, x != 0, x >= 0, x <= 0, x < 1, ~(x > 0),
            (x > 0) & (x < 5), (x > 0) | (x < -1), (x > 0) ^ (x < 5),
            lax.select_n((x > 0).astype(jnp.int32), x, 2 * x, 3 * x),
        ),
        NUMBERS,
    ),
    "whole numbers": (
        lambda x: (
            lax.div(x, jnp.int32(2)), lax.rem(x, jnp.int32(3)), x << 1, x >> 1, x & 3, x | 8,
            jnp.float32(1) * x.astype(jnp.float32), jnp.sum(x), jnp.cumsum(x), jnp.cumsum(x[::-1]),
            lax.cumsum(x, reverse=True), lax.bitcast_convert_type(x, jnp.uint32),
        ),
        WHOLE,
    ),
    "sums": (
        lambda x: (
            jnp.sum(x, 0), jnp.max(x), jnp.min(x, 1), jnp.all(x > 0, 0), jnp.any(x > 0, 1),
            x @ x.T, jnp.vdot(x, x), jnp.einsum("bi,bj->bij", x, x), jnp.einsum("bi,bi->b", x, x),
        ),
        NUMBERS,
    ),
    "shapes": (
        lambda x: (
            x.T, x.ravel(), x[:, None], x[0], x[:, 1:], x[::-1], jnp.roll(x, 1, 0),
            jnp.concatenate([x, x], 1), jnp.stack([x, x]), jnp.split(x, 3, 1), jnp.diag(x[0]),
            jnp.diag(x[0], 1), jnp.pad(x, ((1, 0), (2, 1))), jnp.broadcast_to(x[0], (4, 3)),
            lax.pad(x, jnp.float32(9), ((-1, 2, 1), (1, -1, 0))), jnp.diagonal(x[:, :2]),
            jnp.arange(3) + x.astype(jnp.int32), jnp.tril(x),
        ),
        NUMBERS,
    ),
    "places": (
        lambda x: (
            x[:, jnp.array([2, 0])], x[jnp.array([1, 5])], x.at[0].set(9), x.at[:, 1].add(x[:, 0]),
            x.at[jnp.array([0, 0]), jnp.array([1, 1])].add(1), x.at[jnp.array([7])].set(1),
            x.at[1, jnp.array([2, 0])].set(jnp.array([5.0, 6.0])),
            jnp.take(x, jnp.array([0, 9]), 1, mode="clip"),
            jnp.take_along_axis(x, jnp.argsort(x, 1), 1),
            lax.dynamic_slice(x, (jnp.int32(1), jnp.int32(2)), (1, 2)),
            lax.dynamic_update_slice(x, x[:1] * 2, (jnp.int32(9), jnp.int32(0))),
            jax.vmap(lambda row, i: row[i])(x, jnp.array([2, 0])),
            jax.vmap(lambda row, i: row.at[i].set(0))(x, jnp.array([2, 0])),
        ),
        NUMBERS,
    ),
    "order": (
        lambda x: (
            jnp.sort(x, 1), jnp.argsort(-x, 1, stable=True), jnp.lexsort((x[1], x[0])),
            lax.sort((x, 2 * x), dimension=0, num_keys=2),
        ),
        NUMBERS,
    ),
    "eigenpairs": (lambda x: jnp.linalg.eigh(x)[0], MATRIX),
    "loops": (
        lambda x: (
            turns(x), rows(x), lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
            lax.switch(jnp.int32(x[1, 0] > 1), [jnp.sin, jnp.cos], x),
            lax.platform_dependent(x, cpu=lambda x: x + 1, default=lambda x: x + 2),
        ),
        NUMBERS,
    ),
    "calls": (lambda x: (jax.nn.relu(x), jnp.hypot(x, x), jnp.linalg.norm(x)), NUMBERS),
}  # fmt: skip


def evaluated(function, *arguments):
    """The results, and that no program was made of the function."""
    made = on_host()(function)(*arguments)
    leaves = jax.tree.leaves(made)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return leaves


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numpy_gives_what_the_program_gives(name):
    function, argument = FUNCTIONS[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = jax.tree.leaves(jax.jit(function)(argument))
        found = evaluated(function, argument)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_each_rule_is_tried():
    tried = {"random_split", "random_fold_in", "scatter_add", "copy_p", "expand_dims"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for function, argument in FUNCTIONS.values():
            jaxpr = jax.make_jaxpr(function)(argument).jaxpr
            tried |= {equation.primitive.name for equation in equations(jaxpr)}
    # Not every release of JAX has an operation of each of these names.
    assert set(_RULES) - tried <= {"stack", "unstack", "pow", "copy", "tanh"}, set(_RULES) - tried


def test_eigenvectors_are_those_of_the_matrix():
    values, vectors = evaluated(lambda x: tuple(jnp.linalg.eigh(x)), MATRIX)
    np.testing.assert_allclose(MATRIX @ vectors, vectors * values, atol=2e-6)
    broken = evaluated(lambda x: jnp.linalg.eigh(x)[0], np.full((3, 3), np.nan, np.float32))
    assert np.isnan(broken[0]).all()


def test_keys_are_those_of_jax():
    def drawn(key):
        one, other = jax.random.split(key)
        return one, jax.random.split(other, 3), jax.random.fold_in(other, 7), other

    key = jax.random.key(3)
    found, expected = on_host()(drawn)(key), jax.jit(drawn)(key)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(jax.random.key_data(one), jax.random.key_data(other))


def test_other_keys_and_operations_are_compiled():
    drawn = on_host()(lambda key: jax.random.split(key)[0])
    key = jax.random.key(0, impl="rbg")
    assert jax.random.key_data(drawn(key)).shape == (4,)
    found = on_host()(lambda x: lax.erf(x) + 1)(jnp.ones(3))
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(found, 1 + lax.erf(jnp.ones(3)), rtol=1e-6)


def test_what_is_handed_through_stays_what_it_is():
    large, small = jnp.ones(5), jnp.float32(2)
    found = on_host()(lambda large, small: (large, small + 1))(large, small)
    assert found[0] is large
    assert isinstance(found[1], np.ndarray)


def test_results_lie_where_the_arguments_do():
    mesh = jax.make_mesh((1,), ("chips",), axis_types=(AxisType.Auto,))
    there = NamedSharding(mesh, PartitionSpec())
    argument = jax.device_put(jnp.ones(3), there)
    double = on_host(gives_arrays=True)(lambda x, y: (2 * x, y))
    found, handed = double(argument, np.ones(2, np.float32))
    assert found.sharding == there
    assert isinstance(handed, jax.Array)
    assert isinstance(double(np.ones(3), np.ones(2))[0], jax.Array)


def test_inside_of_a_program_it_is_a_part_of_it():
    add = on_host(static=(1,))(lambda x, y: x + y)
    text = jax.jit(lambda x: add(x, 2.0)).lower(1.0).as_text()
    assert "stablehlo.add" in text
    assert jax.grad(lambda x: add(x, 2.0) ** 2)(1.0) == 6
    assert jax.vmap(lambda x: add(x, 2.0))(jnp.ones(3)).shape == (3,)


def test_another_static_argument_is_another_function():
    scaled = on_host(static=(1,))(lambda x, factor: x * factor)
    assert [float(scaled(jnp.float32(2), factor)) for factor in (1.0, 3.0, 1.0)] == [2, 6, 2]


def test_a_function_is_traced_once():
    traced = []

    @on_host()
    def double(x):
        traced.append(x)
        return 2 * x

    assert [float(double(jnp.float32(x))) for x in range(3)] == [0, 2, 4]
    assert len(traced) == 1
    assert _on_host._traced.cache_info().maxsize == 256


def test_float64_comes_and_goes_with_jax():
    counted = on_host()(lambda x: (x * 0.5, jnp.arange(3)))
    for is_wide in (False, True, False):
        with jax.enable_x64(is_wide):
            half, _ = counted(np.ones(2))
            _, numbers = counted(np.ones(2, np.float32))
        assert half.dtype == (np.float64 if is_wide else np.float32)
        assert numbers.dtype == (np.int64 if is_wide else np.int32)
