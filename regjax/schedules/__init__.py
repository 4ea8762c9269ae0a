"""Schedules and learning-rate rules."""

from regjax.schedules._batch_scaling import batch_size_scaling as batch_size_scaling
from regjax.schedules._batch_scaling import minimal_damping as minimal_damping
from regjax.schedules._batch_scaling import (
    saturating_batch_size_scaling as saturating_batch_size_scaling,
)
from regjax.schedules._matched_rate import matched_learning_rate as matched_learning_rate
from regjax.schedules._scoping import scoping_schedule as scoping_schedule
from regjax.schedules._spectral_rules import SpectralEnds as SpectralEnds
from regjax.schedules._spectral_rules import SpectralRates as SpectralRates
from regjax.schedules._spectral_rules import nesterov_rule as nesterov_rule
from regjax.schedules._spectral_rules import paper_nesterov_rule as paper_nesterov_rule
from regjax.schedules._spectral_rules import polyak_rule as polyak_rule
from regjax.schedules._spectral_rules import spectral_ends as spectral_ends
