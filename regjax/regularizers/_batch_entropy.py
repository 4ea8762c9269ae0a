"""Batch entropy: how much of the batch a layer still tells apart, kept near a trainable target."""

import math
import re
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import DictKey
from jax.typing import ArrayLike, DTypeLike

from regjax import _checks, _tree
from regjax._arguments import checked
from regjax._base import Params, State, Tree
from regjax._one_program import one_program

# The leaves of a tap by which its parameter and its state are found in any model.
TARGET, ENTROPY = "target_entropy", "batch_entropy"


def batch_entropy(
    activations: jax.Array, *, degrees_of_freedom: int = 1, axis_name: str | None = None
) -> jax.Array:
    """Computes the entropy of a layer's units over the batch, each as if it were Gaussian.

        H = mean_i log(1 + pi e v_i) / 2,    v_i = sum_n (x_ni - mean_n x_ni)^2 / (N - dof)

    Here x are the activations of N examples n at the units i, and dof is `degrees_of_freedom`. H is
    in nats. It is 0 if the layer treats all examples the same, and never negative. A constant added
    to a unit does not change it. (The differential entropy of a Gaussian, log(2 pi e v) / 2, has no
    minimum.) A unit without variance has gradient 0.

    Example:
      >>> activations = jnp.array([[0.0, 5.0], [2.0, 5.0]])  # the second unit is constant
      >>> print(f"{regularizers.batch_entropy(activations):.3f}")  # log(1 + 2 pi e) / 2, then / 2
      0.724

    Args:
      activations: (N, ...), real floating point; every entry of an example is a unit.
      degrees_of_freedom: subtracted from the number of examples in the variance.
      axis_name: name of a mapped axis (`shard_map`, `vmap`) over which the batch is split into
        equal parts. None under plain `jit`, where sharded activations give the entropy of the whole
        batch by themselves.

    Returns:
      The mean entropy over the units (), in float32 at least; NaN if an activation is.

    Raises:
      ValueError: the batch has one example or not more than `degrees_of_freedom`, or no units.
      TypeError: `activations` are not real floating point.

    References:
      D. Peer, B. Keulen, S. Stabinger, J. Piater, A. Rodriguez-Sanchez (2022), arXiv:2208.01134.
      Formula and unbiased variance are those of the authors' code.
    """
    activations = _checks.floating_array("activations", activations)
    _checks.integer("degrees_of_freedom", degrees_of_freedom, minimum=0)
    _checks.axis_name("axis_name", axis_name)
    shape = jnp.shape(activations)
    if 0 in shape[1:] or not shape:
        raise ValueError(
            f"`activations` must have a batch axis and at least one unit, got shape {shape}."
        )
    num_examples = shape[0] * (1 if axis_name is None else int(lax.psum(1, axis_name)))
    if num_examples <= max(1, degrees_of_freedom):
        raise ValueError(
            f"`activations` must hold more than {max(1, degrees_of_freedom)} examples, got a batch "
            f"of {num_examples}."
        )
    scale = math.pi * math.e * num_examples / (num_examples - degrees_of_freedom)
    return _entropy(activations, scale, axis_name)


@one_program(static="axis_name")
def _entropy(activations: jax.Array, scale: ArrayLike, axis_name: str | None) -> jax.Array:
    units = _tree.wide(activations).reshape(activations.shape[0], -1)
    # Distances from an example, the same on all devices, are exactly 0 for a constant unit.
    reference = lax.stop_gradient(units[:1])
    if axis_name is not None:
        reference = lax.pmin(reference, axis_name)
    distances = units - reference
    deviations = distances - _mean(distances, axis_name)
    return jnp.mean(0.5 * jnp.log1p(scale * _mean(deviations**2, axis_name)))


@checked
def layerwise_batch_entropy(
    task_loss: jax.Array,
    entropies: jax.Array,
    target_entropies: jax.Array,
    *,
    strength: ArrayLike,
    min_target_entropy: ArrayLike,
) -> jax.Array:
    """Penalises layers whose batch entropy is far from a trainable target.

        penalty = task_loss * strength * mean_l (H_l - max(min_target_entropy, |target_l|))^2

    Add the penalty to the loss. It lets gradients reach the first layers of very deep networks
    without skip connections or normalization. The task loss is not held constant: the penalty
    changes its gradient too.

    Put a `BatchEntropyTap` (`regularizers.nnx` or `regularizers.linen`) behind each layer. The taps
    hold the targets as parameters and compute the entropies H_l in training, and
    `tapped_entropies` collects both:

        outputs, new_state = model.apply(params, state, inputs, train=True)
        entropies, targets = regularizers.nnx.tapped_entropies(params, new_state)

    Train the targets with the weights, without weight decay. A target has no gradient while its
    magnitude is at most `min_target_entropy`. Values that worked for us in perceptrons of 10 to 50
    layers are targets of 0.5, `strength` 0.1 and `min_target_entropy` 0.2. The authors' code has
    2.0, 0.1 and 0.2 for 500 layers.

    Example:
      >>> task_loss, entropies = jnp.array(2.0), jnp.array([0.5, 0.9])  # of two layers
      >>> penalty = regularizers.layerwise_batch_entropy(
      ...     task_loss, entropies, jnp.array([0.5, 0.5]), strength=0.1, min_target_entropy=0.2
      ... )
      >>> print(f"{penalty:.3f}")  # 2 * 0.1 * (0 + 0.4^2) / 2
      0.016

    Args:
      task_loss: (), mean loss over the batch.
      entropies: (num_layers,), in nats: `batch_entropy` of each layer's activations.
      target_entropies: (num_layers,), trainable, in nats.
      strength: per squared nat, relative to the task loss; at least 0.
      min_target_entropy: in nats, at least 0. Without it the targets could fall to 0, and the
        penalty with them.

    Returns:
      The penalty (), in float32 at least; NaN if an entropy or a target is.

    Raises:
      ValueError: `strength` or `min_target_entropy` is negative, `task_loss` is not a scalar, or
        `entropies` and `target_entropies` are not vectors of one length.
      TypeError: one of them is not real floating point.

    References:
      D. Peer et al. (2022), arXiv:2208.01134, in the form of the authors' code. There the entropies
      are those of a perceptron's hidden layers after ReLU, except for the first, or those of a
      residual network's blocks after addition and ReLU.
    """
    _checks.number("strength", strength)
    _checks.number("min_target_entropy", min_target_entropy)
    task_loss, entropies, targets = (
        _tree.wide(_checks.floating_array(name, value))
        for name, value in (
            ("task_loss", task_loss),
            ("entropies", entropies),
            ("target_entropies", target_entropies),
        )
    )
    if task_loss.ndim:
        raise ValueError(f"`task_loss` must be a scalar, got shape {task_loss.shape}.")
    if entropies.shape != targets.shape or entropies.ndim != 1 or not entropies.size:
        raise ValueError(
            "`entropies` and `target_entropies` must be vectors with an entry for each layer, got "
            f"shapes {entropies.shape} and {targets.shape}."
        )
    size = jnp.abs(targets)
    # Not `maximum`, which halves the gradient between the two where they are equal.
    floor = jnp.asarray(min_target_entropy, size.dtype)
    wanted = jnp.where((size > floor) | jnp.isnan(size), size, floor)
    return task_loss * jnp.asarray(strength, size.dtype) * jnp.mean((entropies - wanted) ** 2)


