"""The models of the targets for the Fisher matrix: E[s s'] of each, exactly and from draws.

A function here takes outputs (examples, ...) and their tangent u, and gives E[s s'] u of each
prediction, with s = d log p(target) / d outputs.
"""

import jax
import jax.numpy as jnp

from regjax._base import Tree


def _exact_categorical(outputs: jax.Array, tangent: jax.Array) -> jax.Array:
    probabilities = jax.nn.softmax(outputs)
    centred = tangent - jnp.sum(probabilities * tangent, axis=-1, keepdims=True)
    return probabilities * centred


def _sampled_categorical(outputs: jax.Array, keys: jax.Array, tangent: jax.Array) -> jax.Array:
    sample = jax.vmap(jax.vmap(jax.random.categorical, (0, None)))
    one_hot = jax.nn.one_hot(sample(keys, outputs), outputs.shape[-1], dtype=outputs.dtype)
    return _score_products(jax.nn.softmax(outputs)[:, None] - one_hot, tangent)


def _exact_bernoulli(outputs: jax.Array, tangent: jax.Array) -> jax.Array:
    # The product of both probabilities, each from the side where it does not cancel.
    return jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs) * tangent


def _sampled_bernoulli(outputs: jax.Array, keys: jax.Array, tangent: jax.Array) -> jax.Array:
    probability = jax.nn.sigmoid(outputs)
    sample = jax.vmap(jax.vmap(jax.random.bernoulli, (0, None)))
    scores = probability[:, None] - sample(keys, probability).astype(outputs.dtype)
    return _score_products(scores, tangent)


def _exact_normal(outputs: jax.Array, tangent: jax.Array) -> jax.Array:
    return tangent


def _sampled_normal(outputs: jax.Array, keys: jax.Array, tangent: jax.Array) -> jax.Array:
    sample = jax.vmap(
        jax.vmap(lambda key: jax.random.normal(key, outputs.shape[1:], outputs.dtype))
    )
    return _score_products(sample(keys), tangent)


def _score_products(scores: jax.Array, tangent: jax.Array) -> jax.Array:
    """The mean over draws of s <s, u>; scores (examples, draws, ..., classes or dimensions)."""
    if tangent.ndim == 1:  # one number an example: <s, u> is no sum
        return jnp.mean(scores**2, axis=1) * tangent
    tangent = tangent[:, None]
    inner = jnp.sum(scores * tangent, axis=-1, keepdims=True)
    return jnp.mean(scores * inner, axis=1)


LIKELIHOODS = {
    "categorical": (_exact_categorical, _sampled_categorical),
    "bernoulli": (_exact_bernoulli, _sampled_bernoulli),
    "normal": (_exact_normal, _sampled_normal),
}


def check_weights(likelihood: str, weights: jax.Array, outputs: jax.Array) -> None:
    """Checks that weights have a prefix of the axes of the outputs, which predictions have.

    Raises:
      ValueError: they have not.
    """
    predictions = outputs.shape[:-1] if likelihood == "categorical" else outputs.shape
    if not weights.ndim or weights.shape != predictions[: weights.ndim]:
        raise ValueError(
            f"`weights` must have a prefix of the axes of the predictions, {predictions}, got "
            f"shape {weights.shape}."
        )


def check_outputs(likelihood: str, outputs: Tree, num_examples: int) -> None:
    """Checks that outputs, known by their shape, can be of this kind of prediction.

    Raises:
      TypeError: the outputs are no single real floating-point array; "empirical" takes trees.
      ValueError: a leading axis is not the examples, or a softmax has less than two classes.
    """
    if likelihood == "empirical":
        for leaf in jax.tree.leaves(outputs):
            if leaf.shape[:1] != (num_examples,):
                raise ValueError(
                    f"`model_fn` must return outputs whose leading axis is the {num_examples} "
                    f"examples, got shape {leaf.shape}."
                )
        return
    shape, dtype = getattr(outputs, "shape", None), getattr(outputs, "dtype", jnp.int32)
    if shape is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            "`model_fn` must return one real floating-point array, got "
            f"{jax.tree.map(lambda leaf: f'{leaf.dtype}{list(leaf.shape)}', outputs)}."
        )
    if shape[:1] != (num_examples,):
        raise ValueError(
            f"`model_fn` must return outputs whose leading axis is the {num_examples} examples, "
            f"got shape {shape}."
        )
    if likelihood == "categorical" and (len(shape) < 2 or shape[-1] < 2):
        raise ValueError(
            '`likelihood="categorical"` must have outputs (examples, ..., classes) with at least '
            f'two classes, got shape {shape}. For one logit use "bernoulli".'
        )
