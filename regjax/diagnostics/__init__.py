"""Reports on training and on what it has found. A diagnostic measures; it changes nothing.

Sharpness and the edge of stability:

    edge_of_stability  stability_threshold  preconditioner  critical_sharpness  lambda_max_between
    interval_flatness

Curvature and noise while a network trains; `Monitor` measures them between the steps:

    read_monitor  gradient_noise  noise_scale  gradient_share  operator_alignment
    dropout_noise_alignment

The loss surface and the steps of training:

    loss_surface  interpolate  filter_normalized_direction  line_probe  internal_covariate_shift

Batch norm and weights whose scale does not change the loss:

    scale_invariant_mask  spherical_sharpness  spherical_sharpness_by_group
    effective_learning_rate  spherical_edge_of_stability  sharpness_reduction_flow
    batch_norm_regularization

Decision boundaries, and pieces on which a network is linear:

    decision_margin  margin_jitter  boundary_jitter  least_squares_offset  boundary_distances
    boundary_density  region_count

Data of low dimension:

    subspace_from_data  transversal_complexity  transversal_variation  frozen_component

Units, sparsity, examples and learners:

    condensation  sparse_recovery  recovery_baselines  influence  landscape_dependent_noise
"""

from regjax.diagnostics._alignment import AlignmentResult as AlignmentResult
from regjax.diagnostics._alignment import GradientShareResult as GradientShareResult
from regjax.diagnostics._alignment import gradient_share as gradient_share
from regjax.diagnostics._alignment import operator_alignment as operator_alignment
from regjax.diagnostics._batch_norm import BatchNormResult as BatchNormResult
from regjax.diagnostics._batch_norm import batch_norm_regularization as batch_norm_regularization
from regjax.diagnostics._boundary_jitter import JitterResult as JitterResult
from regjax.diagnostics._boundary_jitter import LeastSquaresResult as LeastSquaresResult
from regjax.diagnostics._boundary_jitter import MarginJitterResult as MarginJitterResult
from regjax.diagnostics._boundary_jitter import boundary_jitter as boundary_jitter
from regjax.diagnostics._boundary_jitter import least_squares_offset as least_squares_offset
from regjax.diagnostics._boundary_jitter import margin_jitter as margin_jitter
from regjax.diagnostics._condensation import CondensationResult as CondensationResult
from regjax.diagnostics._condensation import condensation as condensation
from regjax.diagnostics._critical_sharpness import (
    CriticalSharpnessResult as CriticalSharpnessResult,
)
from regjax.diagnostics._critical_sharpness import critical_sharpness as critical_sharpness
from regjax.diagnostics._decentralized import LandscapeNoiseResult as LandscapeNoiseResult
from regjax.diagnostics._decentralized import (
    landscape_dependent_noise as landscape_dependent_noise,
)
from regjax.diagnostics._decision_margin import decision_margin as decision_margin
from regjax.diagnostics._dropout_noise import DropoutNoiseResult as DropoutNoiseResult
from regjax.diagnostics._dropout_noise import dropout_noise_alignment as dropout_noise_alignment
from regjax.diagnostics._edge_of_stability import EdgeResult as EdgeResult
from regjax.diagnostics._edge_of_stability import edge_of_stability as edge_of_stability
from regjax.diagnostics._edge_of_stability import stability_threshold as stability_threshold
from regjax.diagnostics._gradient_noise import NoiseScaleResult as NoiseScaleResult
from regjax.diagnostics._gradient_noise import gradient_noise as gradient_noise
from regjax.diagnostics._gradient_noise import noise_scale as noise_scale
from regjax.diagnostics._influence import InfluenceResult as InfluenceResult
from regjax.diagnostics._influence import influence as influence
from regjax.diagnostics._interval_flatness import FlatnessResult as FlatnessResult
from regjax.diagnostics._interval_flatness import interval_flatness as interval_flatness
from regjax.diagnostics._landscape import CovariateShiftResult as CovariateShiftResult
from regjax.diagnostics._landscape import LineProbeResult as LineProbeResult
from regjax.diagnostics._landscape import internal_covariate_shift as internal_covariate_shift
from regjax.diagnostics._landscape import line_probe as line_probe
from regjax.diagnostics._low_dimensional import FrozenResult as FrozenResult
from regjax.diagnostics._low_dimensional import SubspaceResult as SubspaceResult
from regjax.diagnostics._low_dimensional import (
    TransversalVariationResult as TransversalVariationResult,
)
from regjax.diagnostics._low_dimensional import frozen_component as frozen_component
from regjax.diagnostics._low_dimensional import subspace_from_data as subspace_from_data
from regjax.diagnostics._low_dimensional import transversal_complexity as transversal_complexity
from regjax.diagnostics._low_dimensional import transversal_variation as transversal_variation
from regjax.diagnostics._monitor import Monitor as Monitor
from regjax.diagnostics._monitor_file import read_monitor as read_monitor
from regjax.diagnostics._monitor_measures import MonitorPoint as MonitorPoint
from regjax.diagnostics._preconditioner import PreconditionerResult as PreconditionerResult
from regjax.diagnostics._preconditioner import preconditioner as preconditioner
from regjax.diagnostics._scale_invariance import ScaleInvarianceResult as ScaleInvarianceResult
from regjax.diagnostics._scale_invariance import scale_invariant_mask as scale_invariant_mask
from regjax.diagnostics._sharpness import SharpnessBetweenResult as SharpnessBetweenResult
from regjax.diagnostics._sharpness import SharpnessResult as SharpnessResult
from regjax.diagnostics._sharpness import lambda_max_between as lambda_max_between
from regjax.diagnostics._sharpness_by_group import (
    spherical_sharpness_by_group as spherical_sharpness_by_group,
)
from regjax.diagnostics._sharpness_flow import FlowResult as FlowResult
from regjax.diagnostics._sharpness_flow import sharpness_reduction_flow as sharpness_reduction_flow
from regjax.diagnostics._sparse_recovery import RecoveryBaselinesResult as RecoveryBaselinesResult
from regjax.diagnostics._sparse_recovery import SparseRecoveryResult as SparseRecoveryResult
from regjax.diagnostics._sparse_recovery import recovery_baselines as recovery_baselines
from regjax.diagnostics._sparse_recovery import sparse_recovery as sparse_recovery
from regjax.diagnostics._spherical_sharpness import SphericalEdgeResult as SphericalEdgeResult
from regjax.diagnostics._spherical_sharpness import (
    effective_learning_rate as effective_learning_rate,
)
from regjax.diagnostics._spherical_sharpness import (
    spherical_edge_of_stability as spherical_edge_of_stability,
)
from regjax.diagnostics._spherical_sharpness import spherical_sharpness as spherical_sharpness
from regjax.diagnostics._spline_partition import BoundaryDensityResult as BoundaryDensityResult
from regjax.diagnostics._spline_partition import RegionCountResult as RegionCountResult
from regjax.diagnostics._spline_partition import boundary_density as boundary_density
from regjax.diagnostics._spline_partition import boundary_distances as boundary_distances
from regjax.diagnostics._spline_partition import region_count as region_count
from regjax.diagnostics._surface import filter_normalized_direction as filter_normalized_direction
from regjax.diagnostics._surface import interpolate as interpolate
from regjax.diagnostics._surface import loss_surface as loss_surface

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists
