"""A spread of the catalogue, chosen to meet every rule that its models meet; `make coverage` runs the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsenet import coverage
from sparsenet.features import RULES, Features
from tests.models import SmallNet

# The models of the spread, and the rules that each is there for.
SPREAD: dict[tuple[str, str], set[str]] = {
    ("timm", "test_convnext"): {"linear", "layer_norm", "permute"},
    ("timm", "test_mambaout"): {"cut"},
    ("timm", "test_coatnet"): {"view", "avg_pool2d", "batch_norm"},
    ("timm", "skresnet18"): {"stack", "unsqueeze", "reduce", "adaptive_avg_pool2d"},
    ("timm", "resnest14d"): {"contiguous", "view", "arithmetic"},
    ("timm", "hrnet_w18_small"): {"interpolate"},
    ("timm", "tf_efficientnet_lite0"): {"pad", "conv2d"},
    ("timm", "resnetblur18"): {"pad", "conv2d"},
    ("timm", "poolformerv2_s12"): {"group_norm"},
    ("timm", "ghostnet_050"): {"getitem", "cat"},
    ("timm", "halonet26t"): {"leave"},
    ("timm", "convnextv2_atto"): {"reduce"},
    ("timm", "mobilevit_xxs"): {"pointwise"},
    ("torchvision", "shufflenet_v2_x0_5"): {"transpose", "metadata"},
    ("torchvision", "squeezenet1_1"): {"max_pool2d"},
    ("torchvision", "lraspp_mobilenet_v3_large"): {"interpolate"},
}
NOT_MET = {
    "what training does": {"backward", "detach", "dropout2d", "gradient_hooks", "requires_grad", "set_data"},
    "what models of the catalogue do before their stages, or in other versions": {
        "adaptive_max_pool2d", "channel_shuffle", "channelwise", "clone", "conv_transpose2d", "expand", "flatten",
        "fresh", "index_select", "instance_norm", "local_response_norm", "matmul", "movedim", "narrow", "prelu",
        "select", "setitem", "show", "squeeze", "synchronised_statistics", "to", "types", "unbind", "unflatten",
        "view_as",
    },
}  # fmt: skip


@pytest.mark.parametrize(("suite", "name"), SPREAD)
def test_the_contract_holds(suite: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    met: set[str] = set()

    def noting(rule: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            met.add(rule.__name__)
            return rule(*args, **kwargs)

        return noted

    for function, rule in RULES.items():
        monkeypatch.setitem(RULES, function, noting(rule))
    (result,) = coverage.run(suite, [name])
    assert result.status == "passed", result.reason
    assert result.share >= 0.99
    assert 0 < result.macs_cut < 0.7
    assert met >= SPREAD[suite, name], met


def test_every_rule_is_met_or_known_not_to_be() -> None:
    """What the spread does not meet has property tests all the same."""
    rules = {rule.__name__ for rule in RULES.values()}
    assert set().union(*SPREAD.values(), *NOT_MET.values()) == rules


# -- that it can fail ------------------------------------------------------------------------------------------


def check(monkeypatch: pytest.MonkeyPatch, model: nn.Module, **options: Any) -> coverage.Result:
    monkeypatch.setattr(coverage, "build", lambda suite, name: model)
    monkeypatch.setattr(coverage, "example_inputs", lambda model: torch.rand(1, 3, 48, 48))
    return coverage.check("timm", "none", "none", **options)


def test_a_model_that_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    result = check(monkeypatch, nn.Sequential(nn.Conv2d(3, 3, 4, 4), SmallNet()))
    assert result.status == "passed", result.reason
    assert result.stage == "0"


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[F.relu]
    monkeypatch.setitem(RULES, F.relu, lambda func, x, *args, **kwargs: rule(func, x * (1 + 1e-4), *args, **kwargs))
    result = check(monkeypatch, nn.Sequential(nn.Conv2d(3, 3, 4, 4), SmallNet()))
    assert result.status == "failed"
    assert result.reason.startswith("AssertionError: all active: error")


def test_a_rule_that_one_storage_breaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By less than float32 would show."""
    rule = RULES[F.relu]

    def wrong(func: Any, x: Features, *args: Any, **kwargs: Any) -> Any:
        return rule(func, x * (1 + 1e-12) if type(x).__name__ == "SparseFeatures" else x, *args, **kwargs)

    monkeypatch.setitem(RULES, F.relu, wrong)
    result = check(monkeypatch, nn.Sequential(nn.Conv2d(3, 3, 4, 4), SmallNet()))
    assert result.status == "failed"
    assert result.reason.startswith("AssertionError: masked: error")


def test_an_output_that_does_not_see_the_mask_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0 + 1

    result = check(monkeypatch, nn.Sequential(nn.Conv2d(3, 3, 4, 4), Deaf()))
    assert result.status == "failed"
    assert "does not see the mask" in result.reason


def test_a_model_without_convolutions_after_a_stage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    result = check(monkeypatch, nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.Linear(4 * 144, 2)))
    assert result.status == "refused"
    assert "no convolution reads the output" in result.reason


def test_whatever_a_model_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("broken")

    result = check(monkeypatch, Broken())
    assert (result.status, result.reason) == ("failed", "ArithmeticError: broken")


def test_fresh_weights_are_enlivened() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    coverage.enliven(model.eval(), torch.rand(1, 3, 8, 8))
    assert not model[1].training
    assert model[1].momentum == 0.1
    for tensor in (model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var, *model[2].parameters()):
        assert len(tensor.unique()) > 1
    assert model(torch.rand(4, 3, 8, 8)).std() > 0.1


def test_an_unknown_suite() -> None:
    with pytest.raises(ValueError, match="choose one of torchvision, timm"):
        next(coverage.run("caffe"))
