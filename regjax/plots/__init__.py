"""Figures of results, for screens and for the columns of a paper. Needs matplotlib."""

from regjax.plots._spectrum import SpectrumPanel as SpectrumPanel
from regjax.plots._spectrum import spectrum as spectrum
from regjax.plots._spectrum import spectrum_figure as spectrum_figure
