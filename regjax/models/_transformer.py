"""A small decoder-only transformer, as in GPT."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Sharding

from regjax import _checks, _tree
from regjax._nnx_module import Module

# Of embeddings and positions: with the embedding as the head, logits begin near 0.
_EMBEDDING_SCALE = 0.02


class GPT(Module):
    """Builds a decoder-only transformer: causal self-attention and perceptrons on embedded tokens.

        pre-norm    x + attention(norm(x)),  then x + perceptron(norm(x));  a norm after the stack
        post-norm   norm(x + attention(x)),  then norm(x + perceptron(x));  none after the stack

    The perceptrons are four times as wide, with GELU. The norms are layer norms. Embeddings of
    positions are added to those of the tokens, and the head is the token embedding. The sub-trees
    of the parameters are "tokens", "positions", "block_0", ... (or "blocks" with `scan`), and with
    pre-norm "norm".

    Example:
      >>> module = models.GPT(10, context=4, width=4, depth=1, num_heads=1, rngs=nnx.Rngs(0))
      >>> logits = nnx.jit(models.GPT.__call__)(module, jnp.array([[1, 2, 3], [1, 2, 9]]))
      >>> print(logits.shape, jnp.array_equal(logits[0, :2], logits[1, :2]))  # it looks back alone
      (2, 3, 10) True

    Args:
      num_tokens: size of the vocabulary.
      context: largest number of tokens in a sequence.
      width: features of each token, a multiple of `num_heads`.
      depth: number of blocks.
      num_heads: number of heads of the attention.
      post_norm: whether the order is that of the first transformers, which is harder to train.
      remat: whether to keep only the inputs of a block for the backward pass and recompute the
        rest. Takes less memory and the time of about one more forward pass.
      scan: whether the arrays of the blocks are stacked along a leading axis, and the blocks are
        one loop. The program is then as long as one block, however many there are.
      feature_sharding: where features and logits, (batch, length, ...), lie on a mesh, such as
        `NamedSharding(mesh, PartitionSpec("data"))`. Pass it if parameters are divided: otherwise
        the compiler may choose to keep all features on each device. None: the compiler decides.
      rngs: generators whose stream "params", or else the default one, draws the initial parameters.

    Raises:
      ValueError: a size is too small, or `width` is no multiple of `num_heads`.
      TypeError: a size is not a Python integer.

    References:
      A. Vaswani et al. (2017), arXiv:1706.03762, post-norm. R. Xiong et al. (2020),
      arXiv:2002.04745, on both orders. The initial scales are flax's, except for the embeddings.
    """

    def __init__(
        self,
        num_tokens: int,
        *,
        context: int,
        width: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        post_norm: bool = False,
        remat: bool = False,
        scan: bool = False,
        feature_sharding: Sharding | None = None,
        rngs: nnx.Rngs,
    ):
        _checks.integer("num_tokens", num_tokens)
        self.context = _checks.integer("context", context)
        self.depth = _checks.integer("depth", depth)
        if _checks.integer("width", width) % _checks.integer("num_heads", num_heads):
            raise ValueError(f"`width` must be a multiple of {num_heads} heads, got {width}.")
        init = nnx.initializers.normal(_EMBEDDING_SCALE)
        self.tokens = nnx.Embed(num_tokens, width, embedding_init=init, rngs=rngs)
        self.positions = nnx.Embed(context, width, embedding_init=init, rngs=rngs)
        blocks = [_Block(width, num_heads, post_norm=post_norm, rngs=rngs) for _ in range(depth)]
        names = ["blocks"] if scan else [f"block_{i}" for i in range(depth)]
        for name, block in zip(names, [_stacked(blocks)] if scan else blocks, strict=True):
            setattr(self, name, block)
        self.norm = None if post_norm else nnx.LayerNorm(width, rngs=rngs)
        self.remat, self.scan, self.feature_sharding = remat, scan, feature_sharding

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes logits (batch, length, num_tokens) of the next of int tokens (batch, length)."""
        if inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(
                "`inputs` must be integer tokens of shape (batch, length), got "
                f"{inputs.dtype} of shape {inputs.shape}."
            )
        length = inputs.shape[1]
        if length > self.context:
            raise ValueError(
                f"`inputs` must have at most {self.context} tokens (`context`), got {length}."
            )
        # The arrays themselves: `nnx.Embed` casts to the dtype that it was made with. Looked up
        # in float32 at least, or gradients of bfloat16 tokens would add up in bfloat16.
        tokens, positions = self.tokens.embedding[...], self.positions.embedding[...]
        features = _tree.wide(tokens)[inputs] + _tree.wide(positions)[None, :length]
        features = self._placed(features.astype(tokens.dtype))
        if self.scan:
            features = self._through_stack(features)
        else:
            for i in range(self.depth):
                block = getattr(self, f"block_{i}")
                features = _recomputed(block, features) if self.remat else block(features)
                features = self._placed(features)
        if self.norm is not None:
            features = self.norm(features)
        return self._placed(features @ tokens.T)

    def _through_stack(self, features: jax.Array) -> jax.Array:
        graph, weights = nnx.split(self.blocks)

        def through_one(features: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            return self._placed(nnx.merge(graph, weights)(features)), None

        # Weights that a loop goes over, not ones that it looks up: their gradients are a stack too.
        body = jax.checkpoint(through_one) if self.remat else through_one
        return lax.scan(body, features, weights)[0]

    def _placed(self, features: jax.Array) -> jax.Array:
        if self.feature_sharding is None:
            return features
        return lax.with_sharding_constraint(features, self.feature_sharding)


class _Block(nnx.Module):
    """Attention and perceptron with their norms, before or behind each."""

    def __init__(self, width: int, num_heads: int, *, post_norm: bool, rngs: nnx.Rngs):
        self.post_norm = post_norm
        self.num_heads = num_heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.queries_keys_values = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attended = nnx.Linear(width, width, rngs=rngs)
        self.perceptron_norm = nnx.LayerNorm(width, rngs=rngs)
        self.widen = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        if self.post_norm:
            features = self.attention_norm(features + self._attention(features))
            return self.perceptron_norm(features + self._perceptron(features))
        features = features + self._attention(self.attention_norm(features))
        return features + self._perceptron(self.perceptron_norm(features))

    def _attention(self, features: jax.Array) -> jax.Array:
        split = (*features.shape[:2], 3 * self.num_heads, -1)
        heads = self.queries_keys_values(features).reshape(split)
        queries, keys, values = jnp.split(heads, 3, axis=2)
        # Written out: flax's and JAX's have scores in float32 whatever comes in.
        scores = jnp.einsum("bqhd,bkhd->bhqk", queries, keys) / math.sqrt(keys.shape[-1])
        is_seen = jnp.tri(features.shape[1], dtype=bool)[None, None]
        shares = jax.nn.softmax(jnp.where(is_seen, scores, -jnp.inf))
        found = jnp.einsum("bhqk,bkhd->bqhd", shares, values)
        return self.attended(found.reshape(features.shape))

    def _perceptron(self, features: jax.Array) -> jax.Array:
        return self.narrow(jax.nn.gelu(self.widen(features)))


def _stacked(blocks: list[_Block]) -> _Block:
    """One module whose arrays are those of all blocks, along a leading axis."""
    graph = nnx.graphdef(blocks[0])
    states = [nnx.state(block) for block in blocks]
    return nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


def _recomputed(block: _Block, features: jax.Array) -> jax.Array:
    # On the arrays alone: `jax.checkpoint` knows nothing of modules.
    graph, weights = nnx.split(block)
    apply = lambda weights, features: nnx.merge(graph, weights)(features)
    return jax.checkpoint(apply)(weights, features)
