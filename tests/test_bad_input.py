"""Every error names the way out, and surgery that fails leaves the model as it was."""

from __future__ import annotations

import builtins
import copy
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import sparsenet
from sparsenet import GivenMask, SelectiveModule
from sparsenet.kernels import triton_support
from tests.models import SmallNet, assert_as_good, assert_unchanged, blobs, small_ssd, snapshot, with_lively_norms

IMAGES = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))  # whatever was imported before


@contextmanager
def raises(kind: type[Exception], model: nn.Module, *parts: str) -> Iterator[None]:
    """An error of a kind whose message has all parts, and leaves the model unchanged."""
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert_unchanged(model, before)


@pytest.fixture
def selective() -> nn.Module:
    return sparsenet.selectify(SmallNet().eval(), "stem", selector=GivenMask(), example_inputs=IMAGES)


# -- surgery ---------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Give a stage's output another form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return {
            "tuple": lambda: (x, x),
            "dict": lambda: {"features": x},
            "2-D": lambda: x.mean((2, 3)),
            "tokens": lambda: x.flatten(2).mT,
            "integers": lambda: (x * 100).long(),
        }[self.form]()


class Staged(nn.Module):
    """A network with a stage of an unusual output, and a module that is never called."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.odd = Broken(form)
        self.head = nn.Conv2d(4, 2, 3, padding=1)
        self.unused = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.odd(x)
        return self.head(x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("at", "parts"),
    [
        ("layr2", ("no stage 'layr2' in ResNet", "the closest are 'layer2'", "Stages: stride2, pool1, stride4")),
        ("pool2", ("no stage 'pool2'", "'pool1'", "Modules: conv1, bn1, relu, maxpool, layer1")),
        ("pool0", ("no stage 'pool0'", "'pool1'")),
        ("stride3", ("no stage 'stride3'", "'stride2'", "stride32")),
        ("stride64", ("no stage 'stride64'", "'stride4'")),
        ("", ("no stage ''", "Stages: stride2, pool1", "Modules: conv1")),
        ("xyzzy", ("no stage 'xyzzy'", "Stages: stride2, pool1, stride4, stride8, stride16, stride32")),
    ],
)
def test_unknown_stage(at: str, parts: tuple[str, ...], inplace: bool) -> None:
    model = torchvision.models.resnet18(weights=None, num_classes=2)
    with raises(ValueError, model, *parts):
        sparsenet.selectify(model, at, example_inputs=torch.rand(1, 3, 64, 64), inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("form", "parts"),
    [
        ("tuple", ("stage 'odd' gives tuple, not one tensor", "choose a module inside or before it")),
        ("dict", ("stage 'odd' gives dict, not one tensor", "choose a module inside or before it")),
        ("2-D", ("stage 'odd' gives a tensor of shape (2, 4), not a map (N, C, H, W)", "choose an earlier stage")),
        ("tokens", ("shape (2, 320, 4)", "not a map", "choose an earlier stage")),
        ("integers", ("stage 'odd' gives torch.int64, not floating-point features",)),
    ],
)
def test_stage_that_gives_no_map(form: str, parts: tuple[str, ...], inplace: bool) -> None:
    model = Staged(form)
    with raises(ValueError, model, *parts):
        sparsenet.selectify(model, "odd", example_inputs=IMAGES, inplace=inplace)


def test_stage_that_never_fires() -> None:
    model = Staged("tuple")
    with raises(RuntimeError, model, "stage 'unused' did not run on the example inputs", "choose a module that"):
        sparsenet.selectify(model, "unused", example_inputs=IMAGES, inplace=True)


def test_stages_of_a_traced_feature_extractor_never_fire() -> None:
    """Its graph calls the leaf modules, and functions in place of the others."""
    model = torchvision.models.feature_extraction.create_feature_extractor(
        torchvision.models.resnet18(weights=None), ["layer2"]
    )
    with raises(RuntimeError, model, "stage 'layer1' did not run", "'strideN' finds", "select before tracing"):
        sparsenet.selectify(model, "layer1", example_inputs=torch.rand(1, 3, 32, 32), inplace=True)
    images = torch.rand(2, 3, 64, 64)
    selective = sparsenet.selectify(model.eval(), "stride4", selector=GivenMask(), example_inputs=images)
    with torch.no_grad(), sparsenet.use_mask(torch.ones(2, 1, 1, dtype=torch.bool)):
        torch.testing.assert_close(selective(images)["layer2"], model(images)["layer2"])


def test_a_compiled_model() -> None:
    with pytest.raises(ValueError, match=r"is compiled: .* torch\.compile\(sparsenet\.selectify"):
        sparsenet.selectify(torch.compile(SmallNet()), "stem", example_inputs=IMAGES, inplace=True)
    with pytest.raises(ValueError, match="is compiled"):
        sparsenet.stages(torch.compile(SmallNet()), example_inputs=IMAGES)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model() -> None:
    for scripted in (torch.jit.script(SmallNet()), torch.jit.trace(SmallNet(), IMAGES)):
        with pytest.raises(ValueError, match="give the Python model it was made from"):
            sparsenet.selectify(scripted, "stem", example_inputs=IMAGES, inplace=True)


def test_an_exported_model() -> None:
    """It has no modules left to embed at."""
    model = torch.export.export(SmallNet().eval(), (IMAGES,)).module()
    with pytest.raises((ValueError, RuntimeError), match=r"no stage|select before tracing"):
        sparsenet.selectify(model, "stem", example_inputs=IMAGES)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_on_the_meta_device(inplace: bool) -> None:
    with torch.device("meta"):
        model = SmallNet()
    with pytest.raises(ValueError, match=r"on the meta device, stem\.0\.weight .* model\.to_empty"):
        sparsenet.selectify(model, "stem", example_inputs=IMAGES, inplace=inplace)
    assert type(model.down) is nn.Conv2d


class Lazy(nn.Module):
    """A network whose layers learn their input channels in the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.LazyConv2d(4, 3, padding=1)
        self.body = nn.LazyConv2d(5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x).relu()).mean((2, 3))


