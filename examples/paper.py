"""The paper's tables and figures, each as a command.

  python -m examples.paper table1                 on embedded data, from the dense checkpoint that comes with it
  python -m examples.paper table1 --data ROOT     on Pascal VOC, full width, the dense detector first
  python -m examples.paper table2 --only direct   only the cells whose name contains "direct"
  python -m examples.paper table2 --partial       the rows that are measured already

Each trains the cells that it needs, one after the other. A cell that was trained before is found
again under --store, and one that was interrupted goes on where it was. Markdown, JSON and PNG are
written under --out when all cells of the table are there, or, with --partial, of what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the recipes' modules, as where a recipe itself is run

import pelee_coco
import pelee_voc
import ssd_coco
import ssd_voc
import trade_off
from cells import Bench, Cell
from claims import Claim, Measured, checked
from claims import markdown as findings
from evaluation.detector import look
from evaluation.paper_like import paper_like_operations
from evaluation.voc_map import paired_bootstrap
from figures import draw_curves, draw_seen
from finetune import Training
from memory import keep_freed_memory
from options import COUNT, NATURAL, POSITIVE, device
from recipe import DEMO_TRAINING, Recipe, add_training, messages, precision, undividable
from report import PAPER_LIKE, origin, table, write_json
from storage import ensure_writable, load_checkpoint, replacing

# The paper's Table 2 in both readings of its columns: the switches of the Selective Module that are off.
NONE_ON = ("dilated", "non_local", "deconv", "skip")
VARIANTS = {
    "∅": NONE_ON,
    "D": ("dilated", "non_local", "skip"),
    "D+S": ("dilated", "non_local"),
    "D+S+N": ("dilated",),
    "D+N+dil": ("skip",),
    "N+dil": ("deconv", "skip"),
    "all": (),
}
READINGS = (("∅", "D+S", "D+S+N", "D+N+dil", "all"), ("D", "D+S", "D+S+N", "N+dil", "all"))

HARDER = "direct, missed pixels weigh more"
CLAIMS = {
    "table1": [
        *(
            Claim("direct supervision cuts more than indirect", f"{at}, direct", f"{at}, indirect", "macs")
            for at in ("pool2", "pool3")
        ),
        *(
            Claim("and loses little more by it", f"{at}, indirect", f"{at}, direct", "map", holds=False)
            for at in ("pool2", "pool3")
        ),
        *(
            Claim("the 75² location cuts more than the 38²", f"pool2, {how}", f"pool3, {how}", "macs")
            for how in ("indirect", "direct")
        ),
        *(Claim("at more loss", f"pool3, {how}", f"pool2, {how}", "map") for how in ("indirect", "direct")),
        *(
            Claim(
                "(ours) the trained mask is worth its place",
                f"pool2, {HARDER}",
                f"pool2, {HARDER}, masks at {masks}",
                "map",
            )
            for masks in ("random", "centre")
        ),
    ],
    "table2": [
        *(
            Claim("stronger modules help indirect supervision", f"indirect, {more}", f"indirect, {less}", "map")
            for less, more in (("∅", "all"), ("D", "all"))
        ),
        *(
            Claim("and not direct", f"direct, {more}", f"direct, {less}", "map", holds=False)
            for less, more in (("∅", "all"), ("D", "all"))
        ),
    ],
}


@dataclass(frozen=True)
class Row:
    """A row of a table: the same cell for each seed, what the paper has for it, and the title of the row that it is
    compared with."""

    title: str
    bench: Bench
    cells: list[Cell]
    paper: str = ""
    baseline: str | None = None


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    with messages():
        for folder, option in ((args.store, "--store"), (args.out, "--out")):
            ensure_writable(folder, option)
        {"fig5": draw, "fig6": trade_offs}.get(args.what, tabulate)(args)


def tabulate(args) -> None:
    """Train and measure what a table asks for, and write it."""
    rows = {"table1": table1, "table2": table2, "table3": table3}[args.what](args)
    if args.partial:
        there = measured_already(rows)
        if not there:
            raise SystemExit(
                f"{args.what}: no row is measured, for each of the seeds, and its baseline, under {args.store}. Leave "
                "out --partial, or train cells first: with --only dense those of the baseline."
            )
        write(there, rows, args)
        return
    for row in rows:
        for cell in row.cells:
            if args.only in f"{row.bench.title} {cell.name} {cell.masks}":
                row.bench.measure(cell)
    if not args.only:
        write(rows, rows, args)


def measured_already(rows: list[Row]) -> list[Row]:
    """The rows of which every cell is measured, and every cell of the row that they are compared with."""
    there = {row.title: row for row in rows if all(row.bench.measured(cell) for cell in row.cells)}
    return [row for row in there.values() if row.baseline is None or row.baseline in there]


def table1(args) -> list[Row]:
    """Two locations and two supervisions against the baseline, by the paper's loss. Then: a loss in which missed pixels
    weigh more, and what is left of its gain where the same number of pixels lie elsewhere."""
    bench, training = prepare(ssd_voc.RECIPE, args)

    def row(title: str, at: str, how: Training, paper: str = "", masks: str = "own") -> Row:
        return Row(title, bench, [Cell(how, seed, at, masks=masks) for seed in args.seeds], paper, "baseline")

    rows = [Row("baseline", bench, [Cell(training, seed) for seed in args.seeds], "79.1")]
    found = {
        ("pool2", "indirect"): "77.6, −21.0 %", ("pool2", "direct"): "77.4, −31.3 %",
        ("pool3", "indirect"): "79.0, −10.2 %", ("pool3", "direct"): "78.9, −19.1 %",
    }  # fmt: skip
    for at, supervision in product(("pool2", "pool3"), ("indirect", "direct")):
        how = replace(training, supervision=supervision)
        rows.append(row(f"{at}, {supervision}", at, how, found[at, supervision]))
    harder = favoured(training)
    rows += [row(f"{at}, {HARDER}", at, harder) for at in ("pool2", "pool3")]
    return rows + [
        row(f"pool2, {HARDER}, masks at {masks}", "pool2", harder, masks=masks) for masks in ("random", "centre")
    ]


def favoured(training: Training) -> Training:
    """With the demonstration's weights of missed pixels in place of the paper's."""
    return replace(training, missed_pixel=DEMO_TRAINING.missed_pixel, size_balance=DEMO_TRAINING.size_balance)


def table2(args) -> list[Row]:
    """The Selective Module's parts, at the paper's 38² location."""
    found = {
        "indirect": ("61.2", "73.1", "76.5", "78.9", "79.0"),
        "direct": ("77.5", "78.9", "78.9", "77.2", "78.6"),
    }
    bench, training = prepare(ssd_voc.RECIPE, args)
    rows = [Row("baseline", bench, [Cell(training, seed) for seed in args.seeds], "79.1")]
    for supervision, (variant, off) in product(("indirect", "direct"), VARIANTS.items()):
        cells = [Cell(replace(training, supervision=supervision), seed, "pool3", off) for seed in args.seeds]
        columns = [reading.index(variant) for reading in READINGS if variant in reading]
        paper = " or ".join(sorted({found[supervision][column] for column in columns}))
        rows.append(Row(f"{supervision}, {variant}", bench, cells, paper, "baseline"))
    return rows


def table3(args) -> list[Row]:
    """The other detectors and data, with direct supervision, by the paper's loss and by one that favours objects."""
    found = {
        "ssd_coco": ("26.9 AP", "26.1 AP, −22.9 %"),
        "pelee_voc": ("71.3", "70.1, −33.1 %"),
        "pelee_coco": ("22.6 AP", "20.7 AP, −31.9 %"),
    }
    rows = []
    for recipe in (ssd_coco.RECIPE, pelee_voc.RECIPE, pelee_coco.RECIPE):
        bench, training = prepare(recipe, args)
        baseline = f"{recipe.name}, baseline"
        rows.append(Row(baseline, bench, [Cell(training, seed) for seed in args.seeds], found[recipe.name][0]))
        for title, how, paper in (("direct", training, found[recipe.name][1]), (HARDER, favoured(training), "")):
            cells = [Cell(how, seed, recipe.at) for seed in args.seeds]
            rows.append(Row(f"{recipe.name}, {title}", bench, cells, paper, baseline))
    return rows


