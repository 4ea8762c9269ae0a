"""Schedules and learning-rate rules."""

from regjax.schedules._matched_rate import matched_learning_rate as matched_learning_rate
from regjax.schedules._scoping import scoping_schedule as scoping_schedule