def test_lazy_parameters() -> None:
    """A copy is initialised by the dry run; in place that would change the caller's model even where surgery fails."""
    model = Lazy()
    with pytest.raises(ValueError, match=r"not initialised, stem\.weight .* call the model on an input first"):
        sparsenet.selectify(model, "stem", selector=GivenMask(), example_inputs=IMAGES, inplace=True)
    selective = sparsenet.selectify(model, "stem", selector=GivenMask(), example_inputs=IMAGES)
    assert isinstance(model.stem, nn.LazyConv2d)
    assert isinstance(selective.body, sparsenet.MaskedConv2d)
    with sparsenet.use_mask(torch.ones(2, 1, 1, dtype=torch.bool)):
        torch.testing.assert_close(selective(IMAGES), sparsenet.densify(selective)(IMAGES))
    with pytest.raises(ValueError, match="not initialised"):
        sparsenet.stages(model, example_inputs=IMAGES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """A model in half precision is as exact with every pixel active as it is dense, on every backend that has it."""
    model, images = with_lively_norms(SmallNet()).to(dtype), IMAGES.to(dtype)
    truth = copy.deepcopy(model).double()(images.double())
    selective = sparsenet.selectify(model, "stem", selector=SelectiveModule(6, 4), example_inputs=images)
    assert next(selective.selector.parameters()).dtype == dtype
    for backend in ("auto", "rows", "reference", "spconv"):
        with sparsenet.use_mask(torch.ones(2, 1, 1, dtype=torch.bool)), sparsenet.use_backend(backend):
            assert_as_good(selective(images), model(images), truth)


def test_channels_last_models() -> None:
    model = with_lively_norms(SmallNet()).to(memory_format=torch.channels_last)
    images, mask = IMAGES.to(memory_format=torch.channels_last), blobs(2, (16, 20))
    selective = sparsenet.selectify(model, "stem", selector=GivenMask(), example_inputs=images)
    plain = sparsenet.selectify(
        copy.deepcopy(model).to(memory_format=torch.contiguous_format),
        "stem",
        selector=GivenMask(),
        example_inputs=IMAGES,
    )
    for backend in ("auto", "rows", "reference", "spconv"):
        with torch.no_grad(), sparsenet.use_mask(mask), sparsenet.use_backend(backend):
            torch.testing.assert_close(selective(images), plain(IMAGES))


def test_a_model_in_training_mode_keeps_it() -> None:
    model = SmallNet().train()
    before = snapshot(model)
    selective = sparsenet.selectify(model, "stem", selector=SelectiveModule(6, 4), example_inputs=IMAGES)
    assert "guided" in str(sparsenet.plan(selective))
    assert all(module.training for module in selective.modules())
    assert_unchanged(model, before)


def test_boxes_where_the_stage_has_another_batch() -> None:
    """A network that stacks two images into one batch before the stage."""

    class Stacked(SmallNet):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.cat([x, y]))

    images = torch.rand(1, 3, 16, 20)
    selective = sparsenet.selectify(Stacked().eval(), "stem", selector=GivenMask(), example_inputs=(images, images))
    with (
        sparsenet.use_mask([torch.tensor([[1.0, 1, 5, 5]])] * 2),
        pytest.raises(ValueError, match="stage's map is of 2"),
    ):
        selective(images, images)
    with torch.no_grad(), sparsenet.use_mask(torch.ones(2, 1, 1, dtype=torch.bool)):
        torch.testing.assert_close(selective(images, images)[:1], selective(images, images)[1:])


def test_an_unknown_mean() -> None:
    model = SmallNet()
    with raises(ValueError, model, "mean must be 'all' (pixels of the map) or 'active', not 'some'"):
        sparsenet.selectify(model, "stem", example_inputs=IMAGES, mean="some", inplace=True)


def test_nhwc_stage_is_refused() -> None:
    """Swin's blocks give (N, H, W, C)."""
    model = torchvision.models.swin_transformer.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=2)
    for at in ("features.0", "features.1", "features.1.0"):
        with raises(ValueError, model, "no convolution reads the output of stage", "one whose output is NCHW"):
            sparsenet.selectify(model, at, example_inputs=torch.rand(1, 3, 32, 32), inplace=True)


def test_swin_t_is_refused() -> None:
    model = torchvision.models.swin_t(weights=None)
    with raises(ValueError, model, "no convolution reads the output of stage 'features.1'"):
        sparsenet.selectify(model, "features.1", example_inputs=torch.rand(1, 3, 64, 64), inplace=True)


def test_nothing_to_skip_after_the_stage() -> None:
    model = SmallNet()
    with raises(ValueError, model, "no convolution reads the output of stage 'block'", "choose an earlier stage"):
        sparsenet.selectify(model, "block", example_inputs=IMAGES, inplace=True)


def test_an_exit_before_every_convolution_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelShuffle(2), nn.Conv2d(1, 1, 3))
    with raises(ValueError, model, "left the region: 1: ", "pixel_shuffle", "choose an earlier stage"):
        sparsenet.selectify(model, "0", example_inputs=IMAGES, inplace=True)


def test_existing_attribute_selector() -> None:
    model = SmallNet()
    model.selector = nn.Linear(2, 2)
    with raises(ValueError, model, "an attribute 'selector'", "rename it"):
        sparsenet.selectify(model, "stem", example_inputs=IMAGES, inplace=True)


def test_already_selective(selective: nn.Module) -> None:
    for inplace in (False, True):
        with raises(ValueError, selective, "selective already", "sparsenet.densify(model)"):
            sparsenet.selectify(selective, "stem", example_inputs=IMAGES, inplace=inplace)


@pytest.mark.parametrize("version", [None, "3.3.1"])
def test_triton_missing_or_too_old(version: str | None, monkeypatch: pytest.MonkeyPatch, selective: nn.Module) -> None:
    find = importlib.import_module

    def with_other_triton(name: str, *args: Any) -> Any:
        if name != "triton":
            return find(name, *args)
        if version is None:
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return SimpleNamespace(__version__=version)

    monkeypatch.setattr(importlib, "import_module", with_other_triton)
    triton_support.missing.cache_clear()
    try:
        named = ("triton>=3.4" if version is None else "Triton 3.3.1 is older than 3.4", "backend='rows'")
        model = SmallNet().eval()
        with raises(ImportError, model, *named):
            sparsenet.selectify(model, "stem", example_inputs=IMAGES, backend="triton", inplace=True)
        with raises(ImportError, selective, *named), sparsenet.use_backend("triton"):
            pass
    finally:
        triton_support.missing.cache_clear()


def test_triton_without_a_gpu_leaves_layers_to_rows_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    net = SmallNet().eval()
    model = sparsenet.selectify(net, "stem", example_inputs=IMAGES, backend="triton", selector=GivenMask())
    assert "triton: its kernels are for GPUs, not for cpu" in str(sparsenet.plan(model))


