"""Curvature over data that do not fit on the device: one pass over a source for each product.

A thread reads the source and puts batches on the device ahead of the one that is being computed.
The products of the batches are added up by their numbers of examples; a block of vectors shares a
pass. The weights of a weighted mean take one pass more, before the first product.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from regjax import _checks, _loops, _losses, _programs
from regjax._arguments import checked
from regjax._base import Batch, Params, Tree, couples_examples
from regjax._losses import Factors
from regjax._sharding import Placement
from regjax._space import Space
from regjax._subsets import of_leaves, part_of
from regjax.curvature._operators import _covariance, _gauss_newton
from regjax.curvature._operators._curvature import (
    CurvatureOperator,
    Form,
    Linearization,
    assemble,
    program,
)
from regjax.curvature._operators._fisher import draw_keys, fisher, fisher_form
from regjax.curvature._operators._hessian import hessian, hessian_form
from regjax.curvature._operators._operator import Operator
from regjax.curvature._operators._sandwich import batch_with_weights
from regjax.curvature._operators._source import Source

# How each matrix follows from a batch, and what stands before the source among the arguments.
_OF_OUTPUTS = ("model_fn", "output_loss_fn", "params")
_FORMS: dict[Any, tuple[Callable[..., Form], tuple[str, ...]]] = {
    hessian: (hessian_form, ("loss_fn", "params")),
    _gauss_newton.gauss_newton: (_gauss_newton.gauss_newton_form, _OF_OUTPUTS),
    _gauss_newton.empirical_fisher: (_gauss_newton.empirical_fisher_form, _OF_OUTPUTS),
    fisher: (fisher_form, ("model_fn", "params")),
    _covariance.gradient_covariance: (_covariance.mean_gradient_form, _OF_OUTPUTS),
}


@dataclasses.dataclass(eq=False)
class _Programs:
    """The programs of an operator for batches of each size, made when one of it comes.

    Attributes:
      make: batch -> how the matrix of that batch alone follows from it.
      first: the first batch's shapes.
      known: types of a batch -> how its matrix follows.
      factors: those of all data of a weighted loss, known after a first pass.
    """

    make: Callable[..., Form]
    first: Batch
    known: dict[Any, Form] = dataclasses.field(default_factory=dict)
    factors: Factors | None = None

    def at(self, batch: Batch) -> Form:
        """How the matrix of a batch follows, as the source gives the batch.

        Raises:
          ValueError: the functions are not what they were when the operator was made.
        """
        types = _programs.types(batch)
        if types not in self.known:
            if self.known:
                self._check()
            self.known[types] = self.make(*batch)
        return self.known[types]

    def _check(self) -> None:
        then = self.known[_programs.types(self.first)]
        if not _programs.same(then, self.make(*self.first)):
            raise ValueError(
                "`arguments` must hold functions that stay the same as long as the operator is "
                "used, got one that computes something else than when it was made."
            )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["placement", "source", "unit", "programs", "inside", "doubles_steps"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class StreamedOperator(Operator):
    """An operator whose data come from a source; only the host can make its products.

    Attributes:
      params: the parameters.
      placement: where the batches lie if they are on several devices; else None.
      source: where the batches come from.
      unit: unit of rounding of a product with a batch.
      programs: how the matrix of a batch follows from which function.
      inside: which leaves of the parameters are differentiated; None: all.
      doubles_steps: whether differences take steps twice as long.
    """

    params: Params
    placement: Placement | None
    source: Source
    unit: float
    programs: _Programs
    inside: tuple[bool, ...] | None = None
    doubles_steps: bool = False

    @property
    def space(self) -> Space:
        space = Space.at(self.params, self.placement)
        return space if self.inside is None else space.subspace(self.inside)

    @property
    def coarser(self) -> "StreamedOperator | None":
        form = self.programs.at(self.programs.first)
        is_exact = form.linearization.coarser is None
        return None if is_exact else dataclasses.replace(self, doubles_steps=True)

    @property
    def home(self) -> Mesh | None:
        return None if self.placement is None else self.placement.home

    @property
    def takes_blocks(self) -> bool:
        """True: reading is what a pass costs."""
        return True

    @property
    def eps(self) -> float:
        return self.unit

    def product(self, vector: jax.Array) -> jax.Array:
        return self._mean(vector, lambda batch: self._fused(batch, vector))

    def block_product(self, rows: jax.Array) -> jax.Array:
        # One linearisation of a batch serves all vectors.
        def multiply(batch: Batch) -> jax.Array:
            linearization, function, params = self._parts(batch)
            return assemble(linearization, function, params, batch, None).block_product(rows)

        return self._mean(rows, multiply)

    def facts(self) -> dict[str, Tree]:
        row = lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)
        one = self._with_draws(jax.tree.map(row, self.programs.first))
        # The factors follow from the rest, and are not known before the first pass.
        bare = dataclasses.replace(self, programs=dataclasses.replace(self.programs, factors=None))
        linearization, function, params = bare._parts(one)
        ours = CurvatureOperator(linearization, function, params, (), None, None, None)
        return {
            "params": self.params, "inside": repr(self.inside), "function": function,
            "linearization": linearization, "program": program(ours, one),
            "source": self.source.digest(),
        }  # fmt: skip

    def product_bytes(self, count: int) -> int:
        """Bytes on a device of `count` products at once, of batches as large as the first one."""
        batch = self._with_draws(self.programs.first)
        if self.placement is not None:
            batch = self.placement.shapes_of(batch)
        parts = self._parts(batch)
        # Beside the product of a batch its data and those read ahead, the sum, the product before.
        num_bytes = self.space.num_bytes
        vectors = num_bytes(jax.eval_shape(lambda: self.space.zeros(count)))
        held = (self.source.prefetch + 1) * num_bytes(batch) + 2 * vectors
        if count == 1:
            return held + self._of_batch(batch).product_bytes(1)
        make = functools.partial(assemble, chunk_size=None)
        kept = jax.eval_shape(make, *parts, batch)
        return held + num_bytes(kept.linear_map) + kept.product_bytes(count)

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        if self.inside is not None:
            ours = iter(inside)
            inside = tuple(here and next(ours) for here in self.inside)
        return dataclasses.replace(self, inside=inside)

    def _parts(self, batch: Batch) -> tuple[Linearization, Callable[..., Tree], Params]:
        """The programs for a batch with its draws, and what is differentiated."""
        linearization, function, _ = self.programs.at(batch[: len(self.programs.first)])
        factors = self.programs.factors
        if factors is not None:
            linearization, function = _losses.with_factors((linearization, function), factors)
        if self.doubles_steps:
            linearization = linearization.coarser or linearization
        if self.inside is None:
            return linearization, function, self.params
        return linearization, *of_leaves(function, self.params, self.inside)

    def _fused(self, batch: Batch, vector: jax.Array) -> jax.Array:
        """The product with the matrix of a batch, of which nothing is kept."""
        return self._of_batch(batch).product(vector)

    def _of_batch(self, batch: Batch) -> CurvatureOperator:
        ours = self.placement
        placement = ours and dataclasses.replace(ours, specs=self.space.specs)
        return CurvatureOperator(*self._parts(batch), batch, None, None, placement)

    def _with_draws(self, shapes: Batch) -> Batch:
        return jax.eval_shape(lambda batch: self.source.drawn(0, batch), shapes)

    def _mean(self, vectors: jax.Array, multiply: Callable[[Batch], jax.Array]) -> jax.Array:
        """The mean over the examples of a pass of the products, weighted by sizes of batches."""
        if not _loops.is_concrete(self, vectors):
            raise ValueError(
                "`operator` must be used outside of jax.jit, jax.vmap and other transformations: "
                "the host reads its data. `matmat` multiplies several vectors in one pass."
            )
        self._weigh()
        total, previous = jnp.zeros_like(vectors), None
        with contextlib.closing(self.source.batches()) as batches:
            for count, batch in batches:
                images = multiply(batch)
                total = _add(total, images, jnp.asarray(count, total.dtype))
                # The device works on one batch while the host hands out the next one, never more.
                jax.block_until_ready(previous)
                previous = images
        return total / jnp.asarray(self.source.num_examples, total.dtype)

    def _weigh(self) -> None:
        """Reads the weights of all data once; their sum is exact as far as each is.

        Raises:
          ValueError: one is negative or not finite, or all are zero.
        """
        programs = self.programs
        if programs.at(programs.first).weights is None or programs.factors is not None:
            return
        total: Any = 0.0
        with contextlib.closing(self.source.batches()) as batches:
            for count, batch in batches:
                weights: Any = programs.at(batch[: len(programs.first)]).weights
                if not np.any(total):
                    _losses.check_constant(weights, self.params, batch)
                means = _losses.evaluated(weights, self.params, batch)
                for mean in means:
                    _losses.check_weight(mean, "loss_fn")
                total = total + np.asarray(means, np.float64) * count
        means = jnp.asarray(total / self.source.num_examples, self.dtype)
        programs.factors = _losses.inverse(tuple(means))


@checked
def stream(
    operator_fn: Callable[..., CurvatureOperator],
    *arguments: Any,
    prefetch: int = 2,
    **options: Any,
) -> Operator:
    """Makes a curvature matrix over a data set that is read batch by batch in every product.

    It goes wherever an `Operator` goes outside of `jax.jit`. Each product is a pass over the data,
    of several vectors too. `spectral_density` holds all of its probes, `num_probes` times
    `num_steps` vectors.

    Example:
      >>> loss_fn = lambda w, x, y: 0.5 * jnp.mean((x @ w - y) ** 2)
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([1.0, 3.0])
      >>> batches = [(x[:1], y[:1]), (x[1:], y[1:])]  # or a data loader
      >>> hessian = curvature.stream(curvature.hessian, loss_fn, jnp.zeros(2), batches)
      >>> print(hessian @ jnp.array([0.0, 1.0]))  # X'X / N times it
      [1. 2.]

    Args:
      operator_fn: `hessian`, `gauss_newton`, `empirical_fisher`, `gradient_covariance` or `fisher`.
      *arguments: those of `operator_fn`, with the source in place of the batch. The source is an
        iterable that begins a new pass at each `iter` (a list, a data loader), or a function
        without arguments that returns an iterator. It gives tuples of arrays with a leading axis of
        examples, as `operator_fn` takes them ((inputs,) for `fisher`), or dicts where the loss
        takes one, and the same examples in every pass. Batches may have any size and count by it,
        those of a `WeightedMean` by their weights; each size is compiled once. Arrays that are not
        on the device are copied, so that the source may use them again; JAX arrays stay where they
        are, so that the source may divide its batches over a mesh.
      prefetch: number of batches that are read and put on the device while one is computed; at most
        one more is in device memory.
      **options: the keyword options of `operator_fn`, but `chunk_size`: the batches are the chunks.
        The draws of `fisher` belong to the example's number in the pass, so its order must stay.

    Returns:
      An `Operator` of shape (n, n), equal up to rounding to that of all examples in one batch. The
      mean is accumulated in the type of the flat vectors, float32 at least.

    Raises:
      ValueError: `operator_fn` is none of the five, the source is empty, or a loss or a model
        couples the examples of a batch; later, by a product: it is made inside of `jax.jit`, or a
        pass has another number of examples than the first one.
      TypeError: the source gives its batches once, something else than tuples, or the arguments are
        not those of `operator_fn`.
      RuntimeError: by a product: the source raised, with the number of the batch.
    """
    form_fn, functions, params, source = _split(operator_fn, arguments, options)
    given, options = options, dict(options)
    wrt, differences = options.pop("wrt", None), options.get("differences", False)
    functions[0], params = part_of(functions[0], params, wrt, differences=differences)
    passes = Source(source, _checks.integer("prefetch", prefetch))
    if operator_fn is not hessian:
        passes.check = functools.partial(batch_with_weights, 1 if operator_fn is fisher else 2)
    first = passes.first()
    num_samples = options.get("num_samples", 1)
    if operator_fn is fisher and num_samples is not None:
        passes.draw = lambda first, count: draw_keys(options["key"], first, count, num_samples)
    # For single examples as well: the batches are parts of the data.
    make = functools.partial(form_fn, *functions, params, chunk_size=1, **options)
    form, programs = make(*first), _Programs(make, _programs.structs(first))
    if _checks.num_examples(first) == 1:  # nothing to be split: tested several at a time
        make(*jax.tree.map(lambda leaf: leaf[np.zeros(8, int)], first))
    programs.known[_programs.types(first)] = form
    one = assemble(form.linearization, form.function, params, passes.drawn(0, first), 1)
    streamed = StreamedOperator(one.params, one.placement, passes, one.eps, programs)
    if operator_fn is not _covariance.gradient_covariance:
        return streamed
    about_zero = stream(_gauss_newton.empirical_fisher, *arguments, prefetch=prefetch, **given)
    return _covariance.centered(about_zero, streamed)


def _split(
    operator_fn: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Callable[..., Form], list[Any], Any, Any]:
    """How the matrix follows, the functions, the parameters and the source among the arguments."""
    if operator_fn not in _FORMS:
        known = ", ".join(function.__name__ for function in _FORMS)
        raise ValueError(f"`operator_fn` must be one of {known}, got {operator_fn!r}.")
    form_fn, names = _FORMS[operator_fn]
    if len(arguments) != len(names) + 1:
        raise TypeError(
            f"`arguments` must be {', '.join(names)}, source for {operator_fn.__name__}, got "
            f"{len(arguments)} of them."
        )
    if "chunk_size" in options:
        raise TypeError("`chunk_size` must be left out: the batches of the source are the chunks.")
    *functions, params, source = arguments
    if any(couples_examples(function) for function in functions):
        raise ValueError(
            f"`{names[0]}` must not couple the examples of a batch (batch norm in train mode): the "
            'source splits them; use mode="evaluation", or ask for mode="train_per_chunk" by name.'
        )
    return form_fn, functions, params, source


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: jax.Array, images: jax.Array, weight: jax.Array) -> jax.Array:
    return total + weight * images
