"""GradInit: one scale for each parameter array, so that the first step helps and is no leap."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _layouts, _loops, _numerics, _tree
from regjax._arguments import checked
from regjax._axes import Layouts
from regjax._base import Batch, LossFn, Params, Tree
from regjax._losses import Whole, whole
from regjax._printing import legible
from regjax.initializers._scales import Scales

_B1, _EPSILON = 0.9, 1e-8  # of Adam, as in the official code
_MIN_SCALE = 0.01


@legible
class GradInitResult(NamedTuple):
    """The scaled parameters and how they were found.

    Attributes:
      params: tree of parameters, each array times its scale.
      scales: tree of scalars (), float32 at least.
      gradient_norms: (iterations,), on the first two half batches, before each iteration.
      objectives: (iterations,), loss after the simulated step; NaN where `constrained`.
      constrained: (iterations,), bool, whether the norm was above its bound and was lowered.
    """

    params: Params
    scales: Tree
    gradient_norms: jax.Array
    objectives: jax.Array
    constrained: jax.Array


@checked
def gradinit(
    loss_fn: LossFn,
    params: Params,
    batches: Batch,
    *,
    gradient_norm_bound: ArrayLike,
    learning_rate: ArrayLike,
    first_step: str = "sgd",
    first_step_learning_rate: ArrayLike | None = None,
    min_scale: float | Tree = None,
    max_scale: float | Tree = None,
    clip: ArrayLike | None = None,
    second_order: bool = False,
    layout: Layouts = None,
) -> GradInitResult:
    """Learns a scale for each parameter array, so that the first step of training lowers the loss.

    Each iteration takes three half batches: S is half 0 and 1, S~ is half 0 and 2.

        p = scales times the initial params,   g = grad L(S; p),   n = |g|
        n > bound:   d = derivative of n in the scales
        otherwise:   d = derivative of L(S~; p - s step(g)) / s, the step held
        scales move by Adam on clip(d), from `min_scale` to `max_scale`

    Here s is the `first_step_learning_rate`, and step(g) the first step of the optimiser: g / |g|
    for SGD, the signs of g for Adam. |g| is the 2-norm with SGD and the 1-norm with Adam, not
    divided by the number of parameters. The variants follow the authors' two codes:

        "sgd", convolutions:   s 0.1,  clip 1,   beta2 0.999, one second moment for both cases
        "adam", transformers:  s 1e-3, clip 1e8, beta2 0.98, a second moment for each case; scales
                               of normalizations are at most 100

    Both keep a first moment for each of the two cases. Each layer of a stack has a scale of its
    own. Arrays of zeros keep the scale 1, and a scale that has reached 0 stays there. An iteration
    whose derivative is NaN changes nothing. An iteration costs three gradients. Make the
    optimiser's state afterwards.

    Example:
      >>> loss_fn = lambda w, x: jnp.mean((w["a"] * w["b"] * x - 1.0) ** 2)
      >>> params = {"a": jnp.array(9.0), "b": jnp.array(1.0)}
      >>> batches = (jnp.ones((60, 3, 1)),)  # 60 iterations, three half batches of one example
      >>> result = initializers.gradinit(
      ...     loss_fn, params, batches, gradient_norm_bound=1.0, learning_rate=0.05
      ... )
      >>> print(f"{result.gradient_norms[0]:.0f} {result.gradient_norms[-1]:.0f}")
      145 1
      >>> print(f"{result.scales['a']:.1f} {result.scales['b']:.1f}")
      0.4 0.4

    Args:
      loss_fn: (params, *batch) -> mean loss in train mode, such as
        `regjax.model_loss(model, output_loss_fn, mode="train")`.
      params: tree of parameters.
      batches: tuple of arrays, the arguments of `loss_fn`, with the axes (iterations, 3, half
        batch, ...): three independent half batches per iteration. A few hundred iterations do.
      gradient_norm_bound: bound of |g|, in units of the loss per parameter. The authors take 1 with
        SGD. There is no default, because a 1-norm grows with the number of parameters.
      learning_rate: learning rate of the scales. The authors take 1e-3 (ResNet-110 with batch norm)
        to 1e-1 (VGG-19 with batch norm), and 2.5e-3 (a translation transformer, Adam).
      first_step: "sgd" or "adam", whose first step is simulated.
      first_step_learning_rate: s, in units of the parameters over the step. None: as above.
      min_scale: lower bound, a number or a tree of numbers. None: 0 for leaves named "bias", 0.01
        for all others.
      max_scale: upper bound, a number or a tree of numbers. None: 100 for leaves named "scale" with
        Adam's step, otherwise no bound.
      clip: bound of each derivative. None: as above.
      second_order: whether to differentiate through the simulated step; the official code does not.
      layout: which axes of the arrays stack layers (`regjax.Layout`); None: a guess.

    Returns:
      A `GradInitResult`.

    Raises:
      ValueError: an option is out of its range, an array lacks the axis of three half batches, or
        the axes of a parameter have to be told.
      TypeError: a parameter is not real floating point.

    References:
      C. Zhu et al. (2021), arXiv:2102.08098, in the forms of the official code.
    """
    variant = _VARIANTS[_checks.choice("first_step", first_step, tuple(_VARIANTS))]
    step_rate = variant.step_rate if first_step_learning_rate is None else first_step_learning_rate
    clip = variant.clip if clip is None else clip
    for name, value in (("gradient_norm_bound", gradient_norm_bound), ("clip", clip)):
        _checks.non_negative(name, value)
    _checks.non_negative("learning_rate", learning_rate)
    _checks.positive("first_step_learning_rate", step_rate)
    num_iterations = _num_iterations(batches)
    # Of two halves, as an iteration sees them.
    joined = lambda leaf: jnp.concatenate([leaf[0, 0], leaf[0, 1]])
    batch = jax.eval_shape(lambda tree: jax.tree.map(joined, tree), batches)
    loss = whole(_chunks.traced(loss_fn, params, batch))
    stacks = Scales(tuple(_layouts.of_leaves(layout, params)))
    iteration = _Iteration(variant, second_order, stacks)
    dtype, sizes = _tree.vector_dtype(params), stacks.sizes(params)
    num_scales = sum(sizes)
    numbers = (gradient_norm_bound, learning_rate, step_rate, clip)
    lower = _bounds("min_scale", min_scale, params, _MIN_SCALE, {"bias": 0.0})
    upper = _bounds("max_scale", max_scale, params, math.inf, {"scale": variant.max_norm_scale})
    if any(low > high for low, high in zip(lower, upper, strict=True)):
        raise ValueError(
            f"`max_scale` must not be below `min_scale`, got {max_scale} and {min_scale}."
        )
    operands = _Operands(
        loss,
        params,
        batches,
        *(jnp.repeat(jnp.asarray(x, dtype), np.array(sizes)) for x in (lower, upper)),
        *(jnp.asarray(number, dtype) for number in numbers),
    )
    history = jnp.zeros(num_iterations, dtype)
    carry = _Carry(
        jnp.ones(num_scales, dtype),
        jnp.zeros((2, num_scales), dtype),
        jnp.zeros((2, num_scales), dtype),
        jnp.zeros(2, jnp.int32),
        (history, history, jnp.zeros(num_iterations, bool)),
    )
    end = _loops.scan(iteration, carry, num_iterations, operands=operands)
    scales = jax.tree.unflatten(jax.tree.structure(params), stacks.split(end.scales, params))
    return GradInitResult(stacks.scaled(end.scales, params), scales, *end.history)


class _Operands(NamedTuple):
    """What an iteration reads."""

    loss_fn: Whole
    params: Params
    batches: Batch
    lower: jax.Array
    upper: jax.Array
    bound: jax.Array
    learning_rate: jax.Array
    step_rate: jax.Array
    clip: jax.Array


class _Carry(NamedTuple):
    """Scales and Adam's moments, one for each array; moments and count for each case.

    Where both cases share the second moment it is the first row.
    """

    scales: jax.Array
    first: jax.Array
    second: jax.Array
    counts: jax.Array
    history: tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Iteration:
    """One iteration as the body of a fold."""

    variant: "_Variant"
    second_order: bool
    stacks: Scales

    def __call__(self, operands: _Operands, carry: _Carry, i: jax.Array) -> _Carry:
        halves = jax.tree.map(lambda leaf: leaf[i], operands.batches)
        join = lambda j: jax.tree.map(lambda leaf: jnp.concatenate([leaf[0], leaf[j]]), halves)
        params = self.stacks.scaled(carry.scales, operands.params)
        derive = self._second_order if self.second_order else self._first_order
        norm, objective, slope = derive(operands, params, join(1), join(2))
        over = norm > operands.bound
        products = jax.tree.map(lambda d, p: _tree.wide(d) * _tree.wide(p), slope, operands.params)
        derivative = self.stacks.reduced(jnp.sum, products).astype(carry.scales.dtype)
        is_there = self.stacks.reduced(jnp.any, jax.tree.map(lambda p: p != 0, operands.params))
        is_zero = ~is_there | (carry.scales == 0)
        derivative = jnp.clip(jnp.where(is_zero, 0, derivative), -operands.clip, operands.clip)
        new = _adam(carry, derivative, over.astype(jnp.int32), operands, self.variant)
        new = new._replace(scales=jnp.where(is_zero, carry.scales, new.scales))
        keep = jnp.all(jnp.isfinite(derivative))
        new = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, carry)
        seen = (norm, jnp.where(over, jnp.nan, objective), over)
        history = tuple(
            past.at[i].set(now.astype(past.dtype))
            for past, now in zip(carry.history, seen, strict=True)
        )
        return new._replace(history=history)

    def _first_order(
        self, operands: _Operands, params: Params, batch: Batch, other: Batch
    ) -> tuple[jax.Array, jax.Array, Params]:
        """Computes norm, objective, and the derivative of whichever counts in the parameters.

        The derivative of the norm n is H u, u = dn/dg: that of the gradient along u at p on S. The
        other one is the gradient itself at p - step on S~. So one call with its place chosen.
        """
        value_and_grad = lambda p, batch: jax.value_and_grad(operands.loss_fn)(p, *batch)
        _, grads = value_and_grad(params, batch)
        norm, direction = jax.value_and_grad(self._norm)(grads)
        over = norm > operands.bound
        choose = lambda one, two: jax.tree.map(lambda a, b: jnp.where(over, a, b), one, two)
        place, data = choose(params, self._moved(operands, params, grads)), choose(batch, other)
        (objective, slope), (_, turned) = jax.jvp(
            lambda p: value_and_grad(p, data), (place,), (direction,)
        )
        slope = jax.tree.map(lambda leaf: leaf / operands.step_rate.astype(leaf.dtype), slope)
        return norm, objective, choose(turned, slope)

    def _second_order(
        self, operands: _Operands, params: Params, batch: Batch, other: Batch
    ) -> tuple[jax.Array, jax.Array, Params]:
        """As `_first_order`, differentiated through the simulated step."""
        grad = lambda p: jax.grad(operands.loss_fn)(p, *batch)

        def ahead(p: Params) -> jax.Array:
            return operands.loss_fn(self._moved(operands, p, grad(p)), *other)

        norm, turned = jax.value_and_grad(lambda p: self._norm(grad(p)))(params)
        objective, slope = jax.value_and_grad(ahead)(params)
        over = norm > operands.bound
        slope = jax.tree.map(lambda leaf: leaf / operands.step_rate.astype(leaf.dtype), slope)
        return norm, objective, jax.tree.map(lambda a, b: jnp.where(over, a, b), turned, slope)

    def _moved(self, operands: _Operands, params: Params, grads: Params) -> Params:
        move = lambda p, a: p - operands.step_rate.astype(p.dtype) * a
        return jax.tree.map(move, params, self.variant.step(grads))

    def _norm(self, grads: Params) -> jax.Array:
        leaves = [_tree.wide(leaf) for leaf in jax.tree.leaves(grads)]
        if self.variant.order == 1:
            return functools.reduce(jnp.add, [jnp.sum(jnp.abs(leaf)) for leaf in leaves])
        return _numerics.scaled_norm(leaves)


def _sgd_step(grads: Params) -> Params:
    return jax.tree.map(lambda unit, leaf: unit.astype(leaf.dtype), _numerics.unit(grads), grads)


def _adam_step(grads: Params) -> Params:
    return jax.tree.map(jnp.sign, grads)


@dataclasses.dataclass(frozen=True)
class _Variant:
    """One of the authors' two codes."""

    step: Callable[[Params], Params]
    order: int  # of the gradient's norm
    step_rate: float
    clip: float
    b2: float
    shares_second_moment: bool
    max_norm_scale: float  # of the leaves named "scale"


