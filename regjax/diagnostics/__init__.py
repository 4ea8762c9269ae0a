"""Reports that change nothing."""

from regjax.diagnostics._batch_norm import BatchNormReport as BatchNormReport
from regjax.diagnostics._batch_norm import batch_norm_regularization as batch_norm_regularization
from regjax.diagnostics._scale_invariance import ScaleInvarianceReport as ScaleInvarianceReport
from regjax.diagnostics._scale_invariance import scale_invariant_mask as scale_invariant_mask
