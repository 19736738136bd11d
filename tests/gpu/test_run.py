"""The script of all device checks, on a machine that need not have one."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from sparsenet import bench, cli, coverage, device_sweep
from tests.gpu import run as script


def part(code: str, most: float = 60, name: str = "part") -> script.Part:
    return script.Part(name, [sys.executable, "-c", code, "{json}"], most)


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('[1]'); print('said');"


def test_a_part_and_what_came_of_it() -> None:
    found = part(WRITES)
    script.run(found, left=60)
    assert (found.status, found.result, found.tail) == ("passed", [1], ["said"])


def test_what_a_part_wrote_before_it_failed_or_hung_is_kept() -> None:
    failing, hanging = part(WRITES + "sys.exit(3)"), part(WRITES + "import time; time.sleep(60)", most=2)
    for each, status in ((failing, "failed"), (hanging, "timed out")):
        script.run(each, left=60)
        assert (each.status, each.result) == (status, [1])
    late = part(WRITES)
    script.run(late, left=0)
    assert (late.status, late.result) == ("no time left", None)


def test_what_cannot_be_read_or_started_is_a_failure_of_that_part_alone() -> None:
    halfway = part(
        "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('[1, '); sys.stdout.buffer.write(b'\\xff')"
    )
    script.run(halfway, left=60)
    assert (halfway.status, halfway.result) == ("passed", None)
    nothing = script.Part("part", ["/no/such/program"], 10)
    script.run(nothing, left=60)
    assert nothing.status == "failed" and "No such file" in nothing.tail[-1]
    missing = script.Part("part", ["/no/such/program"], 10, missing="no such tool")
    script.run(missing, left=60)
    assert (missing.status, missing.tail) == ("not here", ["no such tool"])


def test_with_a_part_end_the_processes_that_it_started(tmp_path: Path) -> None:
    """A compiler that goes on would take the next part's time."""
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    hanging = part(code, most=2)
    script.run(hanging, left=60)
    assert hanging.status == "timed out"
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or ") Z " in state.read_text():  # ended, if nobody asked for it yet
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the part's child goes on")


def test_the_parts_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their words are what the command line takes, of known models and engines, without running them."""
    found, models = list(script.parts("cuda")), set()
    assert all(each.most < 560 for each in found)
    assert sum(each.most for each in found[:4]) < 500  # the most important ones, were each of them to take its most
    for each in found:
        words = each.command
        if "sparsenet.cli" in words:
            options = cli._parser().parse_args(words[words.index("sparsenet.cli") + 1 :])
            assert options.device == "cuda" and options.dtype in bench.DTYPES
            assert set(options.against) <= set(bench.CUDA_RIVALS)
            assert "{json}" in words
            models.add(options.model)
        elif "--sweep" in words:
            monkeypatch.setattr(device_sweep, "device_of", lambda device, dtype: torch.device("cpu"))
            monkeypatch.setattr(device_sweep, "_point", lambda *numbers: numbers)
            combinations = json.loads(words[-1])
            numbers = list(device_sweep.run("cuda", **combinations))
            assert all(channels % 128 == 0 and size <= 75 for _, _, _, channels, size, _, _ in numbers)
        else:
            assert "pytest" in words or each.missing
    for name in models:
        assert isinstance(coverage.named(name), torch.nn.Module)


def test_one_json_of_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "parts", lambda device: [part(WRITES), part("raise SystemExit('no')")])
    path = tmp_path / "gpu.json"
    assert script.main(["--device", "cpu", "--json", str(path)]) == 1
    found = json.loads(path.read_text())
    assert [each["status"] for each in found["parts"]] == ["passed", "failed"]
    assert found["versions"]["torch"] and found["machine"]
    assert all(aim["met"] is None for aim in found["aims"])


def test_what_is_to_be_reached() -> None:
    def network(name: str, realised: float, speedup: dict[str, float]) -> script.Part:
        return script.Part(name, [], 1, result={"realised_fraction_torch": realised, "speedup": speedup})

    point = {"ms": {"dense": 1.0, "triton": 0.2, "spconv": 0.4}, "of_aim": {"triton": 0.9, "spconv": 1.8}}
    slower = {"ms": {"dense": 1.0, "triton": 0.4, "spconv": 0.5}, "of_aim": {"triton": 1.1, "spconv": 1.8}}
    done = [
        network("ssd300_vgg16 32 float16 against cudnn", 0.9, {"dense": 3.0}),
        network("ssd300_vgg16 32 float16 against compile", 0.7, {"compile": 3.0}),
        network("ssd300_vgg16 8 tf32 against cudnn", 0.1, {"dense": 0.1}),
        network("ssd300_vgg16 1 float16 against cudnn", 0.1, {"dense": 1.2, "cudnn-graph": 1.1, "spconv": 0.1}),
        script.Part("layers float16", [], 1, result=[point, slower]),
        script.Part("kernels", [], 1, status="passed"),
        script.Part("compute-sanitizer", [], 1, status="not here"),
    ]
    values = {aim.name: (aim.value, aim.met) for aim in script.aims(done)}
    assert list(values.values()) == [
        (0.7, True),
        (1.1, True),
        (1.1, False),
        (1.25, False),
        (None, None),
        (1.0, True),
        (None, None),
        (None, None),
    ]


def test_the_script_runs_from_end_to_end_where_the_cpu_stands_in_for_a_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One part of each kind: tests, a network (recorded, and in half precision), layers."""
    chosen = ("networks", "ssd300_vgg16 1 float16", "layers float16", "layers tf32", "compute-sanitizer")
    found = [each for each in script.parts("cpu") if each.name.startswith(chosen)]
    assert len(found) == len(chosen)
    monkeypatch.setattr(script, "parts", lambda device: found)
    path = tmp_path / "gpu.json"
    assert script.main(["--device", "cpu", "--json", str(path)]) == 0, [each.tail for each in found]
    checks, network, half, _, single = json.loads(path.read_text())["parts"]
    assert "skipped" in checks["tail"][-1] or torch.cuda.is_available()
    assert network["result"]["ms"].keys() == {"sparse", "dense", "cudnn", "cudnn-graph"}
    assert network["result"]["failures"].keys() == {"spconv", "spconv-triton"}
    assert network["result"]["speedup"].keys() == {"dense", "cudnn", "cudnn-graph"}
    for layers in (half, single):
        (point,) = layers["result"]
        assert point["ms"].keys() >= {"dense", "triton", "rows"}
        assert point["of_aim"]["triton"] > 0
        assert "pip install spconv-triton" in point["failures"]["spconv-triton"] or "spconv-triton" in point["ms"]


def test_the_aim_of_a_layer() -> None:
    point = device_sweep.DevicePoint("float16", 8, 128, 19, 0.25, {"dense": 0.1, "triton": 0.05}, {}, {})
    assert point.of_aim == {"triton": pytest.approx(0.05 / (1.6 * 0.25 * 0.1 + 0.01))}


@pytest.mark.parametrize("installed", [False, True])
def test_a_checkout_need_not_be_installed(installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every part would fail, after the device's time."""
    for folder in ("sparsenet", "adapters"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: name if installed else None)
    with script.importable(tmp_path):
        assert (tmp_path / "sparsenet" / "adapters" / "__init__.py").exists() is not installed
        assert sys.path[0] == str(tmp_path)
    assert not (tmp_path / "sparsenet" / "adapters").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main([])
    assert "PyTorch finds no CUDA device here; --device cpu tries the script alone" in capsys.readouterr().err
