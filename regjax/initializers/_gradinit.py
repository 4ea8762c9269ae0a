"""GradInit: one scale for each parameter array, so that the first step helps and is no leap."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike, DTypeLike

from regjax import _checks, _loops, _numerics, _tree
from regjax._base import Batch, LossFn, Params, Tree, as_partial, check_loss

_B1, _B2, _EPSILON = 0.9, 0.999, 1e-8  # of Adam, as in the official code
_MIN_SCALE = 0.01


class GradInitResult(NamedTuple):
    """The scaled parameters and how they were found.

    Attributes:
      params: tree of parameters, each array times its scale.
      scales: tree of scalars (), float32 at least.
      gradient_norms: (iterations,), of the first two half batches, before each iteration.
      objectives: (iterations,), loss after the simulated step; NaN where `constrained`.
      constrained: (iterations,), bool, whether the norm was above its bound and was lowered.
    """

    params: Params
    scales: Tree
    gradient_norms: jax.Array
    objectives: jax.Array
    constrained: jax.Array


def gradinit(
    loss_fn: LossFn,
    params: Params,
    batches: Batch,
    *,
    gradient_norm_bound: ArrayLike,
    learning_rate: ArrayLike,
    first_step: str = "sgd",
    first_step_learning_rate: ArrayLike = 0.1,
    min_scale: float | Tree = None,
    clip: ArrayLike = 1.0,
    second_order: bool = False,
) -> GradInitResult:
    """Learns a scale for each parameter array from a few hundred batches.

    In each iteration, with the batches S = half 0 and half 1, S~ = half 0 and half 2:

        g = grad L(S; p),  n = |g|
        n > bound:   d = derivative of n in the scales
        otherwise:   d = derivative of L(S~; p - s step(g)) / s, the step held
        scales move by Adam on clip(d), at least `min_scale`; p = scales times the initial params

    with s the `first_step_learning_rate`. The step is g / |g|_2 of SGD (0 for 0), or the signs of
    g, the first one of Adam. |g| is of order 2 with SGD and of order 1 with Adam, not divided by
    the number of parameters. Adam's first moment is kept for each of the two cases apart, each with
    its own bias correction; the second moment is shared. Arrays that are zero keep their scale of 1
    for good. An iteration whose derivative is NaN changes nothing. Costs three gradients an
    iteration: both cases are one derivative of the gradient, taken at another place. Make the
    optimiser's state afterwards.

    Args:
      loss_fn: (params, *batch) -> mean loss in train mode, such as
        `model_loss(model, output_loss_fn, mode="train")`; running statistics are not written.
      params: tree of parameters.
      batches: tuple of arrays, the arguments of `loss_fn`, with the axes (iterations, 3, half
        batch, ...): three independent half batches an iteration.
      gradient_norm_bound: of |g|, in units of the loss per parameter. Used: 1 with SGD; a
        norm of order 1 grows with the number of parameters, so that there is no default.
      learning_rate: of the scales. Used: 1e-3 (ResNet-110 with batch norm) to 1e-1 (VGG-19 with).
      first_step: "sgd" or "adam", whose first step is simulated.
      first_step_learning_rate: s, in units of the parameters over the step. Used: 0.1 (SGD), 1e-3
        (Adam).
      min_scale: lower bound, a number or a tree of numbers. None: 0 for leaves named "bias", 0.01
        for all others, as in the official code.
      clip: bound of each derivative.
      second_order: whether to differentiate through the simulated step too; the official code does
        not.

    Returns:
      A `GradInitResult`.

    Raises:
      ValueError: an option is out of its range, or an array lacks the axis of three half batches.
      TypeError: a parameter is not real floating point.

    References:
      C. Zhu et al. (2021), arXiv:2102.08098; the form is that of the official code, the paper's
      body was not read.
    """
    for name, value in (("gradient_norm_bound", gradient_norm_bound), ("clip", clip)):
        _checks.non_negative(name, value)
    _checks.non_negative("learning_rate", learning_rate)
    _checks.positive("first_step_learning_rate", first_step_learning_rate)
    num_iterations = _num_iterations(batches)
    check_loss(loss_fn, params, jax.tree.map(lambda leaf: leaf[0, 0], batches))
    iteration = _Iteration(_checks.choice("first_step", first_step, tuple(_STEPS)), second_order)
    dtype, num_leaves = _tree.vector_dtype(params), len(jax.tree.leaves(params))
    numbers = (gradient_norm_bound, learning_rate, first_step_learning_rate, clip)
    operands = _Operands(
        as_partial(loss_fn),
        params,
        batches,
        _lower_bounds(min_scale, params, dtype),
        *(jnp.asarray(number, dtype) for number in numbers),
    )
    history = jnp.zeros(num_iterations, dtype)
    carry = _Carry(
        jnp.ones(num_leaves, dtype),
        jnp.zeros((2, num_leaves), dtype),
        jnp.zeros(num_leaves, dtype),
        jnp.zeros(2, jnp.int32),
        (history, history, jnp.zeros(num_iterations, bool)),
    )
    end = _loops.scan(iteration, carry, num_iterations, operands=operands)
    scales = jax.tree.unflatten(jax.tree.structure(params), list(end.scales))
    return GradInitResult(_scaled(end.scales, params), scales, *end.history)


class _Operands(NamedTuple):
    """What an iteration reads."""

    loss_fn: Partial
    params: Params
    batches: Batch
    lower: jax.Array
    bound: jax.Array
    learning_rate: jax.Array
    step_rate: jax.Array
    clip: jax.Array


class _Carry(NamedTuple):
    """Scales and Adam's moments, one for each array; first moment and count for each case."""

    scales: jax.Array
    first: jax.Array
    second: jax.Array
    counts: jax.Array
    history: tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Iteration:
    """One iteration as the body of a fold."""

    first_step: str
    second_order: bool

    def __call__(self, operands: _Operands, carry: _Carry, i: jax.Array) -> _Carry:
        halves = jax.tree.map(lambda leaf: leaf[i], operands.batches)
        join = lambda j: jax.tree.map(lambda leaf: jnp.concatenate([leaf[0], leaf[j]]), halves)
        params = _scaled(carry.scales, operands.params)
        derive = self._second_order if self.second_order else self._first_order
        norm, objective, slope = derive(operands, params, join(1), join(2))
        over = norm > operands.bound
        pairs = zip(jax.tree.leaves(slope), jax.tree.leaves(operands.params), strict=True)
        derivative = jnp.stack([_inner(d, p) for d, p in pairs]).astype(carry.scales.dtype)
        is_zero = jnp.stack([~jnp.any(p != 0) for p in jax.tree.leaves(operands.params)])
        derivative = jnp.clip(jnp.where(is_zero, 0, derivative), -operands.clip, operands.clip)
        new = _adam(carry, derivative, over.astype(jnp.int32), operands)
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
        return jax.tree.map(move, params, _STEPS[self.first_step](grads))

    def _norm(self, grads: Params) -> jax.Array:
        leaves = [_tree.wide(leaf) for leaf in jax.tree.leaves(grads)]
        if self.first_step == "adam":
            return functools.reduce(jnp.add, [jnp.sum(jnp.abs(leaf)) for leaf in leaves])
        square = functools.reduce(jnp.add, [jnp.sum(leaf**2) for leaf in leaves])
        # The root has no derivative at zero.
        return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _sgd_step(grads: Params) -> Params:
    inverse = _numerics.divide(1, optax.tree.norm(grads))
    return jax.tree.map(lambda leaf: leaf * inverse.astype(leaf.dtype), grads)


