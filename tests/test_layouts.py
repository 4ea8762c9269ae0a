"""What the axes of the parameters are for: said, known from the layers, or guessed by names."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import regjax
from regjax import _layouts, curvature, diagnostics, normalization, transforms
from regjax._layouts import Layout, guess_layout
from tests import stacked

ZEROS = functools.partial(jnp.zeros, dtype=jnp.float32)


def axes(layout):
    """(stack, inputs, outputs) of each leaf of a tree of layouts, by its path."""
    is_leaf = lambda node: node is None or isinstance(node, Layout)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        and (leaf.stack, leaf.inputs, leaf.outputs)
        for path, leaf in jax.tree_util.tree_leaves_with_path(layout, is_leaf=is_leaf)
    }


def test_plain_kernels_have_their_outputs_last():
    params = {
        "conv": {"kernel": ZEROS((3, 3, 4, 8)), "bias": ZEROS(8)},
        "norm": {"scale": ZEROS(8), "bias": ZEROS(8)},
        "embed": {"embedding": ZEROS((10, 8))},
        "own": [ZEROS((5, 3)), ZEROS((2, 5, 3)), ZEROS(()), ZEROS(4)],
        "bias": ZEROS(3),
    }
    assert axes(guess_layout(params)) == {
        "bias": ((), (), (0,)),
        "conv/bias": ((), (), (0,)),
        "conv/kernel": ((), (0, 1, 2), (3,)),
        "embed/embedding": ((), (0,), (1,)),
        "norm/bias": ((), (), (0,)),
        "norm/scale": ((), (), (0,)),
        "own/0": ((), (0,), (1,)),
        "own/1": ((), (0, 1), (2,)),
        "own/2": ((), (), ()),
        "own/3": ((), (), (0,)),
    }


def decoder(place):
    """Llama's names without a bias, a stack of 3 layers along an axis."""
    at = lambda *shape: ZEROS((*shape[:place], 3, *shape[place:]))
    layers = {
        "norm": {"scale": at(8)},
        "attention": {"query": {"kernel": at(8, 2, 4)}, "out": {"kernel": at(2, 4, 8)}},
        "mlp": {"wi": {"kernel": at(8, 16)}, "wo": {"kernel": at(16, 8)}},
    }
    return {"decoder": {"layers": layers, "norm": {"scale": ZEROS(8)}}, "out": ZEROS((8, 5))}


@pytest.mark.parametrize("place", [0, 1])
def test_stacks_are_found_by_what_their_arrays_share(place):
    found = axes(guess_layout(decoder(place)))
    put = lambda *rest: tuple(axis + (axis >= place) for axis in rest)
    assert found["decoder/layers/norm/scale"] == ((place,), (), put(0))
    assert found["decoder/layers/attention/query/kernel"] == ((place,), put(0), put(1, 2))
    assert found["decoder/layers/attention/out/kernel"] == ((place,), put(0, 1), put(2))
    assert found["decoder/layers/mlp/wo/kernel"] == ((place,), put(0), put(1))
    assert found["decoder/norm/scale"] == ((), (), (0,))
    assert found["out"] == ((), (0,), (1,))


def test_heads_are_no_stack():
    params = {
        "query": {"kernel": ZEROS((8, 2, 4)), "bias": ZEROS((2, 4))},
        "out": {"kernel": ZEROS((2, 4, 8)), "bias": ZEROS(8)},
    }
    assert axes(guess_layout(params)) == {
        "query/kernel": ((), (0,), (1, 2)),
        "query/bias": ((), (), (0, 1)),
        "out/kernel": ((), (0, 1), (2,)),
        "out/bias": ((), (), (0,)),
    }


