"""Functions as they are when they are traced, found again by what they compute."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from regjax import (
    _jaxprs,
    _programs,
    curvature,
    diagnostics,
    initializers,
    pruning,
    regularizers,
)
from tests.compilations import programs

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "b": jnp.zeros(2)}
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
MATRIX, SCALE, VECTOR = jnp.eye(3) * 2, np.float32([1, 2, 3]), jnp.float32([1.0, 2.0, 4.0])


@jax.jit
def inner(x):
    return MATRIX @ x


def shared(function, *arguments):
    return _programs.share(_programs.trace(function, arguments))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.sum(inner(x) * SCALE),
        lambda x: jax.lax.scan(lambda c, s: (c + jnp.sum(inner(x) * s), c), 0.0, SCALE),
        lambda x: {"a": x @ MATRIX, "b": (jnp.int32(3), None)},
        lambda x: jax.checkpoint(lambda y: jnp.sin(inner(y)) * SCALE)(x),
        lambda x: jax.vmap(lambda s: jax.nn.softmax(s * x))(SCALE),
        lambda x: jax.random.normal(jax.random.key(3), (4,)) * jnp.sum(x),
    ],
)
def test_a_program_is_its_function(function):
    program = shared(function, VECTOR)
    jax.tree.map(np.testing.assert_array_equal, program(VECTOR), function(VECTOR))
    assert jax.tree.structure(program.outputs(VECTOR)) == jax.tree.structure(function(VECTOR))
    compiled = jax.jit(lambda program, x: program(x))(program, VECTOR)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), compiled, program(VECTOR)
    )


def test_what_is_captured_is_an_argument_wherever_it_was_captured():
    big = jnp.arange(3.0)
    program = shared(lambda x: jnp.sum(inner(x) * SCALE * big), VECTOR)
    assert {leaf.shape for leaf in jax.tree.leaves(program)} == {(3, 3), (3,)}
    assert any(leaf is big for leaf in jax.tree.leaves(program))
    text = str(jax.make_jaxpr(lambda program, x: program(x))(program, VECTOR).consts)
    assert text == "[]"


def test_equal_programs_share_their_code_whatever_arrays_they_read():
    make = lambda array, power: shared(lambda x: jnp.sum((x * array) ** power), VECTOR)
    one, other = make(jnp.ones(3), 2), make(jnp.zeros(3), 2)
    assert one.code is other.code
    assert make(jnp.ones(3), 3).code is not one.code
    assert make(jnp.ones(()), 2).code is not one.code
    assert make(np.ones(3, np.float32), 2).code is one.code
    assert float(one(VECTOR)) == 21
    assert float(other(VECTOR)) == 0


def test_the_callers_memory_may_change():
    array = np.ones(3, np.float32)
    program = shared(lambda x: jnp.sum(x * array), VECTOR)
    array[:] = 0
    assert float(program(VECTOR)) == 7


def test_leaves_of_a_function_are_arguments():
    function = lambda decay, x: decay * jnp.sum(x)
    one = shared(Partial(function, jnp.float32(2)), VECTOR)
    assert one.code is shared(Partial(function, jnp.float32(3)), VECTOR).code
    array = jnp.float32(2)
    both = shared(Partial(lambda a, b, x: a * jnp.sum(x) + b, array, array), VECTOR)
    assert float(both(VECTOR)) == 16


def test_rules_of_differentiation_belong_to_the_program():
    def with_slope(slope):
        @jax.custom_jvp
        def function(x):
            return jnp.sum(x * x)

        function.defjvp(lambda p, t: (function(*p), slope * jnp.sum(p[0] * t[0])))
        return function

    hessian = lambda slope: curvature.hessian(lambda p: with_slope(slope)(p), VECTOR)
    assert hessian(2.0).function.code is hessian(2.0).function.code
    for slope in (2.0, 3.0, jnp.float32(5.0)):
        np.testing.assert_allclose(hessian(slope).dense(), float(slope) * np.eye(3))


def test_rules_that_go_backwards_belong_to_it_too():
    def with_slope(slope):
        @jax.custom_vjp
        def function(x):
            return jnp.sum(x**2)

        function.defvjp(lambda x: (function(x), x), lambda x, g: (slope * g * x,))
        return function

    hessian = lambda slope: curvature.hessian(lambda p: with_slope(slope)(p), VECTOR)
    assert hessian(2.0).function.code is hessian(2.0).function.code
    for slope in (2.0, 3.0):
        np.testing.assert_allclose(hessian(slope).dense(), slope * np.eye(3))


def test_a_rule_that_cannot_be_described_is_shared_with_none():
    @jax.custom_jvp
    def function(x, y):
        return x * y

    @function.defjvp
    def rule(primals, tangents):
        raise NotImplementedError

    one, other = (shared(lambda x: function(x, VECTOR), VECTOR) for _ in range(2))
    assert one.code is not other.code
    np.testing.assert_array_equal(one(VECTOR), VECTOR**2)


def test_other_arguments_are_refused_in_words():
    program = shared(lambda x: x, VECTOR)
    with pytest.raises(TypeError, match=r"`arguments` must have the types .* got \(\(\(4,\)"):
        program(jnp.ones(4))


def test_a_description_lasts_and_knows_numbers_apart():
    text = lambda f: _jaxprs.describe(jax.make_jaxpr(f)(VECTOR), lasting=True).text
    texts = [
        text(lambda x, c=c: x * c) for c in (1.0, 1.0 + 1e-7, 2.0, np.float32(3), 0.1 * VECTOR)
    ]
    texts += [text(lambda x: x + 1.0), text(lambda x: (x, x)), text(jnp.sin), text(jax.nn.relu)]
    assert len(set(texts)) == len(texts)
    assert text(lambda x: jnp.tanh(x)) == text(lambda y: jnp.tanh(y))
    assert text(lambda x: jax.pure_callback(np.sin, x, x)) == text(
        lambda x: jax.pure_callback(np.sin, x, x)
    )
    assert text(lambda x: jax.pure_callback(np.sin, x, x)) != text(
        lambda x: jax.pure_callback(np.cos, x, x)
    )


class Trainer:
    def __init__(self):
        self.decay, self.inputs = 0.0, INPUTS

    def loss(self, params):
        penalty = self.decay * jnp.sum(params["w"] ** 2)
        return jnp.mean(jax.nn.softplus(self.inputs @ params["w"] + params["b"][None])) + penalty

    def outputs(self, params, inputs):
        return inputs @ params["w"] * (1 + self.decay)

    def output_loss(self, outputs, targets):
        return jnp.mean((outputs - targets) ** 2) * (1 + self.decay)

    def dropout(self, params, key):
        mask = jax.random.bernoulli(key, 0.5, (3, 1))
        return (1 + self.decay) * jnp.sum(jnp.where(mask, params["w"], 0))

    def gradient(self, params):
        return jax.grad(self.loss)(params)

    def product(self, vector):
        return jax.tree.map(lambda leaf: (1 + self.decay) * leaf, vector)


def of_trainer(trainer, name):
    targets, key = jnp.zeros((8, 2)), jax.random.key(0)
    batches = [(INPUTS, targets)]
    functions = trainer.outputs, trainer.output_loss
    make = {
        "hessian": lambda: curvature.hessian(trainer.loss, PARAMS),
        "gradient": lambda: curvature.from_gradient(trainer.gradient, PARAMS),
        "product": lambda: curvature.from_matvec(trainer.product, PARAMS),
        "gauss_newton": lambda: curvature.gauss_newton(
            *functions, PARAMS, INPUTS, targets, chunk_size=3
        ),
        "empirical": lambda: curvature.empirical_fisher(*functions, PARAMS, INPUTS, targets),
        "fisher": lambda: curvature.fisher(
            trainer.outputs, PARAMS, INPUTS, key=None, num_samples=None, likelihood="normal"
        ),
        "stream": lambda: curvature.stream(curvature.gauss_newton, *functions, PARAMS, batches),
        "dropout": lambda: curvature.dropout_covariance(
            trainer.dropout, PARAMS, key=key, num_samples=3
        ),
    }
    return make[name]()


@pytest.mark.parametrize(
    "name",
    ["hessian", "gradient", "product", "gauss_newton", "empirical", "fisher", "stream", "dropout"],
)
def test_no_answer_is_that_of_an_earlier_trainer(name):
    trainer, fresh = Trainer(), Trainer()
    vector = jax.tree.map(jnp.ones_like, PARAMS)
    before = of_trainer(trainer, name)
    first = before.matvec(vector)
    trainer.decay = fresh.decay = 5.0
    jax.tree.map(np.testing.assert_array_equal, before.matvec(vector), first)
    after = of_trainer(trainer, name).matvec(vector)
    jax.tree.map(np.testing.assert_array_equal, after, of_trainer(fresh, name).matvec(vector))
    assert float(jnp.max(jnp.abs(after["w"] - first["w"]))) > 0.1
    trainer.decay = 0.0
    again = of_trainer(trainer, name).matvec(vector)
    jax.tree.map(np.testing.assert_array_equal, again, first)


def test_a_stream_says_that_its_loss_changed():
    trainer = Trainer()
    batches = [(INPUTS[:5], jnp.zeros((5, 2))), (INPUTS[5:], jnp.zeros((3, 2)))]
    arguments = trainer.outputs, trainer.output_loss, PARAMS, batches
    streamed = curvature.stream(curvature.gauss_newton, *arguments)
    trainer.decay = 5.0
    with pytest.raises(ValueError, match="`arguments` must hold functions that stay the same"):
        streamed.matvec(PARAMS)


def quartic(i):
    """A new function each time, of arrays of its own."""
    targets, decay = jnp.full((8, 2), float(i)), jnp.float32(i)

    def loss(params, inputs):
        outputs = jax.nn.relu(inputs @ params["w"]) + params["b"][None]
        penalty = decay * jnp.sum(params["w"] ** 4) + jnp.mean(inner(params["w"])) ** 2
        return jnp.mean(jax.nn.softmax(outputs) ** 2 * targets[: len(inputs)]) + penalty

    return loss


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_a_new_function_compiles_nothing_and_its_arrays_are_data(chunk_size):
    losses = [quartic(i) for i in range(3)]

    def solve(loss):
        operator = curvature.hessian(loss, PARAMS, INPUTS, chunk_size=chunk_size)
        curvature.top_eigenpairs(operator, 2, key=jax.random.key(0), max_matvecs=12)
        return operator.dense()

    solve(losses[1])
    with programs() as compiled:
        found = solve(losses[2])
    assert compiled == []
    expected = jax.hessian(losses[2])(PARAMS, INPUTS)
    rows = [
        jnp.concatenate([expected[one][other].reshape(size, -1) for other in "bw"], 1)
        for one, size in (("b", 2), ("w", 6))
    ]
    np.testing.assert_allclose(found, jnp.concatenate(rows), rtol=1e-4, atol=1e-5)


def test_programs_that_differ_do_not_pile_up():
    gc.collect()

    def maps():
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)

    solve = lambda i: curvature.hessian(lambda p: jnp.sum(p**4) * (1 + i), jnp.ones(3)).matvec(
        jnp.ones(3)
    )
    solve(0)
    before = maps()
    for i in range(1, 2 * _programs._MAX_COMPILED):
        np.testing.assert_allclose(solve(i), 12 * (1 + i), rtol=1e-6)
    assert maps() - before < 40 * _programs._MAX_COMPILED


def test_inside_of_jit_and_vmap_what_is_closed_over_is_traced():
    def value(scale, shift):
        loss = lambda p, x: jnp.mean(jnp.cosh(scale * x @ p) + shift)
        operator = curvature.hessian(loss, jnp.ones(3), INPUTS, chunk_size=3)
        return operator.matvec(VECTOR)

    expected = [value(jnp.float32(s), 1.0) for s in (0.5, 2.0)]
    scales = jnp.float32([0.5, 2.0])
    for found in (
        jax.lax.map(lambda s: value(s, 1.0), scales),
        jax.jit(jax.vmap(value, (0, None)))(scales, 1.0),
        jax.vmap(value, (0, None))(scales, 1.0),
    ):
        np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-5)
    slope = jax.grad(lambda s: jnp.sum(value(s, 1.0)))(jnp.float32(0.5))
    difference = (jnp.sum(value(0.51, 1.0)) - jnp.sum(value(0.49, 1.0))) / 0.02
    np.testing.assert_allclose(slope, difference, rtol=1e-3)


class Changing:
    """A network and its loss, of which everything can be changed afterwards."""

    def __init__(self):
        self.factor, self.is_linear = 1.0, False

    def model(self, params, inputs):
        hidden = inputs @ params["a"]
        return self.factor * ((hidden if self.is_linear else jnp.tanh(hidden)) @ params["b"])

    def loss(self, params, inputs):
        return jnp.mean(self.model(params, inputs) ** 2)


def answers(changing, params, inputs):
    """What everything that takes a function says of it."""
    key, step = jax.random.key(2), jnp.array([0.1])
    loss, model, at = changing.loss, changing.model, (params, inputs)
    batches = jnp.stack([jnp.stack([inputs, inputs, inputs])] * 2)
    gates = {"a": jnp.ones((4, 5)), "b": jnp.ones((5, 3))}
    as_gates = lambda gates, x: loss(jax.tree.map(jnp.multiply, params, gates), x)
    targets = jnp.zeros(len(inputs), jnp.int32)
    initialised = initializers.gradinit(
        loss, params, (batches,), gradient_norm_bound=1.0, learning_rate=0.1
    )
    return {
        "structure": len(str(pruning.find_structure(model, *at))),
        "cost": pruning.count_cost(model, *at).flops,
        "scores": pruning.taylor_scores(as_gates, gates, inputs, batch_size=4).scores["a"],
        "oracle": pruning.oracle_importance(as_gates, gates, inputs)["a"],
        "matrix": pruning.gradient_matrix(as_gates, gates, inputs)["a"],
        "penalty": regularizers.gradient_norm_penalty(loss, *at),
        "complexity": regularizers.geometric_complexity(model, *at),
        "product": curvature.hvp(loss, params, params, inputs)["a"],
        "noise": curvature.hessian_noise_power(loss, params, params, inputs).value,
        "surface": diagnostics.interpolate(loss, params, params, inputs, positions=step),
        "probe": diagnostics.line_probe(loss, *at, learning_rates=step).losses,
        "sharpness": diagnostics.spherical_sharpness(loss, *at, key=key).value,
        "margin": diagnostics.decision_margin(model, *at, targets),
        "scales": initialised.gradient_norms,
    }


def test_no_answer_is_that_of_an_earlier_call():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (4, 5)), "b": jax.random.normal(keys[1], (5, 3))}
    inputs = jax.random.normal(keys[2], (8, 4))
    changing = Changing()
    before = answers(changing, params, inputs)
    changing.factor, changing.is_linear = 3.0, True
    after = answers(changing, params, inputs)
    new = Changing()
    new.factor, new.is_linear = 3.0, True
    for name, value in answers(new, params, inputs).items():
        np.testing.assert_allclose(after[name], value, rtol=1e-6, err_msg=name)
        if name not in ("structure", "margin"):
            assert not np.allclose(before[name], value, rtol=1e-3), name
