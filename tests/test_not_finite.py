"""NaN in, no verdict out: it is refused by name, or some number of the answer says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import curvature, transforms
from tests import calls

CALLS = {**calls.PRUNING, **calls.DIAGNOSTICS}
# What has only shapes to read.
SHAPES = {"full_masks", "random_scores", "unit_gates", "parameter_masks", "count_cost",
          "find_structure"}  # fmt: skip
SHAPES_OF = {("preconditioner", 1)}
# Solvers are slow to compile; their NaN is that of `curvature`.
SLOW = {"lambda_max_between", "sharpness_reduction_flow", "dropout_noise_alignment"}


def is_floating(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def unknown(tree):
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if is_floating(x) else x, tree)


def cases():
    for name in sorted(CALLS.keys() - SHAPES - SLOW):
        for place, value in [*enumerate(CALLS[name].args), *CALLS[name].keywords.items()]:
            only_shapes = (name, place) in SHAPES_OF
            if (
                not only_shapes
                and not callable(value)
                and any(map(is_floating, jax.tree.leaves(value)))
            ):
                yield name, place


def says_so(result):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(result) if hasattr(leaf, "dtype")]
    return any(
        (leaf == -1).any() if leaf.dtype == np.int32 else not np.isfinite(leaf).all()
        for leaf in leaves
        if leaf.dtype == np.int32 or jnp.issubdtype(leaf.dtype, jnp.floating)
    )


@pytest.mark.parametrize(("name", "place"), list(cases()))
def test_nan_is_refused_or_stays(name, place):
    args, keywords = list(CALLS[name].args), dict(CALLS[name].keywords)
    given = keywords if isinstance(place, str) else args
    given[place] = unknown(given[place])
    try:
        result = CALLS[name].func(*args, **keywords)
    except (ValueError, TypeError, regjax.NotFiniteError) as error:
        text = str(error)
        is_good = text.startswith("`") and any(x in text for x in ("finite", "NaN", "nan"))
    else:
        text, is_good = "taken without a word", says_so(result)
    assert is_good, text


KEY = jax.random.key(0)
INPUTS = jnp.ones((6, 4)).at[3, 1].set(jnp.nan)
START = {"w": jnp.ones(4)}


def square_loss(params, inputs):
    return jnp.mean((inputs @ params["w"]) ** 2)


READERS = {
    "top_eigenpairs": lambda matrix: curvature.top_eigenpairs(matrix, 1, key=KEY),
    "spectral_density": lambda matrix: curvature.spectral_density(matrix, key=KEY),
    "lanczos": lambda matrix: curvature.lanczos(matrix, START, 2),
    "trace": lambda matrix: curvature.trace(matrix, key=KEY, num_matvecs=4),
    "diagonal": lambda matrix: curvature.diagonal(matrix, key=KEY, num_matvecs=4, method="xdiag"),
    "squared_row_norms": lambda matrix: curvature.squared_row_norms(matrix, key=KEY, num_matvecs=4),
    "solve": lambda matrix: curvature.solve(matrix, START),
    "apply_function": lambda matrix: curvature.apply_function(jnp.exp, matrix, START),
    "exact_spectrum": curvature.exact_spectrum,
    "off_diagonal_share": lambda matrix: curvature.off_diagonal_share(matrix, key=KEY),
    "run by hand": lambda matrix: (solver := curvature.solve_solver(matrix, START)).step(
        solver.init()
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_readers_of_a_matrix_say_where_to_look(name):
    matrix = curvature.hessian(square_loss, START, INPUTS)
    with pytest.raises(
        regjax.NotFiniteError, match=r"`operator` .* `batch\[0\]` holds NaN at \[3, 1\]"
    ):
        READERS[name](matrix)


def test_nothing_that_was_computed_is_lost():
    """The product is NaN from the third on."""

    def matvec(vector):
        return jnp.arange(1.0, 9.0) * vector

    solver = curvature.top_eigenpairs_solver(
        curvature.from_matvec(matvec, jnp.zeros(8)), 1, key=KEY
    )
    broken = curvature.from_matvec(lambda v: v * jnp.nan, jnp.zeros(8))
    state = solver.step(solver.step(solver.init()))
    with pytest.raises(
        regjax.NotFiniteError, match=r"in product 3\. What it is made of is"
    ) as error:
        solver.multiplied(broken, state)
    assert int(error.value.result.num_matvecs) == 2
    assert np.isfinite(error.value.result.values).all()


@pytest.mark.parametrize(
    ("params", "loss_fn", "where"),
    [
        ({"w": INPUTS[3]}, lambda p: jnp.sum(p["w"] ** 4), r"`params\['w'\]` holds NaN at \[1\]"),
        ({"w": jnp.ones(4)}, lambda p: square_loss(p, INPUTS), "function closes over holds NaN"),
        ({"w": jnp.zeros(4)}, lambda p: jnp.linalg.norm(p["w"]), "log, norm and square root at 0"),
    ],
)  # fmt: skip
def test_where_it_comes_from(params, loss_fn, where):
    with pytest.raises(regjax.NotFiniteError, match=where):
        curvature.exact_spectrum(curvature.hessian(loss_fn, params))


def test_an_inverse_says_that_a_system_has_not_converged():
    matrix = curvature.hessian(lambda p: jnp.sum(p["w"] ** 4), {"w": jnp.arange(1.0, 5.0)})
    short = curvature.inverse(matrix, damping=0.1, max_matvecs=1)
    with pytest.raises(regjax.NotFiniteError, match="has not converged: raise `max_matvecs`"):
        curvature.trace(short, key=KEY, num_matvecs=2)


def test_inside_of_jit_it_stays_nan():
    found = jax.jit(
        lambda inputs: READERS["top_eigenpairs"](curvature.hessian(square_loss, START, inputs))
    )(INPUTS)
    assert np.isnan(found.values).all()
    assert not found.converged.any()


def test_before_the_first_product_no_estimate_is_a_number():
    matrix = curvature.hessian(square_loss, START, INPUTS)
    for name in ("trace", "apply_function"):
        with pytest.raises(regjax.NotFiniteError) as error:
            READERS[name](matrix)
        result = error.value.result
        numbers = (result.value,) if name == "trace" else (result.error_estimate,)
        assert not np.isfinite(numbers).any()


def test_a_transformation_goes_on():
    """What is measured beside a training does not end it, with or without jit."""
    tx = transforms.spectral_controller(key=KEY, initial_learning_rate=0.01, every=1, num_steps=2)
    grad_fn = lambda params, i: jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    _, state = tx.update(START, tx.init(START), START, grad_fn=grad_fn)
    assert not state.refresh_ok
