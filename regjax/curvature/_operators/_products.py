"""A symmetric matrix that is known by its products, and what follows from products alone."""

import abc
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from regjax import _checks, _loops, _platforms
from regjax._base import Params, Tree
from regjax._meshes import on_one_mesh
from regjax._space import Space

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

# A dense float32 matrix of this order takes 4 GiB.
_MAX_DENSE = 2**15


class Products(abc.ABC):
    """What can be done with products alone; n is the order of the matrix."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"

    @property
    @abc.abstractmethod
    def space(self) -> Space:
        """The space of its vectors: trees like the parameters, and where they lie."""

    @abc.abstractmethod
    def product(self, vector: jax.Array) -> jax.Array:
        """A v for a vector of the space; every product of every kind comes from here."""

    @property
    @abc.abstractmethod
    def eps(self) -> float:
        """The unit of rounding of the narrowest type in a product, at least that of a vector."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Tree]:
        """What decides its products, by name, to tell one problem from another."""

    @abc.abstractmethod
    def product_bytes(self, count: int) -> int:
        """Bytes on a device of temporaries and results of `count` products at once."""

    @property
    def home(self) -> Mesh | None:
        """The mesh with explicit axes that its arrays come from, and results go to; None: none."""
        return None

    @property
    def why_not_finite(self) -> str:
        """A sentence on where products that are not finite come from, if all arrays are."""
        return (
            "What it is made of is finite, as far as that is known (batches of a stream are not). "
            "So the function or a derivative is infinite or undefined there (log, norm and square "
            "root at 0), or a number is too large for its type: try float64. "
            "`jax.debug_nans(True)` names the operation."
        )

    @property
    def coarser(self) -> "Products | None":
        """The same matrix from differences over steps twice as long; None: products are exact."""
        return None

    def block_product(self, rows: jax.Array) -> jax.Array:
        """A V' for rows V (k, length) of vectors of the space, as rows."""
        return _platforms.depending(_one_by_one, _at_once, self, rows)

    @property
    def takes_blocks(self) -> bool:
        """Whether several vectors cost less together than one after the other."""
        return not _platforms.is_on_cpu(self)

    @property
    def size(self) -> int:
        """The number of parameters n."""
        return self.space.size

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.size, self.size)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the flat vectors: the widest of the parameters, float32 at least."""
        return self.space.dtype

    @on_one_mesh
    def matvec(self, vector: Params) -> Params:
        """Computes the product with `vector`, a tree like the parameters; returns another one.

        Raises:
          ValueError: `vector` has another structure or other shapes than the parameters.
          TypeError: it is complex.
        """
        self._check_vector(vector)
        return self.space.unravel(self.product(self.space.ravel(vector)))

    @on_one_mesh
    def matmat(self, vectors: Params) -> Params:
        """Computes the products with k vectors: a tree whose leaves have a leading axis k.

        On accelerators the k products are one batched product; on CPU, where that gains nothing,
        they follow one another.

        Raises:
          ValueError: `vectors` has another structure or other shapes than (k,) + the parameters'.
          TypeError: they are complex.
        """
        leading = jnp.shape(jax.tree.leaves(vectors)[0])[:1] if jax.tree.leaves(vectors) else ()
        _checks.same_tree("vectors", vectors, self.space.like(leading))
        _checks.real_tree("vectors", vectors)
        return self.space.unravel_rows(self.block_product(self.space.ravel_rows(vectors)))

    def _check_vector(self, vector: Params) -> None:
        _checks.same_tree("vector", vector, self.space.like())
        _checks.real_tree("vector", vector)

    def __matmul__(self, vectors: Params) -> Params:
        """`matvec` of a tree like the parameters, `matmat` of one with a leading axis more."""
        leaves, shapes = jax.tree.leaves(vectors), self.space.shapes
        is_block = bool(leaves) and jnp.ndim(leaves[0]) == len(shapes[0]) + 1
        return self.matmat(vectors) if is_block else self.matvec(vectors)

    @on_one_mesh
    def dense(self) -> jax.Array:
        """Computes the matrix (n, n), made symmetric, in the order of `jax.tree.leaves`.

        Raises:
          ValueError: n is above 32768 (4 GiB in float32).
        """
        if self.size > _MAX_DENSE:
            raise ValueError(
                f"`dense` must have at most {_MAX_DENSE} parameters, got {self.size}; use "
                "`top_eigenpairs` or `spectral_density`."
            )
        unit = self.space.shard(jnp.eye(self.size, dtype=self.dtype))
        matrix = self.space.gather(self.block_product(unit))
        return (matrix + matrix.T) / 2

    def to_scipy(self) -> "LinearOperator":
        """Makes a `scipy.sparse.linalg.LinearOperator` on flat NumPy vectors (n,) of it.

        The order is that of `jax.tree.leaves`; matrices (n, k) hold vectors in their columns.
        """
        from scipy.sparse.linalg import LinearOperator  # a tenth of a second, which few need

        space = self.space

        def matmat(columns: np.ndarray) -> np.ndarray:
            _checks.real_tree("vector", columns)
            rows = space.shard(jnp.asarray(np.asarray(columns).T, self.dtype))
            return np.asarray(space.gather(self.block_product(rows))).T

        def matvec(vector: np.ndarray) -> np.ndarray:
            _checks.real_tree("vector", vector)
            flat = space.shard(jnp.asarray(np.asarray(vector).reshape(-1), self.dtype))
            return np.asarray(space.gather(self.product(flat)))

        return LinearOperator(
            self.shape, matvec, matvec, matmat, np.dtype(self.dtype), rmatmat=matmat
        )


def _at_once(operator: Products, rows: jax.Array) -> jax.Array:
    return jax.vmap(operator.product)(rows)


def _one_by_one(operator: Products, rows: jax.Array) -> jax.Array:
    return _loops.scan(_set_row, jnp.zeros_like(rows), rows.shape[0], operands=(operator, rows))


def _set_row(operands: tuple[Products, jax.Array], rows: jax.Array, i: jax.Array) -> jax.Array:
    operator, vectors = operands
    return rows.at[i].set(operator.product(vectors[i]))
