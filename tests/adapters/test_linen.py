"""Options of `from_linen`: what is called, which random streams, which leaves are parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import regjax
from regjax import curvature
from tests import oracles
from tests.adapters import networks

KEY = jax.random.key(0)


@pytest.fixture
def data():
    problem = oracles.problem(num_examples=10)
    return problem.inputs, problem.targets


class Block(linen.Module):
    rate: float
    train: bool

    @linen.compact
    def __call__(self, x, _):
        hidden = jnp.tanh(linen.Dense(5, name="dense")(linen.LayerNorm(name="norm")(x)))
        return x + linen.Dropout(self.rate)(hidden, deterministic=not self.train), None


class Scanned(linen.Module):
    """Flax's own example of layers under `nn.scan`, remat inside, heard by an own field."""

    rate: float = 0.5

    @linen.compact
    def __call__(self, x, *, train):
        layers = linen.scan(
            linen.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        x, _ = layers(self.rate, train, name="layers")(x, None)
        return linen.Dense(3, name="head")(x)


def initialized(module, *args, **kwargs):
    return module.init({"params": KEY, "dropout": KEY}, *args, **kwargs)


def test_scanned_layers_train_with_a_key(data):
    module = Scanned()
    variables = initialized(module, data[0], train=False)
    model = regjax.from_linen(module, variables)
    run = lambda key: model.apply(model.params, model.state, data[0], train=True, key=key)[0]
    np.testing.assert_array_equal(run(KEY), run(KEY))
    expected = module.apply(variables, data[0], train=True, rngs={"dropout": KEY})
    np.testing.assert_array_equal(run(KEY), expected)
    assert np.abs(run(KEY) - run(jax.random.key(1))).max() > 1e-3
    with pytest.raises(ValueError, match=r"`key` must be given.*got none.*needs PRNG for .dropou"):
        run(None)


def test_the_hessian_of_scanned_layers_is_that_of_the_unrolled_network(data):
    module = Scanned(0.0)
    model = regjax.from_linen(module, initialized(module, data[0], train=False))

    own = networks.unrolled_loss("dense")
    expected = oracles.dense_hessian(own, model.params, *data)
    for mode in ("evaluation", "train"):
        loss = regjax.model_loss(model, oracles.cross_entropy, mode=mode)
        dense = curvature.hessian(loss, model.params, *data, chunk_size=4).dense()
        np.testing.assert_allclose(dense, expected, atol=2e-5 * np.abs(expected).max())


class Several(linen.Module):
    """Two streams, a sown loss, a method beside the call, outputs in a dict."""

    def setup(self):
        self.encoder = linen.Dense(4)
        self.head = linen.Dense(3)
        self.dropout = linen.Dropout(0.5)

    def encode(self, x):
        return jnp.tanh(self.encoder(x))

    def __call__(self, x, mask, deterministic=True):
        hidden = self.encode(x) * mask[:, None]
        self.sow("losses", "size", jnp.mean(hidden**2))
        if not deterministic:
            noise = jax.random.normal(self.make_rng("noise"), hidden.shape)
            hidden = self.dropout(hidden, deterministic=False) + noise
        return {"logits": self.head(hidden), "hidden": hidden}


def from_dict(module, inputs, *, deterministic):
    return module(inputs["x"], inputs["mask"], deterministic=deterministic)


def with_loss(module, inputs, *, train):
    outputs = module(inputs["x"], inputs["mask"], deterministic=not train)
    return outputs["logits"], module.variables["losses"]["size"][0]


def test_several_inputs_streams_and_a_sown_loss(data):
    module, mask = Several(), jnp.ones(10).at[0].set(0)
    inputs = {"x": data[0], "mask": mask}
    variables = initialized(module, data[0], mask)
    assert "losses" in variables  # flax initialises what is sown
    streams = ("dropout", "noise")
    model = regjax.from_linen(module, variables, call=from_dict, rngs=streams)
    assert model.state == {}
    expected = module.apply({"params": variables["params"]}, data[0], mask)
    outputs, state = model.apply(model.params, {}, inputs, train=False)
    jax.tree.map(np.testing.assert_array_equal, outputs, expected)
    run = lambda key: model.apply(model.params, {}, inputs, train=True, key=key)
    np.testing.assert_array_equal(run(KEY)[0]["hidden"], run(KEY)[0]["hidden"])
    assert np.abs(run(KEY)[0]["hidden"] - run(jax.random.key(1))[0]["hidden"]).max() > 1e-2
    assert run(KEY)[1] == state == {}

    alone = regjax.from_linen(module, variables, call=from_dict)
    with pytest.raises(ValueError, match=r"`rngs` of `from_linen` must name .*'dropout',\).*noise"):
        alone.apply(alone.params, {}, inputs, train=True, key=KEY)

    sown = regjax.from_linen(module, variables, call=with_loss, rngs=streams)
    size = jnp.mean(expected["hidden"] ** 2)
    for train in (False, True):
        found, state = sown.apply(sown.params, {}, inputs, train=train, key=KEY)
        np.testing.assert_allclose(found[1], size, rtol=1e-6)
        assert state == {}
    loss = regjax.model_loss(
        sown, lambda outputs, y: oracles.cross_entropy(outputs[0], y) + outputs[1]
    )

    def own(params, inputs, targets):
        encoder, head = params["encoder"], params["head"]
        hidden = jnp.tanh(inputs["x"] @ encoder["kernel"] + encoder["bias"][None])
        hidden = hidden * inputs["mask"][:, None].astype(hidden.dtype)
        outputs = hidden @ head["kernel"] + head["bias"][None]
        return oracles.cross_entropy(outputs, targets) + jnp.mean(hidden**2)

    dense = curvature.hessian(loss, sown.params, inputs, data[1]).dense()
    expected = oracles.dense_hessian(own, sown.params, inputs, data[1])
    np.testing.assert_allclose(dense, expected, atol=2e-5 * np.abs(expected).max())


def test_a_method_is_called(data):
    module = Several()
    variables = initialized(module, data[0], jnp.ones(10))
    expected = module.apply({"params": variables["params"]}, data[0], method="encode")
    for call in (Several.encode, module.encode):
        model = regjax.from_linen(module, variables, call=call)
        outputs, _ = model.apply(model.params, {}, data[0], train=False)
        np.testing.assert_array_equal(outputs, expected)


class Sown(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        hidden = linen.Dense(3)(x)
        self.sow("intermediates", "hidden", hidden)
        if train:  # a variable that evaluation does not have
            self.variable("batch_stats", "late", lambda: jnp.zeros(3)).value = hidden.mean(0)
        return linen.BatchNorm(not train)(hidden)


@pytest.mark.parametrize("mutable", [["params", "batch_stats"], True])
def test_what_a_call_creates_is_no_state(mutable, data):
    module = Sown()
    variables = module.init(KEY, data[0], False, mutable=mutable)
    model = regjax.from_linen(module, variables)
    assert set(model.state) == {"batch_stats"}
    _, state = model.apply(model.params, model.state, data[0], train=True)
    assert jax.tree.structure(state) == jax.tree.structure(model.state)
    norm = state["batch_stats"]["BatchNorm_0"]
    hidden = data[0] @ model.params["Dense_0"]["kernel"]
    np.testing.assert_allclose(norm["mean"], 0.01 * hidden.mean(0), rtol=1e-3, atol=1e-5)


class Layer(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x, active):
        x = linen.Dense(3)(x)
        if self.kind == "dropout":
            return linen.Dropout(0.5)(x, not active)
        if self.kind == "norm":
            return linen.BatchNorm(use_running_average=not active)(x)
        if self.kind == "attention":
            attention = linen.MultiHeadDotProductAttention(1, dropout_rate=0.5)
            return attention(x[:, None], deterministic=not active)[:, 0]
        if active:  # a dropout of one's own
            x = x * jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape).astype(x.dtype)
        return x


class Known(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x, is_training=False):
        return Layer(self.kind)(x, is_training)


class Deaf(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x, noisy=False):
        return Layer(self.kind)(x, noisy)


class Field(linen.Module):
    kind: str
    training: bool = False

    @linen.compact
    def __call__(self, x):
        return Layer(self.kind)(x, self.training)


class Always(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x, return_features=False):
        x = Layer(self.kind)(x, True)
        return (x, x) if return_features else x


LAYERS = ["dropout", "norm", "attention", "own"]


def run(module, data, *, train, **options):
    key = dict.fromkeys(("params", "dropout"), KEY)
    model = regjax.from_linen(module, module.init(key, data[0]), **options)
    mode = "train" if train else "evaluation"
    return regjax.model_function(model, mode=mode, key=KEY)(model.params, data[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("make", [Known, Field])
def test_modules_hear_of_training_by_keyword_or_field(make, kind, data):
    evaluation, train = (run(make(kind), data, train=train) for train in (False, True))
    assert np.abs(evaluation - train).max() > 1e-3
    if make is Field:
        other = Field(kind, training=True)
        np.testing.assert_array_equal(run(other, data, train=False), evaluation)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_module_that_does_not_hear_of_training_is_refused(kind, data):
    evaluation = run(Deaf(kind), data, train=False)
    with pytest.raises(ValueError, match=r"`mode` must be 'evaluation' .* Deaf has .*`call=lambda"):
        run(Deaf(kind), data, train=True)
    call = lambda module, x, *, train: module(x, noisy=train)
    train = run(Deaf(kind), data, train=True, call=call)
    assert np.abs(evaluation - train).max() > 1e-3


@pytest.mark.parametrize("kind", LAYERS[:3])
def test_a_call_that_hands_nothing_on_is_refused(kind, data):
    evaluation = run(Known(kind), data, train=False)
    call = lambda module, x, *, train: module(x)
    np.testing.assert_array_equal(run(Known(kind), data, train=False, call=call), evaluation)
    with pytest.raises(ValueError, match=r"`mode` .* Known has .*, though its call is told by tra"):
        run(Known(kind), data, train=True, call=call)


class Partly(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=True)(x)
        return Layer("dropout")(x, train)


def test_some_layers_may_rest_on_purpose(data):
    evaluation, train = (run(Partly(), data, train=train) for train in (False, True))
    assert np.abs(evaluation - train).max() > 1e-3


def test_flags_of_other_names(data):
    class Dropped(linen.Module):  # as in T5X and MaxText
        @linen.compact
        def __call__(self, x, enable_dropout=True):
            return Layer("dropout")(x, enable_dropout)

    class Moded(linen.Module):
        @linen.compact
        def __call__(self, x, model_mode="predict"):
            return Layer("own")(x, model_mode == "train")

    evaluation, train = (run(Dropped(), data, train=train) for train in (False, True))
    assert np.abs(evaluation - train).max() > 1e-3
    with pytest.raises(ValueError, match=r"Moded has .* the flags model_mode"):
        run(Moded(), data, train=True)


@pytest.mark.parametrize("kind", LAYERS[:3])
def test_a_module_that_always_trains_does_so_and_cannot_be_evaluated(kind, data):
    assert np.isfinite(run(Always(kind), data, train=True)).all()
    with pytest.raises((ValueError, Exception), match=r"`key` must be given|immutable"):
        run(Always(kind), data, train=False)


def test_dropout_of_rate_zero_and_plain_modules_need_not_hear(data):
    class Plain(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dropout(0.0, deterministic=True)(linen.Dense(3)(x))

    evaluation, train = (run(Plain(), data, train=train) for train in (False, True))
    np.testing.assert_array_equal(evaluation, train)


class Adapted(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        table = self.param("table", lambda key: jnp.arange(-7, 8, dtype=jnp.int8).reshape(5, 3))
        hidden = x @ (table.astype(x.dtype) / 9) + linen.Dense(3, name="lora")(x)
        hidden = linen.BatchNorm(not train, name="norm")(hidden)
        return linen.Dense(3, name="head")(jnp.tanh(hidden))


@pytest.mark.parametrize(
    "wrt",
    [
        lambda path, leaf: path[0] == "lora",
        {"lora": True, "norm": False, "head": False, "table": False},
    ],
    ids=["path", "mask"],
)
@pytest.mark.parametrize("mode", ["evaluation", "train"])
def test_a_part_of_the_parameters_gives_the_principal_submatrix(wrt, mode, data, default_promotion):
    module = Adapted()
    variables = module.init(KEY, data[0])
    whole = regjax.from_linen(module, variables)
    part = regjax.from_linen(module, variables, wrt=wrt)
    assert set(whole.params) == {"lora", "norm", "head"}
    assert set(whole.state["params"]) == {"table"}
    assert set(part.params) == {"lora"}
    assert set(part.state["params"]) == {"table", "norm", "head"}

    def own(params, inputs, targets, variables):
        params = {**params, "table": variables["params"]["table"]}
        variables = {"params": params, "batch_stats": variables["batch_stats"]}
        train = mode == "train"
        outputs = module.apply(variables, inputs, train, mutable=["batch_stats"])[0]
        return oracles.cross_entropy(outputs, targets)

    expected = oracles.dense_hessian(own, whole.params, *data, variables)
    for model, where in ((whole, slice(None)), (part, slice(12, 30))):  # head, lora, norm
        loss = regjax.model_loss(model, oracles.cross_entropy, mode=mode)
        dense = curvature.hessian(loss, model.params, *data).dense()
        np.testing.assert_allclose(
            dense, expected[where, where], atol=2e-5 * np.abs(expected).max()
        )
    _, state = part.apply(part.params, part.state, data[0], train=True)
    assert jax.tree.structure(state) == jax.tree.structure(part.state)
    assert np.abs(state["batch_stats"]["norm"]["mean"]).max() > 0


def test_partitioned_parameters_keep_their_metadata(data):
    boxed = linen.with_partitioning(linen.initializers.lecun_normal(), ("in", "out"))
    module = linen.Sequential([linen.Dense(4, kernel_init=boxed), linen.Dense(3)])
    variables = module.init(KEY, data[0])
    last = lambda path, leaf: path[0] == "layers_1"
    part = regjax.from_linen(module, variables, wrt=last)
    assert set(part.params) == {"layers_1"}
    assert isinstance(part.state["params"]["layers_0"]["kernel"], linen.Partitioned)
    outputs, _ = part.apply(part.params, part.state, data[0], train=False)
    np.testing.assert_array_equal(outputs, module.apply(variables, data[0]))


def test_equal_options_compile_nothing_again(data):
    traces = []

    @jax.jit
    def evaluate(loss, params):
        traces.append(1)
        return loss(params, *data)

    for seed in (0, 1):
        module = Adapted()
        variables = module.init(jax.random.key(seed), data[0])
        model = regjax.from_linen(module, variables, wrt=lambda path, leaf: "lora" in path)
        evaluate(regjax.model_loss(model, oracles.cross_entropy), model.params)
    assert len(traces) == 1


def test_pruned_units_are_removed(data):
    module = Several()
    variables = initialized(module, data[0], jnp.ones(10))
    inputs = {"x": data[0], "mask": jnp.ones(10)}
    call = lambda module, inputs, *, train: from_dict(module, inputs, deterministic=not train)[
        "logits"
    ]
    model = regjax.from_linen(module, variables, call=call)
    small = networks.without_a_unit(model, inputs)
    assert small.params["encoder"]["kernel"].shape == (5, 3)


def test_wrong_arguments_are_named(data):
    module = Adapted()
    variables = module.init(KEY, data[0])
    with pytest.raises(ValueError, match="`wrt` must match at least one of the leaves head/"):
        regjax.from_linen(module, variables, wrt=lambda path, leaf: "tail" in path)
    with pytest.raises(ValueError, match="`wrt` must choose at least one leaf of real floating"):
        regjax.from_linen(module, variables, wrt=lambda path, leaf: "table" in path)
    with pytest.raises(TypeError, match="or a method of Adapted, got a method of Several"):
        regjax.from_linen(module, variables, call=Several().encode)
    with pytest.raises(TypeError, match="`rngs` must be the names of streams"):
        regjax.from_linen(module, variables, rngs={"dropout": KEY})
    whole = regjax.from_linen(module, variables)
    part = regjax.from_linen(module, variables, wrt=lambda path, leaf: "lora" in path)
    with pytest.raises(
        ValueError, match=r"`params` must have .* got one with \['head'\]\['bias'\]"
    ):
        part.apply(whole.params, part.state, data[0], train=False)


def test_the_variables_in_place_of_the_parameters_are_refused_with_a_word():
    module, inputs = linen.Dense(3), jnp.ones((4, 2))
    variables = module.init(jax.random.key(0), inputs)
    run = regjax.model_function(regjax.from_linen(module, variables))
    with pytest.raises(ValueError, match=r"Of linen's variables they are `variables\['params'\]`"):
        run(variables, inputs)
    run(variables["params"], inputs)
    model = regjax.from_linen(module, variables)
    with pytest.raises(Exception, match="shape") as error:
        regjax.population_statistics(model, model.params, jnp.ones((4, 5, 3)))
    assert "float32[5,3]" in error.value.__notes__[-1]
