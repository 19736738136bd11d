"""PeleeNet, the trunk of Pelee, with the figures of the original (Wang, Li and Ling, 2018, arXiv 1804.06882): as a
classifier of ImageNet, and how a classifier's weights become a detector's.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detectors.ssd import initialise
from storage import CheckpointError, read_state

Scaled = Callable[[int], int]

# Stages of PeleeNet: two-way dense layers, and the width of their bottlenecks.
STAGES = [(3, 16), (4, 32), (8, 64), (6, 64)]


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the map's size but for its stride, and BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=1e-3)))


def conv_bn_relu(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    block = conv_bn(inputs, outputs, size, stride)
    block.add_module("relu", nn.ReLU(inplace=True))
    return block


class Stem(nn.Module):
    """(N, 3, H, W) -> (N, outputs, H / 4, W / 4), at a quarter of the cost of a wide convolution."""

    def __init__(self, outputs: int, squeezed: int):
        super().__init__()
        self.first = conv_bn_relu(3, outputs, 3, 2)
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.branch = nn.Sequential(conv_bn_relu(outputs, squeezed, 1), conv_bn_relu(squeezed, outputs, 3, 2))
        self.last = conv_bn_relu(2 * outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([self.pool(x), self.branch(x)], 1))


class TwoWayDense(nn.Module):
    """(N, inputs, H, W) -> (N, inputs + 2 * growth, H, W): what came in, and two branches that see 3x3 and 5x5."""

    def __init__(self, inputs: int, bottleneck: int, growth: int):
        super().__init__()
        self.near = nn.Sequential(conv_bn_relu(inputs, bottleneck, 1), conv_bn_relu(bottleneck, growth, 3))
        self.far = nn.Sequential(
            conv_bn_relu(inputs, bottleneck, 1),
            conv_bn_relu(bottleneck, growth, 3),
            conv_bn_relu(growth, growth, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.near(x), self.far(x)], 1)


def trunk(scaled: Scaled) -> Iterator[tuple[str, nn.Module]]:
    """PeleeNet's parts by name: `stem`, `stage1`, `pool1`, ... `stage4`. A stage ends in its transition's 1x1
    convolution; the transition's pooling rounds up (38, 19, 10)."""
    yield "stem", Stem(scaled(32), scaled(16))
    channels = scaled(32)
    for stage, (depth, bottleneck) in enumerate(STAGES, start=1):
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(TwoWayDense(channels, scaled(bottleneck), scaled(16)))
            channels += 2 * scaled(16)
        yield f"stage{stage}", nn.Sequential(*layers, conv_bn_relu(channels, channels, 1))
        if stage < 4:
            yield f"pool{stage}", nn.AvgPool2d(2, 2, ceil_mode=True)


def scaling(width: float) -> Scaled:
    """Channel counts times `width`, rounded to a multiple of 8."""
    return lambda channels: max(8, round(channels * width / 8) * 8)


def channels_after(scaled: Scaled) -> list[int]:
    """Of the stem and the four stages."""
    return list(accumulate((2 * scaled(16) * depth for depth, _ in STAGES), initial=scaled(32)))


def peleenet(num_classes: int = 1000, *, width: float = 1.0) -> nn.Sequential:
    """The classifier with random weights, (N, 3, 224, 224) -> (N, num_classes); other sizes work too.

    It reads images as torchvision's classifiers do: RGB in 0..1, minus ImageNet's mean, divided by its deviation. At
    width 1 there are 2.80 M parameters, and the convolutions take 507 M multiply-accumulates.
    """
    scaled = scaling(width)
    layers = {
        "trunk": nn.Sequential(OrderedDict(trunk(scaled))),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "dropout": nn.Dropout(0.05),
        "classifier": nn.Linear(channels_after(scaled)[-1], num_classes),
    }
    classifier = nn.Sequential(OrderedDict(layers))
    initialise(classifier)
    return classifier


@torch.no_grad()
def load_trunk(trunk: Any, path: Path) -> None:
    """Begin a detector's trunk with that of a classifier: one of `peleenet`, or the authors' PyTorch checkpoint
    (`features.stemblock...`). The trunk then computes of the detector's input what the classifier's does of its own.

    Raises:
        CheckpointError: no such file, a damaged one, or one of another network; the trunk is as it was.
    """
    state = {name.removeprefix("module."): value for name, value in read_state(path).items()}  # of `DataParallel`
    published = {f"{theirs}.{a}": f"{ours}.{b}" for ours, theirs in _published() for a, b in _PARTS}
    is_published = any(name.startswith("features.") for name in state)
    names = published if is_published else {f"trunk.{name}": name for name in trunk.state_dict()}
    theirs = {name: value for name, value in state.items() if name.startswith(("features.", "trunk."))}
    _compare(path, theirs, {name: trunk.state_dict()[ours] for name, ours in names.items()})
    trunk.load_state_dict({ours: theirs[name] for name, ours in names.items() if name in theirs}, strict=False)
    if is_published:  # whose normalisation adds 1e-5 to the variance, where ours, as the authors' detector, adds 1e-3
        for norm in (module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)):
            variance = norm.get_buffer("running_var")
            norm.weight.mul_(((variance + norm.eps) / (variance + 1e-5)).sqrt())
    # The detector divides by 1 / 0.017 of 255, the classifier by ImageNet's deviation.
    deviation = trunk.stem.first.conv.weight.new_tensor([0.229, 0.224, 0.225])
    trunk.stem.first.conv.weight.div_((255 * 0.017 * deviation).view(1, 3, 1, 1))


_COUNT = "num_batches_tracked"  # which checkpoints of before PyTorch 0.4.1 lack
_PARTS = [("conv.weight", "conv.weight")] + [
    (f"norm.{name}", f"bn.{name}") for name in ("weight", "bias", "running_mean", "running_var", _COUNT)
]


def _published() -> Iterator[tuple[str, str]]:
    """Each convolution with its normalisation: its place in our trunk, and its name in the authors' network."""
    parts = {"near.0": "branch1a", "near.1": "branch1b", "far.0": "branch2a", "far.1": "branch2b", "far.2": "branch2c"}
    stem = {"first": "stem1", "branch.0": "stem2a", "branch.1": "stem2b", "last": "stem3"}
    for ours, theirs in stem.items():
        yield f"stem.{ours}", f"features.stemblock.{theirs}"
    for stage, (depth, _) in enumerate(STAGES, start=1):
        for layer in range(depth):
            for ours, theirs in parts.items():
                yield f"stage{stage}.{layer}.{ours}", f"features.denseblock{stage}.denselayer{layer + 1}.{theirs}"
        yield f"stage{stage}.{depth}", f"features.transition{stage}"


def _compare(path: Path, theirs: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """That a checkpoint has these tensors and no others."""
    if not theirs:
        raise CheckpointError(
            f"{path} has no tensor whose name begins with 'trunk.' or 'features.': it is no classifier of PeleeNet. "
            "Give --trunk one of `peleenet`, or of the authors' training."
        )
    shapes, ours = ({name: tuple(value.shape) for name, value in s.items()} for s in (theirs, wanted))
    different = [name for name in [*ours, *(n for n in shapes if n not in ours)] if shapes.get(name) != ours.get(name)]
    different = [name for name in different if name in shapes or not name.endswith(_COUNT)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"{path} is of another network than this trunk of PeleeNet: {len(different)} tensors differ, such as "
            f"{name}: {shapes.get(name, 'missing')} in the file, {ours.get(name, 'missing')} in the trunk. Give "
            "--trunk another file, or the --width that it was made with."
        )
