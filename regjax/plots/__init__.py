"""Figures of results: axes in, axes out."""

from regjax.plots._spectrum import Panel as Panel
from regjax.plots._spectrum import spectrum as spectrum
from regjax.plots._spectrum import spectrum_figure as spectrum_figure