_VARIANTS = {
    "sgd": _Variant(_sgd_step, 2, 0.1, 1.0, 0.999, True, math.inf),
    "adam": _Variant(_adam_step, 1, 1e-3, 1e8, 0.98, False, 100.0),
}


def _adam(
    carry: _Carry, derivative: jax.Array, case: jax.Array, operands: _Operands, variant: _Variant
) -> _Carry:
    counts, b2 = carry.counts.at[case].add(1), variant.b2
    row = 0 if variant.shares_second_moment else case
    moment = _B1 * carry.first[case] + (1 - _B1) * derivative
    second = b2 * carry.second[row] + (1 - b2) * derivative**2
    num_first = counts[case].astype(second.dtype)
    num_second = jnp.sum(counts) if variant.shares_second_moment else counts[case]
    # 1 - beta^t, which cancels for a beta near 1.
    mean = moment / -jnp.expm1(num_first * math.log(_B1))
    root = jnp.sqrt(second / -jnp.expm1(num_second.astype(second.dtype) * math.log(b2)))
    scales = carry.scales - operands.learning_rate * mean / (root + _EPSILON)
    return carry._replace(
        scales=jnp.clip(scales, operands.lower, operands.upper),
        first=carry.first.at[case].set(moment),
        second=carry.second.at[row].set(second),
        counts=counts,
    )


def _bounds(
    name: str,
    given: float | Tree | None,
    params: Params,
    default: float,
    by_name: Mapping[str, float],
) -> list[float]:
    """Makes one bound of each leaf's scale, by the leaf's own name where none is given."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if given is None:
        own = [jax.tree_util.keystr(path[-1:]).strip("[]'.") for path, _ in leaves]
        values = [by_name.get(leaf, default) for leaf in own]
    elif isinstance(given, (int, float)):
        values = [given] * len(leaves)
    else:
        values = jax.tree.leaves(_checks.same_structure(name, given, params))
    return [_checks.non_negative(name, value) for value in values]


def _num_iterations(batches: Batch) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    if not shapes or any(len(shape) < 3 or shape[1] != 3 for shape in shapes):
        raise ValueError(
            "`batches` must be arrays with the axes (iterations, 3, half batch, ...), got shapes "
            f"{shapes}."
        )
    if len({(shape[0], shape[2]) for shape in shapes}) > 1 or 0 in shapes[0][:3]:
        raise ValueError(f"`batches` must share their first three axes, got shapes {shapes}.")
    return shapes[0][0]