def draw(args) -> None:
    """What detectors of both supervisions look at, side by side with what they find."""
    bench, training = prepare(ssd_voc.RECIPE, args)
    for supervision in ("direct", "indirect"):
        model, _ = bench.trained(Cell(replace(training, supervision=supervision), args.seeds[0], "pool2"))
        seen = [look(model, bench.data.test[i][0], bench.data.classes) for i in range(5)]
        draw_seen(seen, args.out / f"fig5_{supervision}.png")


def trade_offs(args) -> None:
    """What each way to compute less costs in accuracy; see `trade_off`."""
    bench, training = prepare(ssd_voc.RECIPE, args)
    cells = trade_off.curves(training, favoured(training), args.seeds[0])
    if args.only:
        for curve, cell in ((curve, cell) for curve, many in cells.items() for cell in many):
            if args.only in f"{curve} {cell.name}":
                bench.measure(cell)
        return
    if args.partial:
        cells = {curve: [cell for cell in many if bench.measured(cell)] for curve, many in cells.items()}
        if not cells["dense"]:
            raise SystemExit(
                f"fig6: the dense detector, with which all are compared, is not measured under {args.store}. Leave out "
                "--partial, or train it first: --only 'dense dense-seed'."
            )
    dense = Cell(training, args.seeds[0])
    points = {
        curve: [trade_off.point(bench, dense, cell, args.repeats) for cell in many]
        for curve, many in cells.items()
        if many
    }
    text = trade_off.markdown(points)
    print(f"\n{text}")
    about = origin() | {"seen": bench.seen, "seed": args.seeds[0], "curves": points}
    write_json(args.out / "fig6.json", about)
    draw_curves(trade_off.axes(points), args.out / "fig6.png")
    with replacing(args.out / "fig6.md") as temporary:
        temporary.write_text(f"`{about['command']}`: {bench.seen}; seed {args.seeds[0]}.\n\n{text}")


