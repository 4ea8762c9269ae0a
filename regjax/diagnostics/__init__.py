"""Reports that change nothing."""

from regjax.diagnostics._scale_invariance import ScaleInvarianceReport as ScaleInvarianceReport
from regjax.diagnostics._scale_invariance import scale_invariant_mask as scale_invariant_mask
