"""The Selective Module (SM): a small network that rates how much each pixel of a feature map matters.

The module of SCN ("Selective Convolutional Network", arXiv 2002.01205): an encoder-decoder on a shallow
feature map with a skip, dilated convolutions and a non-local block. The paper gives no widths; with width c:

    reduce   1×1, C → c                                         full resolution, source of the skip
    down     3×3 stride 2, c → 2c                               half resolution from here on
    context  3×3 dilation 2, then 3×3 dilation 4, 2c → 2c
    attend   non-local block on 2c channels, c inside
    up       transposed 3×3 stride 2, 2c → c                    back to exactly (H, W)
    head     3×3 on the sum of up and reduce, c → c, then 1×1, c → 1

Every convolution is followed by BatchNorm and ReLU, but for those of the non-local block and the last one.
"""

from itertools import count, product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_KEYS = 400  # 20×20, so that attention costs at most 400 products per pixel, whatever the resolution
MAX_WIDTH = 32
OPEN_LOGIT = 2.0  # sigmoid 0.88: an untrained module selects everything, and training closes pixels


class NonLocal(nn.Module):
    """Embedded-Gaussian non-local block (Wang et al., CVPR 2018): every pixel attends to the whole map.

    y = x + W · softmax(θ(x)ᵀ pool(φ(x)) / √c) pool(g(x))ᵀ, with W zero at first: the block starts as the
    identity. 1/√c is not in the paper; it only rescales θ, and keeps the softmax from saturating early.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, 3 * inner, 1)  # θ, φ and g in one product
        self.restore = nn.Conv2d(inner, channels, 1)
        for parameter in self.restore.parameters():
            nn.init.zeros_(parameter)

    @staticmethod
    def key_grid(height: int, width: int) -> tuple[int, int, int]:
        """The smallest pooling factor for at most `MAX_KEYS` keys, and the rows and columns that remain."""
        grids = ((k, -(-height // k), -(-width // k)) for k in count(1))
        return next(grid for grid in grids if grid[1] * grid[2] <= MAX_KEYS)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.embed(x).chunk(3, dim=1)
        factor, *_ = self.key_grid(*x.shape[-2:])
        if factor > 1:
            key, value = (F.max_pool2d(t, factor, ceil_mode=True) for t in (key, value))
        # (N, 1, pixels, c). Only rows that are contiguous reach the fused kernels: 4× on a CPU.
        query, key, value = (t.flatten(2).mT.contiguous().unsqueeze(1) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.restore(attended.squeeze(1).mT.unflatten(2, x.shape[-2:]))


def _conv_bn_relu(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1, separable: bool = False
) -> nn.Sequential:
    def conv(outputs: int, groups: int) -> nn.Conv2d:
        padding = dilation * (kernel // 2)
        return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)

    convs = (
        [conv(inputs, groups=inputs), nn.Conv2d(inputs, outputs, 1, bias=False)]
        if separable
        else [conv(outputs, groups=1)]
    )
    return nn.Sequential(*convs, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class SelectiveModule(nn.Module):
    """Features (N, C, H, W) → one logit per pixel (N, 1, H, W), for any H, W ≥ 1.

    The switches are the paper's ablation:

    dilated    dilations 2 and 4 in the context convolutions, otherwise 1
    non_local  the non-local block, otherwise the identity
    deconv     the transposed convolution, otherwise 1×1 and bilinear upsampling
    skip       the sum with the reduced input, otherwise the upsampled features alone
    separable  3×3 convolutions as depthwise and pointwise (not the transposed one)
    """

    def __init__(
        self,
        channels: int,
        width: int = MAX_WIDTH,
        *,
        dilated: bool = True,
        non_local: bool = True,
        deconv: bool = True,
        skip: bool = True,
        separable: bool = False,
    ) -> None:
        super().__init__()
        self.skip = skip
        near, far = (2, 4) if dilated else (1, 1)
        self.reduce = _conv_bn_relu(channels, width, 1)
        self.down = _conv_bn_relu(width, 2 * width, 3, stride=2, separable=separable)
        self.context = nn.Sequential(
            _conv_bn_relu(2 * width, 2 * width, 3, dilation=near, separable=separable),
            _conv_bn_relu(2 * width, 2 * width, 3, dilation=far, separable=separable),
        )
        self.attend = NonLocal(2 * width, width) if non_local else nn.Identity()
        self.up: nn.ConvTranspose2d | nn.Conv2d = (
            nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, bias=False)
            if deconv
            else nn.Conv2d(2 * width, width, 1, bias=False)
        )
        self.up_norm = nn.BatchNorm2d(width)
        self.head = _conv_bn_relu(width, width, 3, separable=separable)
        self.logit = nn.Conv2d(width, 1, 1)
        nn.init.normal_(self.logit.weight, std=0.01)
        assert self.logit.bias is not None
        nn.init.constant_(self.logit.bias, OPEN_LOGIT)

    def forward(self, features: Tensor) -> Tensor:
        size = list(features.shape[-2:])
        # Attention leaves its result channels-last; meeting it there saves 5 to 15 % on a CPU.
        fine = self.reduce(features).contiguous(memory_format=torch.channels_last)
        coarse = self.attend(self.context(self.down(fine)))
        if isinstance(self.up, nn.ConvTranspose2d):
            coarse = self.up(coarse, output_size=size)
        else:
            coarse = F.interpolate(self.up(coarse), size, mode="bilinear")
        upsampled = F.relu(self.up_norm(coarse), inplace=True)
        return self.logit(self.head(upsampled + fine if self.skip else upsampled))

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-accumulates for one image of the given (H, W), in convolutions and attention."""
        height, width = size
        half = (height + 1) // 2, (width + 1) // 2
        pixels, half_pixels = height * width, half[0] * half[1]
        total = pixels * _weights(self.reduce, self.head, self.logit)
        # A transposed convolution spreads each of its inputs over all its taps.
        total += half_pixels * _weights(self.down, self.context, self.attend, self.up)
        if isinstance(self.attend, NonLocal):
            _, rows, columns = NonLocal.key_grid(*half)
            total += 2 * half_pixels * rows * columns * self.attend.restore.in_channels
        return total

    @classmethod
    def fit(
        cls, channels: int, *, size: tuple[int, int], budget: float, separable: bool = False, **switches: bool
    ) -> "SelectiveModule":
        """The widest module that costs at most `budget` MACs at `size`; separable only if it must be.

        Widths are multiples of 8 up to a quarter of the channels (8 at least, 32 at most).
        """
        widest = min(MAX_WIDTH, max(8, channels // 32 * 8))
        for lighter, width in product((separable, True), range(widest, 0, -8)):
            switches["separable"] = lighter
            with torch.device("meta"):  # neither memory nor random numbers for what is only counted
                cost = cls(channels, width, **switches).macs(size)
            if cost <= budget:
                return cls(channels, width, **switches)
        raise ValueError(
            f"no Selective Module for {channels} channels at {size[0]}×{size[1]} fits {budget:,.0f} MACs: "
            f"the smallest takes {cost:,}: embed later, or give one as selector=SelectiveModule({channels}, width)."
        )


def _weights(*modules: nn.Module) -> int:
    """Convolution weights, each of which is one multiply-accumulate per position."""
    parts = (part for module in modules for part in module.modules())
    return sum(part.weight.numel() for part in parts if isinstance(part, nn.Conv2d | nn.ConvTranspose2d))
