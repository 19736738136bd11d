"""The benchmark: what it tells, and what it refuses. Times themselves are not tested."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsenet
from sparsenet import bench, device_sweep, engines, sweep
from sparsenet.cli import main
from sparsenet.selector import GivenMask
from sparsenet.timing import alternate
from tests.models import small_ssd

BENCH = ["bench", "timm:test_resnet", "--at", "layer1", "--density", "0.3", "--size", "64", "--repeats", "1"]


def test_a_network_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    files = ["--json", str(numbers), "--plot", str(picture)]
    assert main([*BENCH, "--batch", "2", "--threads", "1", "--against", "eager", *files]) == 0
    shown = capsys.readouterr().out
    assert "sparse is faster by" in shown
    assert "timm:test_resnet, 2 × 64×64, 30.1% active at layer1" in shown
    found = json.loads(numbers.read_text())
    assert list(found["ms"]) == ["sparse", "dense", "eager"]
    assert list(found["speedup"]) == ["dense", "eager"]
    for name, (low, high) in found["quartiles"].items():
        assert 0 < low <= found["ms"][name] <= high
    assert found["macs_ratio"] == found["dense_macs"] / found["macs"] > 1
    assert found["realised_fraction"] == min(found["speedup"].values()) / found["macs_ratio"]
    assert found["realised_fraction_torch"] == found["speedup"]["eager"] / found["macs_ratio"]
    assert (found["batch"], found["size"], found["threads"], found["density"]) == (2, [64, 64], 1, 0.3)
    assert found["density_met"] == pytest.approx(0.3, abs=0.01)
    assert found["command"].startswith("sparsenet bench timm:test_resnet --at layer1")
    assert found["versions"]["torch"] and found["machine"].keys() == {"processor", "cores", "vectors"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_who_takes_no_part_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(network: nn.Module, images: Tensor) -> engines.Run:
        return lambda: [network(images) * 1.001]

    def broken(network: nn.Module, images: Tensor) -> engines.Run:
        raise NotImplementedError("no such operation\nand more")

    monkeypatch.setitem(engines.ENGINES, "eager", wrong)
    monkeypatch.setitem(engines.ENGINES, "compile", broken)
    found = bench.compare("timm:test_resnet", "layer1", 0.3, size=64, repeats=1, against=("eager", "compile"))
    assert found.failures["compile"].startswith("NotImplementedError: no such operation (test_bench.py:")
    assert found.failures["eager"].startswith("wrong output: error ")
    assert list(found.ms) == ["sparse", "dense"]
    assert found.best == "dense"
    assert found.best_torch is found.realised_fraction_torch is None
    assert ("compile", "–", found.failures["compile"], "", "") in found.rows()


def test_spconv_is_no_dense_engine() -> None:
    found = bench.compare("timm:test_resnet", "layer1", 0.3, size=64, repeats=1, against=("spconv",))
    assert "spconv" in found.speedup
    assert found.best == "dense"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["bench"], "bench needs a MODEL, --at and --density, or --sweep"),
        (["bench", "--sweep", "resnet18"], "--sweep times single convolutions, not resnet18"),
        (["bench", "--sweep", "--device", "cuda", "--plot", "x.png"], "leave out --plot, and take --json on cuda"),
        ([*BENCH, "--against", "eager,tensorrt"], "unknown engine tensorrt: choose among eager, compile, onnxruntime"),
        ([*BENCH, "--batch", "0"], "batch must be at least 1, not 0"),
        ([*BENCH, "--density", "0"], "density must be above 0, and 1 at most, not 0.0"),
        ([*BENCH, "--at", "stride3"], "no stage 'stride3'"),
    ],
)
def test_what_is_asked_wrongly(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert part in capsys.readouterr().err


def test_threads_are_as_they_were() -> None:
    before = torch.get_num_threads()
    with bench.using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with bench.using_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


# -- detectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["pool2", "pool3", "stride8"])
def test_stages_of_a_detectors_network_are_the_detectors(at: str) -> None:
    detector, image = small_ssd(), torch.rand(3, 300, 300)
    whole = sparsenet.selectify(detector, at, selector=GivenMask(), example_inputs=[image])
    network = bench.DetectorNetwork(detector).eval()
    alone = sparsenet.selectify(network, at, selector=GivenMask(), example_inputs=image[None])
    assert sparsenet.plan(alone).stage == sparsenet.plan(whole).stage
    assert sparsenet.plan(alone).total_macs == sparsenet.plan(whole).total_macs


def test_of_a_detector_the_network_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsenet.coverage.named", lambda name: small_ssd())
    found = bench.compare("small_ssd", "pool2", 0.3, repeats=1, against=("eager", "openvino"))
    assert not found.failures
    assert found.size == (300, 300)


def test_a_two_stage_detector_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoStages(nn.Module):
        pretrained_cfg = {"input_size": (3, 32, 32)}  # noqa: RUF012
        rpn = None

    TwoStages.__module__ = "timm.models.none"
    monkeypatch.setattr("sparsenet.coverage.named", lambda name: TwoStages())
    with pytest.raises(ValueError, match="a two-stage detector chooses what its second stage computes"):
        bench.compare("two_stages", "stride4", 0.3)


# -- the sweep -------------------------------------------------------------------------------------------------


def test_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"channels": (16, 128), "sizes": (6, 9), "densities": (0.5, 1.0)}
    monkeypatch.setattr(sweep, "run", partial(sweep.run, **small))
    numbers, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    assert main(["bench", "--sweep", "--repeats", "1", "--json", str(numbers), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert " 16 channels, 9×9,  49% active: " in shown
    assert "lowest efficiency at 10 to 50 %, 64 channels: not measured" in shown
    assert "lowest efficiency at 10 to 50 %, 128 channels and more: " in shown
    assert "6×6: faster than dense up to " in shown
    points = json.loads(numbers.read_text())["points"]
    assert [(p["channels"], p["size"], round(p["density"], 1)) for p in points] == [
        (channels, size, density) for size in (6, 9) for channels in (16, 128) for density in (0.5, 1.0)
    ]
    first = points[0]
    assert first["efficiency"] == (first["dense_ms"] * first["density"] + 0.05) / first["sparse_ms"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_convolution_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sweep.indirect.Prepared.run
    monkeypatch.setattr(sweep.indirect.Prepared, "run", lambda *args: right(*args) * 1.001)
    with pytest.raises(RuntimeError, match=r"indirect, 16 channels at 6x6, density 0\.5: error"):
        list(sweep.run(channels=(16,), sizes=(6,), densities=(0.5,), repeats=1))


def test_calls_that_settle_are_not_timed() -> None:
    calls: list[str] = []
    functions = {name: partial(calls.append, name) for name in "ab"}
    seconds = alternate(functions, repeats=2, warmup=1, settle=2)
    assert "".join(calls) == "aaabbbbbbaaaaaabbb"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "unknown device 'tpu': choose cpu or cuda"),
        ({"dtype": "int8"}, "unknown dtype 'int8': choose one of float32, tf32, float16, bfloat16"),
        ({"dtype": "float16"}, "the engines compute in float32 on a CPU: measure float16 on cuda"),
        pytest.param(
            {"device": "cuda"},
            "finds no CUDA device here: measure on cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device"),
        ),
    ],
)
def test_devices_that_are_not_there(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.compare("resnet18", "layer1", 0.3, **arguments)  # type: ignore[arg-type]


def test_tf32_is_as_it_was_afterwards() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for dtype, allowed in {"tf32": True, "float32": False, "float16": False}.items():
        with bench.computing_in(dtype):
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


def test_the_sweep_of_a_device_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own contenders, in the type that is asked for; the file is there after each point."""
    point = device_sweep.DevicePoint("tf32", 8, 128, 19, 0.25, {"dense": 0.1, "triton": 0.05}, {"triton": 2.0}, {})
    numbers = tmp_path / "sweep.json"

    def points(device: str, dtypes: tuple[str, ...], repeats: int) -> Iterator[device_sweep.DevicePoint]:
        assert (device, dtypes, repeats) == ("cuda", ("tf32",), 3)
        yield point
        assert len(json.loads(numbers.read_text())["points"]) == 1
        yield point

    monkeypatch.setattr(device_sweep, "run", points)
    asked = ["bench", "--sweep", "--device", "cuda", "--dtype", "tf32", "--repeats", "3", "--json", str(numbers)]
    assert main(asked) == 0
    saved = json.loads(numbers.read_text())
    assert saved["command"] == " ".join(["sparsenet", *asked])
    assert [found["of_aim"]["triton"] for found in saved["points"]] == [point.of_aim["triton"]] * 2
    assert "128 channels" in capsys.readouterr().out
