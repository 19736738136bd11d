"""Figure 6: what each way to compute less costs in accuracy, alone and combined with the selection of pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from cells import Bench, Cell
from evaluation.speed import compare_speed
from evaluation.voc_map import paired_bootstrap
from finetune import Training
from reduction.reduce import Reduction
from report import table, write_json

# The share of the channels that is kept, or the side of the images: each at about 3/4 and 1/2 of the MACs.
AMOUNTS = {
    "channels": (0.85, 0.7),
    "lasso": (0.85, 0.7),
    "imitation": (0.85, 0.7),
    "resolution": (256, 212),
}
TITLES = {
    "channels": "channel reduction",
    "lasso": "LASSO channel pruning",
    "imitation": "mask-guided distillation",
    "resolution": "resolution reduction",
}
BEYOND = ("distilled", "capacity")
DENSITIES = (0.2, 0.3, 0.45)
SHARES = (0.4, 0.5, 0.65)  # of the MACs
BATCHES = (1, 8)


def curves(training: Training, favoured: Training, seed: int) -> dict[str, list[Cell]]:
    """The cells of each curve, from the dearest to the cheapest.

    Args:
        training: with the paper's loss.
        favoured: with one in which a missed pixel weighs more.
    """
    found = {"dense": [Cell(training, seed)]}
    for how in ("direct", "indirect"):
        taught = replace(training, supervision=how)
        found[f"SCN, {how}"] = [Cell(taught, seed, at) for at in ("pool3", "pool2")]
    found["SCN, direct, missed pixels weigh more"] = [Cell(favoured, seed, at) for at in ("pool3", "pool2")]
    drawn = replace(favoured, supervision="gumbel")
    found["SCN, gumbel"] = [Cell(replace(drawn, macs=share), seed, "pool2") for share in reversed(SHARES)]
    for how in BEYOND:
        aimed = [replace(favoured, supervision=how, density=density) for density in reversed(DENSITIES)]
        found[f"SCN, {how}"] = [Cell(each, seed, "pool2") for each in aimed]
    for kind, amounts in AMOUNTS.items():
        reductions = [Reduction(kind, amount) for amount in amounts]
        found[TITLES[kind]] = [Cell(training, seed, reduction=each) for each in reductions]
        found[f"{TITLES[kind]} and SCN"] = [Cell(favoured, seed, "pool2", reduction=reductions[0])]
    return found


def point(bench: Bench, dense: Cell, cell: Cell, repeats: int) -> dict[str, Any]:
    """A cell's figures beside the dense detector's: mAP and its difference in percent, the share of the dense one's
    multiply-accumulates, and milliseconds of both, frozen, in one alternating run."""
    figures, found = bench.measure(cell)
    known, reference = bench.measure(dense)
    low, high = paired_bootstrap([(reference.matches, found.matches)])
    return {
        "cell": cell.name,
        "map_11_point": round(figures["map_11_point"], 2),
        "difference": round(figures["map_11_point"] - known["map_11_point"], 2),
        "difference_95": [round(100 * low, 2), round(100 * high, 2)],
        "macs": round(100 * figures["macs"] / known["macs"], 1),
        "minutes": figures["minutes"],
        "speed": _speed(bench, dense, cell, repeats),
    }


def _speed(bench: Bench, dense: Cell, cell: Cell, repeats: int) -> dict[str, Any]:
    """Measured once; removing the file measures again."""
    file = bench.folder(cell) / "speed.json"
    if not file.exists():
        test = bench.data.test
        images = [test[i][0] for i in range(0, len(test), -(-len(test) // 16))]
        models = {"dense": bench.trained(dense)[0], "this": bench.trained(cell)[0]}
        times = {batch: compare_speed(models, images, batch, repeats) for batch in BATCHES}
        write_json(file, {
            f"batch {batch}": {
                "ms": round(median(each["this"]), 2),
                "dense_ms": round(median(each["dense"]), 2),
                "time": round(100 * median(a / b for a, b in zip(each["this"], each["dense"], strict=True)), 1),
            }
            for batch, each in times.items()
        })  # fmt: skip
    speed: dict[str, Any] = json.loads(file.read_text())
    return speed


def markdown(points: dict[str, list[dict[str, Any]]]) -> str:
    """A table, a row for each point of each curve."""
    rows = [["", "mAP, 11-point", "difference [95 %]", "MACs", *(f"time, batch {batch}" for batch in BATCHES), "cell"]]
    for title, curve in points.items():
        for each in curve:
            low, high = each["difference_95"]
            rows.append(
                [
                    title,
                    f"{each['map_11_point']:.1f}",
                    f"{each['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
                    f"{each['macs']:.1f} %",
                    *(
                        f"{each['speed'][f'batch {batch}']['time']:.0f} % "
                        f"({each['speed'][f'batch {batch}']['ms']:.1f} ms)"
                        for batch in BATCHES
                    ),
                    each["cell"],
                ]
            )
    return table(rows)


def axes(points: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Sequence[tuple[float, float]]]]:
    """What is drawn: by axis, by curve, the places (share of the dense detector's cost, mAP)."""
    return {
        "MACs": {title: [(each["macs"], each["map_11_point"]) for each in curve] for title, curve in points.items()},
        f"time per image, batches of {BATCHES[-1]}": {
            title: [(each["speed"][f"batch {BATCHES[-1]}"]["time"], each["map_11_point"]) for each in curve]
            for title, curve in points.items()
        },
    }
