"""The script of all device checks, on a machine that need not have one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.gpu import run as script


def part(code: str, most: float = 60) -> script.Part:
    return script.Part("part", ["-c", code, "{json}"], most)


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


def test_all_parts_fit_into_ten_minutes() -> None:
    assert all(each.most < 560 for each in script.parts("cuda"))
    for device in ("cpu", "cuda"):
        commands = [each.command for each in script.parts(device)]
        assert commands[0][1] == "pytest"
        assert all("{json}" in command for command in commands[1:])


def test_one_json_of_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "parts", lambda device: [part(WRITES), part("raise SystemExit('no')")])
    path = tmp_path / "gpu.json"
    assert script.main(["--device", "cpu", "--json", str(path)]) == 1
    found = json.loads(path.read_text())
    assert [each["status"] for each in found["parts"]] == ["passed", "failed"]
    assert found["versions"]["torch"] and found["machine"]


def test_the_sweep_runs_anywhere(tmp_path: Path) -> None:
    (_, _, sweep) = script.parts("cpu")
    script.run(sweep, left=100)
    assert sweep.status == "passed", sweep.tail
    (point,) = sweep.result
    assert point["ms"].keys() >= {"dense", "rows"}
    assert point["of_aim"]["rows"] > 0
    assert "spconv-triton" in point["failures"] or "spconv-triton" in point["ms"]


@pytest.mark.skipif("torch" in sys.modules and sys.modules["torch"].cuda.is_available(), reason="there is a device")
def test_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main([])
    assert "PyTorch finds no CUDA device here; --device cpu tries the script alone" in capsys.readouterr().err
