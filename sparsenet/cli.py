"""The command line: `sparsenet stages | plan | coverage | bench | profile`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsenet import bench, coverage, device_sweep, sweep
from sparsenet.context import use_mask
from sparsenet.coverage import Result
from sparsenet.freeze import freeze
from sparsenet.masks import blobs
from sparsenet.profile import profile
from sparsenet.selector import GivenMask
from sparsenet.surgery import plan, selectify, stages


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if a model of the catalogue failed, 2 for what was asked wrongly."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    options.command = shlex.join(["sparsenet", *given])
    try:
        status: int = options.run(options)
    except (ValueError, ImportError) as error:
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

    timing = commands.add_parser("bench", help="time a selective network against dense engines, and spconv")
    timing.add_argument("model", nargs="?", help="as for `stages`")
    timing.add_argument("--at", metavar="STAGE", help="as for `plan`")
    timing.add_argument("--density", type=float, help="share of active pixels at the stage, above 0 and 1 at most")
    timing.add_argument("--size", type=int, help="of the square images; by default that of the model's family")
    timing.add_argument("--batch", type=int, default=1, help="images in a call (default: 1)")
    timing.add_argument("--threads", type=int, help="of every engine (default: as many as PyTorch takes)")
    timing.add_argument("--repeats", type=int, default=20, help="timed calls of each (default: 20)")
    timing.add_argument(
        "--against",
        type=lambda names: names.split(","),
        metavar="ENGINE,…",
        help=f"some of {','.join(bench.RIVALS)}, on cuda of {','.join(bench.CUDA_RIVALS)} (default: all)",
    )
    timing.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: cpu)")
    timing.add_argument(
        "--dtype", choices=list(bench.DTYPES), default="float32", help="on cuda, what it computes in (default: float32)"
    )
    timing.add_argument("--sweep", action="store_true", help="no model, but single 3x3 convolutions of many sizes")
    timing.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, machine and versions here")
    timing.add_argument("--plot", type=Path, metavar="FILE", help="draw bars, or the sweep's break-even curves, here")
    timing.set_defaults(run=_bench)

    profiling = commands.add_parser("profile", help="where the time of a frozen selective network goes, by layer")
    profiling.add_argument("model", help="as for `stages`")
    profiling.add_argument("--at", metavar="STAGE", required=True, help="as for `plan`")
    profiling.add_argument("--density", type=float, required=True, help="as for `bench`")
    profiling.add_argument("--size", type=int, help="as for `bench`")
    profiling.add_argument("--batch", type=int, default=1, help="as for `bench`")
    profiling.add_argument("--threads", type=int, help="of PyTorch (default: as many as it takes)")
    profiling.add_argument("--repeats", type=int, default=20, help="timed passes (default: 20)")
    profiling.set_defaults(run=_profile)
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


def _bench(options: Any) -> int:
    if options.sweep:
        return _sweep(options)
    if None in (options.model, options.at, options.density):
        raise ValueError("bench needs a MODEL, --at and --density, or --sweep")
    found = bench.compare(
        options.model,
        options.at,
        options.density,
        size=options.size,
        batch=options.batch,
        threads=options.threads,
        repeats=options.repeats,
        against=options.against,
        device=options.device,
        dtype=options.dtype,
    )
    _show(found.rows())
    print(found.summary())
    if options.json is not None:
        found.save(options.json, options.command)
    if options.plot is not None:
        found.plot(options.plot)
    return 0


def _sweep(options: Any) -> int:
    if options.model is not None:
        raise ValueError(f"--sweep times single convolutions, not {options.model}")
    if options.device != "cpu":
        return _device_sweep(options)
    points = []
    for point in sweep.run(threads=options.threads, repeats=options.repeats):
        points.append(point)
        print(sweep.line(point), flush=True)
    print(sweep.summary(points))
    if options.json is not None:
        sweep.save(points, options.json, options.command)
    if options.plot is not None:
        sweep.plot(points, options.plot)
    return 0


def _device_sweep(options: Any) -> int:
    if options.plot is not None:
        raise ValueError(f"curves are of the CPU's sweep: leave out --plot, and take --json on {options.device}")
    points = []
    for point in device_sweep.run(options.device, dtypes=(options.dtype,), repeats=options.repeats):
        points.append(point)
        print(device_sweep.line(point), flush=True)
        if options.json is not None:
            device_sweep.save(points, options.json, options.command)
    return 0


def _show(rows: list[tuple[str, ...]]) -> None:
    """Print a table, its head first: by rich, where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


def _profile(options: Any) -> int:
    torch.manual_seed(0)
    with bench.using_threads(options.threads):
        network, images = bench.network_of(coverage.named(options.model).eval(), options.size, options.batch)
        selective = selectify(network, options.at, selector=GivenMask(), example_inputs=images)
        frozen = freeze(selective, images)
        with use_mask(blobs(options.batch, plan(selective).size, options.density)):
            print(profile(frozen, images, repeats=options.repeats))
    return 0


def _line(result: Result) -> str:
    share = f"{result.share:7.2%} of {result.conv_macs / 1e6:9.1f} MMACs" if result.stage else ""
    reason = result.reason if len(result.reason) < 200 else f"{result.reason[:200]}…"
    return f"{result.model:40} {result.status:8} {share}  {result.stage}  {reason}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
