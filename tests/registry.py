"""One row for each transformation; `test_transform_contract.py` puts every row through all checks.

A row names what a check needs to know and, with a reason, the checks that do not apply.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from regjax import transforms

_NONE: Mapping[str, Any] = MappingProxyType({})


class Row(NamedTuple):
    """How to make a transformation, and what is true of it.

    Attributes:
      factory: the public function.
      numbers: its numeric arguments, which may be traced.
      static: its other arguments but the key.
      neutral: numbers that give the plain update bit for bit, or None.
      has_key: whether it takes a key.
      needs_grad_fn: whether `update` needs `grad_fn`.
      is_last: whether it corrects the final update, behind the optimiser.
      reads_gradient: whether it stands before the optimiser and can tell if it does not.
      traced: an integer argument that must not be traced, or None.
      num_copies: how many trees like the parameters its state holds.
      num_temporaries: as many copies of a device's parameters its update may take, at most.
      exact: what holds for the weights after each step, whatever the dtypes: a function of a
        `Step`, or None.
      skipped: check -> the reason why it does not apply.
    """

    factory: Callable[..., Any]
    numbers: Mapping[str, Any]
    static: Mapping[str, Any] = _NONE
    neutral: Mapping[str, Any] | None = None
    has_key: bool = False
    needs_grad_fn: bool = False
    is_last: bool = False
    reads_gradient: bool = False
    traced: str | None = None
    num_copies: int = 0
    num_temporaries: int = 5
    exact: Callable[["Step"], None] | None = None
    skipped: Mapping[str, str] = _NONE

    def make(self, key=None, **changes):
        """The transformation, with other arguments where given."""
        arguments = {**self.numbers, **self.static, **changes}
        if self.has_key:
            arguments["key"] = jax.random.key(0) if key is None else key
        return self.factory(**arguments)


class Step(NamedTuple):
    """What a step did, in float64; `rounding` is that of the weights' dtype.

    Attributes:
      params: tree of the weights before.
      updates: tree of what came in.
      after: tree of the weights after.
      before_state: of the transformation.
      state: after the step.
      rounding: relative error of a number in the dtype of the weights.
    """

    params: Any
    updates: Any
    after: Any
    before_state: Any
    state: Any
    rounding: float


def has_exact_zeros(step):
    """Of `soft_threshold`: what is below the threshold is 0, and there is some."""
    zeros = 0
    for w, u, new in zip(*map(jax.tree.leaves, step[:3]), strict=True):
        # Not where rounding decides.
        small, large = np.abs(w + u) < 0.0999, np.abs(w + u) > 0.1001
        np.testing.assert_array_equal(new[small], 0)
        assert np.all(new[large] != 0)
        zeros += small.sum()
    assert zeros > 100


def has_unit_filters(step):
    """Of `rescale_weights`: each filter of a kernel has norm 1."""
    for w, u, new in zip(*map(jax.tree.leaves, step[:3]), strict=True):
        if new.ndim > 1:
            norm = lambda leaf: np.sqrt(np.sum(leaf**2, tuple(range(leaf.ndim - 1))))
            # Half a unit of rounding in the update, and half of one in its sum with the weights.
            error = step.rounding * (norm(w) + norm(u) + 1)
            assert np.all(np.abs(norm(new) - 1) < error)


def follows_the_clean_run(step):
    """Of `anticorrelated_noise`: weights less noise move by the updates alone."""
    noise = [jax.tree.map(double, state.noise) for state in (step.before_state, step.state)]
    old_clean, new_clean = (
        jax.tree.map(np.subtract, tree, xi)
        for tree, xi in zip((step.params, step.after), noise, strict=True)
    )
    trees = map(jax.tree.leaves, (old_clean, step.updates, new_clean))
    for old, u, new in zip(*trees, strict=True):
        # In float32 at least, though the weights themselves are rounded.
        np.testing.assert_allclose(new, old + u, atol=1e-6)
    assert all(np.abs(xi).max() > 0.1 for xi in jax.tree.leaves(noise[1]))


def holds_zeros(step):
    """Of `hold_masks` with `far_from_zero`."""
    for mask, new in zip(*map(jax.tree.leaves, (step.state.masks, step.after)), strict=True):
        assert not mask.all()
        np.testing.assert_array_equal(new[~mask], 0)
        assert np.all(new[mask] != 0)


def keeps_the_weights(step):
    """Of `average_params`: the newest of the latest weights are those after the step."""
    for kept, new in zip(*map(jax.tree.leaves, (step.state.latest[0], step.after)), strict=True):
        np.testing.assert_array_equal(double(kept), new)


def moves_to_the_mean_of_a_ring(step):
    """Of the ring of `among_learners`, of whom the first has weights 1, 1.1 and 1.3 to mix."""
    for w, u, new in zip(*map(jax.tree.leaves, step[:3]), strict=True):
        expected = 3.4 / 3 * w + u
        size = 2 * np.abs(w) + np.abs(u)
        np.testing.assert_allclose((new - expected) / size, 0, atol=3 * step.rounding)


def double(leaf):
    """`leaf` in float64."""
    return np.asarray(leaf, np.float64)


def matrices(params):
    """Mask of the leaves with at least two axes."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def far_from_zero(params):
    """Masks of the larger weights."""
    return jax.tree.map(lambda leaf: jnp.abs(leaf) > 0.5, params)


