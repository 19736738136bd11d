"""Models, masks and comparisons that the model-level tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

import sparsenet

# -- masks -----------------------------------------------------------------------------------------------------


def blobs(batch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Two random discs in each image, bool (N, H, W): between one pixel and about half of them."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    lines, columns = torch.arange(height)[:, None], torch.arange(width)
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    for image in mask:
        for _ in range(2):
            y, x, radius = (torch.rand(3, generator=generator) * torch.tensor([height, width, 0.3 * height])).tolist()
            image |= (lines - y).square() + (columns - x).square() <= radius**2
        image[int(y), int(x)] = True
    return mask


def at_size(mask: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """The mask of a coarser size as the contract words it, pixel by pixel: bool (N, 1, *size)."""
    batch, height, width = mask.shape
    pooled = torch.zeros(batch, 1, *size, dtype=torch.bool)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * height // size[0], -(-(i + 1) * height // size[0]))
            columns = slice(j * width // size[1], -(-(j + 1) * width // size[1]))
            pooled[:, 0, i, j] = mask[:, rows, columns].any(-1).any(-1)
    return pooled


# -- comparisons -----------------------------------------------------------------------------------------------


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, flat and ordinary."""
    return [leaf.flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def error(got: Any, truth: Any) -> float:
    """The largest difference of two outputs."""
    pairs = list(zip(tensors(got), tensors(truth), strict=True))
    assert pairs
    return max((a.double() - b.double()).abs().max().item() if b.numel() else 0.0 for a, b in pairs)


def assert_as_good(got: Any, plain: Any, truth: Any, factor: float = 8.0) -> None:
    """`got` misses the float64 `truth` by at most `factor` times what `plain` does, PyTorch's own computation in the
    same precision (by at least one rounding of the largest number: `plain` may be exact by luck)."""
    largest = max(leaf.abs().max().item() for leaf in tensors(truth) if leaf.numel())
    precision = torch.finfo(tensors(got)[0].dtype).eps
    allowed = factor * max(error(plain, truth), precision * largest)
    found = error(got, truth)
    assert found <= allowed, f"error {found:.3g}, allowed {allowed:.3g} = {factor} x the dense error"


def assert_same(got: Any, wanted: Any, rounds: float = 1000.0) -> None:
    """Equal up to `rounds` roundings of the largest number: for outputs in float64, where any mistake is larger."""
    for a, b in zip(tensors(got), tensors(wanted), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if not b.is_floating_point():
            assert torch.equal(a, b)
        elif b.numel():
            allowed = rounds * torch.finfo(b.dtype).eps * max(1e-3, b.abs().max().item())
            assert (a - b).abs().max().item() <= allowed, f"{(a - b).abs().max().item():.3g} > {allowed:.3g}"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Whatever surgery could leave behind in a model: numbers, identities, classes, attributes, hooks, modes."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "repr": repr(model),
        "modules": [
            (
                name,
                type(module),
                module.training,
                sorted(vars(module)),
                sorted(module._non_persistent_buffers_set),
                {kind: list(found.items()) for kind, found in vars(module).items() if "_hooks" in kind and found},
            )
            for name, module in model.named_modules()
        ],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, old = after.pop("state"), dict(before)["state"]
    assert after == {name: value for name, value in before.items() if name != "state"}
    assert state.keys() == old.keys()
    assert all(torch.equal(value, old[name]) for name, value in state.items())


# -- models ----------------------------------------------------------------------------------------------------


def with_lively_norms(model: nn.Module) -> nn.Module:
    """Batch normalisation that neither keeps zeros nor kills channels, in evaluation mode: what a mask has to undo."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.6, 1.4)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.6, 1.4)
    return model.eval()


class SmallNet(nn.Module):
    """Stem (the stage), stride-2 convolution, residual block, global mean and classifier."""

    def __init__(self, width: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.block = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width))
        self.classify = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(self.stem(x)))
        x = F.relu(x + self.block(x))
        return self.classify(x.mean((2, 3)))


class SmallBackbone(nn.Module):
    """Six maps of SSD300's sizes, 38² to 1², from a trunk with the stages pool1, pool2 and pool3."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def step(inputs: int, pool: bool = True) -> nn.Sequential:
            parts = [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
            return nn.Sequential(*parts, *([nn.MaxPool2d(2, ceil_mode=True)] if pool else []))

        self.trunk = nn.Sequential(step(3), step(width), step(width))
        self.first = step(width, pool=False)
        self.extra = nn.ModuleList(
            [
                nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU()),
                nn.Sequential(nn.Conv2d(width, width, 3), nn.ReLU()),
                nn.Sequential(nn.Conv2d(width, width, 3), nn.ReLU()),
            ]
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [self.first(self.trunk(x))]
        for part in self.extra:
            maps.append(part(maps[-1]))
        return {str(level): found for level, found in enumerate(maps)}


def small_ssd(classes: int = 4, width: int = 8) -> SSD:
    """torchvision's SSD with SSD300's anchors on a small backbone; its scores are spread, so that detections have an
    order and the background is rarely certain."""
    anchors = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300],
    )
    backbone = SmallBackbone(width)
    backbone.out_channels = [width] * 6  # where torchvision's SSD looks for it
    model = SSD(backbone, anchors, (300, 300), classes)
    for module in (*backbone.modules(), *model.head.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


class Branches(nn.Module):
    """A stem, a strided block with a shortcut, pooling, resizing, a grouped layer and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        x = torch.relu(self.down(x) + self.shortcut(x))
        x = nn.functional.max_pool2d(self.grouped(x), 3, 2, 1)
        x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def selective_branches(capacity: float | None = 0.3, dtype: torch.dtype = torch.float64) -> Any:
    """`Branches` behind its stem, with a selector whose logits differ from pixel to pixel."""
    torch.manual_seed(0)
    selector = sparsenet.SelectiveModule(8, 8)
    nn.init.normal_(selector.logit.weight)
    example = torch.rand(1, 3, 20, 20, dtype=dtype)
    model = Branches().to(dtype).eval()
    return sparsenet.selectify(model, "stem", selector=selector, capacity=capacity, example_inputs=example)


class Logits(nn.Module):
    """A selector whose logits are parameters, whatever the features."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, features: Tensor) -> Tensor:
        return self.logits