def test_what_cannot_be_guessed_is_asked_for():
    # Square kernels and a scale: the stack may be either axis of the scale.
    params = {"layers": {"norm": {"scale": ZEROS((3, 8))}, "mlp": {"kernel": ZEROS((3, 8, 5))}}}
    assert set(axes(guess_layout(params)).values()) == {None}
    text = r"`layout` must say .*\['layers'\]\['.*guess_layout\(params, stack=.*'layers/"
    with pytest.raises(ValueError, match=text):
        diagnostics.filter_normalized_direction(params, key=jax.random.key(0))
    tx = transforms.rescale_weights(mask={"layers": {"norm": False, "mlp": True}})
    with pytest.raises(ValueError, match=r"`params\['layers'\]\['mlp'\]\['kernel'\]` of shape"):
        tx.init(params)
    # Both remedies of the message.
    told = guess_layout(params, stack={"layers": 0})
    assert axes(told)["layers/mlp/kernel"] == ((0,), (1,), (2,))
    for layout in (told, {"layers": Layout(stack=0)}, Layout(stack=0), lambda params: told):
        diagnostics.filter_normalized_direction(params, key=jax.random.key(0), layout=layout)
    diagnostics.filter_normalized_direction(params, key=jax.random.key(0), layout=Layout())
    # Four features to (4, 8), or four layers of 4 to 8: both are dense layers of flax.
    torn = {"a": {"kernel": ZEROS((4, 4, 8)), "bias": ZEROS((4, 8))}, "b": ZEROS((3, 2))}
    assert axes(guess_layout(torn)) == {"a/kernel": None, "a/bias": None, "b": ((), (0,), (1,))}
    # Blocks are not wrong if a stack is not taken apart.
    operator = curvature.identity(curvature_space(params))
    assert list(curvature.by_block(operator, depth=2)) == ["layers/mlp", "layers/norm"]


def curvature_space(params):
    return curvature.hessian(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)), params).space


def test_two_stacks():
    moe = {"wi": {"kernel": ZEROS((3, 4, 8, 16))}, "wo": {"kernel": ZEROS((3, 4, 16, 8))}}
    params = {"layers": {"moe": moe, "norm": {"scale": ZEROS((3, 8))}}, "out": ZEROS((8, 2))}
    found = axes(guess_layout(params, stack={"layers": 0, "layers/moe": (0, 1)}))
    assert found["layers/moe/wi/kernel"] == ((0, 1), (2,), (3,))
    assert found["layers/norm/scale"] == ((0,), (), (1,))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.conv = nnx.Conv(3, 3, (3,), rngs=rngs)
        self.up = nnx.ConvTranspose(3, 5, (2,), transpose_kernel=True, rngs=rngs)
        self.einsum = nnx.Einsum("nd,hdk->nhk", (2, 8, 4), (2, 4), rngs=rngs)
        self.temperature = nnx.Param(ZEROS(8))


