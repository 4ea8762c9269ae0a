"""Points in a process of their own: `python -m benchmarks.growth POINTS`, POINTS as JSON.

Devices are counted once in a process, and what it has compiled stays. Each line of the output is a
record.
"""

import json
import sys

from benchmarks import _timing
from benchmarks.growth import _measure
from benchmarks.growth._points import Point

_NUM_CORES = 2


def main(arguments: list[str]) -> None:
    """Prints the records, each as soon as it is measured."""
    _timing.use_cores(_NUM_CORES)
    for fields in json.loads(arguments[0]):
        try:
            record = _measure.record_of(Point(*fields), cold=True)
        except _timing.WrongAnswer as error:
            print(f"REFUSED {error}", file=sys.stderr, flush=True)
            continue
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
