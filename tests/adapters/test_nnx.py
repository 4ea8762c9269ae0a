"""Options of `from_nnx`: what is called, which random streams, which variables are parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import regjax
from regjax import curvature, initializers
from tests import oracles
from tests.adapters import networks

KEY = jax.random.key(0)


@pytest.fixture
def data():
    problem = oracles.problem(num_examples=10)
    return problem.inputs, problem.targets


class Block(nnx.Module):
    def __init__(self, rngs, rate=0.5):
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.linear = nnx.Linear(5, 5, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(jnp.tanh(self.linear(self.norm(x))))


class Scanned(nnx.Module):
    """Flax's own example: layers made by vmap and run by scan."""

    def __init__(self, rngs, rate=0.5):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return Block(rngs, rate)

        self.layers = create(rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x)

        return self.head(forward(x, self.layers))


def test_scanned_layers_train_with_a_key_and_masks_of_their_own(data):
    model = regjax.from_nnx(Scanned(nnx.Rngs(0)))
    run = lambda key, state: model.apply(model.params, state, data[0], train=True, key=key)
    outputs, state = run(KEY, model.state)
    np.testing.assert_array_equal(outputs, run(KEY, state)[0])
    assert np.abs(outputs - run(jax.random.key(1), state)[0]).max() > 1e-3
    keys = jax.random.key_data(state["layers"]["dropout"]["rngs"]["key"])
    assert len({tuple(key) for key in np.asarray(keys)}) == 3
    loss = regjax.model_loss(model, oracles.cross_entropy, mode="train", key=KEY)
    with pytest.raises(ValueError, match="`chunk_size` must not split"):
        curvature.hessian(loss, model.params, *data, chunk_size=5)


def test_the_hessian_of_scanned_layers_is_that_of_the_unrolled_network(data):
    model = regjax.from_nnx(Scanned(nnx.Rngs(0), rate=0.0))

    own = networks.unrolled_loss("linear")
    expected = oracles.dense_hessian(own, model.params, *data)
    for mode in ("evaluation", "train"):
        loss = regjax.model_loss(model, oracles.cross_entropy, mode=mode)
        assert not regjax.couples_examples(loss)
        dense = curvature.hessian(loss, model.params, *data, chunk_size=4).dense()
        np.testing.assert_allclose(dense, expected, atol=2e-5 * np.abs(expected).max())


class Sown(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(5, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        hidden = self.linear(x)
        self.sow(nnx.Intermediate, "hidden", hidden)
        return self.norm(hidden)


def popped(module, inputs):
    return module(inputs), nnx.pop(module, nnx.Intermediate)["hidden"][0]


def captured(module, inputs):
    outputs, found = nnx.capture(module, nnx.Intermediate)(inputs)
    return outputs, found["hidden"][0]


# The older form of flax, which most code has.
@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("call", [popped, captured])
def test_what_a_call_creates_is_no_state_and_a_call_may_read_it(call, data):
    module = Sown(nnx.Rngs(0))
    module(data[0])  # leaves an intermediate in the module
    for model in (regjax.from_nnx(module), regjax.from_nnx(module, call=call)):
        outputs, state = model.apply(model.params, model.state, data[0], train=True)
        assert jax.tree.structure(state) == jax.tree.structure(model.state)
        assert set(state) == {"norm"}
    expected = data[0] @ model.params["linear"]["kernel"]
    np.testing.assert_allclose(outputs[1], expected, rtol=1e-5, atol=1e-5)
    assert hasattr(module, "hidden")  # nobody has changed it


class Several(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(5, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)  # streams are given at the call
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def encode(self, inputs):
        return jnp.tanh(self.encoder(inputs["x"])) * inputs["mask"][:, None]

    def __call__(self, inputs, *, is_training, rngs=None):
        hidden = self.dropout(self.encode(inputs), deterministic=not is_training, rngs=rngs)
        return {"logits": self.head(hidden), "hidden": hidden}


def test_several_inputs_and_outputs_keywords_and_streams_at_the_call(data):
    module = Several(nnx.Rngs(0))
    inputs = {"x": data[0], "mask": jnp.ones(10).at[0].set(0)}
    model = regjax.from_nnx(module)
    run = lambda **options: model.apply(model.params, model.state, inputs, **options)[0]
    expected = module(inputs, is_training=False)
    jax.tree.map(np.testing.assert_array_equal, run(train=False), expected)
    one, same, other = (run(train=True, key=key) for key in (KEY, KEY, jax.random.key(1)))
    np.testing.assert_array_equal(one["hidden"], same["hidden"])
    assert np.abs(one["hidden"] - other["hidden"]).max() > 1e-3
    assert (one["hidden"][1:] == 0).any()
    method = regjax.from_nnx(module, call=Several.encode)
    bound = regjax.from_nnx(module, call=module.encode)
    for each in (method, bound):
        found = each.apply(each.params, each.state, inputs, train=False)[0]
        np.testing.assert_array_equal(found, expected["hidden"])
    assert method.apply == bound.apply


class Streams(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Dropout(0.5, rngs=rngs)
        self.two = nnx.Dropout(0.5, rng_collection="noise", rngs=rngs)

    def __call__(self, x):
        return jnp.stack([self.one(x), self.two(x)])


def test_named_streams_follow_the_key_and_the_others_keep_their_own():
    module, x = Streams(nnx.Rngs(dropout=0, noise=1)), jnp.ones(200)
    model = regjax.from_nnx(module, rngs="noise")
    runs = [
        model.apply({}, model.state, x, train=True, key=jax.random.key(seed))[0] for seed in (0, 1)
    ]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert (runs[0][1] != runs[1][1]).sum() > 60
    strange = regjax.from_nnx(module, rngs=("noise", "other"))
    with pytest.raises(ValueError, match=r"`rngs` must name streams .*\['dropout', 'noise'\].*'ot"):
        strange.apply({}, strange.state, x, train=True, key=KEY)


def test_dropout_without_a_key_draws_from_the_module_and_couples(data):
    model = regjax.from_nnx(Scanned(nnx.Rngs(0)))
    assert model.has_generators
    assert regjax.couples_examples(regjax.model_function(model, mode="train"))
    assert not regjax.couples_examples(regjax.model_function(model))
    loss = regjax.model_loss(model, oracles.cross_entropy, mode="train")
    with pytest.raises(ValueError, match="`chunk_size` must not split"):
        curvature.hessian(loss, model.params, *data, chunk_size=5)


class Deaf(nnx.Module):
    """Tells its layers by a flag of a name of its own."""

    def __init__(self, rngs, kind):
        self.linear = nnx.Linear(5, 3, rngs=rngs)
        norm, dropout = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.layer = norm if kind == "norm" else dropout
        self.kind = kind

    def __call__(self, x, noisy=False):
        name = "use_running_average" if self.kind == "norm" else "deterministic"
        return self.layer(self.linear(x), **{name: not noisy})


@pytest.mark.parametrize(("kind", "what"), [("norm", "batch stati"), ("dropout", "dropout that")])
def test_a_module_that_turns_its_layers_off_is_refused_in_train_mode(kind, what, data):
    module = Deaf(nnx.Rngs(0), kind)
    model = regjax.from_nnx(module)
    for mode in ("train", "train_per_chunk"):
        function = regjax.model_function(model, mode=mode, key=KEY)
        with pytest.raises(ValueError, match=f"`mode` must be 'evaluation' .* Deaf has {what}"):
            function(model.params, data[0])
    regjax.model_function(model)(model.params, data[0])
    told = regjax.from_nnx(module, call=lambda module, x, *, train: module(x, noisy=train))
    evaluation, train = (
        regjax.model_function(told, mode=mode, key=KEY)(told.params, data[0])
        for mode in ("evaluation", "train")
    )
    assert np.abs(evaluation - train).max() > 1e-3
    silent = regjax.from_nnx(module, call=lambda module, x, *, train: module(x))
    with pytest.raises(ValueError, match=f"Deaf has {what}.*, though its call is told by train"):
        regjax.model_function(silent, mode="train", key=KEY)(silent.params, data[0])


def test_some_layers_may_rest_on_purpose(data):
    class Partly(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, train=False):
            return self.dropout(self.norm(x, use_running_average=True), deterministic=not train)

    model = regjax.from_nnx(Partly(nnx.Rngs(0)))
    evaluation, train = (
        regjax.model_function(model, mode=mode, key=KEY)(model.params, data[0])
        for mode in ("evaluation", "train")
    )
    assert np.abs(evaluation - train).max() > 1e-3


class Adapted(nnx.Module):
    """A frozen int8 kernel, a LoRA pair, a norm and a head."""

    def __init__(self, rngs):
        kernel = np.random.default_rng(0).integers(-9, 9, (5, 4))
        self.quantized = nnx.Param(jnp.asarray(kernel, jnp.int8))
        self.lora = nnx.LoRA(5, 2, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.lora.lora_b[...] = jax.random.normal(KEY, (2, 4))

    def __call__(self, x):
        hidden = x @ (self.quantized[...].astype(x.dtype) / 9) + self.lora(x)
        return self.head(jnp.tanh(self.norm(hidden)))


PAIR = {"lora_a": True, "lora_b": True}
CHOICES = {
    "type": nnx.LoRAParam,
    "types": (nnx.LoRAParam, nnx.LoRAParam),
    "path": lambda path, value: "lora" in path,
    "filter": nnx.All(nnx.Param, nnx.PathContains("lora")),
    "mask": {"quantized": False, "lora": True, "norm": False, "head": False},
    "whole mask": {
        "quantized": False,
        "lora": PAIR,
        "norm": {"scale": False, "bias": False},
        "head": {"kernel": False, "bias": False},
    },
}


@pytest.mark.parametrize("wrt", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("mode", ["evaluation", "train"])
def test_a_part_of_the_parameters_gives_the_principal_submatrix(wrt, mode, data):
    module = Adapted(nnx.Rngs(0))
    whole, part = regjax.from_nnx(module), regjax.from_nnx(module, wrt=wrt)
    assert "quantized" in whole.state
    assert "quantized" not in whole.params
    assert {name: set(value) for name, value in part.params.items()} == {
        "lora": {"lora_a", "lora_b"}
    }

    def own(params, inputs, targets, kernel):
        hidden = inputs @ (kernel.astype(inputs.dtype) / 9)
        hidden = hidden + inputs @ params["lora"]["lora_a"] @ params["lora"]["lora_b"]
        if mode == "train":
            hidden = hidden - hidden.mean(0)[None]
            hidden = hidden / jnp.sqrt((hidden**2).mean(0) + 1e-5)[None]
        else:
            hidden = hidden / np.sqrt(1 + 1e-5)
        hidden = hidden * params["norm"]["scale"][None] + params["norm"]["bias"][None]
        outputs = jnp.tanh(hidden) @ params["head"]["kernel"] + params["head"]["bias"][None]
        return oracles.cross_entropy(outputs, targets)

    expected = oracles.dense_hessian(own, whole.params, *data, module.quantized[...])
    for model, where in ((whole, slice(None)), (part, slice(15, 33))):  # head, lora, norm
        loss = regjax.model_loss(model, oracles.cross_entropy, mode=mode)
        dense = curvature.hessian(loss, model.params, *data).dense()
        np.testing.assert_allclose(
            dense, expected[where, where], atol=2e-5 * np.abs(expected).max()
        )
    _, state = part.apply(part.params, part.state, data[0], train=True)
    assert jax.tree.structure(state) == jax.tree.structure(part.state)
    assert state["quantized"].dtype == jnp.int8
    nnx.update(module, part.params)  # the way back


def test_everything_but_the_adapters_leaves_the_statistics_out():
    module = Adapted(nnx.Rngs(0))
    model = regjax.from_nnx(module, wrt=nnx.Not(nnx.LoRAParam))
    assert {name: set(value) for name, value in model.params.items()} == {
        "norm": {"scale", "bias"},
        "head": {"kernel", "bias"},
    }


def test_equal_options_compile_nothing_again(data):
    traces = []

    @jax.jit
    def evaluate(loss, params):
        traces.append(1)
        return loss(params, *data)

    for seed in (0, 1):
        model = regjax.from_nnx(Adapted(nnx.Rngs(seed)), wrt=nnx.LoRAParam)
        evaluate(regjax.model_loss(model, oracles.cross_entropy), model.params)
    assert len(traces) == 1


def test_pruned_units_are_removed_from_a_part_of_the_parameters(data):
    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.last = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, inputs):
            return {"logits": self.last(jnp.tanh(self.norm(self.first(inputs["x"]))))}

    model = regjax.from_nnx(Plain(nnx.Rngs(0)))
    small = networks.without_a_unit(model, {"x": data[0]})
    assert small.params["first"]["kernel"].shape == (5, 3)
    assert small.state["norm"]["mean"].shape == (3,)


def test_wrong_arguments_are_named():
    module = Adapted(nnx.Rngs(0))
    for wrt in (nnx.Cache, lambda path, value: "tail" in path, "tag"):
        with pytest.raises(ValueError, match="`wrt` must match at least one of the leaves"):
            regjax.from_nnx(module, wrt=wrt)
    with pytest.raises(ValueError, match="`wrt` must choose at least one leaf of real floating"):
        regjax.from_nnx(module, wrt=lambda path, value: "quantized" in path)
    with pytest.raises(ValueError, match="`wrt` must choose at least one leaf of real floating"):
        regjax.from_nnx(module, wrt=False)
    with pytest.raises(ValueError, match="`wrt` must have the tree structure"):
        regjax.from_nnx(module, wrt={"lora": True})
    with pytest.raises(TypeError, match="`call` must be callable, got str"):
        regjax.from_nnx(module, call="encode")
    with pytest.raises(TypeError, match="or a method of Adapted, got a method of Several"):
        regjax.from_nnx(module, call=Several(nnx.Rngs(0)).encode)
    with pytest.raises(TypeError, match="`rngs` must be the names of streams"):
        regjax.from_nnx(module, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`rngs` must be one or several different names"):
        regjax.from_nnx(module, rngs=("noise", "noise"))
    complex_module = nnx.Linear(2, 2, param_dtype=jnp.complex64, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"`params.*bias.*must be real floating .* got complex64"):
        regjax.from_nnx(complex_module)


def test_recurrent_layers_draw_nothing_and_attention_drops(data):
    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.GRUCell(5, 4, rngs=rngs))
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x, return_hidden=False):
            hidden = self.rnn(x)
            return hidden if return_hidden else self.head(hidden[:, -1])

    class Attention(nnx.Module):
        def __init__(self, rngs):
            options = {"dropout_rate": 0.5, "decode": False, "rngs": rngs}
            self.attention = nnx.MultiHeadAttention(1, 5, **options)
            self.head = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x, noisy=False):
            return self.head(self.attention(x, deterministic=not noisy).mean(1))

    class Own(nnx.Module):
        def __init__(self, rngs):
            self.head, self.rngs = nnx.Linear(5, 3, rngs=rngs), rngs

        def __call__(self, x, noisy=False):
            x = self.head(x[:, 0])
            return x + jax.random.normal(self.rngs.noise(), x.shape) if noisy else x

    x = jnp.stack([data[0]] * 2, axis=1)
    model = regjax.from_nnx(Recurrent(nnx.Rngs(0)))
    function = regjax.model_function(model, mode="train")
    assert not regjax.couples_examples(function)
    assert function(model.params, x).shape == (10, 3)
    for make in (Attention, Own):
        model = regjax.from_nnx(make(nnx.Rngs(0)))
        assert model.has_generators
        with pytest.raises(ValueError, match="`mode` must be 'evaluation'"):
            regjax.model_function(model, mode="train", key=KEY)(model.params, x)


def test_layers_are_not_initialised_where_some_are_no_parameters(data):
    module = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    part = regjax.from_nnx(module, wrt=lambda path, value: path[1] == 1)
    with pytest.raises(ValueError, match=r"`model` must have all weights .* some of layers/0"):
        initializers.data_dependent(part, part.params, part.state, data[0])
    whole = regjax.from_nnx(module, call=lambda module, inputs: module(inputs["x"]))
    inputs = {"x": data[0]}
    params = initializers.data_dependent(whole, whole.params, whole.state, inputs)
    outputs = regjax.model_function(whole)(params, inputs)
    np.testing.assert_allclose(outputs.std(0), 1, rtol=1e-3)


class Perceptron(nnx.Module):
    def __init__(self, width, rngs):
        self.first, self.head = nnx.Linear(5, width, rngs=rngs), nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.first(x)))


def square_loss(outputs, targets):
    return jnp.mean((outputs - targets[:, None]) ** 2)


def test_parameters_of_another_width_are_refused_by_name(data):
    """nnx itself computes with them, where all layers have it."""
    model, wider = (regjax.from_nnx(Perceptron(width, nnx.Rngs(0))) for width in (4, 7))
    message = r"`params\['first'\]\['bias'\]` must have the shape \(4,\) of the model's, got \(7,\)"
    for run in (
        lambda params: regjax.model_function(model)(params, data[0]),
        lambda params: curvature.hessian(regjax.model_loss(model, square_loss), params, *data),
    ):
        with pytest.raises(ValueError, match=message):
            run(wider.params)


def test_trees_of_nnx_are_told_of_the_plain_dicts(data):
    module = Perceptron(4, nnx.Rngs(0))
    run = regjax.model_function(regjax.from_nnx(module))
    state = nnx.state(module, nnx.Param)
    for tree, text in ((module, r"nnx\.state\(module, nnx\.Param\)"), (state, "state")):
        with pytest.raises(ValueError, match=rf"`nnx\.to_pure_dict\({text}\)`\.$"):
            run(tree, data[0])
    run(nnx.to_pure_dict(state), data[0])