@pytest.mark.parametrize("place", [None, 0, 1])
def test_layers_of_nnx_know_their_axes(place):
    if place is None:
        module = Block(nnx.Rngs(0))
    else:
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block, out_axes=place))
        module = make(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    params = {"blocks": params, "head": ZEROS((8, 2))}

    class Net(nnx.Module):
        def __init__(self):
            self.blocks, self.head = module, nnx.Param(ZEROS((8, 2)))

    found = axes(guess_layout(params, Net()))
    put = lambda *rest: tuple(axis + (place is not None and axis >= place) for axis in rest)
    stack = () if place is None else (place,)
    expected = {
        "attention/query/kernel": ((0,), (1, 2)), "attention/query/bias": ((), (0, 1)),
        "attention/out/kernel": ((0, 1), (2,)), "attention/out/bias": ((), (0,)),
        "dense/kernel": ((0,), (1,)), "dense/bias": ((), (0,)), "norm/scale": ((), (0,)),
        "conv/kernel": ((0, 1), (2,)), "conv/bias": ((), (0,)),
        "up/kernel": ((0, 2), (1,)), "up/bias": ((), (0,)),
        "einsum/kernel": ((1,), (0, 2)), "einsum/bias": ((), (0, 1)),
        "temperature": ((), (0,)),
    }  # fmt: skip
    for name, (inputs, outputs) in expected.items():
        assert found[f"blocks/{name}"] == (stack, put(*inputs), put(*outputs)), name
    assert found["head"] == ((), (0,), (1,))


def test_metadata_of_flax_names_the_stack():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            init = linen.with_logical_partitioning(
                linen.initializers.lecun_normal(), ("embed", "mlp")
            )
            return linen.Dense(8, kernel_init=init, use_bias=False)(x), None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            layers = linen.scan(
                Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3,
                metadata_params={linen.PARTITION_NAME: "layers"},
            )  # fmt: skip
            return linen.Dense(2)(layers(name="layers")(x, None)[0])

    params = Net().init(jax.random.key(0), ZEROS((2, 8)))["params"]
    assert axes(guess_layout(params))["layers/Dense_0/kernel/value"] == ((1,), (0,), (2,))
    # Without it a kernel alone tells nothing, and the user is asked.
    assert axes(guess_layout(linen.meta.unbox(params)))["layers/Dense_0/kernel"] is None


def test_names_of_haiku_and_keras():
    params = {
        "__layer_stack_no_per_layer/linear": {"w": ZEROS((3, 4, 4)), "b": ZEROS((3, 4))},
        "batch_norm": {"scale": ZEROS((1, 1, 1, 4))},
        "conv2_d_transpose": {"w": ZEROS((3, 3, 4, 6)), "b": ZEROS(4)},
        "depthwise_conv2d": {"kernel": ZEROS((3, 3, 4, 2)), "bias": ZEROS(8)},
        "gru_cell": {"kernel": ZEROS((5, 12)), "bias": ZEROS((2, 12))},
        "query": {"kernel": ZEROS((2, 2, 4)), "bias": ZEROS((2, 4))},
    }
    found = axes(guess_layout(params))
    assert found["__layer_stack_no_per_layer/linear/w"] == ((0,), (1,), (2,))
    assert found["batch_norm/scale"] == ((), (), (0, 1, 2, 3))
    assert found["conv2_d_transpose/w"] == ((), (0, 1, 3), (2,))
    assert found["depthwise_conv2d/kernel"] == ((), (0, 1), (2, 3))
    assert found["gru_cell/bias"] == ((), (), (0, 1))
    assert found["query/kernel"] == ((), (0,), (1, 2))


class TestEquinox:
    @pytest.fixture(autouse=True)
    def package(self):
        self.equinox = pytest.importorskip("equinox")

    def net(self):
        nn, keys = self.equinox.nn, jax.random.split(jax.random.key(0), 5)
        return {
            "conv": nn.Conv2d(3, 3, 3, key=keys[0]),
            "square": nn.Linear(4, 4, key=keys[1]),
            "embed": nn.Embedding(7, 3, key=keys[2]),
            "norm": nn.LayerNorm((2, 3)),
            "layers": self.equinox.filter_vmap(lambda key: nn.Linear(4, 4, key=key))(
                jax.random.split(keys[3], 4)
            ),
        }

    def params(self):
        return self.equinox.filter(self.net(), self.equinox.is_inexact_array)

    def test_kernels_have_their_outputs_in_front(self):
        assert axes(guess_layout(self.params())) == {
            "conv/weight": ((), (1, 2, 3), (0,)),
            "conv/bias": ((), (), (0, 1, 2)),
            "square/weight": ((), (1,), (0,)),
            "square/bias": ((), (), (0,)),
            "embed/weight": ((), (0,), (1,)),
            "norm/weight": ((), (), (0, 1)),
            "norm/bias": ((), (), (0, 1)),
            "layers/weight": ((0,), (2,), (1,)),
            "layers/bias": ((0,), (), (1,)),
        }

    def test_numbers_are_those_of_the_transposed_kernels(self):
        params = self.params()
        flipped = {
            "conv": {"kernel": jnp.moveaxis(params["conv"].weight, 0, -1)},
            "square": {"kernel": params["square"].weight.T},
            "layers": {"kernel": jnp.swapaxes(params["layers"].weight, 1, 2)},
        }
        mask = jax.tree.map(lambda leaf: False, params)
        at = lambda tree: [tree[name].weight for name in flipped]
        mask = self.equinox.tree_at(at, mask, [True] * 3)
        options = {"target_norm": 2.0}
        tx = transforms.rescale_weights(mask=mask, **options)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        layout = {"conv": None, "square": None, "layers": Layout(stack=0)}
        flax = transforms.rescale_weights(mask=True, layout=layout, **options)
        expected, _ = flax.update(
            jax.tree.map(jnp.zeros_like, flipped), flax.init(flipped), flipped
        )
        found = dict(zip(flipped, at(updates), strict=True))
        back = {
            "conv": jnp.moveaxis(found["conv"], 0, -1),
            "square": found["square"].T,
            "layers": jnp.swapaxes(found["layers"], 1, 2),
        }
        for name, array in back.items():
            np.testing.assert_allclose(array, expected[name]["kernel"], rtol=1e-5, atol=1e-6)
        direction = diagnostics.filter_normalized_direction(params, key=jax.random.key(0))
        np.testing.assert_allclose(
            *(np.linalg.norm(tree["square"].weight, axis=1) for tree in (direction, params)),
            rtol=1e-5,
        )
        assert not jnp.any(direction["conv"].bias)

    def test_a_tree_of_layouts_that_can_be_called_is_a_tree(self):
        class Net(self.equinox.Module):
            dense: object

            def __call__(self, x):
                raise AssertionError

        params = self.equinox.filter(
            Net(self.equinox.nn.Linear(4, 4, key=jax.random.key(0))),
            self.equinox.is_inexact_array,
        )
        draw = functools.partial(diagnostics.filter_normalized_direction, key=jax.random.key(0))
        given, guessed = draw(params, layout=guess_layout(params)), draw(params)
        np.testing.assert_array_equal(given.dense.weight, guessed.dense.weight)


def test_names_alone_tell_kernels_with_their_outputs_in_front():
    dense = lambda out, into: {"weight": ZEROS((out, into)), "bias": ZEROS(out)}
    found = axes(guess_layout({"a": dense(8, 3), "b": dense(8, 8), "c": dense(2, 8)}))
    assert {found[f"{name}/weight"] for name in "abc"} == {((), (1,), (0,))}
    first = lambda into, out: {"weight": ZEROS((into, out)), "bias": ZEROS(out)}
    found = axes(guess_layout({"a": first(3, 8), "b": first(8, 8)}))
    assert {found[f"{name}/weight"] for name in "ab"} == {((), (0,), (1,))}


def test_experts_have_filters_of_their_own():
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.normal(size=(3, 4, 8, 5)), jnp.float32)
    layout = Layout(stack=(0, 1))
    expected = np.stack(
        [[normalization.standardize_weight(kernel[i, j]) for j in range(4)] for i in range(3)]
    )
    found = normalization.standardize_weight(kernel, layout=layout)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # Experts outside, layers inside, as MaxText has them: the stack lies elsewhere.
    moved = jnp.moveaxis(kernel, 1, 2)
    found = normalization.standardize_weight(moved, layout=Layout(stack=(0, 2)))
    np.testing.assert_allclose(jnp.moveaxis(found, 2, 1), expected, rtol=1e-5, atol=1e-6)
    draw = diagnostics.filter_normalized_direction
    key = jax.random.key(1)
    direction = draw({"kernel": kernel}, key=key, layout=layout)["kernel"]
    own = jax.random.split(jax.random.split(key, 3)[2], 4)[1]
    alone = draw({"kernel": kernel[2, 1]}, key=own)["kernel"]
    np.testing.assert_allclose(direction[2, 1], alone, rtol=1e-5)
    inner = draw({"kernel": moved}, key=key, layout=Layout(stack=(0, 2)))["kernel"]
    np.testing.assert_allclose(jnp.moveaxis(inner, 2, 1), direction, rtol=1e-5)
    other = draw({"kernel": moved}, key=key, layout=Layout(stack=(2, 0)))["kernel"]
    own = jax.random.split(jax.random.split(key, 4)[1], 3)[2]
    alone = draw({"kernel": kernel[2, 1]}, key=own)["kernel"]
    np.testing.assert_allclose(other[2, :, 1], alone, rtol=1e-5)


