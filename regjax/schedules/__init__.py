"""Schedules of numbers in the course of training, and rules for learning rates."""

from regjax.schedules._batch_scaling import batch_size_scaling as batch_size_scaling
from regjax.schedules._batch_scaling import (
    saturating_batch_size_scaling as saturating_batch_size_scaling,
)
from regjax.schedules._matched_rate import matched_learning_rate as matched_learning_rate
from regjax.schedules._scoping import scoping_schedule as scoping_schedule
from regjax.schedules._spectral_rules import SpectralRatesResult as SpectralRatesResult
from regjax.schedules._spectral_rules import nesterov_rule as nesterov_rule
from regjax.schedules._spectral_rules import polyak_rule as polyak_rule

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists
