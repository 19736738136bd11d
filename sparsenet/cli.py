"""The command line: `sparsenet stages | plan | coverage`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsenet import coverage
from sparsenet.coverage import Result
from sparsenet.selector import GivenMask
from sparsenet.surgery import plan, selectify, stages


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if a model of the catalogue failed, 2 for what was asked wrongly."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except ValueError as error:
        parser.error(str(error))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparsenet", description="Make 2D vision networks skip pixels.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("stages", help="where a model can be embedded at")
    listing.add_argument("model", help="a model's name in torchvision or timm (timm: before it where both have it)")
    listing.set_defaults(run=_stages)

    planning = commands.add_parser("plan", help="what a selective model guides, and what leaves, and why")
    planning.add_argument("model", help="as for `stages`")
    planning.add_argument("--at", required=True, help="the stage: poolN, strideN, or a module path")
    planning.add_argument("--reenter", action="store_true", help="let what left take up its sites again")
    planning.set_defaults(run=_plan)

    covering = commands.add_parser("coverage", help="put the models of a library through the contract")
    covering.add_argument("--suite", choices=list(coverage.SUITES), required=True)
    covering.add_argument("--models", nargs="+", metavar="MODEL", help="these only; by default the whole suite")
    covering.add_argument("--json", type=Path, metavar="FILE", help="results; models that it holds are not run again")
    covering.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the report here, of all that FILE of --json holds"
    )
    covering.set_defaults(run=_coverage)
    return parser


def _stages(options: Any) -> int:
    print(stages(coverage.named(options.model)))
    return 0


def _plan(options: Any) -> int:
    model = coverage.named(options.model)
    print(plan(selectify(model, options.at, selector=GivenMask(), reenter=options.reenter, inplace=True)))
    return 0


def _coverage(options: Any) -> int:
    results = []
    for result in coverage.run(options.suite, options.models, options.json):
        results.append(result)
        print(_line(result), flush=True)
    print(coverage.summary(results))
    if options.markdown is not None:
        coverage.report(options.markdown, coverage.load(options.json) or results)
    return int(any(result.status == "failed" for result in results))


def _line(result: Result) -> str:
    share = f"{result.share:7.2%} of {result.conv_macs / 1e6:9.1f} MMACs" if result.stage else ""
    reason = result.reason if len(result.reason) < 200 else f"{result.reason[:200]}…"
    return f"{result.model:40} {result.status:8} {share}  {result.stage}  {reason}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