def test_blocks_of_experts():
    shape = {
        "layers": {"moe": {"kernel": (2, 3, 4, 5)}, "dense": {"kernel": (2, 4, 4)}},
        "out": (4, 2),
    }
    params = jax.tree.map(ZEROS, shape, is_leaf=lambda node: isinstance(node, tuple))
    layout = {"layers": {"moe": Layout(stack=(0, 1)), "dense": Layout(stack=0)}, "out": None}
    operator = curvature.identity(curvature_space(params))
    blocks = curvature.by_block(operator, depth=4, layout=layout)
    assert sorted(blocks) == [
        "layers/0/dense/kernel", "layers/0/moe/0", "layers/0/moe/1", "layers/0/moe/2",
        "layers/1/dense/kernel", "layers/1/moe/0", "layers/1/moe/1", "layers/1/moe/2", "out",
    ]  # fmt: skip
    assert blocks["layers/1/moe/2"].size == 20
    assert list(curvature.by_block(operator, depth=2, layout=layout)) == [
        "layers/0",
        "layers/1",
        "out",
    ]
    assert curvature.by_block(operator, depth=2, layout=layout)["layers/0"].size == 3 * 20 + 16


def test_blocks_of_a_given_product_are_its_principal_submatrices():
    params = {"layers": {"moe": ZEROS((2, 3, 4)), "scale": ZEROS((5, 2))}, "out": ZEROS((3,))}
    size = 2 * 3 * 4 + 5 * 2 + 3
    root = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    dense = root + root.T
    space = curvature_space(params)
    operator = curvature.from_matvec(
        lambda v: space.unravel(jnp.matmul(dense, space.ravel(v), precision="highest")), params
    )
    layout = {"layers": {"moe": Layout(stack=(2, 1)), "scale": Layout(stack=1)}, "out": None}
    # Of different numbers of layers, so that each array has an index of its own.
    places = space.unravel(jnp.arange(size, dtype=jnp.float32))
    blocks = curvature.by_block(operator, depth=4, layout=layout)
    moe, scale = (np.asarray(places["layers"][name], int) for name in ("moe", "scale"))
    found = {
        "layers/moe/3/1": moe[:, 1, 3], "layers/moe/0/2": moe[:, 2, 0],
        "layers/scale/1": scale[:, 1], "out": np.asarray(places["out"], int),
    }  # fmt: skip
    for name, index in found.items():
        np.testing.assert_allclose(blocks[name].dense(), dense[np.ix_(index, index)], rtol=1e-4)
    assert len(blocks) == 4 * 3 + 2 + 1


