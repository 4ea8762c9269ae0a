"""Every transformation on a convnet with running statistics: they tick once an update.

They come from the clean pass: those of the weights before the update, never of perturbed ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import regjax
from regjax import normalization, transforms
from tests import oracles
from tests.registry import ROWS

pytestmark = pytest.mark.usefixtures("default_promotion")
RANDOM = np.random.default_rng(0)
INPUTS = jnp.asarray(RANDOM.normal(size=(8, 6, 6, 1)), jnp.float32)
TARGETS = jnp.asarray(RANDOM.integers(3, size=8), jnp.int32)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, inputs, train: bool):
        hidden = linen.Conv(4, (3, 3), use_bias=False)(inputs)
        hidden = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(hidden))
        return linen.Dense(3)(hidden.mean((1, 2)))


class OurLinenNet(linen.Module):
    @linen.compact
    def __call__(self, inputs, train: bool):
        hidden = linen.Conv(4, (3, 3), use_bias=False)(inputs)
        norm = normalization.linen.BatchNorm(use_running_average=not train, momentum=0.9)
        return linen.Dense(3)(linen.relu(norm(hidden)).mean((1, 2)))


NORMS = {
    "batch norm": lambda rngs: nnx.BatchNorm(4, momentum=0.9, rngs=rngs),
    "our batch norm": lambda rngs: normalization.nnx.BatchNorm(4, momentum=0.9),
    "group norm plus": lambda rngs: normalization.nnx.GroupNormPlus(
        4, num_groups=2, batch_axes=None, track_running=True
    ),
    "weight norm, mean only": lambda rngs: normalization.nnx.MeanOnlyBatchNorm(4),
}


class NnxNet(nnx.Module):
    def __init__(self, norm, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
        if norm.startswith("weight"):
            self.conv = normalization.nnx.WeightNorm(self.conv)
        self.norm = NORMS[norm](rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, inputs):
        return self.head(nnx.relu(self.norm(self.conv(inputs))).mean((1, 2)))


def make(kind):
    if kind.startswith("nnx"):
        return regjax.from_nnx(NnxNet(kind.removeprefix("nnx, "), nnx.Rngs(0)))
    net = LinenNet() if kind == "linen, batch norm" else OurLinenNet()
    return regjax.from_linen(net, net.init(jax.random.key(0), INPUTS, train=False))


KINDS = ["linen, batch norm", "linen, our batch norm", *(f"nnx, {norm}" for norm in NORMS)]


def convolutions(params):
    """Mask of the kernels that feed the batch norm."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) == 4, params)


def chain(name):
    row = ROWS[name]
    masked = {"mask": convolutions} if "mask" in row.static else {}
    tx, descent = row.make(**masked), optax.sgd(0.1, momentum=0.9)
    return optax.chain(descent, tx) if row.is_last else optax.chain(tx, descent)


def loss_with_state(model, params, state):
    outputs, state = model.apply(params, state, INPUTS, train=True)
    return oracles.cross_entropy(outputs, TARGETS), state


# Every transformation with one norm, of the libraries in turn; one of each sort of transformation
# (that takes gradients elsewhere, draws, or changes weights behind the optimiser) with all norms.
_IN_TURN = ("linen, batch norm", "nnx, our batch norm")
_WITH_ALL = ("sam", "perturbed_gradient", "rescale_weights")
PAIRS = [
    (name, kind)
    for i, name in enumerate(ROWS)
    for kind in KINDS
    if kind == _IN_TURN[i % 2] or name in _WITH_ALL
]


# The controller looks at the curvature inside of this step, which is slow and says so.
@pytest.mark.filterwarnings("ignore:A branch with convolutions")
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_statistics_tick_once_and_are_those_of_the_clean_weights(name, kind):
    model, tx = make(kind), chain(name)
    value_and_grad = jax.value_and_grad(
        lambda params, state: loss_with_state(model, params, state), has_aux=True
    )

    @jax.jit
    def step(params, state, opt_state):
        (_, new_state), grads = value_and_grad(params, state)
        grad_fn = lambda p, i: value_and_grad(p, state)[1]
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), new_state, opt_state

    params, state, opt_state = model.params, model.state, tx.init(model.params)
    expected = state
    for _ in range(2):
        expected = regjax.updated_statistics(model, params, INPUTS, state=expected)
        params, state, opt_state = step(params, state, opt_state)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(compare, state, expected)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, params, model.params))
    assert 1e-4 < float(moved) < 10


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_perturbed_weights_are_others(kind):
    # The named wrong version of the test above: keeping the state that the perturbed pass leaves.
    model = make(kind)
    clean = regjax.updated_statistics(model, model.params, INPUTS)
    seen = []

    def grad_fn(params, i):
        seen.append(regjax.updated_statistics(model, params, INPUTS))
        return params

    for seed in range(3):
        tx = ROWS["perturbed_gradient_everywhere"].make(jax.random.key(seed))
        tx.update(model.params, tx.init(model.params), model.params, grad_fn=grad_fn)
    # How far depends on the draw; the test above would see a hundredth of it.
    for other in seen:
        differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), clean, other)
        assert max(jax.tree.leaves(differences)) > 3e-4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "batch norm" in kind])
def test_rescaling_leaves_the_outputs_in_train_mode(kind):
    model = make(kind)
    tx = transforms.rescale_weights(mask=convolutions, target_norm=2.0)
    zero = jax.tree.map(jnp.zeros_like, model.params)
    updates, _ = tx.update(zero, tx.init(model.params), model.params)
    rescaled = optax.apply_updates(model.params, updates)
    norms = [
        jnp.sqrt(jnp.sum(leaf**2, (0, 1, 2)))
        for leaf in jax.tree.leaves(rescaled)
        if leaf.ndim == 4
    ]
    np.testing.assert_allclose(norms[0], 2, rtol=1e-5)

    def outputs(params, train):
        return model.apply(params, model.state, INPUTS, train=train)[0]

    # Up to the epsilon of batch norm, 1e-5 on variances of order 0.1.
    np.testing.assert_allclose(outputs(rescaled, True), outputs(model.params, True), atol=1e-3)
    # In evaluation mode the old statistics are in units of the old norm.
    assert jnp.abs(outputs(rescaled, False) - outputs(model.params, False)).max() > 0.1
