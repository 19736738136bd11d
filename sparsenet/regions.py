"""Masks and boxes in the pixels of the caller's images, brought to the network's input and to its feature maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsenet.constants import constant
from sparsenet.kernels import index, machine
from sparsenet.sites import Pair


@dataclass
class Frame:
    """Where the caller's images lie in the network's input: each at the top left of its `canvas`.

    Sizes are (height, width) in pixels: `originals` as the caller gave the images, `placed` as they lie in the
    canvas after the network's own resizing. What a canvas holds beside its image is batch padding.
    """

    originals: list[Pair]
    placed: list[Pair]
    canvas: Pair

    @classmethod
    def plain(cls, batch: int, size: Pair) -> Frame:
        """Of a network that takes its images as they are."""
        return cls([size] * batch, [size] * batch, size)


@dataclass(frozen=True)
class Regions:
    """Checked regions of interest of a batch: one bool mask (H, W) or one box tensor (boxes, 4) per image."""

    masks: list[Tensor] | None = None
    boxes: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.masks if self.masks is not None else self.boxes or [])

    def entry_mask(self, frame: Frame | None, batch: int, device: torch.device) -> Tensor:
        """The mask of the whole batch, bool (N, H, W), of any H and W, covering the network's input.

        Raises:
            ValueError: when there are not as many regions as images; for boxes and per-image masks, when the
                root module was not called, so that nothing is known of the images.
        """
        if len(self) != batch:
            raise ValueError(f"the mask is for {len(self)} images, but the batch has {batch}: give one per image")
        if self.masks is not None and _plain(frame) and len({mask.shape for mask in self.masks}) == 1:
            return torch.stack(self.masks).to(device, non_blocking=True)
        if frame is None:
            raise ValueError(
                "boxes and per-image masks need the sizes of the images: call the selective model whole, "
                "or give a bool mask (N, H, W)"
            )
        if len(frame.placed) != batch:
            raise ValueError(
                f"the model was called with {len(frame.placed)} images, but the stage's map is of {batch}: which box "
                "lies where cannot be told; give a bool mask (N, H, W) of the map"
            )
        canvas = torch.zeros(batch, *frame.canvas, dtype=torch.bool, device=device)
        if self.masks is not None:
            for image, mask, (height, width) in zip(canvas, self.masks, frame.placed, strict=True):
                image[:height, :width] = any_pool(mask[None].to(device, non_blocking=True), (height, width))[0]
        else:
            boxes = [part.to(device, non_blocking=True) for part in self.placed_boxes(frame)]
            for image, part in zip(canvas, boxes, strict=True):
                image.copy_(_drawn(part, frame.canvas))
        return canvas

    def full(self, frame: Frame | None, batch: int) -> bool | None:
        """Whether `entry_mask` has every pixel active; `None` where that is as soon found from it."""
        masks = self.masks
        if masks is None or len(masks) != batch or not _plain(frame) or not all(map(_by_kernel, masks)):
            return None
        return all(map(index.all_of, masks))

    def placed_boxes(self, frame: Frame) -> list[Tensor]:
        """Boxes in the pixels of the network's input, clipped to their image: float (boxes, 4) each."""
        assert self.boxes is not None
        placed = []
        for boxes, (from_h, from_w), (to_h, to_w) in zip(self.boxes, frame.originals, frame.placed, strict=True):
            limit = boxes.new_tensor([to_w, to_h, to_w, to_h])
            scale = limit / boxes.new_tensor([from_w, from_h, from_w, from_h])
            placed.append((boxes * scale).clamp(min=0).minimum(limit))
        return placed


def _plain(frame: Frame | None) -> bool:
    """Whether the network takes its images as they are, as far as that is known."""
    return frame is None or frame.originals == frame.placed == [frame.canvas] * len(frame.placed)


def _drawn(boxes: Tensor, size: Pair) -> Tensor:
    """The pixels that boxes (boxes, 4) touch, bool (H, W): a product of lines and columns, for their numbers may lie on
    a device that would have to be waited for."""
    left, top, right, bottom = boxes.T[:, :, None]
    whole = (right > left) & (bottom > top)
    lines, columns = (torch.arange(length, device=boxes.device) for length in size)
    lines = (lines >= top.floor()) & (lines < bottom.ceil()) & whole
    columns = (columns >= left.floor()) & (columns < right.ceil())
    return (lines.float().T @ columns.float()) > 0


class Everywhere(Regions):
    """Regions of a pass in which every pixel is active, whatever its batch."""

    def entry_mask(self, frame: Frame | None, batch: int, device: torch.device) -> Tensor:
        return torch.ones(batch, 1, 1, dtype=torch.bool, device=device)

    def full(self, frame: Frame | None, batch: int) -> bool | None:
        return True


