"""Figures of records, as PNG files."""

import io
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from regjax import curvature, plots
from regjax.experiments import _record

# Of a page, with the densities and the eigenvalues side by side.
_WIDTH = 6.8
# Where the eigenvalue axis turns linear, as a share of the largest magnitude.
_LINEAR_SHARE = 1e-3


def draw_spectrum(path: Path, record: _record.Record) -> None:
    """Draws the blocks of a record: the network, and its layers if they were computed."""
    _draw(path, record["blocks"], record["settings"]["matrix"])


def draw_comparison(path: Path, records: dict[str, _record.Record]) -> None:
    """Draws the networks of several records on common axes."""
    matrices = dict.fromkeys(record["settings"]["matrix"] for record in records.values())
    blocks = {name: record["blocks"]["network"] for name, record in records.items()}
    _draw(path, blocks, " / ".join(matrices))


def _draw(path: Path, blocks: dict[str, Any], matrix: str) -> None:
    panels = [_panel(name, block) for name, block in blocks.items()]
    largest = max(np.max(np.abs(panel.eigenvalues)) for panel in panels)
    figure = plots.spectrum_figure(
        panels,
        scale="symlog",
        # A power of ten, so that ticks fall on both ends of the linear part and not inside.
        linthresh=float(10.0 ** np.ceil(np.log10(_LINEAR_SHARE * largest or 1.0))),
        matrix=_record.title(matrix),
        width=_WIDTH,
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    _record.write_bytes(path, image.getvalue())


def _panel(name: str, block: _record.Record) -> plots.SpectrumPanel:
    eigenvalues, arrays = block["eigenvalues"], block["density"]["curve"]
    curve = curvature.DensityCurve(**{field: jnp.asarray(arrays[field]) for field in arrays})
    return plots.SpectrumPanel(name, curve, eigenvalues["values"], eigenvalues["residual_norms"])
