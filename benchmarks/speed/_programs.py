"""One gradient, one Hessian, Gauss-Newton product and SAM step each, as programs to be compared.

The networks are untrained and the data random: what a product costs does not depend on them, and
no data set has to be where the accelerator is.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

import regjax
from benchmarks.speed import _rates
from benchmarks.speed._problems import cross_entropy
from regjax import curvature, transforms
from regjax.models import GPT, ResNet

GRADIENT, HESSIAN, GAUSS_NEWTON = "gradient", "Hessian product", "Gauss-Newton product"
SAM = "SAM step"
# TF32, the default on recent GPUs, visibly perturbs Lanczos; ratios need one precision for all.
PRECISION = "highest"
_RATE, _RHO = 0.1, 0.05


class Problem(NamedTuple):
    """A classifier of examples or of tokens.

    Attributes:
      model_fn: (params, x) -> logits.
      loss_fn: (params, x, y) -> mean cross-entropy.
      params: nested dicts of float32 arrays.
      x: images (N, height, width, 3), float32, or tokens (N, length), int32.
      y: classes (N,), or the tokens that follow (N, length), int32.
      vector: tree like `params`, standard normal.
    """

    model_fn: Any
    loss_fn: Any
    params: Any
    x: jax.Array
    y: jax.Array
    vector: Any

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def gpt(
    num_examples: int,
    *,
    num_tokens: int = 65,
    context: int = 64,
    width: int = 64,
    depth: int = 2,
    num_heads: int = 4,
    remat: bool = False,
) -> Problem:
    """A transformer on sequences of `context` random tokens."""
    model = GPT(
        num_tokens,
        context=context,
        width=width,
        depth=depth,
        num_heads=num_heads,
        remat=remat,
        rngs=nnx.Rngs(0),
    )
    tokens = jax.random.randint(jax.random.key(1), (num_examples, context + 1), 0, num_tokens)
    return classifier(model, tokens[:, :-1], tokens[:, 1:])


def resnet(num_examples: int, *, image_size: int, widths: tuple[int, ...]) -> Problem:
    """A residual network with batch norm, in evaluation mode, on random images of ten classes."""
    shape = (image_size, image_size, 3)
    model = ResNet(shape, 10, widths=widths, normalization="batch", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (num_examples, *shape))
    return classifier(model, x, jax.random.randint(jax.random.key(2), (num_examples,), 0, 10))


def classifier(module: nnx.Module, x: jax.Array, y: jax.Array) -> Problem:
    """The mean cross-entropy of a module, in evaluation mode, on these data."""
    model = regjax.from_nnx(module)
    flat, unravel = ravel_pytree(model.params)
    vector = unravel(jax.random.normal(jax.random.key(0), flat.shape))
    model_fn = regjax.model_function(model)
    loss_fn = regjax.model_loss(model, cross_entropy)
    return Problem(model_fn, loss_fn, model.params, x, y, vector)


class Program:
    """A function with its arguments, compiled when it is first called.

    Args:
      function: traceable by JAX.
      *arguments: trees of arrays.
      precision: of its matrix products; None for JAX's default.
    """

    def __init__(self, function: Any, *arguments: Any, precision: str | None = PRECISION):
        self._function, self._arguments, self._precision = function, arguments, precision

    def __call__(self) -> Any:
        """The function of its arguments."""
        return self.compiled(*self._arguments)

    @property
    def operations(self) -> int:
        """Of its matrix products and convolutions."""
        return _rates.num_operations(self._traced.jaxpr)

    @property
    def flops(self) -> float:
        """All operations, element by element ones too, as the compiler counts what it compiled."""
        analysis: Any = self.compiled.cost_analysis()
        return float(analysis["flops"])

    @property
    def memory(self) -> int:
        """Bytes that it needs besides its arguments and its results."""
        analysis: Any = self.compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes)

    @functools.cached_property
    def _traced(self) -> Any:
        with jax.default_matmul_precision(self._precision):
            return jax.jit(self._function).trace(*self._arguments)

    @functools.cached_property
    def compiled(self) -> Any:
        """The program, to be called with other arguments of the same shapes."""
        return self._traced.lower().compile()


def products(problem: Problem, *, with_step: bool = False) -> dict[str, Program]:
    """The gradient and the products, each in one program that keeps nothing; perhaps the step."""
    _, loss_fn, params, x, y, vector = problem
    found = {
        GRADIENT: Program(_gradient, loss_fn, params, x, y),
        HESSIAN: Program(curvature.hvp, loss_fn, params, vector, x, y),
        GAUSS_NEWTON: Program(_gauss_newton, problem),
    }
    if with_step:
        found[SAM] = Program(_sam_step, loss_fn, params, x, y)
    return found


def over_gradient(
    programs: Mapping[str, Program], seconds: Mapping[str, float]
) -> dict[str, float]:
    """Memory and operations of each program over the gradient's, and time beside operations.

    Args:
      programs: by label, the gradient among them.
      seconds: by the same labels.

    Returns:
      The ratios by name; "time over operations" is the ratio of the times over that of the
      operations.
    """
    found, base = {}, programs[GRADIENT]
    for label, program in programs.items():
        if label != GRADIENT:
            operations = program.operations / base.operations
            found[f"{label}: memory over gradient"] = program.memory / base.memory
            found[f"{label}: operations over gradient"] = operations
            found[f"{label}: time over operations"] = (
                seconds[label] / seconds[GRADIENT] / operations
            )
    return found


def _gradient(loss_fn: Any, params: Any, x: jax.Array, y: jax.Array) -> Any:
    return jax.grad(loss_fn)(params, x, y)


def _gauss_newton(problem: Problem) -> Any:
    model_fn, _, params, x, y, vector = problem
    operator = curvature.gauss_newton(model_fn, cross_entropy, params, x, y)
    return operator.matvec(vector)


def _sam_step(loss_fn: Any, params: Any, x: jax.Array, y: jax.Array) -> Any:
    step = optax.chain(transforms.sam(_RHO), optax.sgd(_RATE))
    grad_fn = lambda params, i: jax.grad(loss_fn)(params, x, y)
    grads = grad_fn(params, 0)
    updates, _ = step.update(grads, step.init(params), params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates)


class Oracle:
    """The same answers by other ways, written out by hand.

    Args:
      problem: whose.
      programs: from `products`; with their gradient, itself checked, the step is taken.
    """

    def __init__(self, problem: Problem, programs: Mapping[str, Program]):
        self._problem, self._gradient = problem, programs[GRADIENT]

    def error(self, label: str, answer: Any) -> float:
        """Relative error in norm: of the step's update, of the gradient's slope along `vector`."""
        if label == GRADIENT:
            # A sum of n independent signs: the slope has the size of the gradient's norm.
            difference = _inner(answer, self._problem.vector) - self._slope_and_hessian[0]
            return float(jnp.abs(difference)) / _norm(answer)
        if label == SAM:
            step = self._step
            return _norm(_less(answer, step)) / _norm(_less(step, self._problem.params))
        expected = self._slope_and_hessian[1] if label == HESSIAN else self._gauss_newton
        return _norm(_less(answer, expected)) / _norm(expected)

    @functools.cached_property
    def _slope_and_hessian(self) -> tuple[jax.Array, Any]:
        return Program(_slope_and_hessian, self._problem)()

    @property
    def _gauss_newton(self) -> Any:
        return Program(_through_outputs, self._problem)()

    @property
    def _step(self) -> Any:
        _, loss_fn, params, x, y, _ = self._problem
        grads = self._gradient()
        above = _along(params, _RHO / _norm(grads), grads)
        return _along(params, -_RATE, self._gradient.compiled(loss_fn, above, x, y))


def _slope_and_hessian(problem: Problem) -> tuple[jax.Array, Any]:
    """Of the loss along the vector in forward mode, and H v in reverse mode twice."""
    _, loss_fn, params, x, y, vector = problem
    slope = jax.jvp(lambda p: loss_fn(p, x, y), (params,), (vector,))[1]
    return slope, jax.grad(lambda p: _inner(jax.grad(loss_fn)(p, x, y), vector))(params)


def _through_outputs(problem: Problem) -> Any:
    """J' a, a = p (u - p'u) over the number of predictions, u = J v, p = softmax(outputs)."""
    model_fn, _, params, x, y, vector = problem
    outputs, change = jax.jvp(lambda p: model_fn(p, x), (params,), (vector,))
    shares = jax.nn.softmax(outputs)
    bent = shares * (change - jnp.sum(shares * change, axis=-1, keepdims=True)) / y.size
    return jax.vjp(lambda p: model_fn(p, x), params)[1](bent)[0]


def _inner(one: Any, other: Any) -> jax.Array:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    products = (jnp.vdot(a, b, precision=PRECISION) for a, b in pairs)
    return sum(products, start=jnp.float32(0))


def _norm(tree: Any) -> float:
    return float(jnp.sqrt(_inner(tree, tree)))


def _less(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.subtract, one, other)


def _along(params: Any, length: float, direction: Any) -> Any:
    return jax.tree.map(lambda w, d: w + length * d, params, direction)
