"""The paper's tables and figures, each as a command.

  python -m examples.paper table1                 on embedded data, from the dense checkpoint that comes with it
  python -m examples.paper table1 --data ROOT --width 1 --checkpoint FILE      on Pascal VOC, full width
  python -m examples.paper table2 --only direct   only the cells whose name contains "direct"

Each trains the cells that it needs, one after the other. A cell that was trained before is found
again under --store, and one that was interrupted goes on where it was. Markdown, JSON and PNG are
written under --out when all cells of the table are there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the recipes' modules, as where a recipe itself is run

from cells import Bench, Cell
from evaluation.detector import look
from evaluation.voc_map import paired_bootstrap
from figures import draw_seen
from finetune import Training
from memory import keep_freed_memory
from recipe import DEMO_TRAINING, bfloat16_is_fast
from report import origin, table, write_json
from ssd_voc import RECIPE
from storage import load_checkpoint, replacing

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


@dataclass(frozen=True)
class Row:
    """A row of a table: the same cell for each seed, and what the paper has for it."""

    title: str
    cells: list[Cell]
    paper: str = ""


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    bench, training = prepare(args)
    if args.what == "fig5":
        draw(bench, training, args)
        return
    rows = {"table1": table1, "table2": table2}[args.what](training, args.seeds)
    for cell in dict.fromkeys(cell for row in rows for cell in row.cells):
        if args.only in f"{cell.name} {cell.masks}":
            bench.measure(cell)
    if args.only:
        return
    write(bench, rows, args)


def table1(training: Training, seeds: list[int]) -> list[Row]:
    """Two locations and two supervisions against the baseline, by the paper's loss. Then: a loss in which missed pixels
    weigh more, and what is left of its gain where the same number of pixels lie elsewhere."""
    weighted = DEMO_TRAINING
    favoured = replace(training, missed_pixel=weighted.missed_pixel, size_balance=weighted.size_balance)

    def row(title: str, at: str | None, how: Training, paper: str = "", masks: str = "own") -> Row:
        return Row(title, [Cell(how, seed, at, masks=masks) for seed in seeds], paper)

    rows = [row("baseline", None, training, "79.1")]
    found = {
        ("pool2", "indirect"): "77.6, −21.0 %", ("pool2", "direct"): "77.4, −31.3 %",
        ("pool3", "indirect"): "79.0, −10.2 %", ("pool3", "direct"): "78.9, −19.1 %",
    }  # fmt: skip
    for at, supervision in product(("pool2", "pool3"), ("indirect", "direct")):
        how = replace(training, supervision=supervision)
        rows.append(row(f"{at}, {supervision}", at, how, found[at, supervision]))
    rows += [row(f"{at}, direct, missed pixels weigh more", at, favoured) for at in ("pool2", "pool3")]
    rows += [
        row(f"the last at pool2, masks at {masks}", "pool2", favoured, masks=masks) for masks in ("random", "centre")
    ]
    return rows


def table2(training: Training, seeds: list[int]) -> list[Row]:
    """The Selective Module's parts, at the paper's 38² location."""
    found = {
        "indirect": ("61.2", "73.1", "76.5", "78.9", "79.0"),
        "direct": ("77.5", "78.9", "78.9", "77.2", "78.6"),
    }
    rows = [Row("baseline", [Cell(training, seed) for seed in seeds], "79.1")]
    for supervision, (variant, off) in product(("indirect", "direct"), VARIANTS.items()):
        how = replace(training, supervision=supervision)
        cells = [Cell(how, seed, "pool3", off) for seed in seeds]
        columns = [reading.index(variant) for reading in READINGS if variant in reading]
        rows.append(
            Row(f"{supervision}, {variant}", cells, " or ".join(sorted({found[supervision][c] for c in columns})))
        )
    return rows


def draw(bench: Bench, training: Training, args) -> None:
    """What detectors of both supervisions look at, side by side with what they find."""
    for supervision in ("direct", "indirect"):
        model, _ = bench.trained(Cell(replace(training, supervision=supervision), args.seeds[0], "pool2"))
        seen = [look(model, bench.data.test[i][0], bench.data.classes) for i in range(5)]
        draw_seen(seen, args.out / f"fig5_{supervision}.png")


def prepare(args) -> tuple[Bench, Training]:
    """Data, dense detector, and how the cells are trained."""
    preset = RECIPE.paper if args.data else RECIPE.demo
    data = RECIPE.load(args.data, args.eval_images)
    torch.manual_seed(0)
    base = RECIPE.detector(1 + len(data.classes), args.width).to(args.device)
    load_checkpoint(base, args.checkpoint)
    training = replace(
        preset.training, missed_pixel=1.0, size_balance=0.0, workers=args.workers, amp=bfloat16_is_fast(args.device)
    )
    if args.iterations:
        training = replace(training, finetune=replace(training.finetune, iterations=args.iterations))
    if args.selector_iterations:
        selector = replace(training.selector, iterations=args.selector_iterations)
        training = replace(training, selector=selector, selector_by_task=args.selector_iterations)
    on = f"{args.data or 'digits'}, {len(data.test)} test images"
    seen = f"{RECIPE.name} width {args.width} from {args.checkpoint.name} on {on}"
    return Bench(base, data, seen, args.store), training


def write(bench: Bench, rows: list[Row], args) -> None:
    """Markdown and JSON of a table; the first row is what the others are compared with."""
    baseline = [bench.measure(cell)[1].matches for cell in rows[0].cells]
    lines = [["", "mAP, 11-point", "mAP, area", "difference [95 %]", "MACs", "active", "minutes a cell", "the paper"]]
    results: list[dict[str, Any]] = []
    for row in rows:
        figures, found = zip(*(bench.measure(cell) for cell in row.cells), strict=True)
        eleven, area, minutes = (mean(f[key] for f in figures) for key in ("map_11_point", "map_area", "minutes"))
        result: dict[str, Any] = {
            "title": row.title,
            "map_11_point": round(eleven, 2),
            "map_11_point_by_seed": [round(f["map_11_point"], 2) for f in figures],
            "map_area": round(area, 2),
            "minutes": round(minutes, 1),
            "paper": row.paper,
        }
        difference, macs, active = "", "", ""
        if row.cells[0].at is not None:
            pairs = list(zip(baseline, (f.matches for f in found), strict=True))
            low, high = (100 * bound for bound in paired_bootstrap(pairs))
            result["difference"] = round(eleven - results[0]["map_11_point"], 2)
            result["difference_95"] = [round(low, 2), round(high, 2)]
            result["macs_cut"] = round(
                100 * (1 - mean(f["macs"] for f in figures) / mean(f["dense_macs"] for f in figures)), 1
            )
            result["active"] = round(100 * mean(f["density"] for f in figures), 1)
            difference = f"{result['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
            macs, active = f"{-result['macs_cut']:+.1f} %".replace("-", "−"), f"{result['active']:.1f} %"
        lines.append([row.title, f"{eleven:.1f}", f"{area:.1f}", difference, macs, active, f"{minutes:.1f}", row.paper])
        results.append(result)
    text = table(lines)
    print(f"\n{text}")
    first = rows[0].cells[0].training
    about = origin() | {"seen": bench.seen, "seeds": args.seeds, "finetune": vars(first.finetune), "rows": results}
    write_json(args.out / f"{args.what}.json", about)
    with replacing(args.out / f"{args.what}.md") as temporary:
        temporary.write_text(f"`{about['command']}`: {bench.seen}, seeds {args.seeds}.\n\n{text}")


def parse_arguments() -> argparse.Namespace:
    """The command line; what it leaves open is the preset's."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=["table1", "table2", "fig5"])
    add("--data", type=Path, metavar="ROOT", help="folder with VOCdevkit; without it, embedded digits")
    add("--width", type=float, help="factor on all channel counts (0.25; with --data 1)")
    add(
        "--checkpoint",
        type=Path,
        help="the dense detector that each cell starts from (for digits the one that comes along)",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="train each cell once per seed (%(default)s)")
    add("--only", default="", metavar="TEXT", help="only the cells whose name contains it; no table is written")
    add("--iterations", type=int, help="of fine-tuning (120; with --data 120000)")
    add("--selector-iterations", type=int, help="of the selector alone, before (1000, or 120 by the detector's loss)")
    add("--eval-images", type=int, default=0, help="evaluate the first so many test images, 0: all (%(default)s)")
    add("--out", type=Path, default=Path("docs/results"), help="folder of tables and pictures (%(default)s)")
    add("--store", type=Path, default=Path("runs/paper"), help="folder of the cells (%(default)s)")
    add("--workers", type=int, default=1, help="processes preparing training images (%(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of an operation (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = parser.parse_args()
    preset = RECIPE.paper if args.data else RECIPE.demo
    args.width = args.width or preset.width
    args.checkpoint = args.checkpoint or preset.checkpoint
    if args.checkpoint is None:
        parser.error(
            "no dense checkpoint of VOC comes along: train one (ssd_voc.py --from-scratch) and give --checkpoint"
        )
    return args


if __name__ == "__main__":
    main()
