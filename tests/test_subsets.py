"""Functions of a part of the parameters, against the dense matrix of all of them."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import regjax
from tests import oracles

PARAMS = {"w": jnp.ones(2), "n": jnp.int8(1)}
ONLY_W = {"w": True, "n": False}


def dense(loss_fn, params, *batch):
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda vector: loss_fn(unravel(vector), *batch))(flat)


def chosen_rows(params, chosen):
    """Which numbers of the flat vector belong to the chosen leaves."""
    sizes = [
        np.full(leaf.size, here) for leaf, here in zip(jax.tree.leaves(params), chosen, strict=True)
    ]
    return np.concatenate(sizes)


@pytest.fixture(name="double")
def _double():
    with jax.enable_x64(True):
        yield


SELECTIONS = {
    "last layer": lambda path, leaf: path[0] == "second",
    "kernels": lambda path, leaf: leaf.ndim == 2,
    "a mask": {"first": False, "second": {"bias": True, "kernel": False}},
    "all": None,
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", SELECTIONS)
def test_the_hessian_of_a_part_is_the_principal_submatrix(case):
    problem = oracles.problem(dtype=np.float64)
    loss, part = regjax.subset(oracles.loss_fn, problem.params, wrt=SELECTIONS[case])
    chosen = [leaf is not None for leaf in jax.tree.leaves(part, is_leaf=lambda n: n is None)]
    rows = chosen_rows(problem.params, chosen)
    expected = dense(oracles.loss_fn, problem.params, *problem.batch)[np.ix_(rows, rows)]
    np.testing.assert_allclose(dense(loss, part, *problem.batch), expected, atol=1e-14)
    found = regjax.curvature.hessian(loss, part, *problem.batch, chunk_size=7).dense()
    np.testing.assert_allclose(found, expected, atol=1e-13)
    whole = loss.whole(part)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, whole, problem.params))


class Adapted(nnx.Module):
    """Integer table, int8 weights with a scale, a tied kernel and a pair of LoRA."""

    def __init__(self, rngs):
        self.first = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)
        self.second = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)
        self.second.lora.lora_b.set_value(jax.random.normal(rngs.params(), (2, 4)))
        self.quantised = nnx.Variable(jnp.arange(-8, 8, dtype=jnp.int8).reshape(4, 4))
        self.on = nnx.Variable(jnp.array([True, False, True, True]))
        self.rngs = rngs

    def __call__(self, inputs):
        frozen = self.quantised[...].astype(inputs.dtype) / 8
        hidden = jnp.tanh(self.first(inputs) @ frozen)
        return jnp.where(self.on[...][None], self.second(hidden), 0)


def test_lora_pairs_of_an_nnx_model_with_leaves_of_any_type():
    graph, state = nnx.split(Adapted(nnx.Rngs(0)))
    inputs = jax.random.normal(jax.random.key(1), (6, 4))

    def loss_fn(state, inputs):
        return jnp.mean(nnx.merge(graph, state)(inputs) ** 2)

    loss, part = regjax.subset(loss_fn, state, wrt=nnx.LoRAParam)
    floats = nnx.state(nnx.merge(graph, state), nnx.Param)
    others = nnx.state(nnx.merge(graph, state), nnx.Not(nnx.Param))
    rows = chosen_rows(floats, ["lora_" in jax.tree_util.keystr(p)
                                for p, _ in jax.tree.leaves_with_path(floats)])  # fmt: skip
    whole = dense(lambda f: loss_fn(nnx.merge_state(f, others), inputs), floats)
    found = regjax.curvature.hessian(loss, part, inputs)
    assert found.shape == (32, 32)
    np.testing.assert_allclose(found.dense(), whole[np.ix_(rows, rows)], atol=1e-5)
    assert jax.tree.structure(part) == jax.tree.structure(jax.grad(loss)(part, inputs))
    assert jax.tree.structure(loss.whole(part)) == jax.tree.structure(state)


def test_a_part_trains_with_sam_and_a_diagnostic_takes_it():
    problem = oracles.problem()
    loss, part = regjax.subset(oracles.loss_fn, problem.params, wrt=SELECTIONS["last layer"])
    grad_fn = lambda p, _: jax.grad(loss)(p, *problem.batch)
    tx = optax.chain(regjax.transforms.sam(0.05), optax.sgd(0.1))
    updates, _ = jax.jit(tx.update, static_argnames="grad_fn")(
        grad_fn(part, 0), tx.init(part), part, grad_fn=grad_fn
    )
    # The same step with a mask over all parameters, whose others have no gradient.
    mask = {"first": False, "second": True}
    whole_fn = lambda p, _: jax.grad(oracles.loss_fn)(p, *problem.batch)
    masked = optax.chain(regjax.transforms.sam(0.05, mask=mask), optax.sgd(0.1))
    expected, _ = masked.update(
        whole_fn(problem.params, 0), masked.init(problem.params), problem.params, grad_fn=whole_fn
    )
    np.testing.assert_allclose(
        updates["second"]["kernel"], expected["second"]["kernel"], rtol=1e-5, atol=1e-7
    )
    assert updates["first"] == {"bias": None, "kernel": None}


def test_leaves_that_are_no_arrays_are_static():
    module = equinox.nn.MLP(3, 1, 4, 1, activation=jax.nn.softplus, key=jax.random.key(0))
    inputs = jax.random.normal(jax.random.key(1), (5, 3))
    loss_fn = lambda module, inputs: jnp.mean(jax.vmap(module)(inputs) ** 2)
    chosen = jax.tree.map(equinox.is_inexact_array, module)
    loss, part = regjax.subset(loss_fn, module, wrt=chosen)
    np.testing.assert_allclose(loss(part, inputs), loss_fn(module, inputs), rtol=1e-6)
    arrays, static = equinox.partition(module, equinox.is_inexact_array)
    combined = lambda arrays, inputs: loss_fn(equinox.combine(arrays, static), inputs)
    found = regjax.curvature.hessian(loss, part, inputs).dense()
    np.testing.assert_allclose(found, dense(combined, arrays, inputs), atol=1e-6)


def test_constants_are_told_apart_by_type_and_value():
    calls = jax.jit(lambda function, part: function(part))
    seen = lambda params: params["w"] + (10 if params["n"] is True else params["n"])
    for value, expected in ((1, 2), (True, 11), (1.0, 2), (2, 3), (0.5, 1.5)):
        function, part = regjax.subset(seen, {"w": jnp.float32(1), "n": value}, wrt=ONLY_W)
        assert calls(function, part) == expected


def test_what_is_coupled_stays_coupled():
    coupled = lambda params, inputs: jnp.var(inputs @ params["w"])
    coupled.couples_examples = True
    loss, _ = regjax.subset(coupled, PARAMS, wrt=ONLY_W)
    assert regjax.couples_examples(loss)


@pytest.mark.parametrize(
    ("wrt", "error", "message"),
    [
        ({"w": False, "n": False}, ValueError, "`wrt` must choose at least one leaf, got none"),
        (lambda path, leaf: "z" in path, ValueError, "`wrt` must match at least one of .* n, w"),
        (nnx.LoRAParam, ValueError, "no nnx variables"),
        ({"w": True, "n": True}, TypeError, r"`params\['n'\]` must be real .*int8.*`wrt`"),
        (None, TypeError, r"`params\['n'\]` must be real .*int8.*`wrt`"),
    ],
)
def test_bad_choices_are_refused(wrt, error, message):
    with pytest.raises(error, match=message):
        regjax.subset(lambda params: params["w"].sum(), PARAMS, wrt=wrt)


def test_a_part_of_another_structure_is_refused():
    loss, part = regjax.subset(lambda params: params["w"].sum(), PARAMS, wrt=ONLY_W)
    assert part == {"w": PARAMS["w"], "n": None}
    with pytest.raises(ValueError, match="`part` must have the tree structure"):
        loss(PARAMS)
    with pytest.raises(TypeError, match="`function` must be callable"):
        regjax.subset(3.0, PARAMS, wrt=ONLY_W)


WITH_INT8 = {**oracles.problem().params, "table": jnp.int8(3)}
OF_FIRST = {
    "mask": {"first": True, "second": False, "table": False},
    "path": lambda path, leaf: path[0] == "first",
    "filter": nnx.PathContains("first"),
}


def float_loss(params, *batch):
    """A loss that does not read the int8 leaf."""
    return oracles.loss_fn({name: params[name] for name in ("first", "second")}, *batch)


READERS = {
    "spherical sharpness": lambda mask: regjax.diagnostics.spherical_sharpness(
        float_loss, WITH_INT8, *oracles.problem().batch, mask=mask, key=jax.random.key(0)
    ).value,
    "effective rate": lambda mask: regjax.diagnostics.effective_learning_rate(
        WITH_INT8, mask=mask, learning_rate=0.1
    ),
    "edge": lambda mask: regjax.diagnostics.spherical_edge_of_stability(
        float_loss, WITH_INT8, WITH_INT8, *oracles.problem().batch,
        mask=mask, key=jax.random.key(0), learning_rate=0.1,
    ).sharpness,
    "sam": lambda mask: regjax.transforms.sam(0.1, mask=mask).update(
        jax.grad(float_loss)(oracles.problem().params, *oracles.problem().batch),
        regjax.transforms.sam(0.1).init(oracles.problem().params),
        oracles.problem().params,
        grad_fn=lambda p, _: jax.grad(float_loss)(p, *oracles.problem().batch),
    )[0],
    "restricted": lambda mask: regjax.curvature.hessian(
        float_loss, oracles.problem().params, *oracles.problem().batch
    ).restricted(mask).dense(),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_masks_paths_and_filters_mean_the_same_everywhere(reader):
    masks = dict(OF_FIRST)
    if reader in ("sam", "restricted"):
        masks["mask"] = {"first": True, "second": False}
    expected, *others = (READERS[reader](mask) for mask in masks.values())
    for found in others:
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_kernels_by_path():
    of_kernels = lambda path, leaf: path[-1] == "kernel"
    penalty = regjax.regularizers.spectral_norm_penalty
    assert penalty(WITH_INT8, mask=of_kernels) == penalty(oracles.problem().params)
    split = regjax.normalization.split_weights(WITH_INT8, mask=of_kernels)
    assert split["table"] is WITH_INT8["table"]
    assert jax.tree.structure(split["first"]["kernel"]) != jax.tree.structure(0)


def int8_model(params, inputs):
    """Logits of a tanh network after an int8 layer, with a scale for the table."""
    table = params["table"]["weights"].astype(inputs.dtype) * params["table"]["scale"]
    return oracles.model_fn(params["net"], jnp.tanh(inputs @ table))


def int8_problem():
    problem = oracles.problem(dtype=np.float64)
    weights = np.random.default_rng(3).integers(-9, 9, size=(5, 5)).astype(np.int8)
    table = {"weights": jnp.asarray(weights), "scale": jnp.float64(0.1)}
    return {"net": problem.params, "table": table}, problem.inputs, problem.targets


def int8_loss(params, inputs, targets):
    return oracles.cross_entropy(int8_model(params, inputs), targets)


OPERATORS = {
    "hessian": lambda p, x, y, **wrt: regjax.curvature.hessian(int8_loss, p, x, y, **wrt),
    "chunks": lambda p, x, y, **wrt: regjax.curvature.hessian(
        int8_loss, p, x, y, chunk_size=5, **wrt
    ),
    "from_gradient": lambda p, x, y, **wrt: regjax.curvature.from_gradient(
        lambda p: jax.grad(int8_loss, allow_int=True)(p, x, y), p, **wrt
    ),
    "gauss_newton": lambda p, x, y, **wrt: regjax.curvature.gauss_newton(
        int8_model, oracles.cross_entropy, p, x, y, **wrt
    ),
    "empirical_fisher": lambda p, x, y, **wrt: regjax.curvature.empirical_fisher(
        int8_model, oracles.cross_entropy, p, x, y, chunk_size=7, **wrt
    ),
    "fisher": lambda p, x, y, **wrt: regjax.curvature.fisher(
        int8_model, p, x, key=jax.random.key(0), **wrt
    ),
    "stream": lambda p, x, y, **wrt: regjax.curvature.stream(
        regjax.curvature.hessian, int8_loss, p, [(x[:9], y[:9]), (x[9:], y[9:])], **wrt
    ),
    "streamed fisher": lambda p, x, y, **wrt: regjax.curvature.stream(
        regjax.curvature.fisher, int8_model, p, [(x[:9],), (x[9:],)], key=jax.random.key(0), **wrt
    ),
    "dropout": lambda p, x, y, **wrt: regjax.curvature.dropout_covariance(
        lambda p, key: int8_loss(p, x * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype), y),
        p, key=jax.random.key(0), num_samples=3, **wrt,
    ),
}  # fmt: skip
FLOATS = {"net": True, "table": {"weights": False, "scale": True}}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", OPERATORS)
def test_wrt_of_each_operator_is_the_principal_submatrix(name):
    params, *batch = int8_problem()
    whole = OPERATORS[name](params, *batch, wrt=FLOATS)
    part = OPERATORS[name](params, *batch, wrt=lambda path, leaf: path[-1] == "bias")
    rows = chosen_rows(
        [leaf for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.float64],
        [True, False, True, False, False],
    )
    assert whole.shape == (len(rows), len(rows))
    assert part.shape == (9, 9)
    np.testing.assert_allclose(part.dense(), whole.dense()[np.ix_(rows, rows)], atol=1e-13)
    again = whole.restricted(lambda path, leaf: path[-1] == "bias")
    np.testing.assert_allclose(again.dense(), part.dense(), atol=1e-13)
    if name == "hessian":
        float_loss = lambda f: int8_loss(
            {"net": f["net"], "table": {**params["table"], "scale": f["scale"]}}, *batch
        )
        expected = dense(float_loss, {"net": params["net"], "scale": params["table"]["scale"]})
        np.testing.assert_allclose(whole.dense(), expected, atol=1e-13)
    if name in ("hessian", "gauss_newton", "fisher"):
        with pytest.raises(TypeError, match=r"`params\['table'\]\['weights'\]` .* `wrt`"):
            OPERATORS[name](params, *batch)
        with pytest.raises(ValueError, match="`wrt` must match at least one"):
            OPERATORS[name](params, *batch, wrt=lambda path, leaf: False)


@pytest.mark.usefixtures("double")
def test_a_product_of_a_part():
    params, *batch = int8_problem()
    wrt = {"net": {"first": True, "second": False}, "table": False}
    matrix = regjax.curvature.hessian(int8_loss, params, *batch, wrt=wrt)
    vector = matrix.space.unravel(jnp.arange(float(matrix.size)))
    found = regjax.curvature.hvp(int8_loss, params, vector, *batch, wrt=wrt)
    jax.tree.map(np.testing.assert_allclose, found, matrix.matvec(vector))
    other = {"net": params["net"], "table": {"weights": None, "scale": None}}
    with pytest.raises(ValueError, match="`vector` must have the tree structure"):
        regjax.curvature.hvp(int8_loss, params, other, *batch, wrt=wrt)
