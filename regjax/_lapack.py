"""Eigenpairs of small matrices on the host: LAPACK on one thread.

The threads of the library wait for each other, and for those of XLA. For a matrix of order 320 two
of them took 50 times as long as one on a busy machine.
"""

import functools
from typing import Any

import numpy as np
import threadpoolctl


def eigh(matrix: np.ndarray, *, lower: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (..., n), ascending, and eigenvectors (..., n, n), columns; NaN if not found.

    Args:
      matrix: (..., n, n), symmetric, float32 or float64.
      lower: which half is read.
    """
    half: Any = "L" if lower else "U"

    def solve(one: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        try:
            values, vectors = np.linalg.eigh(one, half)
        except np.linalg.LinAlgError:
            return one[0] * np.nan, one * np.nan, 1
        return values, vectors, 0

    return _each(solve, matrix, 2, _threads(with_scipy=False))


def eigh_tridiagonal(diagonal: np.ndarray, beside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of tridiagonal matrices, from their diagonals (..., n) and what is beside them.

    Args:
      diagonal: (..., n), float64.
      beside: (..., n - 1).
    """
    solve = _library().dstevd
    size = diagonal.shape[-1]
    if size == 1:
        return diagonal, np.ones((*diagonal.shape, 1))
    numbers = np.concatenate([diagonal, beside], -1)
    threads = _threads(with_scipy=True)
    return _each(lambda one: solve(one[:size], one[size:]), numbers, 1, threads)


def _each(
    solve: Any, stack: np.ndarray, ndim: int, threads: threadpoolctl.ThreadpoolController
) -> tuple[np.ndarray, np.ndarray]:
    leading, dtype = stack.shape[:-ndim], stack.dtype
    with threads.limit(limits=1, user_api="blas"):
        found = [solve(one) for one in stack.reshape(-1, *stack.shape[-ndim:])]
    values = np.stack([values if info == 0 else values * np.nan for values, _, info in found])
    vectors = np.stack([vectors if info == 0 else vectors * np.nan for _, vectors, info in found])
    return (
        values.astype(dtype).reshape(*leading, *values.shape[1:]),
        vectors.astype(dtype).reshape(*leading, *vectors.shape[1:]),
    )


@functools.cache
def _library() -> Any:
    # Importing it takes a tenth of a second, which most calls do without.
    from scipy.linalg import lapack

    return lapack


@functools.cache
def _threads(*, with_scipy: bool) -> threadpoolctl.ThreadpoolController:
    if with_scipy:
        _library()  # it finds the libraries that are loaded
    return threadpoolctl.ThreadpoolController()