def check_regions(regions: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Regions:
    """`Regions` of what a caller gives: see `sparsenet.use_mask` for the forms.

    Raises:
        TypeError, ValueError: for a wrong type, dtype or shape, for NaN, and for boxes of x2 < x1 or y2 < y1.
    """
    forms = "a bool tensor (N, H, W), or a list with one bool mask (H, W) or box tensor (boxes, 4) per image"
    if isinstance(regions, Tensor):
        if regions.dtype != torch.bool:
            raise TypeError(f"a mask must be bool, not {regions.dtype} (use `mask > 0`); a mask is {forms}")
        if regions.dim() != 3 or 0 in regions.shape[1:]:
            raise ValueError(f"a mask tensor must be (N, H, W), not {tuple(regions.shape)}; a mask is {forms}")
        return Regions(masks=list(regions))
    if not isinstance(regions, list | tuple) or not all(isinstance(part, Tensor) for part in regions):
        raise TypeError(f"a mask is {forms}, not {type(regions).__name__}")
    parts = list(regions)
    if parts and all(part.dtype == torch.bool for part in parts):
        if any(part.dim() != 2 or part.numel() == 0 for part in parts):
            raise ValueError(f"each image's mask must be (H, W), not {[tuple(part.shape) for part in parts]}")
        return Regions(masks=parts)
    for part in parts:
        if part.dtype == torch.bool or part.is_complex():
            raise TypeError(f"boxes must be numbers, not {part.dtype}; a mask is {forms}")
        if part.numel() and (part.dim() != 2 or part.shape[1] != 4):
            raise ValueError(f"boxes must be (boxes, 4): x1, y1, x2, y2, not {tuple(part.shape)}")
    boxes = [part.reshape(-1, 4).float() for part in parts]
    for image, part in enumerate(boxes):
        if part.isnan().any():
            raise ValueError(f"boxes of image {image} have NaN: {part[part.isnan().any(1)].tolist()}")
        if (part[:, 2:] < part[:, :2]).any():
            raise ValueError(f"boxes of image {image} are not x1, y1, x2, y2: some have x2 < x1 or y2 < y1")
    return Regions(boxes=boxes)


def _by_kernel(mask: Tensor) -> bool:
    """Whether kernels can read a mask."""
    return mask.device.type == "cpu" and machine.unsupported() is None and not torch.compiler.is_compiling()


def any_pool(mask: Tensor, size: Pair) -> Tensor:
    """Bool (N, H, W) to (N, *size): a cell is active if any pixel under it is; nearest to a finer size."""
    if mask.shape[1:] == size:
        return mask
    coarser = mask.shape[1] >= size[0] and mask.shape[2] >= size[1]
    if coarser and _by_kernel(
        mask
    ):  # a narrow network spent 2 % of its time on PyTorch's pooling, which takes numbers only
        return index.any_of(mask, _cells(mask.shape[1], size[0]), _cells(mask.shape[2], size[1]))
    return by_cells(F.adaptive_max_pool2d, mask.float(), size) > 0


@constant(64)
def _cells(length: int, cells: int) -> Tensor:
    """The bounds of adaptive pooling along an axis: int32 (cells, 2)."""
    place = torch.arange(cells)
    return torch.stack([place * length // cells, -(-(place + 1) * length // cells)], 1).int()


def covered(mask: Tensor, size: Pair) -> Tensor:
    """Bool (N, H, W) to numbers (N, *size): the share of each cell that the mask covers; nearest to a finer size."""
    return by_cells(F.adaptive_avg_pool2d, mask.float(), size)


def by_cells(pool: Callable[[Tensor, Pair], Tensor], numbers: Tensor, size: Pair) -> Tensor:
    """Numbers (N, H, W) to (N, *size), pooled adaptively to a coarser size, nearest to a finer one."""
    coarse = (min(numbers.shape[1], size[0]), min(numbers.shape[2], size[1]))
    pooled = pool(numbers[:, None], coarse)
    return (pooled if coarse == size else F.interpolate(pooled, size, mode="nearest"))[:, 0]


def box_cells(boxes: list[Tensor], size: Pair, stride: Pair) -> Tensor:
    """Cells that boxes, grown by one stride on each side, touch, by the area of the smallest such box in cells; 0 where
    there is none: int32 (N, *size).

    Columns ⌊(x1 - s) / s⌋ … ⌈(x2 + s) / s⌉ - 1, clipped, and rows alike: where this is not 0 is the target mask of
    direct supervision (SCN, section on direct supervision: "expand one stride").

    Args:
        boxes: float (boxes, 4) for each image, in pixels of the network's input.
        stride: pixels of the input per cell, (vertical, horizontal).
    """
    cells = torch.zeros(len(boxes), *size, dtype=torch.int32, device=boxes[0].device if boxes else None)
    for image, part in zip(cells, boxes, strict=True):
        step, limit = part.new_tensor([stride[1], stride[0]]), part.new_tensor([size[1], size[0]])
        low = ((part[:, :2] - step) / step).floor().clamp(min=0).minimum(limit).long().tolist()
        high = ((part[:, 2:] + step) / step).ceil().minimum(limit).clamp(min=0).long().tolist()
        spans = [
            ((right - left) * (bottom - top), left, top, right, bottom)
            for (left, top), (right, bottom) in zip(low, high, strict=True)
        ]
        for area, left, top, right, bottom in sorted(spans, reverse=True):  # so that the smallest comes last
            image[top:bottom, left:right] = area
    return cells
