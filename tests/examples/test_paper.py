"""The tables' cells, and a table, as small as they get."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

import cells
import paper
import recipe
import sparsenet
import trade_off
from cells import Bench, Cell
from data import digits_voc
from data.sets import voc_or_digits
from detectors.ssd import ssd300_vgg16_bn
from finetune import BY_TASK, SUPERVISIONS, Training, finetune_selective
from recipe import DEMO_SCRATCH
from storage import save_checkpoint
from training import Schedule

ONCE = Schedule(iterations=1, batch_size=2, lr=0.005)
TINY = Training(finetune=ONCE, selector=ONCE, selector_batches=1, selector_by_task=1, workers=0)


@pytest.fixture
def data(tmp_path, monkeypatch):
    small = digits_voc.DigitsVOC(train=2, test=2).generate(tmp_path / "small")
    monkeypatch.setattr(digits_voc.DigitsVOC, "generate", lambda self, root: small)
    monkeypatch.chdir(tmp_path)
    return voc_or_digits(None, 0)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return ssd300_vgg16_bn(11, width=0.06)


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_every_supervision_trains_the_branch_and_in_its_own_phase_nothing_else(data, base, tmp_path, supervision):
    training = replace(TINY, supervision=supervision, finetune=replace(ONCE, lr=0.0))
    untouched = {name: value.clone() for name, value in base.state_dict().items() if "running" not in name}
    first = sparsenet.selectify(base, "pool3", example_inputs=[torch.rand(3, 300, 300)], capacity=training.capacity)
    selective = finetune_selective(base, data.train, "pool3", training, 0, tmp_path)
    state = selective.state_dict()
    for name, value in untouched.items():
        if "num_batches" not in name:
            assert torch.equal(state[name], value), name
    logit = "selector.module.logit.bias"
    assert not torch.equal(state[logit], first.state_dict()[logit])
    assert not selective.training
    assert all(parameter.requires_grad for parameter in selective.parameters())


def test_a_cell_is_trained_once(data, base, tmp_path, monkeypatch):
    bench = Bench(base, data, "tiny", "a test", tmp_path / "store")
    cell = Cell(TINY, seed=0, at="pool3", off=("non_local",))
    figures, found = bench.measure(cell)
    assert figures["test_images"] == 2 and found.macs == figures["macs"] < 1.1 * figures["dense_macs"]

    def again(*args, **options):
        raise AssertionError("it is trained already")

    monkeypatch.setattr(cells, "finetune_selective", again)
    known, kept = bench.measure(cell)
    assert known == figures
    assert (kept.matches.correct == found.matches.correct).all() and kept.density == found.density
    other, _ = bench.measure(replace(cell, masks="centre"))  # measured anew, with the same weights
    assert other["masks"] == "centre" and other["minutes"] == figures["minutes"]
    with pytest.raises(AssertionError, match="already"):
        bench.measure(replace(cell, seed=1))
    with pytest.raises(AssertionError, match="already"):
        replace(bench, seen="another test").measure(cell)


def test_a_cell_is_named_by_what_its_training_depends_on():
    cell = Cell(TINY, seed=0, at="pool2")
    assert cell.name == replace(cell, masks="random").name == replace(cell, training=replace(TINY, workers=3)).name
    assert cell.name != replace(cell, training=replace(TINY, missed_pixel=2.0)).name
    dense = Cell(TINY, seed=0)
    assert dense.name == Cell(replace(TINY, missed_pixel=2.0, supervision="indirect"), seed=0).name


def test_how_training_runs_is_an_option_as_in_the_recipes(data, monkeypatch):
    command = "paper.py table3 --width 0.25 --threads 1 --device cpu"
    options = "--amp float16 --accumulate 2 --ema 0.9"
    monkeypatch.setattr("sys.argv", command.split())
    usual, training = paper.prepare(paper.pelee_voc.RECIPE, paper.parse_arguments())
    assert (training.accumulate, training.ema, training.amp) == (1, None, recipe.bfloat16_is_fast("cpu"))
    monkeypatch.setattr("sys.argv", [*command.split(), *options.split()])
    bench, other = paper.prepare(paper.pelee_voc.RECIPE, paper.parse_arguments())
    assert (other.accumulate, other.ema, other.amp) == (2, 0.9, torch.float16)
    assert bench.seen == usual.seen.replace("from scratch", "from scratch in 2 parts, averaged by 0.9")
    assert Cell(training, 0).name != Cell(other, 0).name == Cell(replace(other, amp=False), 0).name
    assert json.loads(json.dumps(Cell(other, 0).settings()))["training"]["amp"] == "torch.float16"


def test_errors_are_messages(data, monkeypatch):
    command = "paper.py table1 --width 0.06 --checkpoint none.safetensors --threads 1 --device cpu"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit, match=r"^CheckpointError: .*none.safetensors"):
        paper.main()


@pytest.mark.parametrize("name", ["random", "centre"])
def test_other_masks_have_as_many_pixels(name):
    mask = torch.zeros(1, 38, 38, dtype=torch.bool)
    mask[:, 3:9, 20:33] = True
    other = cells.OTHER_MASKS[name](mask, 5)
    assert other.sum() == mask.sum() and other.shape == mask.shape and not torch.equal(other, mask)
    if name == "centre":
        assert other[0, 19, 19] and not other[0, 0, 0]


def test_tables_have_the_papers_rows(monkeypatch):
    monkeypatch.setattr(paper, "prepare", lambda recipe, args: (recipe.name, TINY))
    args = Namespace(seeds=[0, 1])
    rows = paper.table1(args)
    assert [row.paper for row in rows[:5]] == [
        "79.1",
        "77.6, −21.0 %",
        "77.4, −31.3 %",
        "79.0, −10.2 %",
        "78.9, −19.1 %",
    ]
    assert [cell.seed for cell in rows[1].cells] == [0, 1]
    rows = {row.title: row for row in paper.table2(args)}
    assert len(rows) == 1 + 2 * 7
    assert rows["direct, all"].paper == "78.6" and rows["indirect, ∅"].cells[0].off == paper.NONE_ON
    assert rows["direct, D+S"].paper == "78.9"  # the second and third column by the two readings
    for row in rows.values():
        assert set(row.cells[0].off) <= set(paper.NONE_ON)
    assert set(BY_TASK) <= set(SUPERVISIONS)
    for name, claims in paper.CLAIMS.items():
        titles = {row.title for row in getattr(paper, name)(args)}
        assert all({claim.above, claim.below} <= titles for claim in claims), name
    rows = paper.table3(args)
    assert [row.bench for row in rows] == ["ssd_coco"] * 3 + ["pelee_voc"] * 3 + ["pelee_coco"] * 3
    assert [row.baseline for row in rows[1::3]] == [row.baseline for row in rows[2::3]]
    assert [row.baseline for row in rows[1::3]] == [row.title for row in rows[::3]]


def test_a_single_cell_by_command_then_a_table(data, base, tmp_path, monkeypatch, capsys):
    save_checkpoint(base, tmp_path / "dense.safetensors")
    monkeypatch.setattr(paper, "table1", lambda args, whole=paper.table1: whole(args)[:5][::4])
    command = (
        "paper.py table1 --width 0.06 --checkpoint dense.safetensors --iterations 1 --selector-iterations 1 "
        "--workers 0 --threads 1 --device cpu --out out"
    )
    monkeypatch.setattr("sys.argv", [*command.split(), "--only", "dense"])
    paper.main()
    assert not list((tmp_path / "out").iterdir())
    assert len(list((tmp_path / "runs" / "paper").iterdir())) == 1
    monkeypatch.setattr("sys.argv", command.split())
    paper.main()
    table = json.loads((tmp_path / "out" / "table1.json").read_text())
    assert [row["title"] for row in table["rows"]][:2] == ["baseline", "pool3, direct"]
    assert "difference_95" in table["rows"][1] and table["seeds"] == [0]
    dense, selective = table["rows"]
    assert 0 < dense["gmacs"] < dense["paper_like_g"] < 1.1 * dense["gmacs"]
    assert 0 < selective["gmacs"] < 1.1 * dense["gmacs"] and "paper_like_g" not in selective
    assert "| pool3, direct" in (tmp_path / "out" / "table1.md").read_text()
    assert "| pool3, direct" in capsys.readouterr().out


def test_figure_6_has_every_curve_of_the_paper_and_more():
    curves = trade_off.curves(TINY, replace(TINY, missed_pixel=8.0), 0)
    assert {f"{title}{both}" for title in trade_off.TITLES.values() for both in ("", " and SCN")} <= curves.keys()
    ways = ("direct", "indirect", "gumbel", "distilled", "capacity")
    assert set(ways) <= set(SUPERVISIONS) and {"dense", *(f"SCN, {how}" for how in ways)} <= curves.keys()
    cells_of_all = [cell.name for many in curves.values() for cell in many]
    assert len(set(cells_of_all)) == len(cells_of_all)
    table = Cell(TINY, 0, "pool2")  # found again where Table 1 has trained it
    assert curves["SCN, direct"][1].name == table.name


def kept(bench, cell):
    """The cell, as if it were measured."""
    matches = {"image": [0], "label": [1], "correct": [cell.at is None], "positives": [[1]] * 2}
    bench.folder(cell).mkdir(parents=True)
    np.savez(bench.folder(cell) / "own.npz", **matches)
    figures = {"macs": 2.0, "dense_macs": 4.0, "density": 0.5, "minutes": 1.0, "coco": None}
    figures |= {"map_11_point": 50.0, "map_area": 50.0}
    (bench.folder(cell) / "own.json").write_text(json.dumps(figures))


def test_a_part_of_a_table(data, base, tmp_path, monkeypatch, capsys):
    """Rows that are there for every seed, with their baseline; of the others the titles. Nothing is trained."""
    benches = [Bench(base, data, name, name, tmp_path / "store") for name in ("first", "second")]
    dense, chosen = ([Cell(TINY, seed, at) for seed in (0, 1)] for at in (None, "pool2"))
    others = {name: [replace(cell, at=name) for cell in chosen] for name in ("half", "missing")}
    rows = [paper.Row(f"{bench.title}, baseline", bench, dense) for bench in benches]
    rows += [paper.Row(f"{bench.title}, pool2", bench, chosen, "", f"{bench.title}, baseline") for bench in benches]
    rows += [paper.Row(name, benches[0], others[name], "", "first, baseline") for name in others]
    monkeypatch.setattr(paper, "table2", lambda args: rows)
    monkeypatch.setattr(Bench, "trained", None)
    claim = paper.Claim("it is there", "first, baseline", "first, pool2", "map")
    monkeypatch.setattr(paper, "CLAIMS", {"table2": [claim, replace(claim, above="half")]})
    command = "paper.py table2 --partial --seeds 0 1 --out out --threads 1"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit, match=r"no row is measured.*--only dense"):
        paper.main()
    for cell in (*chosen, others["half"][0]):
        kept(benches[0], cell)
    for cell in chosen:
        kept(benches[1], cell)
    with pytest.raises(SystemExit, match="no row is measured"):
        paper.main()
    assert not list((tmp_path / "out").iterdir())
    for cell in dense:
        kept(benches[0], cell)
    paper.main()
    table = json.loads((tmp_path / "out" / "table2.json").read_text())
    assert [row["title"] for row in table["rows"]] == ["first, baseline", "first, pool2"]
    assert table["missing"] == ["second, baseline", "second, pool2", "half", "missing"]
    assert [found["above"] for found in table["findings"]] == ["first, baseline"]
    assert (
        "\nNot measured: second, baseline; second, pool2; half; missing.\n"
        in (tmp_path / "out" / "table2.md").read_text()
    )


@pytest.mark.parametrize("wrong", ["table1 --partial --only dense", "fig5 --partial"])
def test_a_part_goes_with_tables_and_trains_none(wrong, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["paper.py", *wrong.split()])
    with pytest.raises(SystemExit):
        paper.main()
    assert "--partial" in capsys.readouterr().err


def test_figure_6_of_the_cells_that_are_there(data, tmp_path, monkeypatch):
    save_checkpoint(ssd300_vgg16_bn(11, width=0.12), tmp_path / "dense.safetensors")
    whole = trade_off.curves

    def few(*args):
        found = whole(*args)
        names = ("dense", "SCN, direct", "channel reduction", "channel reduction and SCN", "resolution reduction")
        return {name: [replace(cell, at=cell.at and "pool3") for cell in found[name][:1]] for name in names}

    monkeypatch.setattr(trade_off, "curves", few)
    command = (
        "paper.py fig6 --width 0.12 --checkpoint dense.safetensors --iterations 1 --selector-iterations 1 "
        "--workers 0 --threads 1 --device cpu --out out --repeats 1"
    )
    monkeypatch.setattr("sys.argv", [*command.split(), "--partial"])
    with pytest.raises(SystemExit, match=r"the dense detector.*--only"):
        paper.main()
    for only in ("dense-seed", "channel reduction and SCN"):
        monkeypatch.setattr("sys.argv", [*command.split(), "--only", only])
        paper.main()
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(cells, "finetune_selective", None)
    monkeypatch.setattr("sys.argv", [*command.split(), "--partial"])
    paper.main()
    found = json.loads((tmp_path / "out" / "fig6.json").read_text())["curves"]
    assert list(found) == ["dense", "channel reduction", "channel reduction and SCN", "resolution reduction"]
    shares = {name: points[0]["macs"] for name, points in found.items()}
    assert shares["dense"] == 100 and shares["channel reduction"] < 100 and 70 < shares["resolution reduction"] < 76
    assert set(found["channel reduction"][0]["speed"]) == {"batch 1", "batch 8"}
    assert (tmp_path / "out" / "fig6.png").stat().st_size > 10_000
    assert "| channel reduction and SCN |" in (tmp_path / "out" / "fig6.md").read_text()


def test_a_dense_detector_that_has_no_checkpoint_is_trained_once(data, tmp_path, monkeypatch):
    """Of the other detectors' table, for Pelee on VOC's layout."""
    monkeypatch.setattr(paper, "table3", lambda args: [paper.Row("x", *one_dense_cell(args))])

    def one_dense_cell(args):
        bench, training = paper.prepare(paper.pelee_voc.RECIPE, args)
        return bench, [Cell(training, 0)]

    command = "paper.py table3 --width 0.25 --scratch-iterations 2 --iterations 1 --workers 0 --threads 1 --device cpu"
    small = replace(DEMO_SCRATCH, batch_size=2)
    demo = replace(paper.pelee_voc.RECIPE.demo, scratch=small, training=replace(TINY, workers=0))
    monkeypatch.setattr(paper.pelee_voc, "RECIPE", replace(paper.pelee_voc.RECIPE, demo=demo))
    monkeypatch.setattr("sys.argv", [*command.split(), "--only", "no such cell"])
    paper.main()
    assert not list((tmp_path / "runs" / "paper").iterdir())
    monkeypatch.setattr("sys.argv", [*command.split(), "--only", "pelee"])
    paper.main()
    folders = sorted(path.name for path in (tmp_path / "runs" / "paper").iterdir())
    assert len(folders) == 2 and folders[1].startswith("pelee_voc-width-0.25-scratch-")
    monkeypatch.setattr(cells, "train_dense", None)
    paper.main()
