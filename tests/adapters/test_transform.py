"""torchvision's transform of images in frozen detectors, against its own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from sparsenet.adapters.torchvision_transform import FrozenTransform
from sparsenet.kernels import machine

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LAYOUTS = ("planes", "pixels", "turned", "every other")

needs_kernels = pytest.mark.skipif(machine.unsupported() is not None, reason=str(machine.unsupported()))


def transform(fixed: tuple[int, int] | None, divisor: int, shorter: int = 40, longer: int = 60) -> Any:
    made = GeneralizedRCNNTransform(shorter, longer, MEAN, DEVIATION, size_divisible=divisor, fixed_size=fixed)
    return made.eval()


def image_of(size: tuple[int, int], layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    height, width = size
    match layout:
        case "planes":
            return torch.rand(3, height, width, dtype=dtype)
        case "pixels":
            return torch.rand(height, width, 3, dtype=dtype).permute(2, 0, 1)
        case "turned":
            return torch.rand(3, width, height, dtype=dtype).mT
        case _:
            return torch.rand(5, 2 * height, 3 * width, dtype=dtype)[1:4, ::2, 1::3]


def by_hand(given: Any, images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """In float64, from torchvision's own."""
    batch, _ = given([image.double() for image in images])
    return batch.tensors, batch.image_sizes


@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70), st.sampled_from(LAYOUTS)), min_size=1, max_size=3),
    st.sampled_from([None, (40, 50), (33, 33)]),
    st.sampled_from([1, 8, 32]),
    st.integers(0, 99),
)
def test_any_images(sizes: list[tuple[int, int, str]], fixed: tuple[int, int] | None, divisor: int, seed: int) -> None:
    torch.manual_seed(seed)
    own = transform(fixed, divisor)
    images = [image_of((height, width), layout) for height, width, layout in sizes]
    before = [image.clone() for image in images]
    found, _ = FrozenTransform(own)(images)
    expected, expected_sizes = by_hand(own, images)
    assert [tuple(size) for size in found.image_sizes] == [tuple(size) for size in expected_sizes]
    assert found.tensors.shape == expected.shape and found.tensors.dtype == torch.float32
    # As far from it as torchvision's own is, and a few roundings.
    distance = (own(images)[0].tensors - expected).abs().max()
    assert (found.tensors - expected).abs().max() <= 2 * distance + 16 * torch.finfo(torch.float32).eps
    assert all(torch.equal(image, kept) for image, kept in zip(images, before, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "fixed"), [((50, 40), (40, 50)), ((40, 55), None), ((30, 60), None)])
@needs_kernels
def test_images_that_have_their_size_are_the_same_to_the_last_bit(
    size: tuple[int, int], fixed: tuple[int, int] | None, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not resized, and are written once."""
    own, image = transform(fixed, 32), image_of(size, layout)
    expected = own([image, image])[0].tensors
    for name in ("normalize", "resize", "batch_images"):
        monkeypatch.setattr(GeneralizedRCNNTransform, name, None)
    assert torch.equal(FrozenTransform(own)([image, image])[0].tensors, expected)


@needs_kernels
def test_what_is_set_later_counts() -> None:
    own, image = transform(None, 1), image_of((40, 50), "planes")
    frozen = FrozenTransform(own)
    frozen([image])
    own.image_mean, own.image_std, own.min_size = [0.1, 0.2, 0.3], [2.0, 3.0, 4.0], (20,)
    assert frozen([image])[0].image_sizes == [(20, 25)]
    torch.testing.assert_close(frozen([image])[0].tensors, own([image])[0].tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_what_kernels_do_not_take_is_torchvisions(dtype: torch.dtype) -> None:
    own, image = transform((50, 40), 1), image_of((40, 50), "pixels", dtype)
    assert torch.equal(FrozenTransform(own)([image])[0].tensors, own([image])[0].tensors)


def test_targets_are_resized_as_ever() -> None:
    own, image = transform(None, 1), image_of((20, 30), "planes")
    targets = [{"boxes": torch.tensor([[1.0, 2, 3, 4]])}]
    batch, found = FrozenTransform(own)([image], targets)
    assert found[0]["boxes"].tolist() == [[2, 4, 6, 8]]
    assert torch.equal(batch.tensors, own([image])[0].tensors)


@pytest.mark.parametrize(
    "wrong", [[torch.zeros(3, 8, 8, dtype=torch.uint8)], [torch.zeros(8, 8)], [torch.zeros(2, 8, 8)], []]
)
def test_wrong_images_are_refused_as_ever(wrong: list[Tensor]) -> None:
    own = transform((50, 40), 1)
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)) as expected:
        own(wrong)
    with pytest.raises(expected.type) as found:
        FrozenTransform(own)(wrong)
    assert str(found.value) == str(expected.value)


def test_in_training_sizes_are_drawn_as_ever() -> None:
    own, image = transform(None, 1).train(), image_of((40, 50), "planes")
    own.min_size = (10, 20, 30, 40)
    found, expected = [], []
    for batches, forward in ((found, FrozenTransform(own)), (expected, own)):
        torch.manual_seed(0)
        batches += [forward([image])[0].tensors for _ in range(9)]
    assert len({batch.shape for batch in expected}) > 1
    assert all(map(torch.equal, found, expected))


def test_gradient_reaches_images() -> None:
    own, image = transform((50, 40), 1), image_of((40, 50), "planes").requires_grad_()
    FrozenTransform(own)([image])[0].tensors.sum().backward()
    assert image.grad is not None and image.grad.abs().min() > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_are_of_their_own_transform(copied: Any) -> None:
    own = transform((50, 40), 1)
    own.forward = FrozenTransform(own)
    twin = copied(own)
    assert twin.forward.transform is twin