def test_bad_layouts_are_refused():
    params = {"layers": {"kernel": ZEROS((3, 4, 5)), "bias": ZEROS((3, 5))}, "out": ZEROS((5, 2))}
    draw = functools.partial(diagnostics.filter_normalized_direction, params, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"`stack` has 2 for `params\['layers'\]\['bias'\]` of sh"):
        draw(layout={"layers": Layout(stack=2), "out": None})
    with pytest.raises(ValueError, match=r"name no axis twice, got -1 twice for `params\['layers"):
        draw(layout={"layers": Layout(stack=1, outputs=-1), "out": None})
    with pytest.raises(ValueError, match="`outputs` must name no axis twice, got 0 again"):
        Layout(stack=0, outputs=0)
    with pytest.raises(TypeError, match="`inputs` must be a Python integer, got 'rows'"):
        Layout(inputs="rows")
    with pytest.raises(
        ValueError, match=r"got none for axis 1 of `params\['layers'\]\['kernel'\]`"
    ):
        draw(layout={"layers": {"kernel": Layout(inputs=0, outputs=2), "bias": None}, "out": None})
    with pytest.raises(ValueError, match="`layout` must have the tree structure"):
        draw(layout={"layers": Layout(stack=0)})
    with pytest.raises(TypeError, match=r"`layout` must be a regjax.Layout, a tree .* got int"):
        draw(layout={"layers": 0, "out": None})
    with pytest.raises(ValueError, match=r"`stack` must hold paths of `params`, got 'layer', wh"):
        guess_layout(params, stack={"layer": 0})
    with pytest.raises(ValueError, match=r"`stack` has 3 for `params\['layers'\]\['kernel'\]`"):
        guess_layout(params, stack={"layers/kernel": 3})
    with pytest.raises(TypeError, match=r"`layout` must be one regjax.Layout, got dict"):
        normalization.standardize_weight(params["out"], layout={"w": Layout()})
    with pytest.raises(ValueError, match="`layout` must have no `stack` for one `kernel`"):
        diagnostics.condensation(params["layers"]["kernel"], layout=Layout(stack=0))


