"""Penalties to add to a loss: pure functions that return a scalar, or a result with its error."""

from regjax.regularizers import linen as linen
from regjax.regularizers import nnx as nnx
from regjax.regularizers._batch_entropy import batch_entropy as batch_entropy
from regjax.regularizers._batch_entropy import layerwise_batch_entropy as layerwise_batch_entropy
from regjax.regularizers._dropout import (
    DropoutGradientPenaltyResult as DropoutGradientPenaltyResult,
)
from regjax.regularizers._dropout import dropout_gradient_penalty as dropout_gradient_penalty
from regjax.regularizers._dropout import dropout_penalty as dropout_penalty
from regjax.regularizers._geometric_complexity import (
    GeometricComplexityResult as GeometricComplexityResult,
)
from regjax.regularizers._geometric_complexity import geometric_complexity as geometric_complexity
from regjax.regularizers._geometric_complexity import (
    geometric_complexity_estimate as geometric_complexity_estimate,
)
from regjax.regularizers._gradient_norm import gradient_norm_penalty as gradient_norm_penalty
from regjax.regularizers._spectral_norm import spectral_norm_penalty as spectral_norm_penalty

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists
