"""SSD300's published figures, and its start from ImageNet weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vgg import cfgs, make_layers

from detectors.ssd import VGG16Extractor, load_imagenet_trunk, ssd300_vgg16_bn


def on_meta(*args, **kwargs):
    with torch.device("meta"):
        return ssd300_vgg16_bn(*args, **kwargs).eval()


def head_outputs(model):
    return model.head(list(model.backbone(torch.empty(1, 3, 300, 300, device="meta")).values()))


@pytest.mark.parametrize(("classes", "giga"), [(21, 31.3735), (81, 34.3604)])
def test_macs(classes, giga):
    with FlopCounterMode(display=False) as counter:
        head_outputs(on_meta(classes))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=5e-5)


def test_parameters():
    """The original's 26,285,486, with a weight and a bias of BatchNorm for the bias of 15 convolutions."""
    model = on_meta(21)
    norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert sum(p.numel() for p in model.parameters()) == 26_285_486 + norms


@pytest.mark.parametrize(("six", "anchors"), [(False, 8732), (True, 11640)])
def test_anchors(six, anchors):
    assert head_outputs(on_meta(21, six=six))["cls_logits"].shape == (1, anchors, 21)


@pytest.mark.parametrize(
    ("kind", "smallest", "largest"), [("voc", (30, 30), (264, 264)), ("coco", (21, 21), (261, 261))]
)
def test_anchor_sizes(kind, smallest, largest):
    model = ssd300_vgg16_bn(21, width=0.125, anchors=kind).eval()
    sizes = []
    model.anchor_generator.register_forward_hook(lambda module, inputs, output: sizes.append(output[0]))
    model([torch.rand(3, 300, 300)])
    [boxes] = sizes
    extents = boxes[:, 2:] - boxes[:, :2]
    assert extents[0].tolist() == pytest.approx(smallest)
    assert extents[-4].tolist() == pytest.approx(largest)
    assert ((boxes[0, :2] + boxes[0, 2:]) / 2).tolist() == pytest.approx([4, 4])  # (0.5, 0.5) x step


def test_maps_and_widths():
    maps = VGG16Extractor(0.25).eval()(torch.rand(1, 3, 300, 300))
    shapes = [tuple(m.shape[1:]) for m in maps.values()]
    assert shapes == [(128, 38, 38), (256, 19, 19), (128, 10, 10), (64, 5, 5), (64, 3, 3), (64, 1, 1)]


def test_trains_on_one_image_and_one_without_objects():
    model = ssd300_vgg16_bn(3, width=0.125)
    target = {"boxes": torch.tensor([[10.0, 10, 90, 120]]), "labels": torch.tensor([2])}
    empty = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    for targets in ([target], [empty]):
        losses = model([torch.rand(3, 300, 300)], targets)
        sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_imagenet_trunk_computes_what_torchvision_does():
    """Up to conv5_3, whose weights are copied as they are; of fc6 and fc7 a part is taken."""
    torch.manual_seed(0)
    features = make_layers(cfgs["D"], batch_norm=True).eval()
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    fc6, fc7 = nn.utils.skip_init(nn.Linear, 512 * 49, 4096), nn.utils.skip_init(nn.Linear, 4096, 4096)
    vgg = SimpleNamespace(features=features, classifier=[fc6, nn.ReLU(), nn.Dropout(), fc7])
    nn.init.normal_(fc6.weight.data[4])  # the row that is looked at: all of them take seconds
    nn.init.zeros_(fc6.bias)
    nn.init.zeros_(fc7.bias)

    extractor = VGG16Extractor().eval()
    load_imagenet_trunk(extractor, vgg)
    image = torch.rand(1, 3, 32, 32)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    convolutions = extractor.trunk[: list(dict(extractor.trunk.named_children())).index("pool5")]
    torch.testing.assert_close(convolutions(255 * image), features[:-1](image / std), rtol=1e-4, atol=1e-4)
    window = fc6.weight.view(4096, 512, 7, 7)
    assert torch.equal(extractor.trunk.fc6.weight[1, 7, 2, 1], window[4, 7, 6, 3])
