"""The values of a whole call's result that are dates, times and time zones of the standard library."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Iterable
from typing import Any

from torchcache.errors import CorruptRecordError, UncacheableError
from torchcache.results.value_kinds import PlainValue, name_of


class DateValue(PlainValue):
    """A ``datetime.date``."""

    tag = 9

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        return value.year, value.month, value.day

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        year, month, day = rest
        return dt.date(year, month, day)


class DateTimeValue(PlainValue):
    """A ``datetime.datetime``, with its time zone if that can be kept."""

    tag = 10

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401
        day = (value.year, value.month, value.day)
        return *day, *TimeValue.parts(value, path, depth)

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        year, month, day, *clock, fold, zone = rest
        hour, minute, second, microsecond = clock
        return dt.datetime(year, month, day, hour, minute, second, microsecond, _zone_of(zone), fold=fold)


class TimeValue(PlainValue):
    """A ``datetime.time``, with its time zone if that can be kept."""

    tag = 11

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        clock = (value.hour, value.minute, value.second, value.microsecond, value.fold)
        return *clock, _zone_entry(value, path)

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        hour, minute, second, microsecond, fold, zone = rest
        return dt.time(hour, minute, second, microsecond, _zone_of(zone), fold=fold)


class TimeDeltaValue(PlainValue):
    """A ``datetime.timedelta``."""

    tag = 12

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        return value.days, value.seconds, value.microseconds

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        days, seconds, microseconds = rest
        return dt.timedelta(days, seconds, microseconds)


class TimeZoneValue(PlainValue):
    """A ``datetime.timezone``: an offset, and a name if it has one."""

    tag = 13

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401
        offset, *name = value.__getinitargs__()
        return *TimeDeltaValue.parts(offset, path, depth), *name

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        days, seconds, microseconds, *name = rest
        return dt.timezone(dt.timedelta(days, seconds, microseconds), *name)


class ZoneInfoValue(PlainValue):
    """A ``zoneinfo.ZoneInfo`` by its name, which is one of those that this machine lists: it leads to a file."""

    tag = 14

    @classmethod
    def parts(cls, value: Any, path: str, depth: int) -> Iterable[object]:  # noqa: ANN401, ARG003
        if value.key not in _zones() or type(value)(value.key) is not value:
            raise UncacheableError(
                f"the cached call returned a time zone {value!r} at {path} that its name does not lead to again; make "
                "it by zoneinfo.ZoneInfo(name)"
            )
        return (value.key,)

    @classmethod
    def value_of(cls, rest: list[Any], depth: int) -> object:  # noqa: ARG003
        import zoneinfo  # noqa: PLC0415 - only those who cached time zones need it

        (key,) = rest
        if key not in _zones():
            raise CorruptRecordError("a result has a time zone that this machine does not list")
        return zoneinfo.ZoneInfo(key)


def is_zone(value: object) -> bool:
    """Tell whether a value is a ``zoneinfo.ZoneInfo``."""
    zones = sys.modules.get("zoneinfo")  # who has a time zone has imported it
    return zones is not None and type(value) is zones.ZoneInfo


def _zone_entry(value: Any, path: str) -> object:  # noqa: ANN401 - a date or a time
    """Return the entry of the time zone of a date or a time.

    Raises:
        UncacheableError: If it cannot be kept.
    """
    zone = value.tzinfo
    if zone is None:
        return None
    if type(zone) is dt.timezone:
        return TimeZoneValue.take_apart(zone, path)[0]
    if is_zone(zone):
        return ZoneInfoValue.take_apart(zone, path)[0]
    raise UncacheableError(
        f"the cached call returned a {type(value).__name__} at {path} whose time zone is {zone!r} of {name_of(zone)}; "
        "use datetime.timezone or zoneinfo.ZoneInfo, or return value.isoformat()"
    )


def _zone_of(entry: Any) -> dt.tzinfo | None:  # noqa: ANN401 - of a zone, or None
    if entry is None:
        return None
    tag, *rest = entry
    zones: dict[int, type[PlainValue]] = {kind.tag: kind for kind in (TimeZoneValue, ZoneInfoValue)}
    zone = zones[tag].value_of(rest, 0)
    assert isinstance(zone, dt.tzinfo)
    return zone


def _zones() -> frozenset[str]:
    """Return the names of the time zones that this machine lists."""
    global _known_zones  # noqa: PLW0603 - listing them reads some hundred files
    if _known_zones is None:
        import zoneinfo  # noqa: PLC0415 - as above

        _known_zones = frozenset(zoneinfo.available_timezones())
    return _known_zones


_known_zones: frozenset[str] | None = None
