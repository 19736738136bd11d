"""PeleeNet's published figures, and a detector's trunk from a classifier's file."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from detectors.pelee import pelee304
from detectors.peleenet import load_trunk, peleenet
from storage import CheckpointError, save_checkpoint
from tests.models import with_lively_norms


def test_published_figures():
    """2.8 M parameters, 508 M multiply-accumulates at 224x224; the same trunk as the detector's."""
    with torch.device("meta"):
        model, detector = peleenet().eval(), pelee304(21)
        with FlopCounterMode(display=False) as counter:
            assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(2.80, abs=0.005)
    assert counter.get_total_flops() / 2e6 == pytest.approx(508, abs=0.5)
    shapes = [
        {name: value.shape for name, value in net.state_dict().items()}
        for net in (model.trunk, detector.backbone.trunk)
    ]
    assert shapes[0] == shapes[1]


def test_it_learns_and_has_dropout():
    torch.manual_seed(0)
    model = peleenet(5, width=0.125)
    images = torch.rand(4, 3, 64, 64)
    F.cross_entropy(model(images), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.dropout.p == 0.05


class Block(nn.Module):
    """The published network's unit, of its names and defaults."""

    def __init__(self, inputs, outputs, size, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class PublishedStem(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem1, self.stem2a, self.stem2b = Block(3, 32, 3, 2), Block(32, 16, 1), Block(16, 32, 3, 2)
        self.stem3 = Block(64, 32, 1)

    def forward(self, x):
        x = self.stem1(x)
        return self.stem3(torch.cat([F.max_pool2d(x, 2), self.stem2b(self.stem2a(x))], 1))


class PublishedLayer(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.branch1a, self.branch1b = Block(inputs, width, 1), Block(width, 16, 3)
        self.branch2a, self.branch2b, self.branch2c = Block(inputs, width, 1), Block(width, 16, 3), Block(16, 16, 3)

    def forward(self, x):
        return torch.cat([x, self.branch1b(self.branch1a(x)), self.branch2c(self.branch2b(self.branch2a(x)))], 1)


def published():
    """The network of the authors' checkpoint, restated by its names: features.stemblock ... classifier."""
    features, channels = OrderedDict(stemblock=PublishedStem()), 32
    for stage, (depth, width) in enumerate([(3, 16), (4, 32), (8, 64), (6, 64)], start=1):
        layers = OrderedDict()
        for layer in range(1, depth + 1):
            layers[f"denselayer{layer}"] = PublishedLayer(channels, width)
            channels += 32
        features[f"denseblock{stage}"] = nn.Sequential(layers)
        features[f"transition{stage}"] = Block(channels, channels, 1)
        if stage < 4:
            features[f"transition{stage}_pool"] = nn.AvgPool2d(2)
    return nn.Sequential(OrderedDict(features=nn.Sequential(features), classifier=nn.Linear(channels, 7)))


def lively(classifier):
    """Numbers at which every part matters, BatchNorm's epsilon too, and none outgrows the others."""
    torch.manual_seed(0)
    with_lively_norms(classifier)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var[::3] = 1e-3
            module.weight.data[::3] *= 1e-3**0.5
    return classifier


def written(classifier, path):
    """As the authors' training writes it, in `DataParallel`; ours as the recipes write theirs."""
    if path.suffix == ".safetensors":
        save_checkpoint(classifier, path)
    else:
        state = {f"module.{name}": value for name, value in classifier.state_dict().items()}
        torch.save({"epoch": 120, "arch": "peleenet", "state_dict": state, "best_acc1": torch.tensor(72.08)}, path)
    return path


@pytest.mark.parametrize("name", ["peleenet_acc7208.pth.tar", "ours.safetensors"])
def test_the_detector_computes_of_an_image_what_the_classifier_does(tmp_path, name):
    """Each of its own normalisation; at a size at which pooling has nothing to round."""
    classifier = lively(peleenet(7) if name.startswith("ours") else published())
    path = written(classifier, tmp_path / name)
    trunk = pelee304(4).backbone.trunk.double().eval()
    load_trunk(trunk, path)
    image = torch.randn(1, 3, 64, 64).double()  # minus the mean, in units of 255
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1).double()
    with torch.no_grad():
        expected = classifier[0].double()(image / deviation)
        found = trunk(image * 255 * 0.017)
    assert expected.shape == (1, 704, 2, 2) and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.std())


def test_a_checkpoint_without_the_counts_of_batches(tmp_path):
    """As PyTorch wrote them before it counted."""
    classifier = lively(published())
    state = {name: value for name, value in classifier.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    trunk = pelee304(4).backbone.trunk
    load_trunk(trunk, tmp_path / "old.pth")
    assert torch.equal(trunk.stage4[6].bn.bias, classifier.features.transition4.norm.bias)


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("features.denseblock3.denselayer8.branch2c.conv.weight"), "1 tensors .*branch2c.conv.weight: missing"),
        (
            without("features.transition4.norm.running_var"),
            "1 tensors .*transition4.norm.running_var: missing in the file",
        ),
        (
            lambda s: s | {"features.transition1.conv.weight": torch.zeros(64, 64, 1, 1)},
            r"\(64, 64, 1, 1\) in the file",
        ),
        (
            lambda s: s | {"features.denseblock4.denselayer7.x": torch.zeros(1)},
            r"denselayer7.x: \(1,\) .*missing in the tr",
        ),
        (lambda s: {f"layers.{name}": value for name, value in s.items()}, "it is no classifier of PeleeNet"),
        (lambda s: {"epoch": 3}, "no tensors by name"),
    ],
)
def test_another_network_is_refused(tmp_path, change, said):
    path = tmp_path / "other.pth"
    torch.save(change(published().state_dict()), path)
    trunk = pelee304(4).backbone.trunk
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    with pytest.raises(CheckpointError, match=said) as error:
        load_trunk(trunk, path)
    assert str(path) in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())


@pytest.mark.parametrize("name", ["a.pth.tar", "a.safetensors"])
def test_missing_or_damaged(tmp_path, name):
    trunk, path = pelee304(4, width=0.125).backbone.trunk, tmp_path / name
    with pytest.raises(CheckpointError, match="There is no file"):
        load_trunk(trunk, path)
    whole = written(peleenet(7, width=0.125), path).read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        load_trunk(trunk, path)
    path.write_bytes(whole)
    load_trunk(trunk, path)
    with pytest.raises(CheckpointError, match="or the --width that it was made with"):
        load_trunk(pelee304(4, width=0.25).backbone.trunk, path)