def test_unknown_backend(selective: nn.Module) -> None:
    model = SmallNet()
    named = ("unknown backend 'cudnn'", "auto, reference, rows, indirect, triton, spconv")
    with raises(ValueError, model, *named):
        sparsenet.selectify(model, "stem", example_inputs=IMAGES, backend="cudnn", inplace=True)
    with raises(ValueError, selective, *named), sparsenet.use_backend("cudnn"):
        pass


def test_no_example_inputs_are_known() -> None:
    model = SmallNet()
    with raises(ValueError, model, "no example inputs are known for", "SmallNet", "example_inputs=torch.rand(1, 3"):
        sparsenet.selectify(model, "stem", inplace=True)


@pytest.mark.parametrize("given", [(), {"x": 3}, [None], "image"])
def test_example_inputs_without_tensors(given: Any) -> None:
    model = SmallNet()
    with raises(ValueError, model, "example_inputs has no tensor", "torch.rand(1, 3, 224, 224)"):
        sparsenet.selectify(model, "stem", example_inputs=given, inplace=True)


@pytest.mark.parametrize("given", [torch.rand(1, 5, 16, 16), (IMAGES, IMAGES), torch.rand(1, 3, 16, 16).long()])
def test_example_inputs_that_the_model_does_not_take(given: Any) -> None:
    """The model's own error comes through, and nothing is left behind."""
    model = SmallNet()
    before = snapshot(model)
    with pytest.raises((RuntimeError, TypeError)):
        sparsenet.selectify(model, "stem", example_inputs=given, inplace=True)
    assert_unchanged(model, before)


def test_a_model_that_fails_halfway() -> None:
    class Failing(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ZeroDivisionError

    for at in ("stem", "stride2"):
        model = Failing().train()
        model.block.eval()
        before = snapshot(model)
        with pytest.raises(ZeroDivisionError):
            sparsenet.selectify(model, at, example_inputs=IMAGES, inplace=True)
        assert_unchanged(model, before)


def test_no_selective_module_fits_the_budget() -> None:
    model = SmallNet()
    with raises(ValueError, model, "no Selective Module for 6 channels", "embed later"):
        sparsenet.selectify(model, "stem", example_inputs=IMAGES, inplace=True)


def test_a_scripted_stage() -> None:
    model = nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"stage '0' is scripted .* embed at another one"):
        sparsenet.selectify(model, "0", example_inputs=IMAGES, inplace=True)


def test_default_example_inputs_are_taken_where_a_family_tells() -> None:
    model = timm.create_model("resnet10t", num_classes=2).eval()
    assert sparsenet.plan(sparsenet.selectify(model, "layer1", selector=GivenMask())).size == (44, 44)  # of 176


# -- a missing backend -----------------------------------------------------------------------------------------


def test_spconv_missing(monkeypatch: pytest.MonkeyPatch, selective: nn.Module) -> None:
    def without_spconv(find: Any) -> Any:
        def found(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] == "spconv":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return find(name, *args, **kwargs)

        return found

    monkeypatch.setattr(importlib, "import_module", without_spconv(importlib.import_module))
    monkeypatch.setattr(builtins, "__import__", without_spconv(builtins.__import__))
    named = ("install spconv-cu", "backend='rows'")
    model = SmallNet().eval()
    with raises(ImportError, model, *named):
        sparsenet.selectify(model, "stem", example_inputs=IMAGES, backend="spconv", inplace=True)
    with raises(ImportError, selective, *named), sparsenet.use_backend("spconv"):
        pass
    # Everything else works without it.
    with sparsenet.use_mask(torch.ones(2, 4, 4, dtype=torch.bool)):
        torch.testing.assert_close(selective(IMAGES), sparsenet.densify(selective)(IMAGES))


