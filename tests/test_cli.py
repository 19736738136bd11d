"""The command line."""

from pathlib import Path

import pytest

from sparsenet import coverage
from sparsenet.cli import main


def test_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stages", "timm:test_resnet"]) == 0
    assert "layer1" in capsys.readouterr().out


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "test_convnext", "--at", "stride4"]) == 0
    shown = capsys.readouterr().out
    assert "100.0% of its convolutions'" in shown
    assert "linear" in shown


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["plan", "resnet18", "--at", "stride3"], "no stage 'stride3'"),
        (["stages", "resnt18"], "neither torchvision nor timm has a model 'resnt18'"),
        (["coverage", "--suite", "timm", "--models", "nothing"], "timm has no model nothing"),
        (["coverage", "--suite", "caffe"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_what_is_asked_wrongly(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert part in capsys.readouterr().err


def test_coverage_goes_on_where_it_was_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, page = tmp_path / "coverage.json", tmp_path / "coverage.md"
    suite = ["coverage", "--suite", "timm", "--json", str(results), "--markdown", str(page)]
    assert main([*suite, "--models", "test_resnet"]) == 0
    checked: list[str] = []

    def check(suite: str, name: str, family: str, *, reenter: bool = False) -> coverage.Result:
        checked.append(name)
        return coverage.Result(name, suite, family, "failed", "it went wrong")

    monkeypatch.setattr(coverage, "check", check)
    assert main([*suite, "--models", "test_resnet", "test_nfnet"]) == 1
    assert checked == ["test_nfnet"]
    assert "1 of 2 models passed" in capsys.readouterr().out
    text = page.read_text()
    assert "| test_resnet | resnet | layer1 | 100.00% |" in text
    assert "**failed**: it went wrong" in text
