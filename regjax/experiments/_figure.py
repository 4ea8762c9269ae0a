"""Figures of records, as PNG files."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regjax import curvature, plots
from regjax.experiments import _record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of a page, with the densities and the eigenvalues side by side.
_WIDTH = 6.8
# Of one surface among several.
_PANEL_WIDTH = 2.2


def draw_spectrum(path: Path, record: _record.Record) -> None:
    """Draws the blocks of a record: the network, and its layers if they were computed."""
    _draw(path, record["blocks"], record["settings"]["matrix"])


def draw_comparison(path: Path, records: dict[str, _record.Record]) -> None:
    """Draws the networks of several records on common axes."""
    matrices = dict.fromkeys(record["settings"]["matrix"] for record in records.values())
    blocks = {name: record["blocks"]["network"] for name, record in records.items()}
    _draw(path, blocks, " / ".join(matrices))


def draw_surface(path: Path, record: _record.Record) -> None:
    """Draws the loss surface of a record."""
    _save(
        path,
        plots.surface_figure([_surface(record["settings"]["model"], record)], figure_width=_WIDTH),
    )


def draw_probes(path: Path, record: _record.Record) -> None:
    """Draws the probes of a record over its epochs."""
    _save(
        path,
        plots.probe_figure([_probes(record["settings"]["model"], record)], figure_width=_WIDTH),
    )


def draw_landscapes(path: Path, records: dict[str, _record.Record]) -> None:
    """Draws the surfaces of several records side by side, and their probes beside `path`."""
    surfaces = [_surface(name, record) for name, record in records.items()]
    width = max(_WIDTH, _PANEL_WIDTH * len(surfaces))
    _save(path, plots.surface_figure(surfaces, figure_width=width))
    probes = [_probes(name, record) for name, record in records.items()]
    _save(path.with_name(f"{path.stem}_probes{path.suffix}"), plots.probe_figure(probes))


def _surface(name: str, record: _record.Record) -> plots.SurfacePanel:
    surface = record["surface"]
    return plots.SurfacePanel(name, surface["positions"], surface["losses"])


def _probes(name: str, record: _record.Record) -> plots.ProbePanel:
    probes = record["probes"]
    fields = {
        field: [probe["epochs" if field == "times" else field] for probe in probes]
        for field in plots.ProbePanel._fields[1:]
    }
    return plots.ProbePanel(name, **fields)


def _draw(path: Path, blocks: _record.Record, matrix: str) -> None:
    panels = [_panel(name, block) for name, block in blocks.items()]
    figure = plots.spectrum_figure(panels, matrix_name=_record.title(matrix), figure_width=_WIDTH)
    _save(path, figure)


def _save(path: Path, figure: "Figure") -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    _record.write_bytes(path, image.getvalue())


def _panel(name: str, block: _record.Record) -> plots.SpectrumPanel:
    eigenvalues, arrays = block["eigenvalues"], block["density"]["curve"]
    curve = curvature.DensityCurveResult(**{field: np.asarray(arrays[field]) for field in arrays})
    return plots.SpectrumPanel(name, curve, eigenvalues["values"], eigenvalues["residual_norms"])