def tapped_entropies(params: Params, state: State) -> tuple[jax.Array, jax.Array]:
    """Collects from the taps of a model the entropies of the last batch and their targets.

    A training loss with a `model` from `regjax.from_nnx` or `regjax.from_linen` is

        outputs, new_state = model.apply(params, state, inputs, train=True)
        loss = output_loss_fn(outputs, targets)
        penalty = layerwise_batch_entropy(loss, *tapped_entropies(params, new_state), ...)
        return loss + penalty, new_state

    Example:
      >>> class Network(nnx.Module):
      ...     def __init__(self):
      ...         self.layer = nnx.Linear(1, 4, rngs=nnx.Rngs(0))
      ...         self.tap = regularizers.nnx.BatchEntropyTap(0.5)
      ...     def __call__(self, inputs):
      ...         return self.tap(self.layer(inputs))
      >>> model = regjax.from_nnx(Network())
      >>> inputs = jnp.linspace(-1.0, 1.0, 8)[:, None]
      >>> _, state = model.apply(model.params, model.state, inputs, train=True)
      >>> entropies, targets = regularizers.nnx.tapped_entropies(model.params, state)
      >>> print(entropies.shape, targets)
      (1,) [0.5]

    Args:
      params: nested dicts with the targets of `BatchEntropyTap` modules, such as those of a
        `regjax.Model`.
      state: state of the same model. Pass the new state that `apply` returned, through which the
        gradient reaches the layers. Before the first training batch the entropies are NaN.

    Returns:
      The entropies and the targets, each (num_layers,), in the order of the layers' names, with
      numbers in the names sorted by value. A tap that is stacked by flax's `scan` or `vmap` over
      layers gives an entry for each layer.

    Raises:
      ValueError: there is no tap, or `params` and `state` do not have the same taps.
    """
    targets, entropies = _leaves_named(TARGET, params), _leaves_named(ENTROPY, state)
    if not targets or not entropies:
        name, leaf = ("state", ENTROPY) if targets else ("params", TARGET)
        raise ValueError(
            f"`{name}` must hold the `{leaf}` of a BatchEntropyTap, got none. The model needs a "
            "tap behind each layer; its params come first here, then its state."
        )
    if targets.keys() != entropies.keys() and all(path[:1] == (ENTROPY,) for path in entropies):
        # linen has the name of the collection in front.
        entropies = {path[1:]: leaf for path, leaf in entropies.items()}
    unpaired = sorted(map(_readable, targets.keys() ^ entropies.keys())) or [
        _readable(path)
        for path, target in targets.items()
        if jnp.shape(target) != jnp.shape(entropies[path])
    ]
    if unpaired:
        raise ValueError(
            "`params` and `state` must hold the same taps, with one target for each entropy, got "
            f"no pair for {', '.join(unpaired)}."
        )
    paths = sorted(targets, key=lambda path: [_by_number(key) for key in path])
    entries = [[jnp.ravel(_tree.wide(tree[p])) for p in paths] for tree in (entropies, targets)]
    return jnp.concatenate(entries[0]), jnp.concatenate(entries[1])


def check_tap(initial_target_entropy: float, degrees_of_freedom: int, dtype: DTypeLike) -> None:
    """Checks the options of a tap."""
    _checks.number("initial_target_entropy", initial_target_entropy)
    _checks.integer("degrees_of_freedom", degrees_of_freedom, minimum=0)
    _checks.inexact_dtype("param_dtype", dtype)


def _mean(values: jax.Array, axis_name: str | None) -> jax.Array:
    mean = jnp.mean(values, 0, keepdims=True)
    return mean if axis_name is None else lax.pmean(mean, axis_name)


def _leaves_named(name: str, tree: Tree) -> dict[tuple[Hashable, ...], jax.Array]:
    """Finds the leaves under the key `name`, by the keys above it."""
    paths = [
        # Behind the keys there may be the value of a variable of nnx.
        (tuple(entry.key for entry in path if isinstance(entry, DictKey)), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return {path[:-1]: leaf for path, leaf in paths if path and path[-1] == name}


def _by_number(key: Hashable) -> list[str | int]:
    """Puts a key in its order: "tap_2" comes before "tap_10"."""
    parts = re.split(r"(\d+)", str(key))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _readable(path: tuple[Hashable, ...]) -> str:
    return "/".join(map(str, path)) or "the model itself"
