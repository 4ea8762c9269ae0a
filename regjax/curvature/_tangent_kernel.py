"""The empirical neural tangent kernel: inner products of the gradients of outputs."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _checks, _loops
from regjax._arguments import checked
from regjax._base import Mask, ModelFn, Params, Tree
from regjax.curvature._operators._jacobian import JacobianOperator, example_rows, jacobian
from regjax.curvature._precision import precisely

# How two Jacobians become a kernel: shapes of the outputs, and how leaves (N, C, d) are contracted.
_AXES = {"full": "icd,jed->icje", "trace": "icd,jcd->ij", "diagonal": "icd,jcd->ijc"}


@checked
def neural_tangent_kernel(
    model_fn: ModelFn,
    params: Params,
    inputs: Tree,
    other_inputs: Tree = None,
    *,
    output_axes: str = "full",
    chunk_size: int | None = None,
    wrt: Mask = None,
    max_bytes: int = 2**32,
) -> jax.Array:
    """Computes the empirical neural tangent kernel.

        K = J J',   J the Jacobian of the outputs with respect to the parameters

    Its eigenvalues over N are those of the Gauss-Newton matrix of half the squared error, summed
    over the outputs and averaged over the N examples (see `gauss_newton`), besides zeros. In
    float32 those below a unit of rounding of the largest are lost;
    `jacobian(...).singular_values()` has their roots.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> model_fn = lambda w, x: x @ w
      >>> kernel = curvature.neural_tangent_kernel(model_fn, jnp.zeros(2), x, output_axes="trace")
      >>> print(kernel)  # X X'
      [[1. 1.]
       [1. 5.]]

    Args:
      model_fn: (params, inputs) -> outputs, with C numbers for each example (see `jacobian`).
      params: tree of real floating-point parameters, n in all.
      inputs: array or tree with a leading axis of N examples.
      other_inputs: the same with M examples, for the columns; None: those of the rows.
      output_axes: "full"; "trace", the sum of the kernels of each output with itself; "diagonal",
        each of these.
      chunk_size: number of examples of which Jacobians are in memory at a time, twice if there
        are more; None: all at once. The Jacobian of each is computed again for each chunk of
        columns, at a small share of the cost of the inner products.
      wrt: which leaves of the parameters it is with respect to (see `hessian`).
      max_bytes: limit of the bytes of the kernel and the Jacobians that it is made of. What their
        computation takes besides is not counted.

    Returns:
      (N, C, M, C), (N, M) of the trace, (N, M, C) of the diagonal; of float32 at least.

    Raises:
      MemoryError: more than `max_bytes` are needed; says how many, before anything is allocated.
      ValueError: `output_axes` is unknown, or the model couples the examples (see `jacobian`).
      TypeError: an output is complex, or none is floating point, or the model cannot be
        differentiated.

    References:
      A. Jacot, F. Gabriel, C. Hongler (2018), arXiv:1806.07572. R. Novak, J. Sohl-Dickstein,
      S. Schoenholz (2022), Fast finite width neural tangent kernel, arXiv:2206.08720: this is
      Jacobian contraction there.
    """
    _checks.choice("output_axes", output_axes, tuple(_AXES))
    _checks.integer("max_bytes", max_bytes)
    rows = jacobian(model_fn, params, inputs, chunk_size=chunk_size, wrt=wrt)
    columns = rows
    if other_inputs is not None:
        columns = jacobian(model_fn, params, other_inputs, chunk_size=chunk_size, wrt=wrt)
        if _row_shapes(rows) != _row_shapes(columns):
            raise ValueError(
                "`other_inputs` must give outputs like `inputs` do, got shapes "
                f"{_row_shapes(columns)} instead of {_row_shapes(rows)}."
            )
    tiling = _Tiling.of(rows, columns, output_axes, is_symmetric=other_inputs is None)
    tiling.check(max_bytes)
    return tiling.kernel(rows, columns)


def _row_shapes(jacobian: JacobianOperator) -> list[tuple[int, ...]]:
    return [leaf.shape[1:] for leaf in jax.tree.leaves(jacobian.outputs)]


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """A kernel in pieces of so many examples each way.

    Attributes:
      output_axes: as of the public function.
      num_rows: N. num_columns: M. num_outputs: C. num_params: n.
      height: number of examples of a piece. width: of its columns.
      dtype: of the kernel.
      is_symmetric: whether columns are the rows.
    """

    output_axes: str
    num_rows: int
    num_columns: int
    num_outputs: int
    num_params: int
    height: int
    width: int
    dtype: Any
    is_symmetric: bool

    @classmethod
    def of(
        cls, rows: JacobianOperator, columns: JacobianOperator, output_axes: str, *,
        is_symmetric: bool,
    ) -> "_Tiling":  # fmt: skip
        return cls(
            output_axes=output_axes,
            num_rows=rows.num_examples,
            num_columns=columns.num_examples,
            num_outputs=rows.num_outputs,
            num_params=rows.space.size,
            height=rows.chunk_size or rows.num_examples,
            width=columns.chunk_size or columns.num_examples,
            dtype=rows.space.dtype,
            is_symmetric=is_symmetric,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        n, m, c = self.num_rows, self.num_columns, self.num_outputs
        return {"full": (n, c, m, c), "trace": (n, m), "diagonal": (n, m, c)}[self.output_axes]

    @property
    def column_axis(self) -> int:
        return 2 if self.output_axes == "full" else 1

    @property
    def is_whole(self) -> bool:
        return self.height == self.num_rows and self.width == self.num_columns

    def check(self, max_bytes: int) -> None:
        """Checks that all of it fits.

        Raises:
          MemoryError: it does not; says what does.
        """
        size = self.dtype.itemsize
        kernel = math.prod(self.shape) * size
        each = self.num_outputs * self.num_params * size
        alone = self.is_whole and self.is_symmetric
        pieces = (self.height if alone else self.height + self.width) * each
        if kernel + pieces <= max_bytes:
            return
        fitting = (max_bytes - kernel) // (2 * each)
        if fitting >= 1:
            remedy = f"`chunk_size={fitting}` fits."
        else:
            remedy = (
                '`output_axes="trace"` has one number for a pair of examples, and '
                "`jacobian(...).gram()` multiplies with the kernel without it."
            )
        raise MemoryError(
            f"`max_bytes` must be at least {kernel + pieces} for a kernel of shape {self.shape} "
            f"({kernel} bytes) and the Jacobians of {pieces // each} examples ({pieces} bytes), "
            f"got {max_bytes}. {remedy}"
        )

    def kernel(self, rows: JacobianOperator, columns: JacobianOperator) -> jax.Array:
        if self.is_whole and self.is_symmetric:
            return _whole(self, rows)
        # Pieces at the end begin earlier than they might, so that all are alike.
        tops = np.minimum(np.arange(0, self.num_rows, self.height), self.num_rows - self.height)
        lefts = np.minimum(
            np.arange(0, self.num_columns, self.width), self.num_columns - self.width
        )
        pairs = [(i, j) for i in tops for j in lefts if j >= i or not self.is_symmetric]
        operands = (rows, columns, jnp.asarray(pairs, jnp.int32))
        body = _body(self)
        return _loops.scan(body, jnp.zeros(self.shape, self.dtype), len(pairs), operands=operands)


@functools.lru_cache(maxsize=64)
def _body(tiling: _Tiling) -> Any:
    """The same object for equal pieces, by which the loop knows it."""
    return functools.partial(_put, tiling)


@functools.partial(jax.jit, static_argnums=0)
@precisely
def _whole(tiling: _Tiling, rows: JacobianOperator) -> jax.Array:
    leaves = _leaves(rows, 0, tiling.num_rows)
    return _contract(tiling, leaves, leaves)


@precisely
def _put(tiling: _Tiling, operands: Tree, kernel: jax.Array, i: jax.Array) -> jax.Array:
    """The kernel with one more piece, and its mirror image."""
    rows, columns, pairs = operands
    top, left = pairs[i, 0], pairs[i, 1]
    piece = _contract(
        tiling, _leaves(rows, top, tiling.height), _leaves(columns, left, tiling.width)
    )
    kernel = _placed(kernel, piece, {0: top, tiling.column_axis: left})
    if not tiling.is_symmetric:
        return kernel
    if tiling.output_axes == "full":
        mirrored = jnp.transpose(piece, (2, 3, 0, 1))
    else:
        mirrored = jnp.swapaxes(piece, 0, 1)
    return _placed(kernel, mirrored, {0: left, tiling.column_axis: top})


def _placed(kernel: jax.Array, piece: jax.Array, starts: dict[int, jax.Array]) -> jax.Array:
    zero = jnp.int32(0)
    places = [starts.get(axis, zero) for axis in range(kernel.ndim)]
    return jax.lax.dynamic_update_slice(kernel, piece, places)


def _leaves(jacobian: JacobianOperator, start: Any, count: int) -> list[jax.Array]:
    """Jacobians of so many examples, (count, C, d) for each leaf."""
    take = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, count)
    rows = example_rows(jacobian, jax.tree.map(take, jacobian.inputs))
    return [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(rows)]


def _contract(tiling: _Tiling, ones: list[jax.Array], others: list[jax.Array]) -> jax.Array:
    axes = _AXES[tiling.output_axes]
    parts = [
        jnp.einsum(axes, one.astype(tiling.dtype), other.astype(tiling.dtype))
        for one, other in zip(ones, others, strict=True)
    ]
    return functools.reduce(jnp.add, parts)