def _adam_step(grads: Params) -> Params:
    return jax.tree.map(jnp.sign, grads)


_STEPS: dict[str, Callable[[Params], Params]] = {"sgd": _sgd_step, "adam": _adam_step}


def _adam(carry: _Carry, derivative: jax.Array, case: jax.Array, operands: _Operands) -> _Carry:
    counts = carry.counts.at[case].add(1)
    moment = _B1 * carry.first[case] + (1 - _B1) * derivative
    second = _B2 * carry.second + (1 - _B2) * derivative**2
    powers = [counts[case].astype(second.dtype), jnp.sum(counts).astype(second.dtype)]
    mean = moment / (1 - _B1 ** powers[0])
    root = jnp.sqrt(second / (1 - _B2 ** powers[1]))
    scales = carry.scales - operands.learning_rate * mean / (root + _EPSILON)
    return carry._replace(
        scales=jnp.maximum(scales, operands.lower),
        first=carry.first.at[case].set(moment),
        second=second,
        counts=counts,
    )


def _scaled(scales: jax.Array, params: Params) -> Params:
    leaves, treedef = jax.tree.flatten(params)
    scaled = [scale.astype(jnp.result_type(p)) * p for scale, p in zip(scales, leaves, strict=True)]
    return jax.tree.unflatten(treedef, scaled)


def _inner(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.sum(_tree.wide(one) * _tree.wide(other))


def _lower_bounds(min_scale: float | Tree, params: Params, dtype: DTypeLike) -> jax.Array:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if min_scale is None:
        values: list[float] = [
            0.0 if jax.tree_util.keystr(path[-1:]).strip("[]'.") == "bias" else _MIN_SCALE
            for path, _ in leaves
        ]
    elif isinstance(min_scale, (int, float)):
        values = [min_scale] * len(leaves)
    else:
        values = jax.tree.leaves(_checks.same_structure("min_scale", min_scale, params))
    return jnp.asarray([_checks.non_negative("min_scale", value) for value in values], dtype)


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
