"""Normalisation over processes: in a group of one it is what it was. Of two: tests/examples/test_distributed.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsenet.train import synchronised


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def trained(norm: nn.Module, x: Tensor) -> list[Tensor]:
    """Results, gradients and state of two steps."""
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).square().sum().backward()
        assert leaf.grad is not None
        results += [y.detach(), leaf.grad]
    return [*results, *(p.grad for p in norm.parameters() if p.grad is not None), *norm.state_dict().values()]


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (5, 3)),
        (nn.BatchNorm1d, (4, 3, 6)),
        (nn.BatchNorm2d, (2, 3, 4, 5)),
        (nn.BatchNorm3d, (2, 3, 2, 3, 4)),
    ],
)
def test_in_one_process_it_is_batch_normalisation(
    group_of_one: None, kind: type[nn.Module], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    x = torch.randn(shape).double() + 3
    expected = trained(kind(3, **options).double(), x)
    norm = kind(3, **options).double()
    with synchronised(norm):
        assert type(norm) is not kind
        found = trained(norm, x)
    assert type(norm) is kind and not hasattr(norm, "process_group")
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_one_value_has_no_variance(group_of_one: None) -> None:
    norm = nn.BatchNorm2d(2)
    with synchronised(norm), pytest.raises(ValueError, match="no variance of one value"):
        norm(torch.randn(1, 2, 1, 1))
    assert norm.running_var is not None and norm.running_var.tolist() == [1, 1]


class Own(nn.BatchNorm2d):
    pass


def test_what_it_leaves() -> None:
    """Everything but the class, also after an error; subclasses; and, without processes, what is computed."""
    model = nn.Sequential(nn.BatchNorm2d(2), Own(2), nn.SyncBatchNorm(2), nn.BatchNorm2d(2))
    keys, calls = list(model.state_dict()), []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(2, 2, 3, 3)
    expected = nn.BatchNorm2d(2)(x)
    with pytest.raises(KeyboardInterrupt), synchronised(model):
        assert type(model[1]) is Own
        assert list(model.state_dict()) == keys
        assert torch.equal(model[0](x), expected) and calls == [1]
        raise KeyboardInterrupt
    assert [type(module) for module in model] == [nn.BatchNorm2d, Own, nn.SyncBatchNorm, nn.BatchNorm2d]
