"""What the paper found, set beside what came out here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from evaluation.detector import Evaluation
from evaluation.voc_map import mean_average_precision, paired_bootstrap
from report import table

Measured = Sequence[tuple[dict[str, Any], Evaluation]]  # of a row of a table, by seed


@dataclass(frozen=True)
class Claim:
    """That one row of a table stands above another, or does not.

    Attributes:
        text: the paper's finding in a few words.
        above, below: titles of the rows.
        of: "macs", the share of multiply-accumulates that is cut, or "map", 11-point mAP.
        holds: whether the paper found the first above the second; if not, the claim is that it is not above.
    """

    text: str
    above: str
    below: str
    of: str
    holds: bool = True


def checked(claim: Claim, above: Measured, below: Measured) -> dict[str, Any]:
    """The difference of the two rows in percentage points, its range, and the verdict: `True`, `False`, or `None` where
    the figures do not tell.

    The range of MACs is that over the seeds, which must all agree; of mAP, the 95 % paired bootstrap interval.
    """
    if claim.of == "macs":
        by_seed = [100 * (b["macs"] / b["dense_macs"] - a["macs"] / a["dense_macs"]) for (a, _), (b, _) in
                   zip(above, below, strict=True)]  # fmt: skip
        difference, low, high = mean(by_seed), min(by_seed), max(by_seed)
    else:
        pairs = [(b.matches, a.matches) for (_, a), (_, b) in zip(above, below, strict=True)]
        low, high = (100 * bound for bound in paired_bootstrap(pairs))
        difference = 100 * mean(mean_average_precision(a)[0] - mean_average_precision(b)[0] for b, a in pairs)
    above_zero = True if low > 0 else False if high < 0 else None
    return {
        "claim": claim.text,
        "above": claim.above,
        "below": claim.below,
        "of": claim.of,
        "difference": round(difference, 2),
        "range": [round(low, 2), round(high, 2)],
        "holds": above_zero if claim.holds else above_zero is not True,
    }


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """A table of what `checked` gives."""
    verdicts = {True: "yes", False: "no", None: "not told apart"}
    names = {"macs": "MACs cut", "map": "mAP"}
    lines = [["The paper found", "compared here", "difference [range]", "so here?"]]
    for each in found:
        low, high = each["range"]
        lines.append(
            [
                each["claim"],
                f"{names[each['of']]}, {each['above']} − {each['below']}",
                f"{each['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
                verdicts[each["holds"]],
            ]
        )
    return table(lines)
