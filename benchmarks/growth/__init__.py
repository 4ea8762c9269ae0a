"""Growth: how time and memory grow with the size of a problem, beside the arithmetic of it."""

from benchmarks.growth._figure import figure as figure
from benchmarks.growth._points import points as points
from benchmarks.growth._runs import records_of as records_of
from benchmarks.growth._slopes import Slope as Slope
from benchmarks.growth._slopes import slopes as slopes
from benchmarks.growth._slopes import summary as summary
from benchmarks.growth._slopes import table as table
