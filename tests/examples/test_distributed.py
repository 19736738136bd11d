"""Two processes against one with the batches of both; torchrun starts this file as a script."""

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

import distributed
import sparsenet
from detectors.ssd import SCALES, SSD, STEPS
from evaluation.detector import evaluate
from tests.models import SmallBackbone, SmallNet
from training import Schedule, batches, fit

RANKS = 2
SCHEDULE = Schedule(iterations=4, batch_size=4, lr=0.05, warmup=0, momentum=0.9)
SHORT = Schedule(iterations=2, batch_size=2, lr=0.001, warmup=0)


class Scenes(torch.utils.data.Dataset):
    """Noise with a bright square in some of the images, others without an object."""

    def __init__(self, size, length=8):
        self.size, self.length = size, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(index)
        image = torch.rand(3, self.size, self.size, generator=random, dtype=torch.float64)
        boxes = torch.rand(index % 3, 2, generator=random, dtype=torch.float64) * self.size / 2
        boxes = torch.cat([boxes, boxes + self.size / 4 + self.size / 16 * (index % 5)], 1)
        for x1, y1, x2, y2 in boxes.int().tolist():
            image[:, y1:y2, x1:x2] += 1
        labels = torch.full((len(boxes),), 1 + index % 2)
        return image, {"boxes": boxes, "labels": labels, "difficult": torch.zeros(len(boxes), dtype=torch.bool)}


def small_net():
    torch.manual_seed(0)
    return SmallNet().double()


def selective(net, at, example, bias):
    torch.manual_seed(1)
    selector = nn.Conv2d(6 if isinstance(net, SmallNet) else 8, 1, 3, padding=1)
    model = sparsenet.selectify(net, at, selector=selector, example_inputs=example)
    nn.init.constant_(model.selector.module.bias, bias)
    return model.train()


def selective_net(bias):
    return selective(small_net(), "stem", torch.rand(2, 3, 24, 24, dtype=torch.float64), bias)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3)).double()


def small_ssd():
    torch.manual_seed(0)
    backbone = SmallBackbone(8)
    backbone.out_channels = [8] * 6
    anchors = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=SCALES["voc"], steps=STEPS)
    return SSD(backbone, anchors, (300, 300), 3).double().train()


def selective_ssd():
    return selective(small_ssd(), "pool1", [torch.rand(3, 300, 300, dtype=torch.float64)], 0.0)


def supervised(loss):
    """With the mask's own part."""

    def whole(model, images, targets):
        with sparsenet.train.direct(model, [target["boxes"] for target in targets]) as supervision:
            losses = loss(model, images, targets)
        return losses | {"saliency": supervision.loss()}

    return whole


def classified(model, images, targets):
    counts = torch.tensor([len(target["labels"]) for target in targets])
    return {"count": F.cross_entropy(model(torch.stack(images)), counts)}


def detected(model, images, targets):
    return model(images, targets)


def budgeted(model, images, targets):
    """With as many active pixels as a budget wants, which the model carries for this test."""
    with sparsenet.train.supervise(model, sparsenet.train.Indirect(), budget=model.budget) as supervision:
        losses = classified(model, images, targets)
    return losses | {"budget": supervision.loss()}


def budgeted_net():
    model = selective_net(0.0)
    model.budget = sparsenet.train.Budget(model, density=0.3)
    return model


def selector_alone(model, images, targets):
    with sparsenet.train.direct(model, [target["boxes"] for target in targets]) as supervision:
        sparsenet.train.selector_only(model, torch.stack(images))
    return {"saliency": supervision.loss()}


CASES = {
    "batch normalisation": (small_net, classified, 24, SCHEDULE, {}),
    "selective": (lambda: selective_net(0.0), supervised(classified), 24, SCHEDULE, {}),
    "empty mask": (lambda: selective_net(-30.0), supervised(classified), 24, SCHEDULE, {}),
    "budget": (budgeted_net, budgeted, 24, SCHEDULE, {}),
    "selector alone": (lambda: selective_net(0.0), selector_alone, 24, SCHEDULE, {"trained": "selector"}),
    "in parts": (linear, classified, 8, SCHEDULE, {"accumulate": 2, "ema": 0.5}),
    "detector": (small_ssd, detected, 300, SHORT, {}),
    "selective detector": (selective_ssd, supervised(detected), 300, SHORT, {}),
}


def train(case, folder, stop_at=None):
    make, loss, size, schedule, options = CASES[case]
    options, model = dict(options), make()
    trained = model.get_submodule(options.pop("trained", ""))
    model.requires_grad_(False)
    trained.requires_grad_(True)

    def stoppable(images, targets, step):
        if step == stop_at:
            raise KeyboardInterrupt
        return loss(model, images, targets)

    losses = fit(
        trained,
        stoppable,
        lambda start: batches(Scenes(size), schedule, seed=0, workers=0, start=start),
        schedule,
        title=case,
        amp=False,
        state=folder / f"{case}.pt",
        save_every=2,
        log=folder / "log" / case,
        **options,
    )
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "state": model.state_dict(), "kinds": kinds(model)}


def kinds(model):
    return [type(module).__name__ for module in model.modules()]


def evaluated():
    found = {}
    for name, make in (("dense", small_ssd), ("selective", selective_ssd)):
        result = evaluate(make().eval(), Scenes(300, length=5), 2, name)
        found[name] = [*vars(result.matches).values(), result.macs, result.dense_macs, result.density]
    return found


def one_of_two(folder):
    """What a rank finds: written to a file, for the parent to read."""
    found = {case: train(case, folder) for case in CASES}
    (folder / "stopped").mkdir(exist_ok=True)
    with contextlib.suppress(KeyboardInterrupt):
        train("selective", folder / "stopped", stop_at=3)
    found["resumed"] = train("selective", folder / "stopped")
    found["evaluated"] = evaluated()
    for name, attempt in (("not finite", not_finite), ("not divisible", not_divisible), ("not shared", not_shared)):
        try:
            attempt(folder)
        except Exception as error:
            found[name] = repr(error)
    torch.save(found, folder / f"{distributed.rank()}.pt")


def not_finite(folder):
    """In the second process only."""
    model = linear()

    def loss(images, targets, step):
        return {"sum": model(torch.stack(images)).sum() * (math.nan if distributed.rank() else 1)}

    data = batches(Scenes(8), SCHEDULE, seed=0, workers=0)
    fit(model, loss, lambda start: data, SCHEDULE, title="not finite", amp=False, state=folder / "nan.pt")


def not_shared(folder):
    """Each process has a folder of its own, so that only the first finds the state that it wrote."""
    for _ in range(2):
        train("in parts", folder / str(distributed.rank()))


def not_divisible(folder):
    batches(Scenes(8), Schedule(iterations=1, batch_size=3, lr=1), seed=0, workers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), __file__, str(folder)]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "examples"), str(root)])
    subprocess.run([sys.executable, *command], env=os.environ | {"PYTHONPATH": paths}, check=True, timeout=200)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_both_batches(found, case, tmp_path):
    alone = train(case, tmp_path)
    for each in found:
        two = each[case]
        for part in ("losses", "gradients", "state"):
            torch.testing.assert_close(two[part], alone[part], rtol=1e-7, atol=1e-9)
        assert two["kinds"] == alone["kinds"]  # nothing is left of the synchronised normalisation
    assert found[0][case]["losses"] == found[1][case]["losses"]


def test_selector_learns_of_an_empty_mask(found):
    for each in found:
        gradients = {name: value for name, value in each["empty mask"]["gradients"].items() if "selector" in name}
        assert len(gradients) >= 2
        assert all(value is not None and value.isfinite().all() for value in gradients.values())
    with sparsenet.record(model := selective_net(-30.0).eval()) as rec:
        model(torch.stack([Scenes(24)[index][0] for index in range(8)]))
    assert max(density for size, density in rec.density.items() if max(size) > 3) == 0


def test_a_stopped_run_of_two_goes_on(found):
    for each in found:
        assert each["resumed"]["losses"] == each["selective"]["losses"]
        for name, value in each["selective"]["state"].items():
            assert torch.equal(each["resumed"]["state"][name], value)


def test_evaluation_in_shares(found):
    alone = evaluated()
    for each in found:
        for name, values in alone.items():
            for mine, expected in zip(each["evaluated"][name], values, strict=True):
                torch.testing.assert_close(
                    torch.as_tensor(mine), torch.as_tensor(expected), rtol=0, atol=0, equal_nan=True
                )
        assert len(each["evaluated"]["dense"][0]) > 0


def test_errors_reach_every_process(found):
    for each in found:
        assert "not finite: the loss is not finite at iteration 0 (sum nan)" in each["not finite"]
        assert "batch of 3 images cannot be divided among 2 processes" in each["not divisible"]
        assert "in parts.pt is not the same for all processes: choose an --out that all share" in each["not shared"]


def test_the_first_process_alone_writes(folder, found):
    assert sorted(path.name for path in folder.glob("*.pt")) == sorted(
        [*(f"{case}.pt" for case in CASES), "0.pt", "1.pt"]
    )
    assert all(len(list((folder / "log" / case).iterdir())) == 1 for case in CASES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.processes("cpu"):
        one_of_two(Path(sys.argv[1]))
