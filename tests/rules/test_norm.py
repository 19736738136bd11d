"""Batch normalisation with the statistics of active pixels, and normalisation over channels, in both storages."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests import strategies
from tests.helpers import STORAGES, assert_agrees, assert_equal, assert_guided, gradients, guide, keep, recorder, select

every_storage = pytest.mark.parametrize("storage", STORAGES)
cases = st.tuples(strategies.masks(), st.integers(1, 5), st.booleans(), st.booleans())  # mask, channels, full, affine


def normaliser(channels: int, affine: bool) -> nn.BatchNorm2d:
    """Away from its initial state, where much would be equal by chance."""
    norm = nn.BatchNorm2d(channels, momentum=0.3, affine=affine).double()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def by_hand(x: Tensor, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> Tensor:
    value = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
    return value * norm.weight[:, None, None] + norm.bias[:, None, None] if norm.affine else value


@every_storage
@given(case=cases)
def test_evaluation_uses_the_running_statistics_and_keeps_the_context(
    storage: str, case: tuple[Tensor, int, bool, bool]
) -> None:
    mask, channels, full, affine = case
    norm, x = normaliser(channels, affine).eval(), torch.randn(len(mask), channels, *mask.shape[1:]).double()
    result = norm(guide(x, select(mask, storage), full=full))
    assert result.full == full
    expected = by_hand(x, norm, norm.running_mean, norm.running_var)
    assert_guided(result, expected)
    if full:  # every pixel was computed: what reads over space finds it
        assert_guided(F.max_pool2d(result, 3, 1, 1), F.max_pool2d(expected, 3, 1, 1))


@every_storage
@given(case=cases)
def test_training_uses_the_statistics_of_active_pixels(storage: str, case: tuple[Tensor, int, bool, bool]) -> None:
    mask, channels, full, affine = case
    norm = normaliser(channels, affine)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(len(mask), channels, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    result = norm(guide(x, select(mask, storage), full=full))
    assert result.full == full

    count, active = int(mask.sum()), x.permute(1, 0, 2, 3)[:, mask]  # (C, n)
    if count < 2:
        expected = by_hand(x, norm, mean, var)
        assert_equal(norm.running_mean, mean)
        assert_equal(norm.running_var, var)
    else:
        average = active.sum(1) / count
        squares = (active - average[:, None]).square().sum(1)
        expected = by_hand(x, norm, average, squares / count)
        assert_equal(norm.running_mean, 0.7 * mean + 0.3 * average.detach())
        assert_equal(norm.running_var, 0.7 * var + 0.3 * (squares / (count - 1)).detach())
    assert_guided(result, expected)
    leaves = [x, *norm.parameters()]
    found, wanted = gradients(result.dense("the test"), leaves), gradients(keep(expected, mask), leaves)
    for actual, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-7, atol=1e-7)  # two pixels may be nearly equal


@every_storage
def test_the_layout_of_a_gradient_does_not_matter(storage: str) -> None:
    """PyTorch's CPU kernel mistakes (1, C, n, 1) of ambiguous strides: its gradient is then wrong without an error."""
    mask = torch.rand(2, 5, 5) < 0.4
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    value = normaliser(3, affine=True)(guide(x, select(mask, storage))).value
    gradient = torch.randn_like(value)
    layouts = [gradient.contiguous(), gradient.contiguous(memory_format=torch.channels_last), gradient.mT.clone().mT]
    found = [torch.autograd.grad(value, x, layout, retain_graph=True)[0] for layout in layouts]
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


@every_storage
def test_without_running_statistics(storage: str) -> None:
    norm, x, mask = (
        nn.BatchNorm2d(3, track_running_stats=False).double(),
        torch.randn(2, 3, 5, 5).double(),
        torch.rand(2, 5, 5) < 0.4,
    )
    active = x.permute(1, 0, 2, 3)[:, mask]
    for module in (norm.train(), norm.eval()):
        expected = by_hand(x, norm, active.mean(1), active.var(1, unbiased=False))
        assert_guided(module(guide(x, select(mask, storage))), expected)
    alone = torch.zeros(2, 5, 5, dtype=torch.bool)
    assert_guided(norm(guide(x, select(alone, storage))), x)


@every_storage
def test_a_cumulative_average_counts_batches(storage: str) -> None:
    norm, mask = nn.BatchNorm2d(2, momentum=None).double(), torch.rand(1, 6, 6) < 0.5
    batches = [torch.randn(1, 2, 6, 6).double() for _ in range(3)]
    for x in batches:
        norm(guide(x, select(mask, storage)))
    assert_equal(norm.running_mean, torch.stack([x[:, :, mask[0]].mean((0, 2)) for x in batches]).mean(0))


