"""NaN in, no verdict out: it is refused by name, or some number of the answer says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    except (ValueError, TypeError) as error:
        text = str(error)
        is_good = text.startswith("`") and any(x in text for x in ("finite", "NaN", "nan"))
    else:
        text, is_good = "taken without a word", says_so(result)
    assert is_good, text