def everything(params):
    """Masks that keep all weights."""
    return jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), params)


def among_learners(factory):
    """`factory`, its `update` called for four learners at once; what is seen is the first one.

    The others have the same gradient and state, and weights a tenth, two and three tenths larger.
    """

    @functools.wraps(factory)
    def make(*args, **kwargs):
        inner = factory(*args, **kwargs)

        def update(updates, state, params=None, **extra):
            everyone = jax.tree.map(
                lambda leaf: jnp.stack([(1 + k / 10) * leaf for k in range(4)]).astype(leaf.dtype),
                params,
            )
            found = jax.vmap(
                lambda own: inner.update(updates, state, own, **extra), axis_name="learner"
            )(everyone)
            return jax.tree.map(lambda leaf: leaf[0], found)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    return make


def keep_weights(params, count, axis_name):
    """The mixing of learners who do not talk."""
    return params


def gossip_in_pairs(*, key):
    """`gossip_average` with the key of its mixing."""
    return transforms.gossip_average(transforms.random_pair_mixing(key=key))


gossip_in_pairs.static_args = ("key",)

_NO_NEUTRAL = {"neutral": "no setting leaves the update as it is"}

_PASSES_ON = {
    "masked": "it passes all updates on; what a mask does to it stands in test_average_params.py",
    "own_mask": "optax.masked chooses the leaves",
    "wider": "it passes the updates on as they are",
}

_NO_OWN_MASK = {
    "own_mask": "it mixes all leaves that it is given; optax.masked chooses them",
    "empty": "jax.vmap, which calls it here, wants an array",
}

