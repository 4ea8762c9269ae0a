"""Stacked layers give the numbers of the unrolled network, whoever reads their axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import regjax
from regjax import (
    _slices,
    curvature,
    diagnostics,
    initializers,
    normalization,
    pruning,
    regularizers,
    transforms,
)
from tests import stacked

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
AXES = pytest.mark.parametrize("axis", [0, 1])
KERNELS = {
    "blocks": [
        {
            "query": {"kernel": True, "bias": False},
            "out": {"kernel": True, "bias": False},
            "mlp": {"kernel": True, "bias": False},
            "norm": {"scale": False},
        }
    ]
    * stacked.LAYERS,
    "head": {"kernel": True, "bias": False},
}
KERNELS_OF_STACK = {**KERNELS, "blocks": KERNELS["blocks"][0]}


def grads_like(params, seed=7):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), params
    )


@AXES
@pytest.mark.parametrize("per_filter", [True, False])
def test_rescaled_weights(axis, per_filter):
    params = stacked.unrolled()
    updates = grads_like(params)
    options = {"target_norm": 2.0, "per_filter": per_filter}
    one = transforms.rescale_weights(mask=KERNELS, **options)
    expected, _ = one.update(updates, one.init(params), params)
    many = transforms.rescale_weights(mask=KERNELS_OF_STACK, layout=stacked.layout(axis), **options)
    whole = stacked.stack(params, axis)
    found, _ = many.update(stacked.stack(updates, axis), many.init(whole), whole)
    stacked.assert_same(stacked.unstack(found, axis), expected, **CLOSE)


def test_rescaled_weights_have_the_norm_in_every_layer():
    # The figures of the issue: four layers, .13, .21, .41 and .87 where the layers are mixed.
    sizes = np.float32([0.13, 0.21, 0.41, 0.87])
    kernel = np.random.default_rng(0).normal(size=(4, 16, 16)).astype(np.float32)
    params = {"layers": {"kernel": sizes[:, None, None] * kernel, "bias": np.ones((4, 16))}}
    tx = transforms.rescale_weights(mask={"layers": {"kernel": True, "bias": False}})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)["layers"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, rtol=1e-6)


@AXES
def test_rescaled_velocity(axis):
    params = stacked.unrolled()
    draw = lambda *shape: jnp.asarray(np.random.default_rng(2).uniform(1, 2, shape), jnp.float32)
    factors = [draw(stacked.LAYERS, stacked.HEADS, 2)[i] for i in range(stacked.LAYERS)]
    ones = jax.tree.map(lambda leaf: 1.0, params)
    for block, factor in zip(ones["blocks"], factors, strict=True):
        block["query"] = {**block["query"], "kernel": factor}
    expected = transforms.rescale_velocity(params, factor=ones)
    whole = jax.tree.map(lambda leaf: 1.0, stacked.stack(params))
    # The axes of layers and of units as they lie: in both forms the layers come first.
    whole["blocks"]["query"]["kernel"] = jnp.stack(factors)
    found = transforms.rescale_velocity(
        stacked.stack(params, axis), factor=whole, layout=stacked.layout(axis)
    )
    stacked.assert_same(stacked.unstack(found, axis), expected, rtol=1e-6)


@AXES
def test_removed_radial_parts(axis):
    params = stacked.unrolled()
    grads = grads_like(params)
    # Of one layer the gradient is orthogonal to each filter of one kernel, of another to the whole.
    first, second = params["blocks"][0]["mlp"]["kernel"], params["blocks"][1]["mlp"]["kernel"]
    across = lambda g, w, over: (
        g - w * jnp.sum(g * w, over, keepdims=True) / jnp.sum(w**2, over, keepdims=True)
    )
    for block, w, over in ((0, first, (0,)), (1, second, (0, 1))):
        place = grads["blocks"][block]["mlp"]
        place["kernel"] = across(place["kernel"], w, over)
    make = functools.partial(
        transforms.remove_radial, optax.scale_by_sign(), weight_decay=0.1, threshold=1e-4
    )
    tx = make()
    expected, _ = tx.update(grads, tx.init(params), params)
    assert not np.allclose(
        expected["blocks"][0]["mlp"]["kernel"],
        jnp.sign(grads["blocks"][0]["mlp"]["kernel"]) + 0.1 * first,
        atol=1e-3,
    )
    tx = make(layout=stacked.layout(axis))
    whole = stacked.stack(params, axis)
    found, _ = tx.update(stacked.stack(grads, axis), tx.init(whole), whole)
    stacked.assert_same(stacked.unstack(found, axis), expected, **CLOSE)


@AXES
def test_split_weights(axis):
    params, layout = stacked.unrolled(), stacked.layout(axis)
    slope = lambda join, split: jax.jit(
        jax.grad(lambda p: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(join(p))))
    )(split)
    expected = normalization.split_weights(params, mask=KERNELS)
    whole = stacked.stack(params, axis)
    found = normalization.split_weights(whole, mask=KERNELS_OF_STACK, layout=layout)
    lengths = found["blocks"]["query"]["kernel"].g
    assert lengths.shape == (3, 2, 2)
    for i, block in enumerate(expected["blocks"]):
        np.testing.assert_allclose(lengths[i], block["query"]["kernel"].g, rtol=1e-6)
        np.testing.assert_allclose(
            jnp.take(found["blocks"]["mlp"]["kernel"].g, i, 0), block["mlp"]["kernel"].g, rtol=1e-6
        )
    join = functools.partial(normalization.join_weights, layout=layout)
    stacked.assert_same(join(found), whole, rtol=1e-6)
    of_stack, of_list = slope(join, found), slope(normalization.join_weights, expected)
    for name in ("query", "mlp", "out"):
        for part in ("v", "g"):
            at = lambda tree: getattr(tree[name]["kernel"], part)  # noqa: B023
            moved = axis if part == "v" else 0
            for i, block in enumerate(of_list["blocks"]):
                np.testing.assert_allclose(
                    jnp.take(at(of_stack["blocks"]), i, moved), at(block), **CLOSE
                )
    with pytest.raises(ValueError, match="`g` must have shape"):
        normalization.join_weights(
            {"blocks": {"kernel": found["blocks"]["mlp"]["kernel"]}}, layout=regjax.Layout()
        )


def test_standardized_weights_of_stacks():
    kernel = np.random.default_rng(0).normal(size=(4, 3, 3, 2, 5)).astype(np.float32)
    kernel *= np.float32([0.25, 0.37, 0.79, 1.63])[:, None, None, None, None]
    expected = np.stack([normalization.standardize_weight(k) for k in kernel])
    for axis in range(5):
        found = normalization.standardize_weight(
            np.moveaxis(kernel, 0, axis), layout=regjax.Layout(stack=axis)
        )
        np.testing.assert_allclose(np.moveaxis(found, axis, 0), expected, rtol=1e-5, atol=1e-6)
    deviations = np.std(expected, axis=(1, 2, 3), ddof=1)
    np.testing.assert_allclose(deviations, 1, rtol=1e-4)


@AXES
@pytest.mark.parametrize("per_filter", [True, False])
def test_directions(axis, per_filter):
    params = stacked.unrolled()
    whole = stacked.stack(params, axis)
    key = jax.random.key(3)
    draw = functools.partial(diagnostics.filter_normalized_direction, per_filter=per_filter)
    found = stacked.unstack(draw(whole, key=key, layout=stacked.layout(axis)), axis)
    # Layer by layer, each with its key; a tree of the same number of leaves.
    keys = jax.random.split(key, stacked.LAYERS)
    for i, block in enumerate(params["blocks"]):
        alone = draw({"blocks": block, "head": params["head"]}, key=keys[i])
        stacked.assert_same(found["blocks"][i], alone["blocks"], **CLOSE)
    alone = draw({"blocks": params["blocks"][0], "head": params["head"]}, key=key)
    stacked.assert_same(found["head"], alone["head"], **CLOSE)
    over = (0,) if per_filter else (0, 1)
    for direction, block in zip(found["blocks"], params["blocks"], strict=True):
        norms = [np.linalg.norm(tree["mlp"]["kernel"], axis=over) for tree in (direction, block)]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        assert not jnp.any(direction["query"]["bias"])
        assert not jnp.any(direction["norm"]["scale"])


def test_surfaces_of_a_given_direction():
    params, axis = stacked.unrolled(), 1
    directions = [
        diagnostics.filter_normalized_direction(
            stacked.stack(params, axis), key=jax.random.key(i), layout=stacked.layout(axis)
        )
        for i in range(2)
    ]
    surface = functools.partial(diagnostics.loss_surface, positions=np.float32([-0.5, 0, 0.5]))
    loss = stacked.loss_of(stacked.stacked_model(axis))
    found = surface(loss, stacked.stack(params, axis), *directions, *stacked.batch())
    expected = surface(
        stacked.loss_of(stacked.unrolled_model), params,
        *(stacked.unstack(direction, axis) for direction in directions), *stacked.batch(),
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@AXES
def test_spectral_norms(axis):
    params = stacked.unrolled()
    penalty = regularizers.spectral_norm_penalty
    expected = jax.value_and_grad(penalty)(params)
    whole = stacked.stack(params, axis)
    found = jax.value_and_grad(functools.partial(penalty, layout=stacked.layout(axis)))(whole)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    stacked.assert_same(stacked.unstack(found[1], axis), expected[1], rtol=1e-4, atol=1e-5)
    iterated = penalty(
        whole, num_iterations=200, key=jax.random.key(0), layout=stacked.layout(axis)
    )
    np.testing.assert_allclose(iterated, expected[0], rtol=1e-4)


@pytest.mark.parametrize(("axis", "per_filter"), [(0, False), (1, True)])
def test_scale_invariance(axis, per_filter):
    kernels = list(jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)), jnp.float32))
    inputs, layout = stacked.batch()[0], {"kernel": regjax.Layout(stack=axis)}
    over = 0 if per_filter else (0, 1)
    unit = lambda kernel: kernel / jnp.linalg.norm(kernel, axis=over, keepdims=True)

    # Layers of which all but the last ones divide the size of their kernel, or its filters, out.
    def model(kernels, x, last):
        for i, kernel in enumerate(kernels):
            x = jnp.tanh(x @ (unit(kernel) if i < last else kernel))
        return x

    find = functools.partial(
        diagnostics.scale_invariant_mask, key=jax.random.key(0), per_filter=per_filter
    )
    of_list = find(lambda p, x: model(p, x, 2), kernels, inputs)
    assert of_list.mask == [True, True, False]
    for last in (2, 3):
        rows = lambda tree: [jnp.take(tree["kernel"], i, axis) for i in range(3)]
        of_stack = find(
            lambda p, x: model(rows(p), x, last),  # noqa: B023
            {"kernel": jnp.stack(kernels, axis)}, inputs, layout=layout,
        )  # fmt: skip
        assert of_stack.mask == {"kernel": last == 3}
        if last == 2:
            # The worst layer decides; both forms draw the same two functionals.
            np.testing.assert_allclose(
                of_stack.radial_fraction["kernel"], max(of_list.radial_fraction), rtol=1e-4
            )


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def wide(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


@pytest.mark.parametrize(
    ("axis", "kind"),
    [(0, "hessian"), (1, "hessian"), (0, "stream"), (1, "gauss_newton"), (1, "chunks"), (0, "sum")],
)
def test_blocks(axis, kind, double):
    params, batch = wide(stacked.unrolled()), wide(stacked.batch())
    mean_square = lambda outputs, targets: jnp.mean((outputs - targets) ** 2)

    def operator(model, params):
        if kind == "gauss_newton":
            return curvature.gauss_newton(model, mean_square, params, *batch)
        loss = stacked.loss_of(model)
        if kind == "stream":
            source = [tuple(leaf[i : i + 3] for leaf in batch) for i in (0, 3)]
            return curvature.stream(curvature.hessian, loss, params, source)
        chunk_size = 2 if kind == "chunks" else None
        hessian = curvature.hessian(loss, params, *batch, chunk_size=chunk_size)
        return hessian + 0.5 * curvature.identity(hessian.space) if kind == "sum" else hessian

    of_list = operator(stacked.unrolled_model, params)
    of_stack = operator(stacked.stacked_model(axis), stacked.stack(params, axis))
    whole = np.asarray(of_list.dense())
    numbers = of_list.space.unravel(jnp.arange(len(whole), dtype=jnp.float64))
    for depth in (2, 3) if kind == "sum" else (3,):
        rows = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(numbers):
            name = jax.tree_util.keystr(path[:depth], simple=True, separator="/")
            rows.setdefault(name, []).extend(np.ravel(leaf).astype(int))
        found = curvature.by_block(of_stack, depth=depth, layout=stacked.layout(axis))
        assert set(found) == set(rows)
        assert ("blocks/2/query" if depth == 3 else "blocks/2") in found
        for name in list(found)[:: 3 if kind == "hessian" else 7]:
            np.testing.assert_allclose(
                found[name].dense(), whole[np.ix_(rows[name], rows[name])], rtol=1e-9, atol=1e-11
            )
    assert list(curvature.by_block(of_stack, layout=stacked.layout(axis))) == ["blocks", "head"]


def test_indices_stand_behind_the_container_of_the_layers():
    layer = {"a": {"kernel": jnp.ones((3, 4, 2)), "bias": jnp.ones((3, 2))}}
    head = {"kernel": jnp.ones((2, 2))}
    for params, expected in (
        ({"net": {"layers": layer}, "head": head}, "net/layers/0/a/bias"),
        ({"net": {"stacked": layer}}, "net/stacked/0/a/bias"),
        ({"net": layer, "head": head}, "net/0/a/bias"),
        ({"net": layer}, "net/0/a/bias"),
        ({"layers": layer}, "layers/0/a/bias"),
        ({"layers": {"inner": layer}, "head": head}, "layers/0/inner/a/bias"),
    ):
        names = [part.name for part in _slices.parts(params, None)]
        assert expected in names, names


def test_vectors_of_a_block_are_those_of_the_layer():
    params = stacked.stack(stacked.unrolled(), 1)
    loss = stacked.loss_of(stacked.stacked_model(1))
    operator = curvature.hessian(loss, params, *stacked.batch())
    block = curvature.by_block(operator, depth=3, layout=stacked.layout(1))["blocks/1/query"]
    found = curvature.top_eigenpairs(block, 1, key=jax.random.key(0))
    assert found.vectors["blocks"]["query"]["kernel"].shape == (1, 4, 2, 2)
    assert found.vectors["blocks"]["mlp"] == {"kernel": None, "bias": None}
    assert found.converged.all()
    within = block.restricted(jax.tree.map(lambda leaf: leaf.shape == (2, 2), block.space.like()))
    np.testing.assert_allclose(within.dense(), block.dense()[:4, :4], rtol=1e-4, atol=1e-6)


@AXES
def test_sharpness_by_group(axis, double):
    params, batch = wide(stacked.unrolled()), wide(stacked.batch())
    measure = functools.partial(
        diagnostics.spherical_sharpness_by_group, key=jax.random.key(0), tol=1e-9
    )
    only = lambda mask, keep: jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf and keep in jax.tree_util.keystr(path), mask
    )
    expected = measure(
        stacked.loss_of(stacked.unrolled_model), params, *batch, mask=only(KERNELS, "mlp")
    )
    found = measure(
        stacked.loss_of(stacked.stacked_model(axis)), stacked.stack(params, axis), *batch,
        mask=only(KERNELS_OF_STACK, "mlp"), layout=stacked.layout(axis),
    )  # fmt: skip
    assert list(found) == list(expected) == [f"blocks/{i}/mlp/kernel" for i in range(3)]
    for name, result in expected.items():
        np.testing.assert_allclose(found[name].value, result.value, rtol=1e-6)


@AXES
def test_gradinit(axis):
    params, layout = stacked.unrolled(), stacked.layout(axis)
    random = np.random.default_rng(1)
    batches = tuple(
        jnp.asarray(random.normal(size=(4, 3, 5, n)), jnp.float32) for n in (stacked.WIDTH, 2)
    )
    learn = functools.partial(
        initializers.gradinit, gradient_norm_bound=1.0, learning_rate=0.05,
    )  # fmt: skip
    expected = learn(stacked.loss_of(stacked.unrolled_model), params, batches)
    found = learn(
        stacked.loss_of(stacked.stacked_model(axis)), stacked.stack(params, axis), batches,
        layout=layout,
    )  # fmt: skip
    stacked.assert_same(stacked.unstack(found.params, axis), expected.params, rtol=1e-4, atol=1e-5)
    scales = [block["mlp"]["kernel"] for block in expected.scales["blocks"]]
    np.testing.assert_allclose(found.scales["blocks"]["mlp"]["kernel"], scales, rtol=1e-4)
    assert len(set(np.asarray(scales).tolist())) == stacked.LAYERS


def parts_of(tree, axis):
    """Leaves by their names in the list of layers, of the stacked form or of the list."""
    tree = tree if isinstance(tree["blocks"], list) else stacked.unstack(tree, axis)
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


@AXES
def test_lowest_weights_with_a_floor_in_each_layer(axis):
    params = stacked.unrolled()
    whole = stacked.stack(params, axis)
    # The first layer is so small that it would go as a whole, but for the floor.
    lowest = functools.partial(pruning.mask_lowest, num_to_remove=90, min_units=2)
    scores = pruning.weight_magnitude(params)
    expected = parts_of(lowest(scores, pruning.full_masks(scores)), axis)
    scores = pruning.weight_magnitude(whole)
    masks = pruning.full_masks(scores)
    find = functools.partial(lowest, layout=stacked.layout(axis))
    for run in (find, jax.jit(find)):
        found = parts_of(run(scores, masks), axis)
        for name, mask in expected.items():
            np.testing.assert_array_equal(found[name], mask, err_msg=name)
    assert int(found["blocks/0/mlp/kernel"].sum()) == 2
    limit = sum(max(leaf.size - 2, 0) for leaf in jax.tree.leaves(params))
    lowest(scores, masks, num_to_remove=limit, layout=stacked.layout(axis))
    with pytest.raises(ValueError, match=f"`num_to_remove` must be at most {limit},"):
        lowest(scores, masks, num_to_remove=limit + 1, layout=stacked.layout(axis))


@AXES
def test_importance_of_filters(axis):
    params = stacked.unrolled()
    grads = grads_like(params)

    def importance(params, grads, layout=None):
        groups, num_groups = pruning.filter_groups(params, layout=layout)
        values = pruning.group_importance(params, grads, groups=groups, num_groups=num_groups)
        spread = jax.tree.map(lambda leaf, g: jnp.broadcast_to(g, leaf.shape), params, groups)
        return jax.tree.map(lambda g: jnp.where(g < 0, -1, values[g]), spread), num_groups

    expected, num_groups = importance(params, grads)
    found, number = importance(
        stacked.stack(params, axis), stacked.stack(grads, axis), stacked.layout(axis)
    )
    assert number == num_groups == 3 * (4 + 4 + 4) + 2
    of_list, of_stack = parts_of(expected, axis), parts_of(found, axis)
    for name, values in of_list.items():
        np.testing.assert_allclose(of_stack[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_units_of_a_scan_are_those_of_all_layers():
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    params = {"into": draw(0, 3, 5, 7), "out": draw(1, 3, 7, 5)}

    def model(params, x):
        step = lambda x, w: (x + jnp.tanh(x @ w["into"]) @ w["out"], None)
        return jax.lax.scan(step, x, params)[0]

    structure = pruning.find_structure(model, params, jnp.ones((4, 5)))
    norms = pruning.incoming_norm(structure, params)
    assert list(norms) == ["into"]
    expected = np.sqrt(sum(np.sum(np.square(kernel), 0) for kernel in params["into"]))
    np.testing.assert_allclose(norms["into"], expected, rtol=1e-5)


@AXES
def test_penalties_that_go_over_all_weights_see_no_stack(axis):
    params, grads = stacked.unrolled(), grads_like(stacked.unrolled())
    for tx in (
        transforms.coherent_regularization(0.3, gate=transforms.cosine_gate(0.5)),
        transforms.coherent_regularization(
            0.3, gate=transforms.ratio_gate(), penalty_gradient=transforms.l1_gradient
        ),
        transforms.soft_threshold(0.1),
    ):
        expected, state = tx.update(grads, tx.init(params), params)
        whole = stacked.stack(params, axis)
        found, other = tx.update(stacked.stack(grads, axis), tx.init(whole), whole)
        stacked.assert_same(stacked.unstack(found, axis), expected, rtol=1e-6)
        assert bool(getattr(state, "on", True)) == bool(getattr(other, "on", True))


@AXES
@pytest.mark.parametrize("cyclic", [True, False])
def test_noise_of_one_layer_at_a_time(axis, cyclic):
    whole = stacked.stack(stacked.unrolled(), axis)
    groups = {"blocks": 0, "head": 1}
    seen = []
    tx = transforms.perturbed_gradient(
        0.1, key=jax.random.key(0), cyclic=cyclic, groups=groups, layout=stacked.layout(axis)
    )
    update = jax.jit(lambda state: tx.update(whole, state, whole, grad_fn=lambda params, i: params))
    state = tx.init(whole)
    for _ in range(4 if cyclic else 12):
        noisy, state = update(state)
        moved = jax.tree.map(lambda one, other: jnp.any(one != other), noisy, whole)
        by_layer = [
            [
                bool(jnp.any(one != other))
                for one, other in zip(*map(jax.tree.leaves, pair), strict=True)
            ]
            for pair in zip(
                stacked.unstack(noisy, axis)["blocks"],
                stacked.unstack(whole, axis)["blocks"],
                strict=True,
            )
        ]
        # All leaves of a layer, or none.
        assert all(len(set(layer)) == 1 for layer in by_layer)
        seen.append((*(layer[0] for layer in by_layer), bool(moved["head"]["kernel"])))
    assert all(sum(groups) == 1 for groups in seen)
    assert len(set(seen)) == stacked.LAYERS + 1
    if cyclic:
        assert [groups.index(True) for groups in seen] == [0, 1, 2, 3]
