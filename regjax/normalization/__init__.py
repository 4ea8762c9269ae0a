"""Normalization: the pure statistics under it."""

from regjax.normalization._statistics import rescale_statistics as rescale_statistics
from regjax.normalization._statistics import standardize_weight as standardize_weight