@every_storage
@given(mask=strategies.masks(), p=st.sampled_from([1.0, 2.0, 3.0]), dim=st.sampled_from([1, -3]), full=st.booleans())
def test_normalize_over_channels(storage: str, mask: Tensor, p: float, dim: int, full: bool) -> None:
    x = torch.randn(len(mask), 4, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    result, expected = F.normalize(guide(x, select(mask, storage), full=full), p, dim), F.normalize(x, p, dim)
    assert result.full == full
    assert_guided(result, expected)
    assert_equal(gradients(result.dense("the test"), [x])[0], gradients(keep(expected, mask), [x])[0])


@every_storage
@pytest.mark.parametrize("dim", [0, 2, -1])
def test_normalize_over_space_leaves_the_region(storage: str, dim: int) -> None:
    x, mask, record = torch.randn(2, 3, 4, 4).double(), torch.rand(2, 4, 4) < 0.5, recorder()
    result = F.normalize(guide(x, select(mask, storage, record=record)), dim=dim)
    assert_equal(result, F.normalize(keep(x, mask), dim=dim))
    (operation,) = record.operations
    assert (operation.name, operation.status) == ("F.normalize", "exit")
    assert operation.reason == "works over another dimension than channels"


@every_storage
@pytest.mark.parametrize("full", [False, True])
def test_statistics_of_half_precision_are_in_single(storage: str, full: bool) -> None:
    """With a mean of 100, squares in bfloat16 would have no digit left for a variance of 1."""
    mask, x = torch.rand(2, 9, 9) < 0.5, (torch.randn(2, 3, 9, 9) + 100).bfloat16()
    norm = nn.BatchNorm2d(3)
    result = norm(guide(x, select(mask, storage), full=full))
    assert result.dtype == torch.bfloat16
    active = x.double().permute(1, 0, 2, 3)[:, mask]
    expected = by_hand(x.double(), norm.double(), active.mean(1), active.var(1, unbiased=False))
    torch.testing.assert_close(result.dense("the test").double(), keep(expected, mask), rtol=2**-7, atol=2**-7)


# -- statistics of an image's whole map ------------------------------------------------------------------------

WEIGHT, BIAS = (torch.linspace(-1, 2, 6, dtype=torch.float64).roll(shift).requires_grad_() for shift in (0, 2))
BY_IMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "F.group_norm": lambda x: F.group_norm(x, 3, WEIGHT, BIAS),
    "F.group_norm of one group": lambda x: F.group_norm(x, 1, eps=0.1),
    "F.group_norm by name": lambda x: F.group_norm(input=x, num_groups=2, weight=WEIGHT),
    "F.instance_norm": lambda x: F.instance_norm(x, weight=WEIGHT, bias=BIAS, eps=0.01),
}


@every_storage
@pytest.mark.parametrize("name", BY_IMAGE)
@given(mask=strategies.masks(), full=st.booleans())
def test_statistics_of_an_image_count_inactive_pixels_as_zeros(
    storage: str, name: str, mask: Tensor, full: bool
) -> None:
    x = torch.randn(len(mask), 6, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    if mask[0].numel() == 1 and name == "F.instance_norm":
        return  # which PyTorch refuses
    assert_agrees(BY_IMAGE[name], storage, mask, x, full=full)


@every_storage
@given(mask=strategies.masks(), full=st.booleans())
def test_local_response_norm(storage: str, mask: Tensor, full: bool) -> None:
    x = torch.randn(len(mask), 6, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    function = lambda x: F.local_response_norm(x, 3, alpha=0.1, beta=0.6, k=2.0)  # noqa: E731
    assert_agrees(function, storage, mask, x, full=full, pointwise=True)


@every_storage
def test_instance_norm_by_running_statistics(storage: str) -> None:
    norm = torch.nn.InstanceNorm2d(6, affine=True, track_running_stats=True).double().eval()
    torch.nn.init.normal_(norm.running_mean)
    x, mask = torch.randn(2, 6, 3, 4).double(), torch.rand(2, 3, 4) < 0.5
    assert_guided(norm(guide(x, select(mask, storage))), norm(x))


@every_storage
def test_groups_that_do_not_divide_the_channels(storage: str) -> None:
    with pytest.raises(RuntimeError, match="cannot be normalised in 4 groups"):
        F.group_norm(guide(torch.randn(1, 6, 3, 3), select(torch.ones(1, 3, 3).bool(), storage)), 4)
