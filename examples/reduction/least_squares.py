"""Least squares on sums over samples, so that no samples have to be kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Of what is read, x, and what is wanted, y, summed over samples in float64.

    Attributes:
        gram: sum of x xᵀ, (inputs, inputs).
        product: sum of x yᵀ, (inputs, outputs).
        energy: sum of yᵀ y.
    """

    gram: Tensor
    product: Tensor
    energy: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Of x (samples, inputs) and y (samples, outputs)."""
        x, y = x.double(), y.double()
        return cls(x.T @ x, x.T @ y, y.square().sum().item())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.product + other.product, self.energy + other.energy)

    def error(self, weight: Tensor) -> float:
        """Sum of |y - weight x|²; weight is (outputs, inputs)."""
        w = weight.double()
        return float(self.energy - 2 * (w.T * self.product).sum() + (w @ self.gram * w).sum())

    def solve(self, weight: Tensor, ridge: float = 1e-4) -> Tensor:
        """The weights (outputs, inputs) nearest to y = weight x; in directions that the samples say little of, near to
        those given. `ridge` is the cost of leaving them, in units of the mean square of an input."""
        w = weight.double()
        wanted = self.product - self.gram @ w.T
        penalty = ridge * self.gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        change = torch.linalg.solve(self.gram + penalty * torch.eye(len(self.gram), device=w.device).to(w), wanted)
        return (w + change.T).to(weight.dtype)
