"""Tables and logs that say how their figures came about."""

import json
import platform
import sys
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from evaluation.coco_ap import COCOAP
from evaluation.detector import Evaluation
from evaluation.voc_map import mean_average_precision, paired_bootstrap
from storage import replacing

PAPER_LIKE = "G as the paper counts"  # the head of a column


@dataclass(frozen=True)
class Comparison:
    """A dense and a selective detector on the same test images, one evaluation of each per seed."""

    seeds: list[int]
    dense: list[Evaluation]
    selective: list[Evaluation]
    milliseconds: dict[int, dict[str, list[float]]]  # batch size -> "dense" and "selective": per image, by repeat
    paper_like: int  # operations of the dense one, see `evaluation.paper_like`

    def figures(self) -> dict[str, Any]:
        """All results as JSON values; mAP in percent, means over the seeds unless listed by seed."""
        maps = {
            name: [mean_average_precision(run.matches) for run in runs]
            for name, runs in (("dense", self.dense), ("selective", self.selective))
        }
        pairs = [(d.matches, s.matches) for d, s in zip(self.dense, self.selective, strict=True)]
        result: dict[str, Any] = {"seeds": self.seeds, "test_images": len(pairs[0][0].positives)}
        for k, kind in enumerate(("map_11_point", "map_area")):
            by_seed = {name: [round(100 * scores[k], 3) for scores in values] for name, values in maps.items()}
            result[f"{kind}_by_seed"] = by_seed
            result[kind] = {name: round(mean(values), 3) for name, values in by_seed.items()}
        averages = {"dense": self.dense, "selective": self.selective}
        if self.dense[0].coco is not None:  # by the names of COCOAP
            result["coco"] = {name: _coco(runs) for name, runs in averages.items()}
        result["difference"] = round(result["map_11_point"]["selective"] - result["map_11_point"]["dense"], 3)
        result["difference_95"] = [round(100 * bound, 3) for bound in paired_bootstrap(pairs)]
        macs, dense_macs = (mean(getattr(s, kind) for s in self.selective) for kind in ("macs", "dense_macs"))
        result["gmacs"] = {"dense": round(dense_macs / 1e9, 4), "selective": round(macs / 1e9, 4)}
        result["paper_like_g"] = {"dense": round(self.paper_like / 1e9, 4)}
        result["macs_cut"] = round(100 * (1 - macs / dense_macs), 2)
        result["active"] = round(100 * mean(s.density for s in self.selective), 2)
        result["speed"] = {f"batch {batch}": _speed(times) for batch, times in self.milliseconds.items()}
        return result


def coco_percent(found: COCOAP) -> dict[str, float | None]:
    """COCO's figures in percent by name; `None` where there is no object of that size."""
    return {name: None if isnan(value) else round(100 * value, 3) for name, value in asdict(found).items()}


def _coco(runs: list[Evaluation]) -> dict[str, float | None]:
    """Means over the seeds, which see the same objects."""
    by_seed = [coco_percent(run.coco) for run in runs if run.coco is not None]
    return {
        name: None if value is None else round(mean(found[name] or 0.0 for found in by_seed), 3)
        for name, value in by_seed[0].items()
    }


def _speed(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median of the ratios of neighbouring measurements with their range."""
    ratios = sorted(dense / selective for dense, selective in zip(times["dense"], times["selective"], strict=True))
    return {
        "ms": {name: round(median(values), 3) for name, values in times.items()},
        "speedup": round(median(ratios), 3),
        "speedup_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "ms_by_repeat": {name: [round(value, 3) for value in values] for name, values in times.items()},
    }


def markdown(figures: dict[str, Any]) -> str:
    """A table of `Comparison.figures`, a row per detector."""
    low, high = figures["difference_95"]
    speeds = figures["speed"]
    cut = f"{-figures['macs_cut']:+.1f} %".replace("-", "−")
    extra = ["AP", "AP50", "AP75"] if "coco" in figures else []
    columns = [f"{what}, {batch}" for batch in speeds for what in ("ms per image", "speed-up")]
    rows = [["", *extra, "mAP, 11-point", "mAP, area", "difference [95 %]", "GMACs", PAPER_LIKE, "active", *columns]]
    for name in ("dense", "selective"):
        chosen = name == "selective"
        rows.append(
            [
                name,
                *(f"{figures['coco'][name][key.lower()]:.1f}" for key in extra),
                f"{figures['map_11_point'][name]:.1f}",
                f"{figures['map_area'][name]:.1f}",
                f"{figures['difference']:+.1f} [{low:+.1f}, {high:+.1f}]" if chosen else "",
                f"{figures['gmacs'][name]:.3f}" + (f" ({cut})" if chosen else ""),
                "" if chosen else f"{figures['paper_like_g']['dense']:.3f}",
                f"{figures['active']:.1f} %" if chosen else "100 %",
                *(
                    cell
                    for speed in speeds.values()
                    for cell in (f"{speed['ms'][name]:.1f}", f"{speed['speedup']:.2f}×" if chosen else "")
                ),
            ]
        )
    return table(rows)


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def origin(model: nn.Module | None = None) -> dict[str, Any]:
    """What a log needs so that its run can be repeated: the command, and what it ran on; of a `model`, that is where
    it is."""
    device = torch.device("cpu") if model is None else next(model.parameters()).device
    return {
        "command": " ".join(["python", "examples/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def thinned(losses: list[float], points: int = 100) -> list[float]:
    """The mean loss of each of about `points` stretches of equal length."""
    step = max(1, len(losses) // points)
    return [round(mean(losses[i : i + step]), 3) for i in range(0, len(losses), step)]


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
