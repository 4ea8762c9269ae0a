"""What a notebook shows of a result or an operator is short, and says the numbers that are few."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import curvature, diagnostics
from regjax._printing import legible
from regjax.curvature._operators._operator import Operator
from tests.faces import FACES, public_names


@legible
class Result(NamedTuple):
    """A sample."""

    values: Any
    vectors: Any = None
    converged: Any = True


def loss(w):
    return 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w["a"] ** 2)


def test_a_short_result_is_one_line():
    shown = repr(Result(jnp.asarray([8.0, 7.000001]), None, jnp.asarray([True, False])))
    assert shown == "Result(values=[8, 7], vectors=None, converged=[True, False])"


def test_large_arrays_are_shapes_and_trees_are_counted():
    many = {f"layer_{i}": np.zeros((100, 2), np.float32) for i in range(20)}
    shown = repr(Result(np.zeros((3, 5)), {"a": jnp.zeros((2, 8))}, many)).split("\n")
    assert shown == [
        "Result(",
        "    values=float64[3,5],",
        "    vectors={'a': float32[2,8]},",
        "    converged=<dict of 20 arrays, 4000 numbers>,",
        ")",
    ]


def test_what_has_no_numbers_is_its_type():
    key = jax.random.key(0)
    assert repr(Result(key, jax.nn.relu, [1.5, 2])).split("\n")[-1].endswith("[1.5, 2])")
    assert repr(Result(key)).startswith("Result(values=key<fry>[], ")
    shown = []
    jax.jit(lambda x: shown.append(repr(Result(x))) or x)(jnp.zeros(2, jnp.bfloat16))
    assert shown == ["Result(values=bfloat16[2], vectors=None, converged=True)"]
    assert repr(Result(jnp.ones((), jnp.bfloat16))).startswith("Result(values=1, ")


@pytest.mark.parametrize("face", FACES)
def test_every_public_result_is_legible(face):
    results = [value for name, value in public_names(face).items() if name.endswith("Result")]
    assert [v for v in (*results, regjax.Model) if v.__repr__ is not Result.__repr__] == []


def test_operators_print_their_shape_and_no_arrays():
    operator = curvature.hessian(loss, {"a": jnp.zeros(8)})
    assert repr(operator) == "CurvatureOperator(shape=(8, 8), dtype=float32)"
    assert repr(2 * operator) == "Multiple(shape=(8, 8), dtype=float32)"
    jacobian = curvature.jacobian(lambda w, x: x @ w, jnp.zeros(3), jnp.ones((5, 3)))
    assert repr(jacobian) == "JacobianOperator(shape=(5, 3))"
    kinds = [Operator]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert len(kinds) > 10
    assert [kind for kind in kinds if kind.__repr__ is not Operator.__repr__] == []


def test_a_loss_of_a_model_shows_its_mode_and_no_graph():
    model = regjax.from_callable(lambda params, inputs: inputs @ params, jnp.zeros(2))
    loss_fn = regjax.model_loss(model, mean_output)
    assert repr(loss_fn) == (
        "ModelLoss(\n    function=ModelFunction(state={}, key=None, apply=<Apply>, "
        "mode='evaluation', coupled=False),\n    output_loss_fn=<mean_output>,\n)"
    )


def mean_output(outputs, targets):
    return jnp.mean(outputs - targets)


@pytest.mark.parametrize(
    "measure",
    [
        curvature.hessian,
        functools.partial(diagnostics.line_probe, learning_rates=[0.1]),
        lambda loss_fn, params, *batch: diagnostics.influence(
            loss_fn, params, batch, batch, damping=1.0
        ),
    ],
)
def test_an_error_in_the_loss_says_what_the_loss_was_given(measure):
    """One-hot labels where integers belong: the message is that of the loss, the note is ours."""

    def loss_fn(params, inputs, labels):
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError("labels must be integers")
        return jnp.mean(inputs @ params["w"])

    arguments = (loss_fn, {"w": jnp.ones(2)}, jnp.ones((5, 2)), jnp.ones((5, 3)))
    with pytest.raises(TypeError, match="labels must be integers") as caught:
        measure(*arguments)
    given = "called with (a dict of 1 arrays, float32[5,2], float32[5,3])"
    assert given in "".join(caught.value.__notes__)