ROWS = {
    "sam": Row(
        transforms.sam,
        {"rho": 0.1},
        neutral={"rho": 0.0},
        needs_grad_fn=True,
        reads_gradient=True,
        traced="num_shards",
    ),
    "asam": Row(
        transforms.sam,
        {"rho": 0.5, "eta": 0.01},
        static={"adaptive": True},
        neutral={"rho": 0},
        needs_grad_fn=True,
        reads_gradient=True,
    ),
    "m_sharpness": Row(
        transforms.sam,
        {"rho": 0.1},
        static={"num_shards": 2},
        neutral={"rho": 0.0},
        needs_grad_fn=True,
        reads_gradient=True,
        traced="num_shards",
    ),
    "gsam": Row(
        transforms.gsam,
        {"rho": 0.1, "alpha": 0.4},
        neutral={"rho": 0.0, "alpha": 0.0},
        needs_grad_fn=True,
        reads_gradient=True,
    ),
    "perturbed_gradient": Row(
        transforms.perturbed_gradient,
        {"std": 0.1},
        neutral={"std": 0.0},
        has_key=True,
        needs_grad_fn=True,
        reads_gradient=True,
    ),
    "perturbed_gradient_everywhere": Row(
        transforms.perturbed_gradient,
        {"std": 0.1},
        static={"layerwise": False},
        neutral={"std": 0.0},
        has_key=True,
        needs_grad_fn=True,
        reads_gradient=True,
    ),
    "anticorrelated_noise": Row(
        transforms.anticorrelated_noise,
        {"std": 0.1},
        neutral={"std": 0.0},
        has_key=True,
        is_last=True,
        num_copies=1,
        exact=follows_the_clean_run,
    ),
    "entropy_sgd": Row(
        transforms.entropy_sgd,
        {"gamma": 0.1, "learning_rate": 0.1, "noise_scale": 0.1},
        static={"num_inner_steps": 3},
        neutral={"num_inner_steps": 0},
        has_key=True,
        needs_grad_fn=True,
        reads_gradient=True,
        num_temporaries=9,
        traced="num_inner_steps",
        skipped={"own_mask": "its walk is one of all parameters"},
    ),
    "rescale_weights": Row(
        transforms.rescale_weights,
        {"target_norm": 1.0},
        static={"mask": matrices},
        is_last=True,
        exact=has_unit_filters,
        traced="every",
        skipped=_NO_NEUTRAL,
    ),
    "remove_radial": Row(
        transforms.remove_radial,
        {"threshold": 10.0, "weight_decay": 0.1, "weight_decay_ratio": 0.5},
        static={"tx": optax.identity(), "mask": matrices},
        neutral={"threshold": 0.0, "weight_decay": 0.0},
    ),
    "coherent_regularization": Row(
        transforms.coherent_regularization,
        {"strength": 0.1},
        static={"gate": transforms.cosine_gate(0.1, hold=3)},
        neutral={"strength": 0.0},
    ),
    "soft_threshold": Row(
        transforms.soft_threshold,
        {"threshold": 0.1},
        neutral={"threshold": 0.0},
        is_last=True,
        exact=has_exact_zeros,
    ),
    "spectral_controller": Row(
        transforms.spectral_controller,
        {"initial_learning_rate": 0.1, "smallest_ratio": 1e-3, "max_momentum": 0.9},
        static={"every": 2, "num_steps": 6},
        has_key=True,
        needs_grad_fn=True,
        reads_gradient=True,
        traced="num_steps",
        num_copies=1,
        skipped={
            "neutral": "it is the optimiser",
            "own_mask": "its curvature is that of all parameters",
            "divided": "the rows of its Lanczos run are whole on each device",
            "explicit": "operators of curvature want automatic axes, and say so",
        },
    ),
    "gossip_ring": Row(
        among_learners(transforms.gossip_average),
        {},
        static={"mixing": transforms.ring_mixing()},
        neutral={"mixing": keep_weights},
        is_last=True,
        exact=moves_to_the_mean_of_a_ring,
        skipped=_NO_OWN_MASK,
    ),
    "gossip_in_pairs": Row(
        among_learners(gossip_in_pairs),
        {},
        has_key=True,
        is_last=True,
        num_temporaries=12,  # of four learners
        skipped={**_NO_OWN_MASK, "neutral": "that of the ring is the mixing, here it is fixed"},
    ),
    "hold_masks": Row(
        transforms.hold_masks,
        {},
        static={"masks": far_from_zero},
        neutral={"masks": everything},
        is_last=True,
        num_copies=1,
        exact=holds_zeros,
        skipped={
            "masked": "its masks are a tree like all parameters",
            "own_mask": "its masks are arrays",
            "abstract": "these masks are made of the weights, which are not there",
        },
    ),
    "average_params": Row(
        transforms.average_params,
        {"decay": 0.9},
        static={"begin": 1, "every": 2},
        neutral={},
        is_last=True,
        traced="every",
        num_copies=2,
        skipped=_PASSES_ON,
    ),
    "average_of_the_latest": Row(
        transforms.average_params,
        {},
        static={"num_latest": 3},
        neutral={},
        is_last=True,
        traced="num_latest",
        num_copies=3,
        exact=keeps_the_weights,
        skipped=_PASSES_ON,
    ),
}
