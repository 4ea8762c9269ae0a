"""What the benchmarks of large networks count, check and measure."""

import dataclasses
import functools
import math
import pkgutil

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from benchmarks import __main__ as command
from benchmarks import speed
from benchmarks.speed import _programs, _rates, bench_accelerator
from regjax import curvature
from regjax.models import GPT, MLP, ResNet


@pytest.mark.parametrize("preset", ["smoke", "cpu", "gpu"])
def test_every_file_has_cases_for_every_preset(preset):
    files = {name.split("/")[0] for name in command.find_cases(preset)}
    benches = {name.name for name in pkgutil.iter_modules(speed.__path__)}
    assert files == {name.removeprefix("bench_") for name in benches if name.startswith("bench_")}


def test_rates_count_the_work_that_was_timed(monkeypatch):
    def half_a_second(run):
        run()
        run()  # the copy gives its memory away and must go on with the new one
        return 0.5

    monkeypatch.setattr(_rates, "_best_seconds", half_a_second)
    product, copied = 2 * 8**3 / 0.5, 2 * 1024 / 0.5
    assert _rates.measured.__wrapped__(8, 1024) == (product, product, copied)


_NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 2), "padding": "SAME"},
        {"window_strides": (1, 2), "padding": [(2, 1), (0, 3)], "lhs_dilation": (3, 2)},
        {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": "VALID", "feature_group_count": 2},
        {"window_strides": (1, 1), "padding": "VALID", "batch_group_count": 2},
    ],
)
def test_operations_of_a_convolution_are_xlas(options):
    channels = 8 // options.get("feature_group_count", 1)
    images, kernel = jnp.ones((4, 9, 8, 8)), jnp.ones((3, 2, channels, 6))
    traced = jax.jit(
        lambda x, k: lax.conv_general_dilated(x, k, dimension_numbers=_NHWC, **options)
    ).trace(images, kernel)
    assert _rates.num_operations(traced.jaxpr) == traced.lower().cost_analysis()["flops"]


def test_operations_count_turns_and_the_longer_branch_and_nothing_dead():
    matrix = jnp.ones((4, 4))
    product = 2 * 4**3

    def function(x):
        unused = x @ x
        y = lax.scan(lambda carry, _: (carry @ x, carry @ carry), x, None, length=5)[0]
        del unused
        return lax.cond(y[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, y)

    counted = _rates.num_operations(jax.make_jaxpr(function)(matrix))
    assert counted == (5 + 2) * product
    endless = lambda x: lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ x, x)
    with pytest.raises(NotImplementedError, match="no products in a while loop, got one"):
        _rates.num_operations(jax.make_jaxpr(endless)(matrix))


@pytest.mark.parametrize("remat", [False, True])
def test_operations_of_a_transformer_in_closed_form(remat):
    tokens, context, width, depth, examples = 11, 6, 8, 3, 2
    problem = _programs.gpt(
        examples,
        num_tokens=tokens,
        context=context,
        width=width,
        depth=depth,
        num_heads=2,
        remat=remat,
    )
    counted = {
        label: program.operations
        for label, program in _programs.products(problem, with_step=True).items()
    }
    positions = examples * context
    blocks = positions * depth * 2 * 12 * width**2
    attention = positions * depth * 2 * 2 * context * width
    weights = blocks + positions * 2 * width * tokens
    # y = x w forward, and two products in its gradient. A derivative has two products for one, and
    # the gradient of w itself is needed in none, unless w is an activation as well (attention).
    gradient, hessian = 3 * (weights + attention), 8 * weights + 9 * attention
    gauss_newton = 5 * (weights + attention)
    if remat:
        # Once more through the blocks, less the last product of each, whose result goes on alone;
        # in the Hessian product with its derivative; in both maps of the Gauss-Newton product.
        again = blocks + attention - positions * depth * 2 * 4 * width**2
        gradient, hessian = gradient + again, hessian + 3 * again
        gauss_newton += 2 * again
    assert counted == {
        "gradient": gradient,
        "Hessian product": hessian,
        "Gauss-Newton product": gauss_newton,
        "SAM step": 2 * gradient,
    }


def test_the_accelerators_networks_have_the_sizes_that_are_quoted():
    sizes = bench_accelerator._SIZES["gpu"]
    gpt, resnet = dict(sizes.gpt), dict(sizes.resnet)
    del gpt["num_examples"], resnet["num_examples"]
    shape = (resnet["image_size"], resnet["image_size"], 3)
    modules = {
        124_475_904: lambda: GPT(rngs=nnx.Rngs(0), **gpt),
        11_173_962: lambda: ResNet(
            shape, 10, widths=resnet["widths"], normalization="batch", rngs=nnx.Rngs(0)
        ),
    }
    for count, build in modules.items():
        params = nnx.state(nnx.eval_shape(build), nnx.Param)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_oracles_refuse_wrong_products_and_steps():
    x = jax.random.normal(jax.random.key(0), (8, 2, 2, 1))
    module = MLP((2, 2, 1), 3, width=5, rngs=nnx.Rngs(0))
    problem = _programs.classifier(module, x, jnp.arange(8) % 3)
    programs = _programs.products(problem, with_step=True)
    answers = {label: program() for label, program in programs.items()}
    error = _programs.Oracle(problem, programs).error
    assert max(error(label, answer) for label, answer in answers.items()) < 1e-5
    larger = {label: jax.tree.map(lambda leaf: 1.01 * leaf, answers[label]) for label in answers}
    grads = answers["gradient"]
    wrong = {
        **larger,
        "SAM step": jax.tree.map(lambda w, g: w - _programs._RATE * g, problem.params, grads),
    }
    errors = {label: error(label, answer) for label, answer in wrong.items()}
    assert min(errors.values()) > bench_accelerator._TOLERANCE, errors
    assert error("Hessian product", answers["Gauss-Newton product"]) > 0.01
    assert error("Gauss-Newton product", answers["Hessian product"]) > 0.01


@pytest.mark.optimized
def test_probe_sees_what_is_wrong_with_a_factorisation():
    diagonal = jnp.linspace(1, 2, 40)
    operator = curvature.from_matvec(jax.tree_util.Partial(jnp.multiply, diagonal), diagonal)
    solver = curvature.lanczos_solver(operator, jnp.ones(40), 5)
    state = solver.init()
    for _ in range(5):
        state = solver.step(state)
    weights = jax.random.normal(jax.random.key(0), (5,))
    error = lambda state: bench_accelerator.probe_error(
        operator, bench_accelerator.probe(state, weights)
    )
    assert error(state) < 1e-5
    projected = jnp.asarray(state.projected)
    blocks = tuple(1.01 * block for block in state.basis.blocks)
    scaled = dataclasses.replace(state.basis, blocks=blocks)
    for wrong in (
        state._replace(projected=projected.at[2, 2].add(0.01)),
        state._replace(projected=projected.at[1, 2].add(0.01)),
        state._replace(beta=jnp.zeros_like(state.beta)),
        state._replace(basis=scaled),
    ):
        assert error(wrong) > bench_accelerator._TOLERANCE


def test_steps_are_cut_to_the_memory_of_the_device():
    row, steps = 1000, 80
    needed = curvature.MemoryResult(5000, 84 * row, 30_000, 0, 80 * row, 0)
    enough = math.ceil((5000 + 84 * row + 30_000) / 0.9)
    fit = functools.partial(bench_accelerator.steps_that_fit, needed, row)
    assert fit(enough, steps) == steps
    assert 1 < fit(enough - 10 * row, steps) <= steps - 10
    assert fit(0, steps) == 1
