"""Run stress scenarios: ``python -m stress run --suite crowd --seconds 60 --seed 1``.

A suite ends with one JSON line; the last line says how many passed. The exit status is 0 if all did, and 1 if
something was violated: then the directory is kept and the command that runs it again is printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from stress.suites import SUITES
from stress.values import ViolationError
from stress.verdict import Run


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "list":
        for name, suite in SUITES.items():
            print(f"{name:8} {suite.purpose}")
        return 0
    logging.getLogger("torchcache").setLevel(logging.ERROR)  # that a cache is full is no news here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # members are ended on the way out
    names = list(SUITES) if options.suite == "all" else [options.suite]
    if options.plant and not all(options.plant in SUITES[name].plants for name in names):
        parser.error(f"--plant {options.plant} is not known to the suite {options.suite}")
    for option in ("cases", "case", "only"):
        if getattr(options, option) is not None and not all(option in SUITES[name].takes for name in names):
            parser.error(f"--{option} means nothing to the suite {options.suite}")
    passed = sum(_run_suite(name, options, options.seconds / len(names)) for name in names)
    print(f"stress: {passed} passed, {len(names) - passed} failed")
    return 0 if passed == len(names) else 1


def _run_suite(name: str, options: argparse.Namespace, seconds: float) -> bool:
    suite = SUITES[name]
    if options.dir is not None:
        options.dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"torchcache-stress-{os.getpid()}-", dir=options.dir))
    asked = Run(
        suite=name,
        seed=options.seed,
        seconds=seconds,
        jobs=options.jobs or suite.jobs,
        directory=directory,
        tally=suite.tally(),
        cases=options.cases,
        case=options.case,
        only=options.only,
        plant=options.plant,
    )
    start = time.monotonic()
    is_kept = False
    try:
        try:
            suite.run(asked)
            if asked.case is None:
                asked.tally.check_hits()
            is_part = asked.case is not None or asked.only is not None
            if not is_part and not asked.has_failed() and not asked.tally.is_proof():
                asked.note(ViolationError("idle", "nothing was checked, so nothing is proved"))
        except Exception as error:
            asked.note(error)
        print(json.dumps(asked.verdict(time.monotonic() - start)), flush=True)
        is_kept = asked.has_failed()
        for violation in asked.violations():
            print(f"{violation['kind']}: {violation['what']}")
        if is_kept:
            print(f"kept: {directory}\nagain: {asked.command}", flush=True)
        return not is_kept
    finally:
        if not is_kept:
            shutil.rmtree(directory)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stress", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the suites")
    run = commands.add_parser("run", help="run one suite, or all of them one after the other")
    run.add_argument("--suite", choices=[*SUITES, "all"], required=True)
    run.add_argument("--seconds", type=_positive, default=60.0, help="for all suites together (60)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--dir", type=Path, help="where directories are made; by default the temporary one")
    run.add_argument("--jobs", type=int, choices=range(1, 33), metavar="1..32", help="processes of a kind at a time")
    run.add_argument(
        "--cases", type=_count, help="end after so many cases (keys, forms, state), or rows of each kind (rows)"
    )
    run.add_argument("--case", type=_number, help="run only the case of this number (keys, forms, state)")
    run.add_argument("--only", help="run only kinds that have this in their names (keys, forms, state)")
    plants = sorted({plant for suite in SUITES.values() for plant in suite.plants})
    run.add_argument("--plant", choices=plants, help="do something wrong, which the suite has to find")
    return parser


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("0 or more")
    return number


def _count(text: str) -> int:
    number = _number(text)
    if not number:
        raise argparse.ArgumentTypeError("1 or more")
    return number


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError("between 0 and 86400 seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
