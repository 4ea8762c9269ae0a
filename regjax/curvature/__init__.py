"""Curvature of the loss: operators, solvers on them, and what is read off their results."""

from regjax._space import Space as Space
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
from regjax.curvature._lanczos import LanczosResult as LanczosResult
from regjax.curvature._lanczos import lanczos as lanczos
from regjax.curvature._lanczos import lanczos_solver as lanczos_solver
from regjax.curvature._measure import DensityResult as DensityResult
from regjax.curvature._measure import SpectralSumResult as SpectralSumResult
from regjax.curvature._measure import effective_dimension as effective_dimension
from regjax.curvature._measure import spectral_sum as spectral_sum
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
from regjax.curvature._operators._matvec import from_matvec as from_matvec
from regjax.curvature._operators._operator import Operator as Operator
from regjax.curvature._operators._operator import identity as identity
from regjax.curvature._operators._stream import stream as stream
from regjax.curvature._random_matrix import BatchExtremesResult as BatchExtremesResult
from regjax.curvature._random_matrix import NoisePowerResult as NoisePowerResult
from regjax.curvature._random_matrix import additive_outlier as additive_outlier
from regjax.curvature._random_matrix import batch_extreme_eigenvalues as batch_extreme_eigenvalues
from regjax.curvature._random_matrix import hessian_noise_power as hessian_noise_power
from regjax.curvature._random_matrix import marchenko_pastur_outlier as marchenko_pastur_outlier
from regjax.curvature._random_matrix import wigner_outlier as wigner_outlier
from regjax.curvature._ritz import RitzResult as RitzResult
from regjax.curvature._ritz import ritz_pairs as ritz_pairs
