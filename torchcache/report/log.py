"""Set up the ``torchcache`` logger, and only that one."""

from __future__ import annotations

import logging
import os
from typing import TextIO

logger: logging.Logger = logging.getLogger("torchcache")

DEFAULT_FORMAT = "[torchcache] - %(asctime)s - %(name)s - %(levelname)s - %(message)s"
DEFAULT_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

_said: set[tuple[str, ...]] = set()


def warn_once(key: tuple[str, ...], message: str, *args: object) -> None:
    """Log a warning the first time this process gives ``key``; what may happen at every call is said once."""
    log_once(key, message, *args, level=logging.WARNING)


def log_once(key: tuple[str, ...], message: str, *args: object, level: int) -> None:
    """Log a line of a level the first time this process gives ``key``."""
    if key not in _said:
        _said.add(key)
        logger.log(level, message, *args)


_own_handlers: list[logging.Handler] = []


def set_logger_config(
    level: int | str | None = None,
    fmt: str | None = None,
    datefmt: str | None = None,
    stream: TextIO | None = None,
    filename: str | os.PathLike[str] | None = None,
) -> None:
    """Give the ``torchcache`` logger a level, a format and its own handlers.

    What is not given comes from TORCHCACHE_LOG_LEVEL, TORCHCACHE_LOG_FMT, TORCHCACHE_LOG_DATEFMT and
    TORCHCACHE_LOG_FILE, then from the defaults (WARNING, standard error, no file). A later call
    replaces the handlers of an earlier one. The root logger and the logger's propagation are left
    alone. A file that cannot be opened is said in the log and left out.

    Args:
        level: A level of ``logging`` or its name, in any case.
        fmt: Format of a line.
        datefmt: Format of its time.
        stream: Where lines go; standard error if None.
        filename: A file that gets the lines as well, opened in append mode.

    Raises:
        ValueError: If ``level`` or ``fmt`` is wrong. A wrong variable of the environment never raises: it is
            said in the log, and the default is in force.
    """
    given = level if level is not None else os.environ.get("TORCHCACHE_LOG_LEVEL")
    unknown_level = None
    try:
        number = _level_number(given)
    except ValueError:
        if level is not None:
            raise
        number, unknown_level = logging.WARNING, given

    line, time = fmt or os.environ.get("TORCHCACHE_LOG_FMT") or DEFAULT_FORMAT, datefmt
    time = time or os.environ.get("TORCHCACHE_LOG_DATEFMT") or DEFAULT_DATE_FORMAT
    format_error = None
    try:
        formatter = logging.Formatter(line, time)
    except ValueError as error:
        if fmt:
            raise
        formatter, format_error = logging.Formatter(DEFAULT_FORMAT, time), error
    handlers: list[logging.Handler] = [logging.StreamHandler(stream)]
    path = filename or os.environ.get("TORCHCACHE_LOG_FILE")
    file_error = None
    if path:
        try:
            handlers.append(logging.FileHandler(path))
        except OSError as error:
            file_error = error
    for old in _own_handlers:
        logger.removeHandler(old)
        old.close()
    _own_handlers[:] = handlers
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(number)
    if unknown_level is not None:
        logger.warning(
            "TORCHCACHE_LOG_LEVEL=%s is no level; use DEBUG, INFO, WARNING, ERROR or CRITICAL. WARNING is in force.",
            unknown_level,
        )
    if format_error is not None:
        logger.warning("TORCHCACHE_LOG_FMT is no format (%s); the default is in force", format_error)
    if file_error is not None:
        logger.warning("the log file %s cannot be opened (%s); logging goes on without it", path, file_error)


def configure_from_environment() -> None:
    """Call ``set_logger_config()`` if any TORCHCACHE_LOG_* variable is set; import does this."""
    if any(name.startswith("TORCHCACHE_LOG_") for name in os.environ):
        set_logger_config()


def _level_number(level: int | str | None) -> int:
    if level is None:
        return logging.WARNING
    if isinstance(level, int):
        return level
    number = logging.getLevelName(level.strip().upper())
    if isinstance(number, int):
        return number
    if level.strip().isdigit():
        return int(level)
    raise ValueError(f"level={level!r} is no logging level; use DEBUG, INFO, WARNING, ERROR or CRITICAL")
