"""Pooling over windows against PyTorch's own on a map whose inactive pixels are zero, in both storages."""

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional as F

from tests import strategies
from tests.helpers import STORAGES, assert_equal, assert_guided, gradients, guide, keep, recorder, select
from tests.strategies import Pool

every_storage = pytest.mark.parametrize("storage", STORAGES)


@every_storage
@pytest.mark.parametrize("sign", ["mixed", "negative"])
@given(case=strategies.masked_poolings())
def test_equals_the_dense_pooling_and_so_do_its_gradients(
    storage: str, sign: str, case: tuple[Pool, Tensor, bool]
) -> None:
    """Where every active value is negative, an inactive pixel (0) wins the maximum and padding (-∞) does not."""
    pool, mask, full = case
    x = torch.randn(pool.batch, 3, *pool.size, dtype=torch.float64)
    x = (-x.abs() if sign == "negative" else x).requires_grad_()
    result, expected = pool(guide(x, select(mask, storage), full=full)), pool(x if full else keep(x, mask))
    assert_guided(result, expected)
    assert not result.full
    kept = keep(expected, result.selection.mask(result.grid))
    assert_equal(gradients(result.dense("the test"), [x])[0], gradients(kept, [x])[0])


@every_storage
def test_inactive_pixels_and_padding_are_different_things(storage: str) -> None:
    x, mask = torch.full((1, 1, 2, 3), -4.0).double(), torch.tensor([[[True, True, False], [True, True, False]]])
    features = guide(x, select(mask, storage))
    assert F.max_pool2d(features, 3, 1, 1).dense("the test")[0, 0, 0].tolist() == [-4, 0, 0]
    counted = F.avg_pool2d(features, 3, 1, 1).dense("the test")[0, 0, 0]
    assert_equal(counted, torch.tensor([-16 / 9, -16 / 9, 0], dtype=torch.float64))
    uncounted = F.avg_pool2d(features, 3, 1, 1, count_include_pad=False).dense("the test")[0, 0, 0]
    assert_equal(uncounted, torch.tensor([-4, -16 / 6, 0], dtype=torch.float64))


@every_storage
@pytest.mark.parametrize(
    "module",
    [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2), nn.AvgPool2d((3, 2), 2, 1, True, False)],
    ids=str,
)
def test_modules(storage: str, module: nn.Module) -> None:
    x, mask = torch.randn(2, 3, 8, 7).double(), torch.rand(2, 8, 7) < 0.4
    assert_guided(module(guide(x, select(mask, storage))), module(keep(x, mask)))


@every_storage
@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool2d(x, 2, padding=2),
        lambda x: F.avg_pool2d(x, 2, padding=2),
        lambda x: F.avg_pool2d(x, 2, divisor_override=0),
        lambda x: F.max_pool2d(x, 9),
        lambda x: F.avg_pool2d(x, 9),
    ],
)
def test_what_the_dense_pooling_refuses_is_refused(storage: str, pool: Pool) -> None:
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(RuntimeError):
        pool(x)
    with pytest.raises(RuntimeError):
        pool(guide(x, select(torch.ones(1, 4, 4).bool(), storage)))


@every_storage
def test_indices_leave_the_region(storage: str) -> None:
    x, mask, record = torch.randn(1, 2, 4, 4).double(), torch.rand(1, 4, 4) < 0.5, recorder()
    features = guide(x, select(mask, storage, record=record))
    values, indices = F.max_pool2d(features, 2, return_indices=True)
    expected, wanted = F.max_pool2d(keep(x, mask), 2, return_indices=True)
    assert_equal(values, expected)
    assert torch.equal(indices, wanted)
    assert [operation.status for operation in record.operations] == ["exit"]
