"""What a file of a checkpoint says of itself: written as JSON, and not trusted when it is read."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from regjax import _archive, _files

PATTERN = "*.products.npz"
_NAME = re.compile(r"[0-9]{8,}\.[0-9a-f]{8}\.products\.npz")


class Piece(NamedTuple):
    """Rows of a basis that are in one file.

    Attributes:
      file: its name.
      start: the first row.
      stop: the row after the last.
    """

    file: str
    start: int
    stop: int


class Part(NamedTuple):
    """Where the rows of a basis are.

    Attributes:
      generation: how often the basis was made anew.
      pieces: one after the other from row 0 on.
    """

    generation: int
    pieces: tuple[Piece, ...]

    @property
    def filled(self) -> int:
        """The number of rows."""
        return self.pieces[-1].stop if self.pieces else 0


@dataclasses.dataclass(frozen=True)
class Saved:
    """A state on disk but for its arrays.

    Attributes:
      product: two numbers of the first product.
      count: number of steps so far.
      stage: number of solvers before this one.
      parts: the bases by the paths of their rows.
    """

    product: list[float]
    count: int
    stage: int
    parts: dict[str, Part]

    def files(self) -> set[str]:
        """The names of the files that rows are in."""
        return {piece.file for part in self.parts.values() for piece in part.pieces}


def metadata_of(facts: dict[str, Any], saved: Saved) -> dict[str, Any]:
    """What is written: `saved`, and what the problem is known by."""
    return {"facts": facts, **dataclasses.asdict(saved)}


def facts_of(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """What the problem of a file is known by.

    Raises:
      CheckpointError: the file does not say.
    """
    facts = metadata.get("facts")
    if not isinstance(facts, dict):
        raise wrong(path, "facts", facts)
    return facts


def saved_of(path: Path, metadata: dict[str, Any]) -> Saved:
    """What was written, each entry checked.

    Raises:
      CheckpointError: an entry is missing, unknown or not what it has to be.
    """
    for name in sorted(metadata):
        if name not in ("facts", *(field.name for field in dataclasses.fields(Saved))):
            raise wrong(path, name, metadata[name])
    product, parts = metadata.get("product"), metadata.get("parts")
    if not (isinstance(product, list) and len(product) == 2 and all(map(_is_number, product))):
        raise wrong(path, "product", product)
    for name, least in (("count", 1), ("stage", 0)):
        if not _is_count(metadata.get(name), least):
            raise wrong(path, name, metadata.get(name))
    if not isinstance(parts, dict):
        raise wrong(path, "parts", parts)
    return Saved(
        product=[float(number) for number in product],
        count=metadata["count"],
        stage=metadata["stage"],
        parts={prefix: _part(path, part) for prefix, part in parts.items()},
    )


def wrong(path: Path, name: str, value: object) -> _files.CheckpointError:
    """The error for an entry that this package does not write."""
    return _files.CheckpointError(
        f"{path} must be a file of a solver's checkpoint: its entry `{name}` must be what a solver "
        f"writes, got {_archive.shown(value)}."
    )


def _part(path: Path, part: object) -> Part:
    entries = list(part) if isinstance(part, list) else []
    if len(entries) != 2 or not _is_count(entries[0], 0) or not isinstance(entries[1], list):
        raise wrong(path, "parts", part)
    return Part(entries[0], tuple(_pieces(path, entries[1])))


def _pieces(path: Path, entries: list[object]) -> Iterator[Piece]:
    filled = 0
    for entry in entries:
        match entry:
            case [str() as file, int() as start, int() as stop] if (
                _NAME.fullmatch(file) and start == filled < stop
            ):
                filled = stop
                yield Piece(file, start, stop)
            case _:
                raise wrong(path, "parts", entry)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    is_small = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return isinstance(value, float) or is_small