def test_models_know_their_layouts():
    class Lone(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Lone))(rngs)

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer.dense(x), out_axes=nnx.Carry)(x, self.layers)

    # By its names and its shape alone it might be a convolution.
    model = regjax.from_nnx(Net(nnx.Rngs(0)))
    assert axes(guess_layout(model.params)) == {"layers/dense/kernel": None}
    assert axes(model.layout) == {"layers/dense/kernel": ((0,), (1,), (2,))}
    tx = transforms.rescale_weights(mask=True, layout=model.layout)
    zeros = jax.tree.map(jnp.zeros_like, model.params)
    updates, _ = tx.update(zeros, tx.init(model.params), model.params)
    kernel = model.params["layers"]["dense"]["kernel"] + updates["layers"]["dense"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=1), 1, rtol=1e-6)
    kernel_only = regjax.from_callable(lambda params, x: x @ params["w"], {"w": ZEROS((3, 2))})
    assert axes(kernel_only.layout) == {"w": ((), (0,), (1,))}


def test_layouts_pass_through_jit():
    params = stacked.stack(stacked.unrolled(), 1)
    draw = diagnostics.filter_normalized_direction
    for layout in (stacked.layout(1), guess_layout(params)):
        found = jax.jit(draw)(params, key=jax.random.key(0), layout=layout)
        expected = draw(params, key=jax.random.key(0), layout=layout)
        stacked.assert_same(found, expected, rtol=1e-5)


def test_condensation_of_a_kernel_with_outputs_in_front():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    found = diagnostics.condensation(kernel, layout=regjax.Layout(outputs=0))
    np.testing.assert_allclose(found.cosines, diagnostics.condensation(kernel.T).cosines)


def test_folding_of_stacks():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.uniform(1, 2, size=shape), jnp.float32)
    kernel, rest = draw(4, 3, 5), [draw(3, 5) for _ in range(5)]
    found = normalization.fold_batch_norm(
        kernel, *rest, epsilon=1e-3, layout=regjax.Layout(stack=1)
    )
    for i in range(3):
        one = normalization.fold_batch_norm(kernel[:, i], *(x[i] for x in rest), epsilon=1e-3)
        np.testing.assert_allclose(found[0][:, i], one[0], rtol=1e-6)
        np.testing.assert_allclose(found[1][i], one[1], rtol=1e-6)


def test_axes_of_each_leaf_are_complete():
    params = stacked.stack(stacked.unrolled(), 1)
    leaves = jax.tree.leaves(params)
    for own, leaf in zip(_layouts.of_leaves(stacked.layout(1), params), leaves, strict=True):
        assert sorted((*own.stack, *own.inputs, *own.outputs)) == list(range(leaf.ndim))


