"""Figures as a page holds them: in the page, with their captions."""

import base64
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from regjax.experiments import _figure, _meanings
from regjax.experiments._record import Record

_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


class Drawing(NamedTuple):
    """Figures in files, which a page shows.

    Attributes:
      path: of the first figure; a second one stands beside it.
      shows: names of their captions.
      draw: (path) -> None, draws them in the format of the path.
    """

    path: Path
    shows: tuple[str, ...]
    draw: Callable[[Path], None]


def drawings_of(folder: Path, record: Record) -> list[Drawing]:
    """Returns the figures of a record, as the run has drawn them."""
    draws: dict[str, tuple[str, Callable[..., None]]] = {
        "spectrum": ("blocks", _figure.draw_spectrum),
        "surface": ("surface", _figure.draw_surface),
        "probes": ("surface", _figure.draw_probes),
        "monitor": ("monitor", _draw_monitor),
    }
    kind = record["settings"].get("figure", "png")
    return [
        Drawing(folder / f"{name}.{kind}", (name,), functools.partial(draw, record=record))
        for name, (needs, draw) in draws.items()
        if needs in record
    ]


def images(drawings: Sequence[Drawing]) -> list[dict[str, str]]:
    """Returns captions and data URIs of figures; those of another format are drawn again."""
    found = []
    for path, shows, draw in drawings:
        with tempfile.TemporaryDirectory() as scratch:
            if path.suffix not in _TYPES or not path.exists():
                path = Path(scratch) / "figure.png"
                draw(path)
            paths = [path, *(path.with_name(name) for name in _figure.beside(path.name))]
            for one, name in zip(paths, shows, strict=False):
                content = base64.b64encode(one.read_bytes()).decode()
                uri = f"data:{_TYPES[one.suffix]};base64,{content}"
                found.append({"uri": uri, "caption": _meanings.CAPTIONS[name]})
    return found


def _draw_monitor(path: Path, record: Record) -> None:
    _figure.draw_monitor(path, {"": record})
