"""The ranks of the job that this process takes part in, as torch.distributed knows them."""

from __future__ import annotations

from typing import Any

from torch import distributed


def has_other_ranks() -> bool:
    """Tell whether another rank could be left waiting."""
    return is_in_a_job() and distributed.get_world_size() > 1


def rank_and_size() -> tuple[int, ...]:
    """Return the rank of this process and how many there are; empty outside of a job."""
    return (distributed.get_rank(), distributed.get_world_size()) if is_in_a_job() else ()


def collectives_done() -> tuple[int, ...]:
    """Return something that differs once this process took part in a collective of any group.

    Costs some microseconds in a job of several ranks, and nothing elsewhere.
    """
    return tuple(map(_sequence_number, _groups())) if has_other_ranks() else ()


def _groups() -> list[Any]:
    return list(distributed.distributed_c10d._world.pg_map)  # noqa: SLF001 - there is no public list of all groups


def _sequence_number(group: Any) -> int:  # noqa: ANN401 - a class of C without types
    try:
        number: int = group._get_sequence_number_for_group()  # noqa: SLF001 - the flight recorder asks the same
    except RuntimeError:  # a back end that does not count
        return 0
    return number


def is_in_a_job() -> bool:
    """Tell whether torch.distributed is set up; costs a third of a microsecond."""
    return distributed.is_available() and distributed.is_initialized()
