"""A progress bar, where tqdm is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torchcache.report.log import warn_once


@contextlib.contextmanager
def progress_bar(total: int, label: str, *, is_wanted: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar while the body runs; yields what advances it by so many samples.

    Neither a missing tqdm nor a standard error stream that is closed ends the body: each is logged once.

    Args:
        total: How many samples there are.
        label: What stands in front of the bar.
        is_wanted: Whether to show one at all.
    """
    bar = _make(total, label) if is_wanted else None
    shown = _Shown(bar)
    try:
        yield shown.advance
    finally:
        shown.close()


class _Shown:
    """A bar of tqdm, or what is left of one that failed: nothing."""

    def __init__(self, bar: Any) -> None:  # noqa: ANN401 - tqdm has no types
        self._bar = bar

    def advance(self, amount: int) -> None:
        """Advance the bar by so many samples."""
        if self._bar is None:
            return
        try:
            self._bar.update(amount)
        except Exception as error:  # noqa: BLE001 - whatever the stream raises that it is written to
            self._bar = None
            _say_failure(error)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is None:
            return
        try:
            self._bar.close()
        except Exception as error:  # noqa: BLE001 - as above
            _say_failure(error)


def _make(total: int, label: str) -> Any:  # noqa: ANN401 - as above
    try:
        from tqdm import tqdm  # noqa: PLC0415 - an extra
    except ImportError:
        warn_once(
            ("progress",),
            "there is no progress bar without tqdm: pip install 'torchcache[progress]', or pass progress=False",
        )
        return None
    try:
        return tqdm(total=total, desc=label, unit="sample")
    except Exception as error:  # noqa: BLE001 - as above
        _say_failure(error)
        return None


def _say_failure(error: Exception) -> None:
    warn_once(("progress failed",), "the progress bar is gone: %r; it goes on without", error)
