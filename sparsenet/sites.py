"""Active sites of one resolution, and kernel maps between two: pure index arithmetic, no features.

A site is one pixel of one image in a batch. Sites are numbered row by row, image after image, and a kernel
map tells for each output site and kernel tap where the tap reads: a row, an inactive pixel (`INACTIVE`,
value 0) or a place outside the image (`OUTSIDE`, whose value is the operation's own padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

INACTIVE = -1
OUTSIDE = -2

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A sliding window: the geometry that convolution and pooling share, each field as (vertical, horizontal).

    `padding` is what lies above and to the left. Whatever the output size makes a window reach below or to
    the right of the image is padding too. `padding_mode` is one of `torch.nn.Conv2d`'s.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    padding_mode: str = "zeros"

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """Whether each output site reads exactly the input site at its own place."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)


class ActiveSites:
    """The active pixels of one resolution: `mask`, bool (N, H, W), and what follows from it."""

    def __init__(self, mask: Tensor):
        self.mask = mask

    @classmethod
    def all(cls, batch: int, size: Pair, device: torch.device) -> ActiveSites:
        """Every pixel active, as in features that still carry their whole context."""
        sites = cls(torch.ones(batch, *size, dtype=torch.bool, device=device))
        sites.index = torch.arange(batch * size[0] * size[1], device=device)
        return sites

    @property
    def size(self) -> Pair:
        return self.mask.shape[1], self.mask.shape[2]

    def __len__(self) -> int:
        return self.index.shape[0]

    @cached_property
    def index(self) -> Tensor:
        """Position of each site in the flattened (N, H, W) grid, ascending: int64 (n,)."""
        return self.mask.flatten().nonzero()[:, 0]

    @cached_property
    def image(self) -> Tensor:
        """Which image of the batch each site belongs to: int64 (n,)."""
        return self.index // (self.size[0] * self.size[1])

    @cached_property
    def line(self) -> Tensor:
        """Vertical place of each site in its image: int64 (n,)."""
        return self.index // self.size[1] % self.size[0]

    @cached_property
    def column(self) -> Tensor:
        """Horizontal place of each site in its image: int64 (n,)."""
        return self.index % self.size[1]

    @cached_property
    def rank(self) -> Tensor:
        """The row of each pixel, or `INACTIVE`; one line and one column more than the map answer `OUTSIDE`:
        int32 (N, H + 1, W + 1)."""
        batch, height, width = self.mask.shape
        rank = torch.full((batch, height + 1, width + 1), OUTSIDE, dtype=torch.int32, device=self.mask.device)
        inside = torch.cumsum(self.mask.flatten(), 0, dtype=torch.int32) - 1
        rank[:, :height, :width] = torch.where(self.mask, inside.view(self.mask.shape), INACTIVE)
        return rank


class KernelMap:
    """Where each tap of each output site reads: `table`, int32 (n_out, taps), and what follows from it."""

    def __init__(self, table: Tensor, inputs: int):
        self.table = table
        self.inputs = inputs

    @cached_property
    def gather(self) -> Tensor:
        """`table` flattened, with everything that is no row sent to one appended row of zeros: row `inputs`."""
        return torch.where(self.table < 0, self.inputs, self.table).flatten()

    @cached_property
    def gather_padded(self) -> Tensor:
        """Like `gather`, but places outside the image go to a second appended row: row `inputs + 1`."""
        outside = (self.table == OUTSIDE).flatten()
        return torch.where(outside, self.inputs + 1, self.gather)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The map by taps, as spconv wants it: int32 (2, taps, most) of (input row, output row) padded with -1,
        and int32 (taps,), how many pairs each tap has."""
        found = (self.table >= 0).T  # (taps, n_out)
        counts = found.sum(1, dtype=torch.int32)
        tap, output = found.nonzero(as_tuple=True)
        first = torch.cumsum(counts, 0) - counts
        slot = torch.arange(len(tap), device=tap.device) - first[tap]
        pairs = torch.full((2, *found.shape), -1, dtype=torch.int32, device=tap.device)
        pairs[0, tap, slot] = self.table[output, tap]
        pairs[1, tap, slot] = output.int()
        return pairs, counts


def kernel_map(source: ActiveSites, window: Window, target: ActiveSites) -> KernelMap:
    """The kernel map of `window` from the sites it reads to the sites it must produce.

    There is no hash table: a tap's place is arithmetic on the output site's coordinates, and its row a look-up
    in the rank image.
    """
    (height, width), (out_height, out_width) = source.size, target.size
    lines = _axis(height, out_height, window, 0, source.rank.device)
    columns = _axis(width, out_width, window, 1, source.rank.device)
    line = lines[target.line] + (target.image * (height + 1))[:, None]  # (n_out, kernel height)
    column = columns[target.column]  # (n_out, kernel width)
    place = (line * (width + 1))[:, :, None] + column[:, None, :]
    return KernelMap(source.rank.view(-1)[place.flatten(1)], len(source))


@lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _axis(length: int, out_length: int, window: Window, axis: int, device: torch.device) -> Tensor:
    """Input coordinate of every (output coordinate, tap) along one axis, `length` standing for outside: (out, taps).

    Small, a function of the geometry alone, and made of a dozen tiny operations: computing it in every pass took a
    tenth of a narrow network's time.
    """
    start = torch.arange(out_length, device=device) * window.stride[axis] - window.padding[axis]
    taps = torch.arange(window.kernel[axis], device=device) * window.dilation[axis]
    place = start[:, None] + taps
    match window.padding_mode:
        case "zeros":
            return torch.where((place < 0) | (place >= length), length, place)
        case "replicate":
            return place.clamp(0, length - 1)
        case "circular":
            return place % length
        case "reflect":
            place = place.abs()
            return torch.where(place >= length, 2 * (length - 1) - place, place)
        case mode:
            raise ValueError(f"padding_mode {mode!r} is not one of zeros, reflect, replicate, circular")
