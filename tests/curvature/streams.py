"""A streamed operator, the same one in memory, and a source that counts its passes."""

from functools import partial

import jax
import numpy as np

from regjax import curvature
from tests import oracles

KEY = jax.random.key(5)
# Name -> operator, its functions, what it takes of a batch, its options.
KINDS = {
    "hessian": (curvature.hessian, (oracles.loss_fn,), 2, {}),
    "gauss_newton": (curvature.gauss_newton, (oracles.model_fn, oracles.cross_entropy), 2, {}),
    "empirical_fisher": (
        curvature.empirical_fisher, (oracles.model_fn, oracles.cross_entropy), 2, {}
    ),
    "fisher": (curvature.fisher, (oracles.model_fn,), 1, {"key": KEY, "num_samples": 3}),
    "exact_fisher": (curvature.fisher, (oracles.model_fn,), 1, {"key": None, "num_samples": None}),
}  # fmt: skip


class Source:
    """Batches of a problem in NumPy; counts its passes, that of `stream` itself as well."""

    def __init__(self, batch, sizes=(9, 9, 5)):
        cuts = np.cumsum(sizes)[:-1]
        self.batches = list(zip(*(np.split(np.asarray(a), cuts) for a in batch), strict=True))
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def pair(name="hessian", problem=None, **options):
    """A streamed operator, the same in memory, and the source, its passes counted from now on."""
    problem = oracles.problem() if problem is None else problem
    operator_fn, functions, num_arrays, own = KINDS[name]
    batch = problem.batch[:num_arrays]
    source = Source(batch)
    streamed = curvature.stream(operator_fn, *functions, problem.params, source, **own, **options)
    source.passes = 0
    return streamed, operator_fn(*functions, problem.params, *batch, **own), source


def close(one, other, rtol=1e-4, atol=1e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), one, other)
