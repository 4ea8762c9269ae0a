"""Scalars to add to a loss."""

from regjax.regularizers._geometric_complexity import (
    GeometricComplexityEstimate as GeometricComplexityEstimate,
)
from regjax.regularizers._geometric_complexity import geometric_complexity as geometric_complexity
from regjax.regularizers._geometric_complexity import (
    geometric_complexity_estimate as geometric_complexity_estimate,
)
from regjax.regularizers._gradient_norm import gradient_norm_penalty as gradient_norm_penalty
