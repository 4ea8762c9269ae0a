"""Whether a loss is a mean over independent examples: tried on some of them, before data are split.

Values alone do not tell. At a head of zeros every cross-entropy is log C, whatever batch norm in
train mode does below; its gradient with respect to the head is not. The data at hand do not tell
either: of a mask of ones a masked mean is a mean, until the batch comes that is padded. So it is
tried on other data too, examples of zeros and ones among those that came.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax import _checks, _jaxprs, _loops, _numerics, _programs, _sharding, _tree
from regjax._arguments import checked
from regjax._base import (
    Batch,
    LossFn,
    Params,
    Tree,
    WeightedMean,
    assumed_separable,
    check_scalar,
    differs_by_chunk,
    terms,
)
from regjax._losses import check_weight
from regjax._one_program import one_program
from regjax._programs import Program

# Enough examples to tell a mean from anything else, and no more than a chunk if that holds a few.
_MOST, _FEWEST = 64, 8
# Units of rounding that a loss of ordinary size may be off, and by which the weights are moved to
# see how far a gradient is.
_UNITS, _MOVES = 32, 4
_TOLERANCE = 1e-4
# What was tested, the latest last; the programs are kept, or they could not be found again.
_passed: collections.OrderedDict[Any, None] = collections.OrderedDict()
_MOST_PASSED = 256


@checked
def check_separable(loss_fn: LossFn, params: Params, *batch: Tree, tol: float = _TOLERANCE) -> None:
    """Checks that a loss is a mean over independent examples, by splitting the batch unevenly.

    Compares the values and the gradients of the whole batch with those of two parts of it. It does
    so on the examples as they are and, as far as the loss is finite there, with some of them
    replaced by zeros and ones: the mean over the ones of a mask is not a mean over the examples,
    even where this mask is all ones.

    Functions that split data (`chunk_size=...`) call it themselves, once for each function and its
    shapes, on the examples of a chunk (8 to 64), taken from all over the data. They cannot inside
    of `jax.jit`, nor for data that lie on several machines, because no numbers can be read there.

    Example:
      >>> x = jnp.arange(8.0)
      >>> regjax.check_separable(lambda params, x: jnp.mean((x - params) ** 2), jnp.ones(()), x)
      >>> regjax.check_separable(lambda params, x: jnp.sum((x - params) ** 2), jnp.ones(()), x)
      Traceback (most recent call last):
      ValueError: `loss_fn` must be the mean over independent examples: ...

    Args:
      loss_fn: (params, *batch) -> scalar, or `WeightedMean`.
      params: tree of parameters.
      *batch: arrays with a leading axis of at least two examples. Of two, the parts are equal, and
        a mean that forgets the sizes goes unnoticed.
      tol: allowed difference between the whole batch and the mean of two unequal parts, weighted by
        their sizes or their weights. Losses are compared relative to the largest magnitude of the
        three, gradients relative to the largest norm. In types narrower than float32 at least 16
        units of their rounding are allowed.

    Raises:
      ValueError: the losses or the gradients differ (a sum, batch norm in train mode, one dropout
        mask for the whole batch), are not finite, or there are fewer than two examples; a weight is
        negative.
    """
    _checks.non_negative("tol", tol)
    length = _checks.num_examples(batch)
    if length < 2:
        raise ValueError(f"`batch` must hold at least two examples to be split, got {length}.")
    check = _Check(loss_fn, params, batch, "loss_fn")
    check.compare(tol)


def ensure_separable(
    loss_fn: Callable[..., Tree],
    params: Params,
    batch: Batch,
    *,
    size: int,
    name: str,
    functions: tuple[Callable[..., Tree], ...],
    programs: tuple[Program, ...],
) -> None:
    """Tests a loss that is about to be split, if nobody did, said, or asked for its opposite.

    Args:
      loss_fn: (params, *batch) -> loss.
      params: tree of parameters.
      batch: all data.
      size: number of examples of a chunk.
      name: what the function is called in a message.
      functions: those of the user that the loss is made of.
      programs: the same functions traced, and shared with equal ones, by which it is known again
        what was tested.

    Raises:
      ValueError: the loss is not a mean over independent examples.
    """
    if any(differs_by_chunk(function) or assumed_separable(function) for function in functions):
        return
    length = _checks.num_examples(batch)
    count = min(length, _MOST, max(size, _FEWEST))
    if count < 2 or not has_numbers(programs, params, batch):
        return
    what = (count, *(program.code for program in programs), _programs.types((params, batch)))
    if what in _passed:
        return
    # Those at the beginning may be of one class, the last ones padded.
    places = np.arange(count) * (length - 1) // (count - 1)
    if placement := _sharding.find(batch, params):
        params, batch = placement.replicate(params), placement.shard(batch)
    some = _taken(batch, places)
    _Check(loss_fn, params, some, name).compare(_TOLERANCE)
    _passed[what] = None
    if len(_passed) > _MOST_PASSED:
        _passed.popitem(last=False)


def has_numbers(*trees: Tree) -> bool:
    """Tells whether a host can look at all leaves: they are numbers, and on this machine."""

    def is_elsewhere(leaf: Any) -> bool:
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return is_shape or not getattr(leaf, "is_fully_addressable", True)

    return _loops.is_concrete(*trees) and not any(map(is_elsewhere, jax.tree.leaves(trees)))


class _Check:
    """A loss on some examples, together and in two parts."""

    def __init__(self, loss_fn: LossFn, params: Params, batch: Batch, name: str):
        length = _checks.num_examples(batch)
        self.cut = max(1, length // 3)
        self.params, self.name, self.length = params, name, length
        self.batches = _split(batch, self.cut)
        self.loss_fn = loss_fn
        # Traced anew each time: the function may have changed since.
        signatures = [(params, *part) for part in self.batches]
        self.program = _programs.trace(loss_fn, *signatures)
        for signature in signatures:
            check_scalar(self.program.outputs(*signature), name=name)
        self.eps = max(
            float(jnp.finfo(_tree.vector_dtype(params)).eps),
            *(_jaxprs.narrowest_eps(trace.jaxpr) for trace in self.program.code.traces.values()),
        )

    def compare(self, tol: float) -> None:
        tol = max(tol, 16 * self.eps) if self.eps > jnp.finfo(jnp.float32).eps else tol
        measured = jax.device_get(_measured(self.program, self.params, self.batches))
        for weight in jax.tree.leaves(measured.weights):
            check_weight(weight, self.name)
        if not np.isfinite(measured.values[0]):
            raise ValueError(
                f"`{self.name}` must be finite on the batch, got {measured.values[0]}."
            )
        fault = self._fault(self.batches, measured, tol)
        # In the second part alone: of as many in both each would have the same share of a mask.
        rest = self.length - self.cut
        for put, count in ((_flipped, max(1, rest // 2)), (jnp.zeros_like, rest)):
            fault = fault or self._fault_of_others(put, count, tol)
        if fault:
            self._refuse(*fault)

    def _fault_of_others(
        self, put: Callable[[Any], jax.Array], count: int, tol: float
    ) -> tuple[str, str] | None:
        """The same with the last `count` examples replaced; None where that gives no numbers."""
        batches = _split(_replaced(self.batches[0], put, count), self.cut)
        try:
            measured = jax.device_get(_measured(self.program, self.params, batches))
            is_fine = all(np.isfinite(number) for number in jax.tree.leaves(measured))
            is_fine = is_fine and all(w >= 0 for w in jax.tree.leaves(measured.weights))
            fault = self._fault(batches, measured, tol) if is_fine else None
        except (FloatingPointError, jax.errors.JaxRuntimeError):  # of those who look for NaN
            return None
        return fault and (f"with zeros and ones for the last {count} {fault[0]}", fault[1])

    def _fault(
        self, batches: tuple[Batch, ...], measured: "_Measured", tol: float
    ) -> tuple[str, str] | None:
        """What the whole batch does and what its parts do instead, if they differ."""
        values, gradients, weights = measured
        for whole, one, two in zip(*weights, strict=True):
            if not abs(whole - one - two) <= tol * abs(whole):
                return f"has the weight {whole:g}", f"have {one + two:g} together"
        whole, parts = float(values[0]), float(values[1] + values[2])
        sizes = max(abs(whole), *(abs(float(value)) for value in values[3:]))
        norm, gap, largest = (float(number) for number in gradients)
        same_value = abs(whole - parts) <= tol * sizes + _UNITS * self.eps
        # A gradient that is no number tells nothing.
        same_gradient = gap <= tol * largest + self.eps**2 or not np.isfinite(norm)
        if same_value and same_gradient:
            return None
        value, gradient = _moved(self.program, self.params, batches[0], self.eps)
        if not (same_value or abs(whole - parts) <= _MOVES * float(value)):
            return f"gives {whole:.6g}", f"gives {parts:.6g}"
        if not (same_gradient or gap <= _MOVES * float(gradient)):
            return (
                "has another gradient",
                f"differs from it by {gap:.2g}, of gradients of norm {largest:.2g}",
            )
        return None

    def _refuse(self, whole: str, parts: str) -> None:
        raise ValueError(
            f"`{self.name}` must be the mean over independent examples: the whole batch {whole}, "
            f"the weighted mean of {self.cut} and {self.length - self.cut} examples {parts}. A sum "
            "does this, a mean that is divided by anything but the number of examples, batch norm "
            "in train mode, and dropout with one key for the whole batch. Return "
            "regjax.WeightedMean(sum, weight), with the weight as it is and not 1 in place of 0, "
            "give each example a key of its own as data, use "
            'mode="evaluation" or "train_per_chunk" of a model, or leave out `chunk_size`. Who '
            f"knows better passes regjax.assume_separable({self.name})."
        )


@one_program()
def _taken(batch: Batch, places: ArrayLike) -> Batch:
    return jax.tree.map(lambda leaf: leaf[places], batch)


@one_program(static="cut")
def _split(batch: Batch, cut: int) -> tuple[Batch, ...]:
    first = jax.tree.map(lambda leaf: leaf[:cut], batch)
    return batch, first, jax.tree.map(lambda leaf: leaf[cut:], batch)


@one_program(static=("put", "count"))
def _replaced(batch: Batch, put: Callable[[Any], jax.Array], count: int) -> Batch:
    """A batch with others in place of the last `count` rows of its leaves; keys as they are."""

    def replaced(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        is_last = np.arange(len(leaf)) >= len(leaf) - count
        return jnp.where(is_last.reshape(-1, *[1] * (leaf.ndim - 1)), put(leaf), leaf)

    return jax.tree.map(replaced, batch)


def _flipped(leaf: Any) -> jax.Array:
    """1 for 0, and 0 for all else: the ones of a mask are gone, and another class is there."""
    return jnp.asarray(leaf == 0, leaf.dtype)


class _Measured(NamedTuple):
    """Numbers of the whole and of the parts.

    Attributes:
      values: the losses: of the whole, what each part adds to it, and those of the parts by
        themselves.
      gradients: the norm of the gradient, of the difference from the parts', and the largest one.
      weights: of the whole and of each part.
    """

    values: list[jax.Array]
    gradients: tuple[jax.Array, ...]
    weights: list[list[jax.Array]]


@one_program()
def _measured(program: Program, params: Params, batches: tuple[Batch, ...]) -> _Measured:
    """Values, gradients and weights of the whole and of the parts."""
    terms_of = functools.partial(_terms, program, params)
    weights = [[jax.lax.stop_gradient(weight) for _, weight in terms_of(b)] for b in batches]

    def share(params: Params, batch: Batch) -> jax.Array:
        pairs = zip(_terms(program, params, batch), weights[0], strict=True)
        values = [_numerics.divide(total, weight) for (total, _), weight in pairs]
        return functools.reduce(jnp.add, values)

    both = [jax.value_and_grad(share)(params, batch) for batch in batches]
    whole, *parts = (jax.tree.map(_tree.wide, gradient) for _, gradient in both)
    gap = jax.tree.map(lambda a, b, c: a - b - c, whole, *parts)
    # Of the parts by themselves, as if each were all there is.
    ratios = [
        functools.reduce(jnp.maximum, map(_numerics.divide, weights[0], own)) for own in weights[1:]
    ]
    norms = [_numerics.scaled_norm(gradient) for gradient in (whole, *parts)]
    own_norms = [n * r.astype(n.dtype) for n, r in zip(norms[1:], ratios, strict=True)]
    largest = functools.reduce(jnp.maximum, [norms[0], *own_norms])
    values = [value for value, _ in both]
    own = [value * ratio for value, ratio in zip(values[1:], ratios, strict=True)]
    slopes = norms[0], _numerics.scaled_norm(gap), largest
    return _Measured([*values, *own], slopes, weights)


@one_program()
def _moved(
    program: Program, params: Params, batch: Batch, eps: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """How far the value and the gradient move if each weight is rounded off by some units."""

    def move(leaf: jax.Array) -> jax.Array:
        wide = _tree.wide(leaf)
        size = jnp.abs(wide) + jnp.sqrt(jnp.mean(wide**2))
        signs = jnp.where(jnp.arange(wide.size) % 2, 1, -1).reshape(wide.shape).astype(wide.dtype)
        return (wide + _UNITS * jnp.asarray(eps, wide.dtype) * size * signs).astype(leaf.dtype)

    def value(params: Params) -> jax.Array:
        quotients = [_numerics.divide(*term) for term in _terms(program, params, batch)]
        return functools.reduce(jnp.add, quotients)

    there = jax.tree.map(move, params)
    back = jax.tree.map(lambda leaf, moved: 2 * leaf - moved, params, there)
    (one, slope), (other, turned) = map(jax.value_and_grad(value), (params, there))
    gap = jax.tree.map(lambda a, b: _tree.wide(a) - _tree.wide(b), slope, turned)
    # Of a mean that is linear in the weights the value is not as uncertain as they are.
    return jnp.abs(one - (other + value(back)) / 2), _numerics.scaled_norm(gap)


def _terms(program: Program, params: Params, batch: Batch) -> list[tuple[jax.Array, jax.Array]]:
    """Sums and weights of a loss; a plain mean has the number of examples for weight."""
    loss, length = program(params, *batch), _checks.num_examples(batch)
    found = terms(loss) or (WeightedMean(_tree.wide(loss) * length, jnp.float32(length)),)
    dtype = _tree.widest(_tree.wide_dtype(term.sum) for term in found)
    return [(term.sum.astype(dtype), term.weight.astype(dtype)) for term in found]
