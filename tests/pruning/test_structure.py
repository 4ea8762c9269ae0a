"""Groups that are known by hand, on networks and on single operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import regjax
from regjax import models, pruning
from tests.pruning import networks

RANDOM = np.random.default_rng(2)
X = jnp.asarray(RANDOM.normal(size=(3, 4)), jnp.float32)
SHAPES = {"a": (4, 6), "b": (6, 5), "v": (6,), "c": (3,), "flat": (36, 2)}
PARAMS = {name: jnp.asarray(RANDOM.normal(size=s), jnp.float32) for name, s in SHAPES.items()}


def find(forward, params=PARAMS, inputs=X):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return pruning.find_structure(forward, params, inputs)


def find_in(model, inputs=networks.IMAGES):
    return find(regjax.model_function(model), model.params, inputs)


def paths(group):
    return {
        field: [(part.path, part.axis) for part in getattr(group, field)]
        for field in group._fields[1:]
    }


@pytest.mark.parametrize("face", ["nnx", "linen"])
@pytest.mark.parametrize("kind", ["plain", "residual", "joined"])
def test_groups_of_the_three_networks(face, kind):
    structure = find_in(networks.MAKERS[face](kind))
    found = {name: group.num_units for name, group in structure.groups.items()}
    assert list(found.items()) == list(networks.UNITS[kind].items())  # in the order of the network
    assert structure.fixed == {"head/kernel": "feeds the outputs"}


def test_a_residual_stage_is_one_group_with_all_that_belongs_to_it():
    structure = find_in(networks.nnx_model("residual"))
    assert paths(structure.groups["stem/kernel"]) == {
        "producers": [("a_out/kernel", 3), ("stem/kernel", 3)],
        "scales": [("norm/scale", 0)],
        "biases": [("a_out/bias", 0), ("norm/bias", 0)],
        "statistics": [("state/norm/mean", 0), ("state/norm/var", 0)],
        "consumers": [("a/kernel", 2), ("b/kernel", 2), ("shortcut/kernel", 2)],
    }
    assert paths(structure.groups["b/kernel"])["producers"] == [
        ("b/kernel", 3), ("c_out/kernel", 3), ("shortcut/kernel", 3)
    ]  # fmt: skip


def test_positions_of_units_behind_flattening_and_concatenation():
    (head,) = find_in(networks.nnx_model("plain")).groups["second/kernel"].consumers
    assert (head.path, head.axis) == ("dense/kernel", 0)
    np.testing.assert_array_equal(head.units, np.tile(np.arange(5), 9))
    groups = find_in(networks.nnx_model("joined")).groups
    none = lambda number: [-1] * number
    for name, units in (
        ("left/kernel", [*range(4), *none(7)]),
        ("right/kernel", [*none(4), *range(5), *none(2)]),
    ):
        (mix,) = groups[name].consumers
        for part in (mix, *groups[name].scales, *groups[name].statistics):
            np.testing.assert_array_equal(part.units, units)
    leaves = jax.tree.leaves(networks.nnx_model("joined").params)
    assert leaves[mix.leaf].shape == (3, 3, 11, 3)


SIZES = {models.MLP: {"width": 4}, models.ConvNet: {"width": 4}, models.ResNet: {"widths": (4, 6)}}
RESNET = ["stem", "block_0/first", "block_1/first", "block_1/second"]
BY_CHANNEL = ["none", "batch", "ghost", "noisy", "lp1", "lp2", "lpinf", "mean_only"]
ACROSS = {"layer": "is reduced by `reduce_sum`"}
IN_GROUPS = {"group": 4, "group_plus": 2}
OF_KERNELS = ["weight", "weight_standardized", "weight_mean_only"]


@pytest.mark.parametrize("norm", [*BY_CHANNEL, *ACROSS, *IN_GROUPS, *OF_KERNELS])
@pytest.mark.parametrize("kind", SIZES)
def test_networks_of_the_library(kind, norm):
    structure = find_in(networks.packaged_model(kind, norm, **SIZES[kind]))
    names = RESNET if kind is models.ResNet else ["layer_0", "layer_1"]
    if norm in BY_CHANNEL or norm in IN_GROUPS:
        assert list(structure.groups) == [f"{name}/layer/kernel" for name in names]
        if norm in IN_GROUPS and kind is not models.ResNet:
            counts = {group.num_units for group in structure.groups.values()}
            assert counts == {IN_GROUPS[norm]}
        assert structure.fixed == {"head/kernel": "feeds the outputs"}
    elif norm in ACROSS:
        assert not structure.groups
        assert structure.fixed.pop("head/kernel") == "feeds the outputs"
        assert all(ACROSS[norm] in reason for reason in structure.fixed.values())
    else:
        # A normalized kernel is no longer linear in its slices: only the head is a plain consumer.
        last = "block_1/second" if kind is models.ResNet else "layer_1"
        assert list(structure.groups) == [f"{last}/layer/layer/kernel"]


@jax.custom_vjp
def identity(x):
    return x


identity.defvjp(lambda x: (x, None), lambda _, grad: (grad,))


def conv(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def between(operation):
    """A network with the operation on its six hidden units."""
    return lambda params, x: operation(x @ params["a"], params) @ params["b"]


def flattened(params, x):
    """Six channels at two by three positions, the channels in the middle."""
    grid = (x @ params["a"])[:, None, :, None] + jnp.arange(6.0).reshape(1, 2, 1, 3)
    return jnp.tanh(grid).reshape(3, -1) @ params["flat"]


HANDLED = {
    "flattened": flattened,
    "jit": between(lambda h, p: jax.jit(jnp.tanh)(h)),
    "nested jit": jax.jit(between(lambda h, p: jax.jit(jax.jit(jax.nn.silu))(h))),
    "checkpoint": between(lambda h, p: jax.checkpoint(lambda h: jnp.sin(h) + p["v"])(h)),
    "custom_vjp": between(lambda h, p: identity(h)),
    "stop_gradient": between(lambda h, p: jax.lax.stop_gradient(h)),
    "barrier": between(lambda h, p: jax.lax.optimization_barrier(h)),
    "reversed": between(lambda h, p: h[:, ::-1]),
    "uniform": between(lambda h, p: h + jnp.full_like(h, 0.3)),
    "selected": between(lambda h, p: jnp.where(h > 0, h * p["v"], 0.5)),
    "clipped": between(lambda h, p: jnp.clip(h, -0.1, 0.2)),
    "by an example's own": between(lambda h, p: h * jnp.max(p["c"]) * h[:1]),
    "other dtype": between(lambda h, p: h.astype(jnp.float16).astype(jnp.float32)),
    "stacked": between(lambda h, p: jnp.stack([h, h * p["v"]]).sum(0)),
    "summed over examples": between(lambda h, p: jnp.cumsum(h, 0) / jnp.std(h, 0)),
    "permuted": between(lambda h, p: jnp.concatenate([h[:, 3:], h[:, :3]], 1)),
    "depthwise": between(
        lambda h, p: conv(h[:, None, None], jnp.ones((1, 1, 1, 6)), groups=6)[:, 0, 0]
    ),
    "scanned": between(
        lambda h, p: jax.lax.scan(lambda h, _: (jnp.tanh(h), None), h, None, length=2)[0]
    ),
    "two consumers": lambda p, x: x @ p["a"] * p["v"] @ p["b"] + (x @ p["a"]) @ p["b"],
    "one example": lambda p, x: jax.vmap(lambda x: jnp.tanh(p["a"].T @ x + p["v"]) @ p["b"])(x),
    "transposed": lambda p, x: (p["b"].T @ jnp.maximum(p["a"].T @ x.T, 0)).T,
    "product of kernels": lambda p, x: x @ (p["a"] @ p["b"]),
    "scaled kernel": lambda p, x: x @ p["a"] @ (-p["b"] / jnp.arange(1.0, 6.0)).astype(jnp.float32),
    "batches": lambda p, x: jnp.einsum("hni,io,oc->nc", jnp.stack([x, x**2]), p["a"], p["b"]),
}


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("name", HANDLED)
def test_operations_that_keep_channels_apart(name):
    """The six units are found and can be removed."""
    forward, gone = HANDLED[name], {"a": np.array([True, False, True, True, False, True])}
    structure = find(forward)
    assert {name: group.num_units for name, group in structure.groups.items()} == {"a": 6}
    gates = {"a": jnp.asarray(gone["a"], jnp.float32)}
    masked = forward(pruning.apply_gates(structure, PARAMS, gates), X)
    pruned = pruning.remove_units(structure, regjax.from_callable(forward, PARAMS), gone)
    assert pruned.params["a"].shape == (4, 4)
    smaller = regjax.model_function(pruned)(pruned.params, X)
    np.testing.assert_allclose(smaller, masked, rtol=1e-5, atol=1e-6)
    assert float(jnp.max(jnp.abs(masked - forward(PARAMS, X)))) > 1e-3


def repeated(h, params):
    return jax.lax.while_loop(lambda h: jnp.sum(h) > 9, lambda h: h / 2, h)


def pairs(h, params):
    return (h[:, :, None] * h[:, None, :]).reshape(3, 36) @ jnp.ones((36, 6))


def unread(params, x):
    jnp.tanh(x @ params["a"])
    return x


REFUSED = [
    ("feeds the outputs", lambda p, x: (x @ p["a"] @ p["b"], x @ p["a"])),
    ("goes into no kernel", unread),
    (
        "meets an axis of the data",
        lambda p, x: (x @ p["a"] + jnp.concatenate([x, x[:, :2]], 1)) @ p["b"],
    ),
    ("meets a constant array", between(lambda h, p: h * np.arange(6.0, dtype=np.float32))),
    ("meets a constant array", between(lambda h, p: h + jnp.arange(6.0))),
    (
        "meets a constant array",
        between(lambda h, p: h + jnp.concatenate([jnp.zeros((3, 2)), jnp.ones((3, 4))], 1)),
    ),
    ("is reduced by `reduce_sum`", between(lambda h, p: h - jnp.mean(h, 1, keepdims=True))),
    ("is reduced by `reduce_max`", between(lambda h, p: jax.nn.softmax(h))),
    ("is reduced by `argmax`", between(lambda h, p: h * jnp.argmax(h, 1)[:, None])),
    ("is looked up by `gather`", between(lambda h, p: jnp.max(h.reshape(3, 2, 3), 1)[:, [0] * 6])),
    ("is taken out alone", between(lambda h, p: h[:, :1] * h)),
    ("is taken out alone", between(lambda h, p: h * h[:, 2][:, None])),
    ("is taken apart", between(lambda h, p: h + sum(jnp.unstack(h, axis=1))[:, None])),
    ("is flattened together", between(pairs)),
    (
        "is cut or mixed by `dynamic_slice`",
        between(lambda h, p: jax.lax.dynamic_slice_in_dim(h, 1, 3, 1)[:, jnp.zeros(6, int)]),
    ),
    (
        "is cut or mixed by `pad`",
        between(lambda h, p: jax.lax.pad(h, 0.0, ((0, 0, 0), (1, -1, 0)))),
    ),
    ("is cut or mixed by `cumsum`", between(lambda h, p: jnp.cumsum(h, 1))),
    (
        "is cut or mixed by `reduce_window_max`",
        between(lambda h, p: nnx.max_pool(h[:, :, None], (2,), padding="SAME")[:, :, 0]),
    ),
    (
        "is a position of a convolution",
        between(lambda h, p: conv(h[:, None, :, None], jnp.ones((1, 3, 1, 1)))[:, 0, :, 0]),
    ),
    ("passes through `sort`, which has no rule", between(lambda h, p: jnp.sort(h, 1))),
    ("passes through `while`, which has no rule", between(repeated)),
    ("meets an axis that an operation has mixed", between(lambda h, p: h + jnp.sort(p["v"]))),
    ("is contracted with what is no parameter", between(lambda h, p: h @ h.T @ h)),
    ("is contracted with what is no parameter", lambda p, x: x @ p["a"] @ jnp.tanh(p["b"])),
    ("is contracted with what is no parameter", lambda p, x: x @ p["a"] @ (p["b"] * p["b"])),
    ("is contracted with what is no parameter", lambda p, x: x @ p["a"] @ (1.0 / p["b"])),
    ("is contracted with what is no parameter", lambda p, x: x @ p["a"] @ (p["b"] + 1.0)),
]


@pytest.mark.parametrize(("reason", "forward"), REFUSED)
def test_operations_that_mix_channels_are_named(reason, forward):
    structure = find(forward)
    assert not structure.groups
    assert reason in structure.fixed["a"]


def test_kernel_that_produces_and_consumes_the_same_units_is_fixed():
    """Removing its slices takes units away at both ends, which is no gate at one of them."""
    tied = lambda p, x: jnp.tanh(x @ p["a"] @ p["b"]) @ p["b"].T @ p["out"]
    structure = find(tied, {**PARAMS, "out": jnp.ones((6, 2))})
    reason = "goes into a kernel along an axis with another use"
    assert structure.fixed == {"a": reason, "b": reason, "out": "feeds the outputs"}


def test_kernel_in_the_state_takes_no_gates():
    last = jax.tree_util.Partial(lambda kernel, p, x: x @ p["a"] @ kernel, PARAMS["b"])
    assert find(last).fixed == {"a": "goes into an array of the state"}


def test_one_position_of_a_group_that_is_fixed_fixes_all_of_it():
    structure = find(lambda p, x: ((h := x @ p["a"]) @ p["b"], h[:, 2]))
    assert structure.fixed["a"] == "is taken out alone by `squeeze`"


def test_recurrent_units_are_one_group():
    """The same kernel twice: its input and its output axis are the same units."""

    def forward(p, x):
        h = jnp.tanh(x @ p["in"])
        for _ in range(2):
            h = jnp.tanh(h @ p["recurrent"] + x @ p["in"])
        return h @ p["out"]

    params = {"in": jnp.ones((4, 6)), "recurrent": jnp.ones((6, 6)), "out": jnp.ones((6, 2))}
    group = find(forward, params).groups["in"]
    assert paths(group)["producers"] == [("in", 1), ("recurrent", 1)]
    assert paths(group)["consumers"] == [("out", 0), ("recurrent", 0)]


def test_heads_and_channels_of_attention():
    """Heads go whole; within them the channels of values alone, as queries meet keys."""

    def forward(p, x):
        q, k, v = (jnp.einsum("btm,mhd->bthd", x, p[name]) for name in ("q", "k", "v"))
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(3.0), axis=-1)
        return jnp.einsum("bhts,bshd,hdm->btm", weights, v, p["o"])

    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    params = {"q": draw(5, 2, 3), "k": draw(5, 2, 3), "v": draw(5, 2, 4), "o": draw(2, 4, 5)}
    inputs = draw(3, 6, 5)
    structure = find(forward, params, inputs)
    assert {name: group.num_units for name, group in structure.groups.items()} == {"q": 2, "v": 4}
    assert paths(structure.groups["q"])["producers"] == [("k", 1), ("q", 1), ("v", 1)]
    assert paths(structure.groups["v"])["consumers"] == [("o", 1)]
    masks = {"q": np.array([False, True]), "v": np.array([True, False, True, True])}
    gates = {name: jnp.asarray(mask, jnp.float32) for name, mask in masks.items()}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        pruned = pruning.remove_units(structure, regjax.from_callable(forward, params), masks)
        gated = forward(pruning.apply_gates(structure, params, gates), inputs)
        np.testing.assert_allclose(forward(pruned.params, inputs), gated, rtol=1e-5, atol=1e-6)
    assert pruned.params["o"].shape == (1, 3, 5)


def test_abstract_inputs_do_and_nothing_is_computed():
    model = networks.nnx_model("plain")
    abstract = jax.ShapeDtypeStruct(networks.IMAGES.shape, networks.IMAGES.dtype)
    structure = find_in(model, abstract)
    assert list(structure.groups) == list(networks.UNITS["plain"])
    assert structure.inputs == abstract


def test_train_mode_finds_the_same_groups():
    model = networks.nnx_model("residual")
    function = regjax.model_function(model, mode="train")
    assert list(find(function, model.params, networks.IMAGES).groups) == list(
        networks.UNITS["residual"]
    )


def test_bad_parameters_are_refused():
    with pytest.raises(TypeError, match=r"`params\['a'\]` must be real floating point, got int32"):
        find(lambda p, x: x, {"a": jnp.ones(3, jnp.int32)})
    with pytest.raises(ValueError, match="`params` must have at least one array leaf"):
        find(lambda p, x: x, {})
