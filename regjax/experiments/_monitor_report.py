"""What is shown of monitors."""

import math

from regjax.experiments import _meanings
from regjax.experiments._numbers import with_error
from regjax.experiments._record import Record
from regjax.experiments._table import Contents, Table

_MONITOR_ROWS = 5  # intervals between those that are printed
OF_MONITOR: dict[str, tuple[str, str | None, str | None]] = {
    "loss": ("loss", None, None),
    "sharpness": ("largest eigenvalue", "sharpness_error_bound", "sharpness_converged"),
    "stability_threshold": ("  stable up to", None, None),
    "preconditioned_sharpness": (
        "preconditioned eigenvalue",
        "preconditioned_sharpness_error_bound",
        "preconditioned_sharpness_converged",
    ),
    "preconditioned_threshold": ("  stable up to", None, None),
    "critical_sharpness": ("critical sharpness", None, "critical_sharpness_resolved"),
    "trace": ("trace", "trace_standard_error", None),
    "gradient_noise_scale": (
        "noise scale",
        "gradient_noise_scale_standard_error",
        "noise_resolved",
    ),
    "gradient_share": ("gradient in top eigenspace", None, "gradient_share_converged"),
}


def monitor_contents(record: Record) -> Contents:
    """Shows what the monitor of a record saw, at a few steps."""
    rows = record["monitor"]
    places = sorted({round(i * (len(rows) - 1) / _MONITOR_ROWS) for i in range(_MONITOR_ROWS + 1)})
    shown = [name for name in OF_MONITOR if any(name in row for row in rows)]
    head = ["step", *(f"{rows[i]['step']:,}" for i in places)]
    cells = []
    for name in shown:
        label, error, flag = OF_MONITOR[name]
        cells.append([label, *(_seen(rows[i], name, error, flag) for i in places)])
    header = (
        f"Measured on {record['settings']['monitor_examples']:,} training examples at most. "
        f"{_meanings.MONITOR_LEGEND}."
    )
    return [header, Table(cells, head)]


def _seen(row: Record, name: str, error: str | None, flag: str | None) -> str:
    """Formats a number of a monitor's row; what is flagged has a ~ in front."""
    value = row.get(name)
    if value is None or not math.isfinite(value):
        return "not known"
    text = f"{value:.3g}" if error is None else with_error(value, row[error])
    if f"{name}_lower_bound" in row:
        text += f" [{row[f'{name}_lower_bound']:.3g}, {row[f'{name}_upper_bound']:.3g}]"
    return f"~{text}" if flag is not None and not row[flag] else text
