"""The transformer against NumPy, and its curvature against a dense Hessian."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import regjax
from regjax import curvature
from regjax.models import GPT
from tests import oracles

TOKENS = jnp.asarray(np.random.default_rng(0).integers(11, size=(3, 5)), jnp.int32)


def make(seed=0, **options):
    sizes = {"context": 6, "width": 8, "depth": 2, "num_heads": 2, **options}
    return regjax.from_nnx(GPT(11, **sizes, rngs=nnx.Rngs(seed)))


def outputs(model, tokens=TOKENS, params=None):
    params = model.params if params is None else params
    return regjax.model_function(model)(params, tokens)


def perturbed(params, scale=0.3):
    """Weights with which nothing is 0, as biases are at the start."""
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * random.normal(size=leaf.shape), leaf.dtype), params
    )


def layer_norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(x, p, num_heads):
    """Token by token, head by head: each looks at itself and what was before."""
    width = x.shape[-1] // num_heads
    found = np.zeros_like(x)
    projected = linear(x, p["queries_keys_values"])
    for example in range(len(x)):
        for head in range(num_heads):
            own = slice(head * width, (head + 1) * width)
            queries, keys, values = (part[:, own] for part in np.split(projected[example], 3, 1))
            for i in range(x.shape[1]):
                scores = np.exp(keys[: i + 1] @ queries[i] / math.sqrt(width))
                found[example, i, own] = scores / scores.sum() @ values[: i + 1]
    return linear(found, p["attended"])


def perceptron(x, p):
    return linear(gelu(linear(x, p["widen"])), p["narrow"])


def by_hand(params, tokens, *, depth, num_heads, post_norm):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = params["tokens"]["embedding"][tokens]
    x = x + params["positions"]["embedding"][: tokens.shape[1]]
    for i in range(depth):
        p = params[f"block_{i}"]
        if post_norm:
            x = layer_norm(x + attention(x, p, num_heads), p["attention_norm"])
            x = layer_norm(x + perceptron(x, p), p["perceptron_norm"])
        else:
            x = x + attention(layer_norm(x, p["attention_norm"]), p, num_heads)
            x = x + perceptron(layer_norm(x, p["perceptron_norm"]), p)
    if not post_norm:
        x = layer_norm(x, params["norm"])
    return x @ params["tokens"]["embedding"].T


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
def test_the_outputs_are_those_of_numpy(post_norm, remat):
    model = make(post_norm=post_norm, remat=remat)
    params = perturbed(model.params)
    expected = by_hand(params, np.asarray(TOKENS), depth=2, num_heads=2, post_norm=post_norm)
    np.testing.assert_allclose(outputs(model, params=params), expected, rtol=1e-4, atol=1e-5)


def test_no_token_sees_a_later_one():
    model = make()
    params = perturbed(model.params)
    changed = TOKENS.at[:, 3].set((TOKENS[:, 3] + 1) % 11)
    before, after = outputs(model, params=params), outputs(model, changed, params)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.any(np.asarray(before[:, 3:] != after[:, 3:]), axis=-1))


def test_the_sizes_are_those_of_the_formula():
    width, depth = 8, 2
    count = sum(leaf.size for leaf in jax.tree.leaves(make().params))
    block = 12 * width**2 + 9 * width + 4 * width
    assert count == (11 + 6) * width + depth * block + 2 * width
    post = sum(leaf.size for leaf in jax.tree.leaves(make(post_norm=True).params))
    assert post == count - 2 * width


def loss_of(model):
    return regjax.model_loss(model, oracles.cross_entropy)


@pytest.mark.slow
def test_curvature_of_the_whole_and_of_blocks_is_the_dense_one(default_promotion):
    # flax's layer norm promotes float32 and float64.
    with jax.enable_x64(True):
        model = make(width=4, depth=1, num_heads=2)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), perturbed(model.params))
        targets = jnp.roll(TOKENS, -1, 1)
        loss = loss_of(model)
        dense = oracles.dense_hessian(loss, params, TOKENS, targets)
        hessian = curvature.hessian(loss, params, TOKENS, targets, chunk_size=2)
        np.testing.assert_allclose(hessian.dense(), dense, atol=1e-10)
        top = curvature.top_eigenpairs(hessian, 2, key=jax.random.key(0), tol=1e-8)
        np.testing.assert_allclose(top.values, np.linalg.eigvalsh(dense)[:-3:-1], rtol=1e-6)
        assert set(curvature.by_block(hessian)) == {"block_0", "norm", "positions", "tokens"}
        # Leaves come in the order of their names: the block is first.
        block = curvature.by_block(hessian)["block_0"].dense()
        np.testing.assert_allclose(block, dense[: len(block), : len(block)], atol=1e-10)


def test_recomputing_changes_no_product():
    targets = jnp.roll(TOKENS, -1, 1)

    @jax.jit
    def products(loss, params):
        image = curvature.hvp(loss, params, params, TOKENS, targets)
        return jax.grad(loss)(params, TOKENS, targets), image

    found = [
        products(loss_of(model), perturbed(model.params)) for model in (make(), make(remat=True))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


@pytest.mark.parametrize(("post_norm", "remat"), [(False, True), (True, False)])
def test_a_stack_of_blocks_is_the_blocks_one_after_the_other(post_norm, remat):
    """Loss, gradient and Hessian product, of the same weights stacked."""
    one_by_one = make(depth=3, post_norm=post_norm, remat=remat)
    stacked = make(depth=3, post_norm=post_norm, remat=remat, scan=True)

    def stack(params):
        blocks = [params[f"block_{i}"] for i in range(3)]
        rest = {name: part for name, part in params.items() if not name.startswith("block_")}
        return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks), **rest}

    jax.tree.map(np.testing.assert_array_equal, stacked.params, stack(one_by_one.params))
    targets = jnp.roll(TOKENS, -1, 1)

    @jax.jit
    def found(loss, params, vector):
        image = curvature.hvp(loss, params, vector, TOKENS, targets)
        return *jax.value_and_grad(loss)(params, TOKENS, targets), image

    params = perturbed(one_by_one.params)
    vector = perturbed(jax.tree.map(jnp.zeros_like, params))
    expected = found(loss_of(one_by_one), params, vector)
    loss, gradient, image = found(loss_of(stacked), stack(params), stack(vector))
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    for ours, theirs in ((gradient, expected[1]), (image, expected[2])):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
            ours, stack(theirs),
        )  # fmt: skip


def test_the_layout_of_stacked_blocks_is_known():
    layout = regjax.guess_layout(make(depth=3, scan=True).params)
    kernel = layout["blocks"]["widen"]["kernel"]
    assert (kernel.stack, kernel.inputs, kernel.outputs) == ((0,), (1,), (2,))
    assert layout["blocks"]["attention_norm"]["scale"].stack == (0,)
    assert layout["tokens"]["embedding"].stack == ()
    # Where the lengths say nothing the modules do.
    even = make(width=8, depth=8, scan=True)
    found = jax.tree.leaves(even.layout["blocks"], is_leaf=lambda n: isinstance(n, regjax.Layout))
    assert {entry.stack for entry in found} == {(0,)}


def test_bad_sizes_and_inputs():
    with pytest.raises(ValueError, match="`width` must be a multiple of 3 heads, got 8"):
        make(num_heads=3)
    with pytest.raises(ValueError, match="`depth` must be at least 1, got 0"):
        make(depth=0)
    message = r"`inputs` must have at most 6 tokens \(`context`\), got 7"
    with pytest.raises(ValueError, match=message):
        outputs(make(), jnp.zeros((1, 7), jnp.int32))
    with pytest.raises(ValueError, match=r"`inputs` must be integer tokens.*float32"):
        outputs(make(), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"shape \(batch, length\), got int32 of shape \(3,\)"):
        outputs(make(), jnp.zeros(3, jnp.int32))


def test_gradients_of_bfloat16_tokens_are_summed_in_float32():
    """In bfloat16 a sum of many equal terms stops at 256 of them."""
    model = make(context=64, depth=1)
    tokens = jnp.asarray(np.random.default_rng(2).integers(2, size=(64, 64)), jnp.int32)

    def gradient(dtype):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
        loss = lambda p: jnp.mean(outputs(model, tokens, p).astype(jnp.float32)[..., 0])
        # flax's layer norm promotes bfloat16 by itself.
        with jax.numpy_dtype_promotion("standard"):
            return np.asarray(jax.jit(jax.grad(loss))(params)["tokens"]["embedding"], np.float32)

    exact = gradient(jnp.float32)
    np.testing.assert_allclose(gradient(jnp.bfloat16), exact, atol=0.03 * np.abs(exact).max())
