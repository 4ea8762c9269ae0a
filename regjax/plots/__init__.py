"""Figures of results, for screens and for the columns of a paper. Needs matplotlib."""

from regjax.plots._blocks import distance_figure as distance_figure
from regjax.plots._blocks import draw_distances as draw_distances
from regjax.plots._monitor import draw_monitor as draw_monitor
from regjax.plots._monitor import monitor_figure as monitor_figure
from regjax.plots._panels import SpectrumPanel as SpectrumPanel
from regjax.plots._probe import ProbePanel as ProbePanel
from regjax.plots._probe import draw_probe as draw_probe
from regjax.plots._probe import probe_figure as probe_figure
from regjax.plots._spectrum import draw_spectrum as draw_spectrum
from regjax.plots._spectrum import spectrum_figure as spectrum_figure
from regjax.plots._surface import SurfacePanel as SurfacePanel
from regjax.plots._surface import draw_surface as draw_surface
from regjax.plots._surface import draw_surface_3d as draw_surface_3d
from regjax.plots._surface import surface_figure as surface_figure

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists
