"""SSD300's published figures, and its start from ImageNet weights."""

from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vgg import cfgs, make_layers

from detectors.ssd import VGG16Extractor, load_imagenet_trunk, ssd300_vgg16_bn
from storage import CheckpointError, load_checkpoint, save_checkpoint


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


@pytest.mark.parametrize(("classes", "original"), [(21, 26_285_486), (81, 34_305_206)])
def test_parameters(classes, original):
    """The original's; with BatchNorm a weight and a bias of it for the bias of 15 convolutions."""
    assert sum(p.numel() for p in on_meta(classes, batch_norm=False).parameters()) == original
    model = on_meta(classes)
    norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert norms > 0
    assert sum(p.numel() for p in model.parameters()) == original + norms


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


@pytest.mark.parametrize("variant", [{}, {"six": True, "batch_norm": False}], ids=["batch norm", "six, without"])
def test_trains_on_one_image_and_one_without_objects(variant):
    model = ssd300_vgg16_bn(3, width=0.125, **variant)
    target = {"boxes": torch.tensor([[10.0, 10, 90, 120]]), "labels": torch.tensor([2])}
    empty = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    for targets in ([target], [empty]):
        losses = model([torch.rand(3, 300, 300)], targets)
        sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("batch_norm", [True, False])
def test_imagenet_trunk_computes_what_torchvision_does(batch_norm):
    """Up to conv5_3, whose weights are copied as they are; of fc6 and fc7 a part is taken."""
    torch.manual_seed(0)
    features = make_layers(cfgs["D"], batch_norm=batch_norm).eval()
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    fc6, fc7 = nn.utils.skip_init(nn.Linear, 512 * 49, 4096), nn.utils.skip_init(nn.Linear, 4096, 4096)
    vgg = SimpleNamespace(features=features, classifier=[fc6, nn.ReLU(), nn.Dropout(), fc7])
    nn.init.normal_(fc6.weight.data[4])  # the row that is looked at: all of them take seconds
    nn.init.normal_(fc6.bias)
    nn.init.normal_(fc7.bias)

    extractor = VGG16Extractor(batch_norm=batch_norm).eval()
    load_imagenet_trunk(extractor, vgg)
    image = torch.rand(1, 3, 32, 32)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    first, trunk = extractor.trunk
    convolutions = nn.Sequential(*first, *trunk[: list(dict(trunk.named_children())).index("pool5")])
    expected = features[:-1](image / std)
    assert expected.std() > 0.1
    torch.testing.assert_close(convolutions(255 * image), expected, rtol=1e-4, atol=1e-4)
    window = fc6.weight.view(4096, 512, 7, 7)
    assert torch.equal(trunk.fc6.weight[1, 7, 2, 1], window[4, 7, 6, 3])
    biases = (trunk.bn_fc6.bias, trunk.bn_fc7.bias) if batch_norm else (trunk.fc6.bias, trunk.fc7.bias)
    for mine, their in zip(biases, (fc6.bias, fc7.bias), strict=True):
        assert torch.equal(mine, their[::4])


def test_imagenet_weights_that_cannot_be_fetched(monkeypatch):
    def offline(weights):
        raise URLError("no network")

    monkeypatch.setattr("detectors.ssd.vgg16_bn", offline)
    with pytest.raises(CheckpointError, match=r"vgg16_bn-.*no network.*Put it into .*/checkpoints.*--no-imagenet"):
        load_imagenet_trunk(VGG16Extractor(width=0.125))


@pytest.mark.parametrize("variant", [{"six": True}, {"batch_norm": False}], ids=["six anchors", "no batch norm"])
def test_checkpoint_of_another_variant(tmp_path, variant):
    path = tmp_path / "dense.safetensors"
    save_checkpoint(ssd300_vgg16_bn(3, width=0.125), path, width=0.125, six=False, batch_norm=True)
    model = ssd300_vgg16_bn(3, width=0.125, **variant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = (
        r'another model; it says .*"six": false, "batch_norm": true.*tensors differ.*Give the options that it was made'
    )
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
