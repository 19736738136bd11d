"""What surgery will find, as a value: which operations after the stage are guided, which leave, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sparsenet.selection import Operation
from sparsenet.sites import Pair


@dataclass(frozen=True)
class Step:
    """One operation of the dry run that met guided features, and the module it ran in."""

    path: str
    operation: Operation


@dataclass(frozen=True)
class Plan:
    """The dry run of a selective model: prints as a table.

    Attributes:
        at: the stage as asked for, and `stage`, its module path.
        batch: how many images the example had.
        size: (H, W) at the stage; `channels` there.
        steps: operations on guided features, in order.
        sizes: every (H, W) the guided features took.
        total_macs: multiply-accumulates of the dense network on the example.
        downstream_macs: those of them after the stage, the denominator of `guided_share`.
        guided_macs: those of them in guided operations.
        conv_macs: those of 2-D convolutions over maps of more than one pixel whose input comes of the stage's output (a
            convolution of what was pooled to 1x1 is a linear layer), the denominator of `guided_conv_share`.
    """

    at: str
    stage: str
    batch: int
    size: Pair
    channels: int
    steps: tuple[Step, ...]
    sizes: tuple[Pair, ...]
    total_macs: int
    downstream_macs: int
    guided_macs: int
    conv_macs: int

    @property
    def guided_share(self) -> float:
        """Share of the MACs after the stage that masks can cut."""
        return self.guided_macs / max(1, self.downstream_macs)

    @property
    def guided_conv_share(self) -> float:
        """Share of the MACs of convolutions after the stage that masks can cut."""
        guided = sum(step.operation.dense_macs for step in self.steps if step.operation.convolves)
        return guided / max(1, self.conv_macs)

    @property
    def exits(self) -> tuple[Step, ...]:
        """Where features left the guided region, with the reason in `step.operation.reason`."""
        return tuple(step for step in self.steps if step.operation.status == "exit")

    def __str__(self) -> str:
        rows = [("module", "operation", "size", "status", "MMACs", "reason")]
        for step in self.steps:
            operation = step.operation
            size = f"{operation.size[0]}x{operation.size[1]}"
            macs = f"{operation.dense_macs / 1e6:.1f}" if operation.dense_macs else ""
            rows.append((step.path, operation.name, size, operation.status, macs, operation.reason or ""))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        table = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows
        ]
        found = Counter(step.operation.status for step in self.steps)
        head = (
            f"stage {self.at!r} = {self.stage}, {self.channels} channels at {self.size[0]}x{self.size[1]}; "
            f"{found['guided']} guided operations, {found['reduction']} reductions, {found['exit']} exits"
        )
        share = (
            f"guided: {self.guided_macs / 1e6:.1f} of {self.downstream_macs / 1e6:.1f} MMACs after the stage "
            f"({self.guided_share:.1%}), {self.guided_conv_share:.1%} of its convolutions' {self.conv_macs / 1e6:.1f}; "
            f"the network has {self.total_macs / 1e6:.1f} on the example input"
        )
        return "\n".join([head, *(line.rstrip() for line in table), share])