def test_kernels_alone_in_a_container_of_layers_are_asked_for():
    # Behind `optax.masked` no bias is there to tell, nor in a net without any.
    alone = {"layers": {"wi": {"kernel": ZEROS((3, 8, 16))}, "wo": {"kernel": ZEROS((3, 16, 8))}}}
    tx = optax.masked(
        transforms.rescale_weights(mask=True), {"layers": {"wi": True, "wo": True}, "head": False}
    )
    with pytest.raises(ValueError, match=r"`layout` must say what the axes of `params\['layers'\]"):
        tx.init({**alone, "head": ZEROS((8, 2))})
    assert set(axes(guess_layout(alone)).values()) == {None}
    assert axes(guess_layout({"ScanBlock_0": alone["layers"]}))["ScanBlock_0/wi/kernel"] is None
    # Layers in a list, or of several sizes, and what has a norm of its own are no stack.
    convolution = {"kernel": ZEROS((3, 3, 4, 8))}
    for plain in (
        {"layers": [convolution, convolution]},
        {"layers": {"a": {"kernel": ZEROS((3, 3, 4, 8))}, "b": {"kernel": ZEROS((5, 5, 8, 9))}}},
        {"layers": {"a": convolution, "norm": {"scale": ZEROS(8)}}},
        {"trunk": {"a": convolution, "b": convolution}},
    ):
        assert None not in axes(guess_layout(plain)).values()


def test_arrays_of_any_names_in_a_container_of_layers_are_asked_for():
    for layers in (
        {"wq": ZEROS((12, 8, 8)), "norm": ZEROS((12, 8))},
        {"W": ZEROS((3, 8, 8)), "b": ZEROS((3, 8))},
        {"q": {"lora_a": ZEROS((3, 8, 2)), "lora_b": ZEROS((3, 2, 8))}},
    ):
        for name in ("blocks", "decoder_layers", "encoderblock"):
            assert set(axes(guess_layout({name: layers})).values()) == {None}
    # Two axes each are matrices, and what shares no axis is no stack.
    plain = {"W": ZEROS((8, 8)), "U": ZEROS((8, 8))}, {"a": ZEROS((3, 4, 8)), "b": ZEROS((5, 8, 9))}
    for layers in plain:
        assert None not in axes(guess_layout({"layers": layers})).values()


def test_scales_of_norms_that_are_called_weights_are_no_kernels():
    dense = {"weight": ZEROS((3, 8, 16)), "bias": ZEROS((3, 16))}
    norm = {"weight": ZEROS((3, 8)), "bias": ZEROS((3, 8))}
    for params in (
        {"layers": {"any": norm, "dense": dense}},
        {"layers": {"ln_1": {"weight": ZEROS((3, 8))}, "dense": dense}},
        {"layers": {"post_norm": {"kernel": ZEROS((3, 8))}, "dense": dense}},
    ):
        found = axes(guess_layout(params))
        kernels = [path for path, (_, inputs, _) in found.items() if inputs]
        assert kernels == ["layers/dense/weight"]
        assert {stack for stack, _, _ in found.values()} == {(0,)}
    kernel = {"weight_norm": {"kernel": ZEROS((8, 16))}, "normal": {"kernel": ZEROS((8, 16))}}
    assert set(axes(guess_layout(kernel)).values()) == {((), (0,), (1,))}


def test_stacks_of_modules_that_users_write():
    class Scale(nnx.Module):
        def __init__(self, size):
            self.weight = nnx.Param(ZEROS(size))

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.scale, self.dense = Scale(8), nnx.Linear(8, 16, rngs=rngs)

    class Net(nnx.Module):
        def __init__(self):
            self.blocks = nnx.vmap(Block)(nnx.Rngs(0).split(3))
            self.head = nnx.Linear(16, 2, rngs=nnx.Rngs(1))

    found = axes(regjax.from_nnx(Net()).layout)
    assert found["blocks/scale/weight"][0] == (0,)
    assert found["blocks/dense/kernel"] == ((0,), (1,), (2,))
    assert found["head/kernel"] == ((), (0,), (1,))


def test_norms_of_heads_are_no_stack():
    for shape in ((16, 8, 8), (4, 4, 8), (16, 2, 8)):
        attention = {"query": {"kernel": ZEROS(shape)}, "norm": {"scale": ZEROS(shape[1:])}}
        found = axes(guess_layout({"attention": attention, "norm": {"scale": ZEROS(shape[0])}}))
        assert found["attention/norm/scale"] is None
        assert found["attention/query/kernel"] in (None, ((), (0,), (1, 2)))


