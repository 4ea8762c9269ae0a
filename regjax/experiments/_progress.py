"""A progress bar."""

from typing import Any


class Bar:
    """A progress bar on stderr, a line for each stage."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._bar: Any = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(finished=error[0] is None)

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Shows that `done` steps of `total` of a stage are over."""
        if stage != self._stage:
            from tqdm import tqdm

            self.close(finished=True)
            self._stage, self._bar = stage, tqdm(desc=stage, total=total, mininterval=0.5)
        if self._bar is None:
            return
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self, *, finished: bool = False) -> None:
        """Ends the line of the stage, at 100 % where it finished in fewer steps than its limit."""
        if self._bar is not None:
            if finished:
                self._bar.total = self._bar.n
            self._bar.close()
        self._bar = None