def prepare(recipe: Recipe, args) -> tuple[Bench, Training]:
    """Data, dense detector, and how the cells are trained: with the paper's loss."""
    preset = recipe.paper if args.data else recipe.demo
    width = args.width or preset.width
    checkpoint = args.checkpoint or (preset.checkpoint if width == preset.width else None)
    machine = {name: getattr(args, name) for name in ("workers", "accumulate", "ema")}
    amp = precision(args.amp, args.device)
    training = replace(preset.training, missed_pixel=1.0, size_balance=0.0, amp=amp, **machine)
    if args.iterations:
        training = replace(training, finetune=replace(training.finetune, iterations=args.iterations))
    if args.selector_iterations:
        selector = replace(training.selector, iterations=args.selector_iterations)
        training = replace(training, selector=selector, selector_by_task=args.selector_iterations)
    scratch = preset.scratch
    if args.scratch_iterations:
        scratch = replace(scratch, iterations=args.scratch_iterations)

    if reason := undividable(recipe, replace(training, supervision="indirect")):  # which divides all
        raise SystemExit(reason)
    data = recipe.load(args.data, args.eval_images)
    torch.manual_seed(0)
    base = recipe.detector(1 + len(data.classes), width).to(args.device)
    if checkpoint:
        origin = checkpoint.name
    else:
        origin = f"{scratch.iterations} iterations from scratch"
        origin += f" in {args.accumulate} parts" if args.accumulate > 1 else ""
        origin += f", averaged by {args.ema}" if args.ema else ""
    title = f"{recipe.name} width {width}"
    seen = f"{title}, dense from {origin}, on {args.data or 'digits'}, {len(data.test)} test images"

    def ready() -> None:
        if checkpoint:
            load_checkpoint(base, checkpoint)
        else:
            bench.train_base(scratch, training)

    bench = Bench(base, data, title, seen, args.store, ready)
    return bench, training


def write(rows: list[Row], whole: list[Row], args) -> None:
    """Markdown and JSON of a table, and whether what the paper found came out.

    Args:
        rows: those that are written.
        whole: those that the table has.
    """
    measured = {row.title: [row.bench.measure(cell) for cell in row.cells] for row in rows}
    missing = [row.title for row in whole if row.title not in measured]
    results = [result(row, measured) for row in rows]
    claims = [claim for claim in CLAIMS.get(args.what, []) if {claim.above, claim.below} <= measured.keys()]
    found = [checked(claim, measured[claim.above], measured[claim.below]) for claim in claims]
    compared = ["difference [95 %]", "MACs", PAPER_LIKE, "active"]
    head = ["", "mAP, 11-point", "mAP, area", *compared, "minutes a cell", "the paper"]
    coco = any("coco" in each for each in results)
    lines = [[*head[:1], *(["AP", "AP50", "AP75"] if coco else []), *head[1:]]]
    for each in results:
        if "difference" in each:
            low, high = each["difference_95"]
            cost = [f"{-each['macs_cut']:+.1f} %".replace("-", "−"), "", f"{each['active']:.1f} %"]
            compared = [f"{each['difference']:+.1f} [{low:+.1f}, {high:+.1f}]", *cost]
        else:
            compared = ["", f"{each['gmacs']:.3f} G", f"{each['paper_like_g']:.3f}", ""]
        scores = [f"{each['coco'][key]:.1f}" if "coco" in each else "" for key in ("ap", "ap50", "ap75") if coco]
        scores += [f"{each[key]:.1f}" for key in ("map_11_point", "map_area")]
        lines.append([each["title"], *scores, *compared, f"{each['minutes']:.1f}", each["paper"]])
    text = table(lines) + (f"\nNot measured: {'; '.join(missing)}.\n" if missing else "")
    text += f"\n{findings(found)}" if found else ""
    print(f"\n{text}")
    seen = list(dict.fromkeys(row.bench.seen for row in rows))
    about = origin() | {"seen": seen, "seeds": args.seeds, "rows": results, "missing": missing, "findings": found}
    write_json(args.out / f"{args.what}.json", about)
    with replacing(args.out / f"{args.what}.md") as temporary:
        temporary.write_text(f"`{about['command']}`: {'; '.join(seen)}; seeds {args.seeds}.\n\n{text}")


