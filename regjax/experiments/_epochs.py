"""One epoch of training: a pure step on plain trees, repeated by `_loops.scan`.

An epoch is a permutation of the examples, cut into blocks of batches. A block of uint8 images is
gathered on the device, or by the host where the set is too large for the device; what is then run
on it is one and the same compiled program, so that both ways give the same bits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from regjax import _loops
from regjax._base import Params, PRNGKey, State
from regjax._one_program import one_program
from regjax._runners import ApplyFn
from regjax.experiments._data import Dataset
from regjax.experiments._inputs import Scaling, cross_entropy, measure_scaling, normalize
from regjax.experiments._settings import TrainSettings

# A block is sent and reported as a whole: small beside any memory, often enough for a bar.
_BLOCK_BYTES = 2**25
_BLOCK_BATCHES = 64


class Weights(NamedTuple):
    """What training changes: parameters, batch statistics, and the optimiser's state."""

    params: Params
    model_state: State
    optimizer_state: optax.OptState


class Block(NamedTuple):
    """Some batches of an epoch, what a step reads.

    Attributes:
      images: (batches, batch size, height, width, channels), as in the data set.
      labels: (batches, batch size) int32.
      scaling: of the inputs.
      key: typed key of the epoch's steps.
      first_step: (), int32, number of the block's first batch in the epoch.
    """

    images: jax.Array
    labels: jax.Array
    scaling: Scaling
    key: jax.Array
    first_step: jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
    """The training step as the body of a fold; the carry is (weights, sum of the losses).

    Attributes:
      apply: the model's.
      optimizer: its update is given `grad_fn`, as the transformations of this library read it.
      num_shards: equal parts of a batch, which `grad_fn` tells apart by its index. With one part
        the index counts the batches that follow in the block, those of an inner loop.
    """

    apply: ApplyFn
    optimizer: optax.GradientTransformationExtraArgs
    num_shards: int = 1

    def __call__(
        self, block: Block, carry: tuple[Weights, jax.Array], i: jax.Array
    ) -> tuple[Weights, jax.Array]:
        """Returns the carry after batch `i` of `block`."""
        weights, total = carry
        key = jax.random.fold_in(block.key, block.first_step + i)

        def loss_fn(
            params: Params, images: jax.Array, labels: jax.Array
        ) -> tuple[jax.Array, State]:
            inputs = normalize(images, block.scaling)
            outputs, model_state = self.apply(
                params, weights.model_state, inputs, train=True, key=key
            )
            return cross_entropy(outputs, labels), model_state

        def grad_fn(params: Params, index: ArrayLike) -> Params:
            batch = self._inner_batch(block, i, index)
            return jax.grad(loss_fn, has_aux=True)(params, *batch)[0]

        evaluate = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, model_state), grads = evaluate(weights.params, block.images[i], block.labels[i])
        updates, optimizer_state = self.optimizer.update(
            grads, weights.optimizer_state, weights.params, grad_fn=grad_fn
        )
        params = optax.apply_updates(weights.params, updates)
        return Weights(params, model_state, optimizer_state), total + loss

    def _inner_batch(
        self, block: Block, i: jax.Array, index: ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        if self.num_shards == 1:
            following = (i + jnp.asarray(index, i.dtype)) % block.labels.shape[0]
            return block.images[following], block.labels[following]
        images, labels = (
            batch[i].reshape(self.num_shards, -1, *batch.shape[2:])
            for batch in (block.images, block.labels)
        )
        return images[index], labels[index]


class Epochs:
    """Runs the epochs of one training run.

    Args:
      settings: `batch_size`, `device_bytes`, `dtype`.
      dataset: the examples.
      step: the training step.
    """

    def __init__(self, settings: TrainSettings, dataset: Dataset, step: Step):
        images, labels, self._step = dataset.train_inputs, dataset.train_targets, step
        self._scaling = measure_scaling(dataset, settings.dtype)
        self._num_examples, self._batch_size = len(labels), settings.batch_size
        self.num_batches = self._num_examples // self._batch_size
        batch_bytes = settings.batch_size * math.prod(images.shape[1:]) * images.itemsize
        self._block_batches = max(1, min(_BLOCK_BATCHES, _BLOCK_BYTES // batch_bytes))
        self._gather: Callable[[np.ndarray], tuple[jax.Array, jax.Array]]
        if images.nbytes <= settings.device_bytes:
            self._gather = functools.partial(_gather, jnp.asarray(images), jnp.asarray(labels))
        else:
            self._gather = lambda order: (jnp.asarray(images[order]), jnp.asarray(labels[order]))

    def run(
        self, weights: Weights, key: jax.Array, callback: Callable[[int], None]
    ) -> tuple[Weights, jax.Array]:
        """Runs one epoch.

        Args:
          weights: not changed, so that it is still there if the epoch goes wrong.
          key: typed key of the epoch: of the order and of the steps.
          callback: called with the number of batches done.

        Returns:
          The new weights, and the mean over the steps of the loss before each.
        """
        order_key, step_key = jax.random.split(key)
        carry = (weights, jnp.zeros((), self._scaling.mean.dtype))
        for first, (images, labels) in self._blocks(order_key):
            # The block before was computed while this one was gathered.
            jax.block_until_ready(carry)
            callback(first)
            block = Block(images, labels, self._scaling, step_key, jnp.int32(first))
            carry = _loops.scan(self._step, carry, len(labels), operands=block)
        weights, total = jax.block_until_ready(carry)
        callback(self.num_batches)
        return weights, total / self.num_batches

    def _blocks(self, key: jax.Array) -> Iterator[tuple[int, tuple[jax.Array, jax.Array]]]:
        order = np.asarray(_permutation(key, self._num_examples))
        order = order[: self.num_batches * self._batch_size].reshape(self.num_batches, -1)
        for first in range(0, self.num_batches, self._block_batches):
            yield first, self._gather(order[first : first + self._block_batches])


@one_program(static="count")
def _permutation(key: PRNGKey, count: int) -> jax.Array:
    return jax.random.permutation(key, count)


@one_program()
def _gather(images: jax.Array, labels: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    return images[order], labels[order]
