"""The paper's figures, and a count by hand."""

import pytest
import torch

from detectors.pelee import pelee304
from detectors.ssd import ssd300_vgg16_bn
from evaluation.detector import multiply_accumulates
from evaluation.paper_like import paper_like_operations


@pytest.mark.parametrize(("classes", "giga"), [(21, 31.784), (81, 35.575)])
def test_ssd300_takes_what_the_paper_says(classes, giga):
    """Which has 31.78 and 35.58."""
    model = ssd300_vgg16_bn(classes, six=True).eval()
    model.score_thresh = 1.0  # random weights find thousands of boxes
    counted = paper_like_operations(model, torch.rand(3, 300, 300))
    assert counted / 1e9 == pytest.approx(giga, abs=5e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_heads_have_a_bias_and_logits_a_softmax():
    """Between two numbers of classes only the logits' convolutions differ: by that much, and four at each output."""
    image = torch.rand(3, 304, 304)
    few, more = (pelee304(classes, width=0.25).eval() for classes in (2, 3))
    macs, whole = (count(more, image) - count(few, image) for count in (multiply_accumulates, paper_like_operations))
    assert whole - macs == 4 * 5142
