from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsenet.selector.selective_module import MAX_KEYS, NonLocal, SelectiveModule

SWITCHES = ("dilated", "non_local", "deconv", "skip", "separable")
VARIANTS = [dict(zip(SWITCHES, on, strict=True)) for on in product((False, True), repeat=len(SWITCHES))]
side = st.integers(1, 23)


def counted_macs(module: SelectiveModule, features: Tensor) -> int:
    # The fused attention kernel of the CPU is unknown to torch's counter, its two matrix products are not.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.eval()(features)
    return counter.get_total_flops() // 2


def reach(module: SelectiveModule, size: int = 65) -> int:
    """How many columns of the input the central logit depends on."""
    features = torch.randn(1, 8, size, size, requires_grad=True)
    module.eval()(features)[0, 0, size // 2, size // 2].backward()
    assert features.grad is not None
    return int((features.grad.abs().sum((0, 1, 2)) > 0).sum())


@pytest.mark.parametrize("switches", VARIANTS, ids=lambda v: "+".join(k for k in v if v[k]) or "none")
def test_every_variant_gives_one_logit_per_pixel_and_counts_its_macs(switches: dict[str, bool]) -> None:
    module = SelectiveModule(12, 8, **switches)
    features = torch.randn(1, 12, 45, 38)  # half of it, 23×19, has more pixels than keys
    assert module.eval()(features).shape == (1, 1, 45, 38)
    assert module.macs((45, 38)) == counted_macs(module, features)


@given(side, side, st.integers(0, 3), st.sampled_from([torch.float32, torch.float64]))
def test_any_size_batch_and_dtype(height: int, width: int, batch: int, dtype: torch.dtype) -> None:
    module = SelectiveModule(4, 8).to(dtype).eval()
    features = torch.randn(batch, 4, height, width, dtype=dtype)
    logits = module(features)
    assert logits.shape == (batch, 1, height, width)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@given(height=side, width=side)
def test_macs_are_exact_at_any_size(height: int, width: int) -> None:
    module = SelectiveModule(4, 8)
    assert module.macs((height, width)) == counted_macs(module, torch.randn(1, 4, height, width))


@pytest.mark.parametrize(
    ("channels", "size", "separable", "millions"),
    [(128, 75, False, 279.9), (256, 38, False, 76.4), (128, 75, True, 119), (256, 38, True, 36)],
)
def test_macs_of_the_documented_design(channels: int, size: int, separable: bool, millions: float) -> None:
    macs = SelectiveModule(channels, 32, separable=separable).macs((size, size))
    assert macs / 1e6 == pytest.approx(millions, abs=0.5 if separable else 0.05)


def test_starts_open() -> None:
    logits = SelectiveModule(16, 8)(torch.randn(2, 16, 20, 20))
    assert (logits.sigmoid() > 0.5).all()


def test_training_reaches_every_parameter() -> None:
    module = SelectiveModule(4, 8)
    torch.nn.init.normal_(module.attend.restore.weight)
    module(torch.randn(1, 4, 9, 7)).square().sum().backward()  # batch of one, in training mode
    silent = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_autocast() -> None:
    module = SelectiveModule(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(torch.randn(2, 4, 40, 41))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()


def test_images_do_not_see_each_other() -> None:
    module = SelectiveModule(4, 8).double().eval()
    features = torch.randn(3, 4, 17, 12, dtype=torch.float64)
    apart = torch.cat([module(image) for image in features.split(1)])
    torch.testing.assert_close(module(features), apart)


def test_dilation_widens_what_a_pixel_sees() -> None:
    narrow, wide = (reach(SelectiveModule(8, 8, dilated=on, non_local=False)) for on in (False, True))
    assert narrow < wide < 65


def test_non_local_sees_the_whole_map_once_trained() -> None:
    module = SelectiveModule(8, 8)
    assert reach(module) < 65  # the identity at first
    torch.nn.init.normal_(module.attend.restore.weight)
    assert reach(module) == 65


@pytest.mark.parametrize("skip", [True, False])
def test_skip_carries_the_input_past_the_bottleneck(skip: bool) -> None:
    module = SelectiveModule(4, 8, skip=skip).eval()
    torch.nn.init.zeros_(module.up.weight)
    logits = module(torch.randn(1, 4, 16, 16))
    assert (logits.std() > 0) == skip


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (25, 24)])
def test_non_local_equals_its_equation(size: tuple[int, int]) -> None:
    block = NonLocal(6, 3).double()
    torch.nn.init.normal_(block.restore.weight)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    theta, phi, g = block.embed(x).chunk(3, dim=1)
    factor, *grid = block.key_grid(*size)
    if factor > 1:
        phi, g = (F.max_pool2d(t, factor, ceil_mode=True) for t in (phi, g))
    assert list(g.shape[-2:]) == grid
    weights = torch.einsum("nchw,ncij->nhwij", theta, phi).div(3**0.5).flatten(3).softmax(-1)
    attended = torch.einsum("nhwk,nck->nchw", weights, g.flatten(2))
    torch.testing.assert_close(block(x), x + block.restore(attended))


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_keys_are_bounded_and_cover_the_map(height: int, width: int) -> None:
    factor, rows, columns = NonLocal.key_grid(height, width)
    assert rows * columns <= MAX_KEYS
    assert 0 <= rows * factor - height < factor
    assert 0 <= columns * factor - width < factor


@given(channels=st.integers(8, 512), size=st.tuples(side, side), budget=st.integers(10_000, 20_000_000))
def test_fit_keeps_the_budget_and_prefers_width(channels: int, size: tuple[int, int], budget: int) -> None:
    try:
        module = SelectiveModule.fit(channels, size=size, budget=budget)
    except ValueError:
        assert SelectiveModule(channels, 8, separable=True).macs(size) > budget
        return
    width = module.logit.in_channels
    assert module.macs(size) <= budget
    assert width % 8 == 0
    assert width <= max(8, channels // 4)
    if width < min(32, channels // 32 * 8):
        wider = SelectiveModule(channels, width + 8, separable=module.down[0].groups > 1)
        assert wider.macs(size) > budget


def test_fit_takes_the_documented_width_where_it_may() -> None:
    module = SelectiveModule.fit(128, size=(75, 75), budget=0.01 * 31.37e9)
    assert module.macs((75, 75)) == SelectiveModule(128, 32).macs((75, 75))


def test_fit_lowers_width_before_it_separates() -> None:
    size = (38, 38)
    dense, separable = (SelectiveModule(128, 8, separable=on).macs(size) for on in (False, True))
    assert SelectiveModule.fit(128, size=size, budget=dense).macs(size) == dense
    assert SelectiveModule.fit(128, size=size, budget=dense - 1).macs(size) == separable


def test_fit_passes_switches_on_and_says_what_is_impossible() -> None:
    module = SelectiveModule.fit(128, size=(38, 38), budget=1e8, non_local=False, skip=False)
    assert not module.skip
    assert isinstance(module.attend, torch.nn.Identity)
    with pytest.raises(ValueError, match=r"128 channels at 38×38 fits 10 MACs: the smallest takes \d"):
        SelectiveModule.fit(128, size=(38, 38), budget=10)


def test_initialisation_does_not_depend_on_the_candidates_that_were_too_wide() -> None:
    torch.manual_seed(0)
    fitted = SelectiveModule.fit(128, size=(38, 38), budget=8e6)
    torch.manual_seed(0)
    direct = SelectiveModule(128, 8)
    for name, value in direct.state_dict().items():
        assert torch.equal(value, fitted.state_dict()[name]), name
