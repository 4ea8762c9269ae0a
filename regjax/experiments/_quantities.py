"""Numbers that tables of one seed and of several read off a record."""

from collections.abc import Callable

from regjax.experiments._record import Record


def _last_probe(compute: Callable[[Record], float]) -> Callable[[Record], float]:
    return lambda record: compute(record["probes"][-1])


def centre(record: Record) -> float:
    """The loss in the middle of the surface, at the minimum."""
    losses = record["surface"]["losses"]
    return losses[len(losses) // 2][len(losses) // 2]


OF_PROBE: dict[str, Callable[[Record], float]] = {
    "gradient norm": _last_probe(lambda probe: probe["gradient_norm"]),
    "loss range along the gradient step": _last_probe(
        lambda probe: max(probe["losses"]) - min(probe["losses"])
    ),
    "largest change of the gradient": _last_probe(lambda probe: max(probe["gradient_distances"])),
    "effective smoothness": _last_probe(lambda probe: max(probe["smoothness"])),
}