# -- masks and boxes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "kind", "parts"),
    [
        (torch.ones(2, 4, 4), TypeError, ("must be bool, not torch.float32", "mask > 0")),
        (torch.ones(2, 4, 4, dtype=torch.uint8), TypeError, ("must be bool, not torch.uint8",)),
        (torch.ones(4, 4, dtype=torch.bool), ValueError, ("(N, H, W), not (4, 4)",)),
        (torch.ones(2, 1, 4, 4, dtype=torch.bool), ValueError, ("(N, H, W), not (2, 1, 4, 4)",)),
        (torch.ones(2, 0, 4, dtype=torch.bool), ValueError, ("(N, H, W), not (2, 0, 4)",)),
        ("everything", TypeError, ("a bool tensor (N, H, W), or a list", "not str")),
        (None, TypeError, ("a bool tensor (N, H, W), or a list", "not NoneType")),
        ([[1.0, 2, 3, 4]], TypeError, ("a list with one bool mask (H, W) or box tensor (boxes, 4) per image",)),
        ([torch.ones(1, 4, 4, dtype=torch.bool)], ValueError, ("must be (H, W), not [(1, 4, 4)]",)),
        (
            [torch.ones(4, 4, dtype=torch.bool), torch.zeros(0, 4)],
            TypeError,
            ("boxes must be numbers, not torch.bool",),
        ),
        ([torch.rand(2, 5)], ValueError, ("boxes must be (boxes, 4): x1, y1, x2, y2, not (2, 5)",)),
        ([torch.rand(4)], ValueError, ("(boxes, 4)", "not (4,)")),
        ([torch.tensor([[0.0, 0, float("nan"), 5]])], ValueError, ("boxes of image 0 have NaN",)),
        ([torch.zeros(0, 4), torch.tensor([[5.0, 0, 1, 5]])], ValueError, ("boxes of image 1", "x2 < x1 or y2 < y1")),
        ([torch.tensor([[0.0, 6, 1, 5]])], ValueError, ("boxes of image 0", "x2 < x1 or y2 < y1")),
        ([torch.zeros(1, 4, dtype=torch.complex64)], TypeError, ("boxes must be numbers",)),
    ],
)
def test_wrong_masks(selective: nn.Module, mask: Any, kind: type[Exception], parts: tuple[str, ...]) -> None:
    """They raise where they are given, not in the forward pass."""
    with raises(kind, selective, *parts), sparsenet.use_mask(mask):
        pytest.fail("use_mask took it")


@pytest.mark.parametrize(
    "mask",
    [torch.ones(3, 4, 4, dtype=torch.bool), [torch.ones(4, 4, dtype=torch.bool)], [torch.zeros(0, 4)] * 5, []],
    ids=["tensor", "masks", "boxes", "empty"],
)
def test_mask_of_another_batch(selective: nn.Module, mask: Any) -> None:
    count = len(mask)
    with raises(ValueError, selective, f"for {count} images, but the batch has 2", "give one per image"):
        with sparsenet.use_mask(mask):
            selective(IMAGES)
    with sparsenet.use_mask(torch.ones(2, 4, 4, dtype=torch.bool)):
        assert torch.isfinite(selective(IMAGES)).all()  # the failed pass has left nothing behind


def test_boxes_outside_the_image_are_clipped(selective: nn.Module) -> None:
    boxes = [
        torch.tensor([[-100.0, -50, 3, 2], [18, 14, 1e6, 1e6]]),  # beyond two corners
        torch.tensor([[-9, -9, -1, -1], [30, 3, 40, 9], [4, 4, 4, 9]]),  # outside, to the right, and without area
    ]
    with sparsenet.use_mask(boxes), sparsenet.record(selective) as rec:
        assert torch.isfinite(selective(IMAGES)).all()
    expected = torch.zeros(2, 16, 20, dtype=torch.bool)
    expected[0, :2, :3] = expected[0, 14:, 18:] = True
    assert torch.equal(rec.masks[16, 20], expected)


def test_missing_mask(selective: nn.Module) -> None:
    for training in (False, True):
        selective.train(training)
        with raises(ValueError, selective, "selector=GivenMask() and was called without a mask", "use_mask(mask)"):
            selective(IMAGES)


def test_boxes_for_a_part_of_the_model(selective: nn.Module) -> None:
    """Whoever calls a part has not told where the images lie."""
    with (
        raises(ValueError, selective, "boxes and per-image masks need the sizes", "call the selective model whole"),
        sparsenet.use_mask([torch.zeros(0, 4)] * 2),
    ):
        selective.stem(IMAGES)