def result(row: Row, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """The figures of a row, means over its seeds; mAP in percent.

    Args:
        measured: of the row and of that which it is compared with, by title.
    """
    figures, found = zip(*measured[row.title], strict=True)
    by_seed = {key: [f[key] for f in figures] for key in ("map_11_point", "map_area", "minutes")}
    said: dict[str, Any] = {"title": row.title, "paper": row.paper, "cells": [cell.name for cell in row.cells]}
    said |= {key: round(mean(values), 2) for key, values in by_seed.items()}
    said["map_11_point_by_seed"] = [round(value, 2) for value in by_seed["map_11_point"]]
    if figures[0]["coco"]:
        said["coco"] = {
            name: None if value is None else round(mean(f["coco"][name] for f in figures), 2)
            for name, value in figures[0]["coco"].items()
        }
    said["gmacs"] = round(mean(f["macs"] for f in figures) / 1e9, 4)
    if row.baseline is None:
        dense, image = row.bench.base.eval(), row.bench.data.test[0][0]
        said["paper_like_g"] = round(paper_like_operations(dense, image) / 1e9, 4)
    else:
        others = measured[row.baseline]
        pairs = [(other.matches, f.matches) for (_, other), f in zip(others, found, strict=True)]
        said["difference"] = round(said["map_11_point"] - mean(known["map_11_point"] for known, _ in others), 2)
        said["difference_95"] = [round(100 * bound, 2) for bound in paired_bootstrap(pairs)]
        said["macs_cut"] = round(
            100 * (1 - mean(f["macs"] for f in figures) / mean(f["dense_macs"] for f in figures)), 1
        )
        said["active"] = round(100 * mean(f["density"] for f in figures), 1)
    return said


def parse_arguments() -> argparse.Namespace:
    """The command line; what it leaves open is the preset's."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["table1", "table2", "table3", "fig5", "fig6"])
    add("--data", type=Path, metavar="ROOT", help="folder with VOCdevkit; without it, embedded digits")
    add("--width", type=POSITIVE, help="factor on all channel counts (0.25; with --data 1)")
    add(
        "--checkpoint",
        type=Path,
        help="the dense detector that each cell starts from (for digits the one that comes along)",
    )
    add("--seeds", type=NATURAL, nargs="+", default=[0], help="train each cell once per seed (%(default)s)")
    add("--only", default="", metavar="TEXT", help="only the cells whose name contains it; no table is written")
    add(
        "--partial",
        action="store_true",
        help="train none, and write the rows of a table, or draw the cells of fig6, that are measured already",
    )
    add("--repeats", type=COUNT, default=15, help="of timing, for fig6 (%(default)s)")
    add("--scratch-iterations", type=COUNT, help="of the dense detector, where no checkpoint is there")
    add("--iterations", type=COUNT, help="of fine-tuning (those of the recipe)")
    add("--selector-iterations", type=COUNT, help="of the selector alone, before (1000, or 120 by the detector's loss)")
    add("--eval-images", type=NATURAL, default=0, help="evaluate the first so many test images, 0: all (%(default)s)")
    add("--out", type=Path, default=Path("docs/results"), help="folder of tables and pictures (%(default)s)")
    add("--store", type=Path, default=Path("runs/paper"), help="folder of the cells (%(default)s)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add_training(parser)
    args = parser.parse_args()
    if args.partial and (args.only or args.what == "fig5"):
        parser.error("--partial is of the tables and fig6, and trains none: it does not go with --only")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds: one occurs twice")
    return args


if __name__ == "__main__":
    main()
