"""Curvature of the loss: matrices that are known by their products, and what is computed of them.

Matrices, from a loss or a model with its parameters and data:

    hessian  gauss_newton  fisher  empirical_fisher  gradient_covariance  dropout_covariance
    dropout_covariance_factor  from_gradient  from_matvec  jacobian  hvp

Matrices from other matrices or from batches:

    by_block  stream  identity  inverse  jacobi_preconditioner  low_rank_preconditioner

Their spectrum, eigenvalues with error bounds and densities with bands:

    top_eigenpairs  spectral_density  density_curve  eigenvalue_count  lanczos  ritz_pairs
    exact_spectrum  density_distances

Sums over the eigenvalues of a spectral density:

    spectral_sum  effective_dimension  log_determinant  schatten_norm

Estimates from random products, with standard errors:

    trace  diagonal  inverse_diagonal  squared_row_norms  squared_frobenius_norm
    off_diagonal_share

Linear systems and functions of a matrix:

    solve  apply_function

Kernels, linearised models and what they leave uncertain:

    neural_tangent_kernel  kernel_alignment  target_alignment  linearized_model
    output_covariance  leverage

What a mini-batch makes of the largest eigenvalues:

    hessian_noise_power  batch_extreme_eigenvalues  wigner_outlier  additive_outlier
    marchenko_pastur_outlier

Long runs: `memory_estimate` and `run` take a `Solver`, which `top_eigenpairs_solver` and its like
make for each method; `Checkpoint` says where a method saves its state.
"""

from regjax._space import Space as Space
from regjax.curvature._block_structure import DensityDistancesResult as DensityDistancesResult
from regjax.curvature._block_structure import OffDiagonalResult as OffDiagonalResult
from regjax.curvature._block_structure import density_distances as density_distances
from regjax.curvature._block_structure import off_diagonal_share as off_diagonal_share
from regjax.curvature._counts import CountResult as CountResult
from regjax.curvature._counts import eigenvalue_count as eigenvalue_count
from regjax.curvature._curves import DensityCurveResult as DensityCurveResult
from regjax.curvature._curves import density_curve as density_curve
from regjax.curvature._density import spectral_density as spectral_density
from regjax.curvature._density import spectral_density_solver as spectral_density_solver
from regjax.curvature._eigen import EigenResult as EigenResult
from regjax.curvature._eigen import top_eigenpairs as top_eigenpairs
from regjax.curvature._eigen import top_eigenpairs_solver as top_eigenpairs_solver
from regjax.curvature._engine._checkpoint import Checkpoint as Checkpoint
from regjax.curvature._engine._driver import run as run
from regjax.curvature._engine._memory import MemoryResult as MemoryResult
from regjax.curvature._engine._memory import memory_estimate as memory_estimate
from regjax.curvature._engine._solver import Solver as Solver
from regjax.curvature._estimators import DiagonalResult as DiagonalResult
from regjax.curvature._estimators import TraceResult as TraceResult
from regjax.curvature._estimators import diagonal as diagonal
from regjax.curvature._estimators import diagonal_solver as diagonal_solver
from regjax.curvature._estimators import exact_spectrum as exact_spectrum
from regjax.curvature._estimators import trace as trace
from regjax.curvature._estimators import trace_solver as trace_solver
from regjax.curvature._functions import FunctionResult as FunctionResult
from regjax.curvature._functions import apply_function as apply_function
from regjax.curvature._functions import apply_function_solver as apply_function_solver
from regjax.curvature._inverse import inverse as inverse
from regjax.curvature._inverse import inverse_diagonal as inverse_diagonal
from regjax.curvature._kernel_alignment import kernel_alignment as kernel_alignment
from regjax.curvature._kernel_alignment import target_alignment as target_alignment
from regjax.curvature._lanczos import LanczosResult as LanczosResult
from regjax.curvature._lanczos import lanczos as lanczos
from regjax.curvature._lanczos import lanczos_solver as lanczos_solver
from regjax.curvature._leverage import LeverageResult as LeverageResult
from regjax.curvature._leverage import OutputCovarianceResult as OutputCovarianceResult
from regjax.curvature._leverage import leverage as leverage
from regjax.curvature._leverage import output_covariance as output_covariance
from regjax.curvature._linearized import LinearizedModel as LinearizedModel
from regjax.curvature._linearized import linearized_model as linearized_model
from regjax.curvature._measure import DensityResult as DensityResult
from regjax.curvature._measure import SpectralSumResult as SpectralSumResult
from regjax.curvature._measure import effective_dimension as effective_dimension
from regjax.curvature._measure import log_determinant as log_determinant
from regjax.curvature._measure import schatten_norm as schatten_norm
from regjax.curvature._measure import spectral_sum as spectral_sum
from regjax.curvature._norms import RowNormsResult as RowNormsResult
from regjax.curvature._norms import squared_frobenius_norm as squared_frobenius_norm
from regjax.curvature._norms import squared_row_norms as squared_row_norms
from regjax.curvature._norms import squared_row_norms_solver as squared_row_norms_solver
from regjax.curvature._operators._blocks import by_block as by_block
from regjax.curvature._operators._covariance import gradient_covariance as gradient_covariance
from regjax.curvature._operators._curvature import CurvatureOperator as CurvatureOperator
from regjax.curvature._operators._dropout import dropout_covariance as dropout_covariance
from regjax.curvature._operators._dropout import (
    dropout_covariance_factor as dropout_covariance_factor,
)
from regjax.curvature._operators._fisher import fisher as fisher
from regjax.curvature._operators._gauss_newton import empirical_fisher as empirical_fisher
from regjax.curvature._operators._gauss_newton import gauss_newton as gauss_newton
from regjax.curvature._operators._hessian import from_gradient as from_gradient
from regjax.curvature._operators._hessian import hessian as hessian
from regjax.curvature._operators._hessian import hvp as hvp
from regjax.curvature._operators._identity import identity as identity
from regjax.curvature._operators._jacobian import JacobianOperator as JacobianOperator
from regjax.curvature._operators._jacobian import jacobian as jacobian
from regjax.curvature._operators._matvec import from_matvec as from_matvec
from regjax.curvature._operators._operator import Operator as Operator
from regjax.curvature._operators._stream import stream as stream
from regjax.curvature._preconditioners import jacobi_preconditioner as jacobi_preconditioner
from regjax.curvature._preconditioners import low_rank_preconditioner as low_rank_preconditioner
from regjax.curvature._random_matrix import BatchExtremesResult as BatchExtremesResult
from regjax.curvature._random_matrix import NoisePowerResult as NoisePowerResult
from regjax.curvature._random_matrix import additive_outlier as additive_outlier
from regjax.curvature._random_matrix import batch_extreme_eigenvalues as batch_extreme_eigenvalues
from regjax.curvature._random_matrix import hessian_noise_power as hessian_noise_power
from regjax.curvature._random_matrix import marchenko_pastur_outlier as marchenko_pastur_outlier
from regjax.curvature._random_matrix import wigner_outlier as wigner_outlier
from regjax.curvature._ritz import RitzResult as RitzResult
from regjax.curvature._ritz import ritz_pairs as ritz_pairs
from regjax.curvature._solve import SolveResult as SolveResult
from regjax.curvature._solve import solve as solve
from regjax.curvature._solve import solve_solver as solve_solver
from regjax.curvature._tangent_kernel import neural_tangent_kernel as neural_tangent_kernel

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists
