"""Figures of records, in the format of their file names."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from regjax import curvature, plots
from regjax.experiments import _record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In inches: of a column of a paper, and of a page.
_WIDTHS = {"column": 3.3, "page": 6.8}


def draw_spectrum(path: Path, record: _record.Record) -> None:
    """Draws the blocks of a record: the network, and its layers if they were computed."""
    named = {"network": _network(record)}
    blocks = {named.get(name, name): block for name, block in record["blocks"].items()}
    _draw(path, blocks, _record.title(record["settings"]["matrix"]), _width(record))


def draw_comparison(path: Path, records: dict[str, _record.Record]) -> None:
    """Draws the networks of several records on common axes."""
    matrices = {_record.title(record["settings"]["matrix"]): None for record in records.values()}
    blocks = {_label(name): record["blocks"]["network"] for name, record in records.items()}
    _draw(path, blocks, " / ".join(matrices), _width(*records.values()))


def draw_surface(path: Path, record: _record.Record) -> None:
    """Draws the loss surface of a record."""
    panel = _surface(_network(record), record)
    _save(path, plots.surface_figure([panel], figure_width=_width(record)))


def draw_probes(path: Path, record: _record.Record) -> None:
    """Draws the probes of a record over its epochs."""
    panel = _probes(_network(record), record)
    _save(path, plots.probe_figure([panel], figure_width=_width(record)))


def draw_landscapes(path: Path, records: dict[str, _record.Record]) -> None:
    """Draws the surfaces of several records side by side, and their probes beside `path`."""
    width = _width(*records.values())
    surfaces = [_surface(_label(name), record) for name, record in records.items()]
    _save(path, plots.surface_figure(surfaces, figure_width=width))
    probes = [_probes(_label(name), record) for name, record in records.items()]
    figure = plots.probe_figure(probes, figure_width=width)
    (name,) = beside(path.name)
    _save(path.with_name(name), figure)


def draw_monitor(path: Path, records: dict[str, _record.Record]) -> None:
    """Draws what the monitors of several records saw; a single one needs no name."""
    width = _WIDTHS[next(iter(records.values()))["settings"].get("figure_width", "page")]
    runs = {_label(name): record["monitor"] for name, record in records.items()}
    _save(path, plots.monitor_figure(runs, figure_width=width))


def beside(name: str) -> list[str]:
    """Returns the names of the further figures that may stand beside a comparison's."""
    stem, _, kind = name.rpartition(".")
    return [f"{stem}_probes.{kind}"]


def _width(*records: _record.Record) -> float:
    """Returns the width that the options of the first record ask for."""
    return _WIDTHS[records[0]["settings"]["figure_width"]]


def _network(record: _record.Record) -> str:
    """Names a network by what is not usual about it."""
    options = record["settings"]
    normalization = {"none": "no normalization"}.get(
        options["normalization"], f"{options['normalization']} norm"
    ).replace("_", " ")
    method = [options[name] for name in ("transformation", "init") if options[name] in options]
    words = [options["model"], normalization, " with ".join([options["optimizer"], *method])]
    return ", ".join(word.replace("_", " ") for word in words)


def _label(item: str) -> str:
    """Names an item of a comparison: a bare "none" says nothing in a figure."""
    return ", ".join(
        "no normalization" if word.strip() in ("none", "normalization=none") else word
        for word in item.split(",")
    )


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


def _draw(path: Path, blocks: _record.Record, matrix: str, width: float) -> None:
    panels = [_panel(name, block) for name, block in blocks.items()]
    figure = plots.spectrum_figure(panels, matrix_name=matrix, figure_width=width)
    _save(path, figure)


def _save(path: Path, figure: "Figure") -> None:
    import matplotlib

    kind, image = path.suffix.removeprefix("."), io.BytesIO()
    # The same numbers give the same bytes: without the time, and with names that do not vary.
    undated: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with matplotlib.rc_context({"svg.hashsalt": "regjax", "pdf.fonttype": 42}):
        figure.savefig(image, format=kind, metadata=undated.get(kind))
    _record.write_bytes(path, image.getvalue())


def _panel(name: str, block: _record.Record) -> plots.SpectrumPanel:
    eigenvalues, arrays = block["eigenvalues"], block["density"]["curve"]
    curve = curvature.DensityCurveResult(**{field: jnp.asarray(arrays[field]) for field in arrays})
    return plots.SpectrumPanel(name, curve, eigenvalues["values"], eigenvalues["residual_norms"])
