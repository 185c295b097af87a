"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys

from benchmarks import calls, hits, layout, processes, rooms, state_check
from benchmarks.workload import BenchmarkError
from benchmarks.wrong_hits import compare as wrong_hits

BENCHMARKS = {
    "calls": calls,
    "hits": hits,
    "layout": layout,
    "processes": processes,
    "rooms": rooms,
    "state": state_check,
    "wrong-hits": wrong_hits,
}


def main() -> int:
    """Run the benchmark that the command line names and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    calls.add_arguments(commands.add_parser("calls", help="hits of calls that are one sample, as of a dataset"))
    hits.add_arguments(commands.add_parser("hits", help="hits, side by side with torchcache 0.6.0"))
    layout.add_arguments(commands.add_parser("layout", help="how rows lie on disk: bytes, reads, writes"))
    processes.add_arguments(commands.add_parser("processes", help="forks, new processes and lookups from disk"))
    rooms.add_arguments(commands.add_parser("rooms", help="what a hit walks through: functions called, rooms entered"))
    state_check.add_arguments(commands.add_parser("state", help="the check of the weights at every call"))
    wrong_hits.add_arguments(
        commands.add_parser("wrong-hits", help="every way in which a cached result could be wrong, with rivals")
    )
    args = parser.parse_args()
    try:
        return BENCHMARKS[args.command].run(args)
    except BenchmarkError as error:
        print(f"benchmarks {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