class Wrong(nn.Module):
    """Selectors with more than one logit per pixel, or too few pixels."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, features: Tensor) -> Tensor:
        return {
            "channels": features[:, :2],
            "pixels": features[:, :1, 1:],
            "batch": features[:1, :1],
            "flat": features[:, 0].flatten(1),
        }[self.shape]


@pytest.mark.parametrize("shape", ["channels", "pixels", "batch", "flat"])
def test_selector_of_a_wrong_shape(shape: str) -> None:
    model = sparsenet.selectify(SmallNet(), "stem", selector=Wrong(shape), example_inputs=IMAGES).eval()
    with raises(ValueError, model, "one logit per pixel, (2, 1, 16, 20), but gave"):
        model(IMAGES)


def test_a_selector_may_leave_its_channel_out() -> None:
    class Flat(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features[:, 0] - 0.2

    model = sparsenet.selectify(SmallNet(), "stem", selector=Flat(), example_inputs=IMAGES).eval()
    with sparsenet.record(model) as rec:
        model(IMAGES)
    assert 0 < rec.density[16, 20] < 1
    assert rec.saliency[16, 20].shape == (2, 16, 20)


# -- models that are not selective -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        sparsenet.plan,
        sparsenet.densify,
        lambda model: sparsenet.record(model).__enter__(),
        lambda model: sparsenet.train.direct(model, [torch.zeros(0, 4)]).__enter__(),
    ],
    ids=["plan", "densify", "record", "direct"],
)
def test_a_plain_model(use: Any) -> None:
    for model in (SmallNet(), small_ssd()):
        with raises(ValueError, model, "no selective model", "sparsenet.selectify(model, at=...)"):
            use(model)


def test_densify_twice(selective: nn.Module) -> None:
    dense = sparsenet.densify(selective)
    with raises(ValueError, dense, "no selective model"):
        sparsenet.densify(dense)


# -- direct supervision ----------------------------------------------------------------------------------------


def test_direct_supervision_of_another_batch() -> None:
    model = sparsenet.selectify(SmallNet(), "stem", selector=nn.Conv2d(6, 1, 1), example_inputs=IMAGES).eval()
    for warmup in (False, True):
        with raises(ValueError, model, "boxes are given for 3 images, but the batch has 2", "one tensor per image"):
            with sparsenet.train.direct(model, [torch.zeros(0, 4)] * 3, warmup=warmup):
                model(IMAGES)
    with (
        raises(TypeError, model, "takes boxes (boxes, 4) for each image, not masks"),
        sparsenet.train.direct(model, [torch.ones(4, 4, dtype=torch.bool)] * 2),
    ):
        pass
    with (
        raises(ValueError, model, "boxes of image 1 have NaN"),
        sparsenet.train.direct(model, [torch.zeros(0, 4), torch.full((1, 4), torch.nan)]),
    ):
        pass
    for weights in ({"positive_weight": 0.0}, {"positive_weight": math.nan}, {"size_balance": -1.0}):
        with (
            raises(ValueError, model, "positive_weight must be > 0 and size_balance >= 0"),
            sparsenet.train.direct(model, [torch.zeros(0, 4)] * 2, **weights),
        ):
            pass
    with (
        raises(ValueError, model, "direct supervision needs the sizes", "call the selective model whole"),
        sparsenet.train.direct(model, [torch.zeros(0, 4)] * 2),
    ):
        model.stem(IMAGES)


def test_features_of_a_stage_that_does_not_run() -> None:
    model = sparsenet.selectify(SmallNet(), "stem", selector=nn.Conv2d(6, 1, 1), example_inputs=IMAGES)
    model.forward = lambda images: images
    with raises(RuntimeError, model, "the stage did not run"):
        sparsenet.train.stage_features(model, IMAGES)


def test_direct_loss_without_a_pass() -> None:
    model = sparsenet.selectify(SmallNet(), "stem", selector=nn.Conv2d(6, 1, 1), example_inputs=IMAGES)
    with sparsenet.train.direct(model, [torch.zeros(0, 4)] * 2) as supervision:
        pass
    with raises(RuntimeError, model, "no selective model ran inside this"):
        supervision.loss()


def test_a_record_without_a_pass(selective: nn.Module) -> None:
    with sparsenet.record(selective) as rec:
        pass
    for name in ("masks", "saliency", "density"):
        with raises(RuntimeError, selective, "nothing was recorded", "with sparsenet.record(model)"):
            getattr(rec, name)
