"""Data, network and training that the two claims on pruning share.

Convolutions of 16, 32 and 64 channels with batch norm and ReLU, pooling behind the second, a linear
head: 112 gates. Pruned weights are held at zero while the rest trains on, so that no round compiles
anything; at the end the units are really removed and the compiler counts.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import regjax
from benchmarks.claims import _networks
from regjax import Model, pruning, transforms

RATE, MOMENTUM, BATCH = 0.05, 0.9, 64
_TEST_IMAGES = 2000
_NUM_TRAIN = {"digits": 1440, "fashion_mnist": 3000}


class Problem(NamedTuple):
    """A network trained on a data set.

    Attributes:
      split: images of 8 x 8 pixels (digits) or 14 x 14 (Fashion-MNIST, means of four).
      half: the model after half of the training. end: after all of it.
    """

    split: _networks.Split
    half: Model
    end: Model


@functools.cache
def split(data: str) -> _networks.Split:
    """Training images and test images, 2000 at most."""
    load = _networks.digits if data == "digits" else _networks.small_fashion_mnist
    whole = load(_NUM_TRAIN[data])
    few = slice(_TEST_IMAGES)
    return _networks.as_images(whole._replace(x_test=whole.x_test[few], y_test=whole.y_test[few]))


@functools.cache
def trained(data: str, channels: tuple[int, ...], num_steps: int, seed: int) -> Problem:
    """The network of this seed, trained by SGD with momentum; remembered."""
    images = split(data)
    start = regjax.from_nnx(_network(images.x.shape[1], channels, seed))
    everything = pruning.full_masks(start.params)
    half, state = train(start, images, everything, num_steps // 2, 2 * seed)
    end, _ = train(half, images, everything, num_steps - num_steps // 2, 2 * seed + 1, state)
    return Problem(images, half, end)


def _network(side: int, channels: tuple[int, ...], seed: int) -> nnx.Module:
    rngs, inputs, layers = nnx.Rngs(seed), 1, []
    for i, outputs in enumerate(channels):
        norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        # ReLU comes behind: it and the maximum commute.
        behind = nnx.Sequential(norm, _pool) if i == 1 else norm
        convolution = nnx.Conv(inputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        layers.append((convolution, behind))
        inputs = outputs
    head = nnx.Sequential(_flatten, nnx.Linear((side // 2) ** 2 * inputs, 10, rngs=rngs))
    return _networks.Net(layers, head, nnx.relu)


def _pool(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (2, 2), (2, 2))


def _flatten(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)


def train(
    model: Model, images: _networks.Split, masks: Any, num_steps: int, seed: int, state: Any = None
) -> tuple[Model, Any]:
    """The model after so many more steps with masked weights held at 0; the optimiser's state."""
    params, model_state = model.params, model.state
    state = _OPTIMIZER.init(params) if state is None else state
    for rows in _batches(len(images.y), num_steps, seed):
        params, model_state, state = _step(
            model.apply, params, model_state, state, masks, images.x, images.y, rows
        )
    return model._replace(params=params, state=model_state), state


_OPTIMIZER = optax.chain(optax.sgd(RATE, momentum=MOMENTUM), transforms.hold_masks())


@functools.partial(jax.jit, static_argnums=0)
def _step(
    apply: Any, params: Any, model_state: Any, state: Any, masks: Any, x: Any, y: Any, rows: Any
) -> Any:
    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, new = apply(params, model_state, x[rows], train=True)
        return _networks.cross_entropy(logits, y[rows]), new

    grads, new = jax.grad(loss, has_aux=True)(params)
    updates, state = _OPTIMIZER.update(grads, state, params, masks=masks)
    return optax.apply_updates(params, updates), new, state


def _batches(num_examples: int, num_steps: int, seed: int) -> Iterator[np.ndarray]:
    random, done = np.random.default_rng(seed), 0
    while done < num_steps:
        order = random.permutation(num_examples)[: num_examples - num_examples % BATCH]
        for rows in order.reshape(-1, BATCH)[: num_steps - done]:
            yield rows
            done += 1


def without(model: Model, masks: Any) -> Model:
    """The model with masked weights at 0."""
    zeroed = jax.tree.map(lambda leaf, mask: jnp.where(mask, leaf, 0), model.params, masks)
    return model._replace(params=zeroed)


@functools.cache
def structure(data: str, channels: tuple[int, ...]) -> pruning.Structure:
    """The same for all seeds."""
    x = split(data).x[:2]
    model = regjax.from_nnx(_network(x.shape[1], channels, 0))
    return pruning.find_structure(regjax.model_function(model), model.params, x)