def test_names_of_attention_and_of_depthwise_convolutions_without_a_bias():
    params = {
        "q": {"kernel": ZEROS((8, 2, 4))},
        "v_proj": {"kernel": ZEROS((8, 2, 4))},
        "kv_einsum": {"w": ZEROS((2, 3, 8, 4))},
        "attn_vec_einsum": {"w": ZEROS((3, 4, 8))},
        "depthwise_conv1d": {"kernel": ZEROS((3, 8, 2))},
        "Depthwise_0": {"kernel": ZEROS((3, 3, 1, 8))},
    }
    assert axes(guess_layout(params)) == {
        "q/kernel": ((), (0,), (1, 2)),
        "v_proj/kernel": ((), (0,), (1, 2)),
        "kv_einsum/w": ((), (2,), (0, 1, 3)),
        "attn_vec_einsum/w": ((), (0, 1), (2,)),
        "depthwise_conv1d/kernel": ((), (0,), (1, 2)),
        "Depthwise_0/kernel": ((), (0, 1, 2), (3,)),
    }


def test_experts_are_asked_for():
    moe = {"gate": {"kernel": ZEROS((8, 4))}, "wi": ZEROS((4, 8, 16)), "wo": ZEROS((4, 16, 8))}
    for name in ("moe", "experts", "MoeBlock_0", "block_sparse_moe"):
        found = axes(guess_layout({name: moe, "out": ZEROS((8, 2))}))
        assert found[f"{name}/gate/kernel"] == ((), (0,), (1,))
        assert found[f"{name}/wi"] is found[f"{name}/wo"] is None
    told = guess_layout({"moe": moe}, stack={"moe": 0, "moe/gate": ()})
    assert axes(told)["moe/wi"] == ((0,), (1,), (2,))
    assert axes(told)["moe/gate/kernel"] == ((), (0,), (1,))


def test_einsums_of_other_projects():
    class Einsum(nnx.Module):
        def __init__(self, einsum_str, shape):
            self.einsum_str, self.shape = einsum_str, shape
            self.w = nnx.Param(ZEROS(shape))

    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.q = Einsum("BTD,NDH->BTNH", (2, 8, 4))
            self.kv = Einsum("BSD,CKDH->CBSKH", (2, 1, 8, 4))
            self.out = Einsum("BTNH,NHD->BTD", (2, 4, 8))

    module = nnx.vmap(Attention, axis_size=3, in_axes=None)(nnx.Rngs(0))
    found = axes(guess_layout(nnx.to_pure_dict(nnx.state(module, nnx.Param)), module))
    assert found == {
        "q/w": ((0,), (2,), (1, 3)),
        "kv/w": ((0,), (3,), (1, 2, 4)),
        "out/w": ((0,), (1, 2), (3,)),
    }


def test_named_axes_of_haliax():
    # As haliax has them, which is not installed here: arrays with axes, layers with In and Out.
    axis = lambda name: types.SimpleNamespace(name=name)
    kind = type("NamedArray", (), {"__module__": "haliax.core"})
    jax.tree_util.register_pytree_with_keys(
        kind,
        lambda node: ([(jax.tree_util.GetAttrKey("array"), node.array)], node.axes),
        lambda axes, leaves: named(leaves[0], axes),
    )

    def named(array, axes):
        node = kind()
        node.array, node.axes = array, axes
        return node

    @jax.tree_util.register_pytree_with_keys_class
    class Linear:
        In, Out = axis("embed"), (axis("heads"), axis("size"))

        def __init__(self, weight):
            self.weight = weight

        def tree_flatten_with_keys(self):
            return [(jax.tree_util.GetAttrKey("weight"), self.weight)], None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

    names = [axis(name) for name in ("layers", "heads", "size", "embed")]
    params = {"blocks": Linear(named(ZEROS((3, 2, 4, 8)), names))}
    assert list(axes(guess_layout(params)).values()) == [((0,), (3,), (1, 2))]
