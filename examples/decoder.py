"""A small language model as they are written: scanned layers, causal attention, ragged texts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Block(nn.Module):
    """Attention and perceptron, each behind its norm and beside a residual path."""

    num_heads: int

    @nn.compact
    def __call__(self, x, mask):
        """Returns the new activations, (batch, tokens, width), and what a scan wants beside it."""
        attention = nn.MultiHeadDotProductAttention(
            self.num_heads, use_bias=False, name="attention"
        )
        x = x + attention(nn.RMSNorm(name="attention_norm")(x), mask=mask)
        hidden = nn.Dense(2 * x.shape[-1], name="up")(nn.RMSNorm(name="mlp_norm")(x))
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(hidden)), None


class Decoder(nn.Module):
    """Logits (batch, tokens, vocabulary) of the next token, with layers in one array or apart."""

    vocabulary: int = 7
    width: int = 4
    num_heads: int = 2
    num_layers: int = 2
    scan: bool = True

    @nn.compact
    def __call__(self, tokens):
        """Computes the logits of int tokens (batch, tokens)."""
        embedding = nn.Embed(self.vocabulary, self.width, name="embedding")
        x, mask = embedding(tokens), nn.make_causal_mask(tokens)
        if self.scan:
            stack = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.num_layers,
            )
            x, _ = stack(self.num_heads, name="layers")(x, mask)
        else:
            for i in range(self.num_layers):
                x, _ = Block(self.num_heads, name=f"layer_{i}")(x, mask)
        return embedding.attend(nn.RMSNorm(name="norm")(x))


def unrolled(params):
    """Returns the parameters of the scanned decoder as those of the one with layers apart."""
    params = dict(params)
    layers = params.pop("layers")
    num_layers = len(jax.tree.leaves(layers)[0])
    take = lambda i: jax.tree.map(lambda leaf: leaf[i], layers)
    return {**params, **{f"layer_{i}": take(i) for i in range(num_layers)}}


def masked_nll(logits, targets, mask):
    """Returns the sum of the losses of the tokens that count, and how many they are."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nll * mask), jnp.sum(mask)


def texts(num_texts=16, length=6, vocabulary=7, seed=0):
    """Returns tokens and targets, int (texts, length), and a float mask; the last are empty."""
    random = np.random.default_rng(seed)
    tokens = random.integers(vocabulary, size=(num_texts, length + 1))
    lengths = np.sort(random.integers(length + 1, size=num_texts))[::-1]
    lengths[-num_texts // 4 :] = 0
    mask = np.arange(length) < lengths[:, None]
    return tuple(
        np.asarray(array, kind)
        for array, kind in ((tokens[:, :-1], "int32"), (tokens[:, 1:], "int32"), (mask, "float32"))
    )
