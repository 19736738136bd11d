"""The convolution that surgery leaves in place of a guided `nn.Conv2d`."""

from __future__ import annotations

from torch import Tensor, nn

from sparsenet.features import Departed, Features, Leaves
from sparsenet.rules.conv import masked_conv2d


def by_rule(conv: nn.Conv2d, x: Features, backend: str, fill: Tensor | None, live: bool | None = None) -> Features:
    """A module's convolution of guided features: see `masked_conv2d`."""
    return masked_conv2d(
        x,
        conv.weight,
        conv.bias,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        padding_mode=conv.padding_mode,
        backend=backend,
        fill=fill,
        live=live,
    )


class MaskedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that computes guided features at their active sites only, and anything else as ever.

    Made from a convolution by `guide` and turned back by `release`, which change the class and nothing else: the
    parameters, their names and their identity stay.

    Attributes:
        path: the module's path in its model.
        size: (height, width) of its output in the dry run.
        backend: this layer's own choice; "auto" leaves it to the model.
        fill: what inactive pixels hold where the result leaves the guided region, (out_channels,), or `None` for 0.
    """

    path: str
    size: tuple[int, int]
    backend: str
    fill: Tensor | None

    @classmethod
    def guide(cls, conv: nn.Conv2d, path: str, size: tuple[int, int], fill: Tensor | None = None) -> MaskedConv2d:
        conv.__class__ = cls
        assert isinstance(conv, cls)
        conv.path, conv.size, conv.backend = path, size, "auto"
        conv.register_buffer("fill", fill, persistent=False)
        return conv

    def release(self) -> nn.Conv2d:
        del self.path, self.size, self.backend, self.fill
        self.__class__ = nn.Conv2d  # type: ignore[assignment]
        return self

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Departed):
            input = input.reentered()
        if not isinstance(input, Features):
            return super().forward(input)
        try:
            return by_rule(self, input, self.backend, self.fill, input.selection.live_behind(self.path))
        except Leaves:
            return super().forward(input)  # its functions leave for the same reason, as exits

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, masked at {self.size[0]}x{self.size[1]}, backend={self.backend}"
