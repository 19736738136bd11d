"""What the four recipes share: dense and selective detector, fine-tuned from one dense checkpoint, then compared."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

import distributed
import sparsenet
from data.sets import Data
from evaluation.detector import evaluate, look
from evaluation.speed import compare_speed
from evaluation.voc_map import mean_average_precision
from figures import draw_seen
from finetune import SUPERVISIONS, Training, finetune_dense, finetune_selective, train_dense
from memory import keep_freed_memory
from report import Comparison, coco_percent, markdown, origin, thinned, write_json
from storage import load_checkpoint, replacing, save_checkpoint
from training import Schedule


@dataclass(frozen=True)
class Preset:
    """What differs between the demonstration and the paper's experiment."""

    width: float  # factor on all channel counts
    scratch: Schedule  # of the dense detector both start from
    training: Training  # of each of the two
    eval_images: int  # 0: all
    checkpoint: Path | None


@dataclass(frozen=True)
class Recipe:
    """A detector on a data set.

    Attributes:
        about: what `--help` begins with.
        name: of the folder under runs/ that takes the output.
        detector: (classes with the background, width) -> the dense detector, with random weights.
        imagenet: gives a detector of width 1 an ImageNet trunk (a download), if there is one for it.
        load: (root or `None` for embedded data, test images) -> the data.
        at: the stage after which pixels are selected.
        demo: on embedded data.
        paper: on the real data.
    """

    about: str
    name: str
    detector: Callable[[int, float], Any]
    imagenet: Callable[[Any], None] | None
    load: Callable[[Path | None, int], Data]
    at: str
    demo: Preset
    paper: Preset


# The selective detector's and the dense one's, on embedded data. A missed pixel weighs more than in the paper's loss.
DEMO_TRAINING = Training(
    finetune=Schedule(iterations=120, batch_size=16, lr=0.005),
    selector=Schedule(iterations=1000, batch_size=16, lr=0.02),
    selector_batches=100,
    selector_by_task=120,
    mask_warmup=0.2,
    missed_pixel=8.0,
    size_balance=0.5,
)
DEMO_SCRATCH = Schedule(iterations=2140, batch_size=16, lr=0.02)


def paper_preset(schedule: Schedule) -> Preset:
    """Of a schedule at full width. The paper trains for twice the baseline's iterations: here those of the dense
    detector, then as many of fine-tuning."""
    training = Training(
        finetune=schedule,
        selector=Schedule(iterations=2_000, batch_size=32, lr=0.02),
        selector_batches=40,
        selector_by_task=2_000,
        mask_warmup=schedule.warmup,
    )
    return Preset(width=1.0, scratch=schedule, training=training, eval_images=0, checkpoint=None)


def run(recipe: Recipe) -> None:
    """What a recipe does when it is called from the command line."""
    args = parse_arguments(recipe)
    with distributed.processes(args.device) as args.device:
        compare(recipe, args)


def compare(recipe: Recipe, args: argparse.Namespace) -> None:
    """Train the two, evaluate them, and write what came out; of several processes, the first measures and writes."""
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    data = recipe.load(args.data, args.eval_images)
    train, test, classes = data.train, data.test, data.classes
    torch.manual_seed(args.seeds[0])
    base = recipe.detector(1 + len(classes), args.width).to(args.device)
    if args.from_scratch:
        if args.imagenet:
            assert recipe.imagenet is not None
            recipe.imagenet(base)
        pretrain(base, train, test, classes, args)
        if args.dense_only:
            return
    else:
        load_checkpoint(base, args.checkpoint)

    began = time.perf_counter()
    evaluations = []
    for seed in args.seeds:
        dense, selective = finetune(base, train, classes, seed, args)
        titled = {"evaluation of dense": dense, "evaluation of selective, MACs counted": selective}
        evaluations.append([evaluate(model, test, len(classes), title) for title, model in titled.items()])
    if not distributed.first():
        return
    images = [test[i][0].to(args.device) for i in range(0, len(test), -(-len(test) // args.timed_images))]
    models = {"dense": dense, "selective": selective}
    times = {batch: compare_speed(models, images, batch, args.repeats) for batch in args.timed_batches}

    dense_runs, selective_runs = map(list, zip(*evaluations, strict=True))
    figures = Comparison(args.seeds, dense_runs, selective_runs, times).figures()
    table = markdown(figures)
    print(f"\n{table}")
    with replacing(args.out / "result.md") as temporary:
        temporary.write_text(table)
    settings = {
        "at": args.at,
        "width": args.width,
        **asdict(args.training),
        "amp": str(args.training.half),
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    write_json(args.out / "result.json", origin() | settings | figures)
    draw_seen([look(selective, test[i][0], classes) for i in range(min(5, len(test)))], args.out / "selection.png")
    for file in args.out.glob("*.resume.pt"):
        file.unlink()
    print(f"{args.out} now holds", ", ".join(sorted(file.name for file in args.out.iterdir())))


def pretrain(model: Any, train: Dataset, test: Dataset, classes: Sequence[str], args) -> None:
    """Train the dense detector both start from; write it, and a log of how it came about."""
    began = time.perf_counter()
    losses = train_dense(model, train, args.scratch, "dense from scratch", args.seeds[0], args.training, args.out)
    minutes = (time.perf_counter() - began) / 60
    found = evaluate(model, test, len(classes), "evaluation")
    matches = found.matches
    if not distributed.first():
        return
    save_checkpoint(model, args.out / "dense_from_scratch.safetensors", classes=classes, width=args.width)
    eleven, area = mean_average_precision(matches)
    log = {
        "seed": args.seeds[0],
        "width": args.width,
        "schedule": asdict(args.scratch),
        "half_precision": str(args.training.half),
        "minutes": round(minutes, 1),
        "test_images": len(matches.positives),
        "map_11_point": round(100 * eleven, 3),
        "map_area": round(100 * area, 3),
        "coco": coco_percent(found.coco) if found.coco else None,
        "loss": thinned(losses),
    }
    write_json(args.out / "dense_from_scratch.json", origin() | log)
    print(f"dense: mAP {100 * eleven:.1f} (11-point), {100 * area:.1f} (area) after {minutes:.1f} minutes")


def finetune(base: nn.Module, train: Dataset, classes: Sequence[str], seed: int, args):
    """Fine-tune the dense detector, and the same one made selective, alike; returns both."""
    dense = finetune_dense(base, train, args.training, seed, args.out)
    selective = finetune_selective(base, train, args.at, args.training, seed, args.out)
    if seed == args.seeds[0] and distributed.first():
        print(sparsenet.plan(selective))
    for name, model in (("dense", dense), ("selective", selective)):
        if distributed.first():
            path = args.out / f"{name}_seed{seed}.safetensors"
            save_checkpoint(model, path, classes=classes, width=args.width, at=args.at)
    return dense, selective


# fmt: off
def parse_arguments(recipe: Recipe) -> argparse.Namespace:
    """The command line; what it leaves open is the preset's."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=recipe.about, formatter_class=raw)
    add = parser.add_argument
    add("--data", type=Path, metavar="ROOT",
        help="folder of the real data set; without it, embedded digits")
    add("--at", default=recipe.at, help="the stage after which pixels are selected (%(default)s)")
    add("--width", type=float, help="factor on all channel counts (0.25; with --data 1)")
    add("--checkpoint", type=Path,
        help="dense checkpoint to start from (for digits the one in checkpoints/)")
    add("--from-scratch", action="store_true", help="train that checkpoint first")
    add("--dense-only", action="store_true", help="stop after --from-scratch")
    if recipe.imagenet:
        add("--no-imagenet", dest="imagenet", action="store_false",
            help="let --data --from-scratch begin at random, not from ImageNet weights (a download)")
    add("--iterations", type=int, help="of fine-tuning, each detector (120; with --data 120000)")
    add("--selector-iterations", type=int,
        help="of the selector alone, before fine-tuning (1000; with --data 2000)")
    add("--selector-batches", type=int, metavar="BATCHES", help="whose features are kept for it, and "
        "repeated (100; with --data 40, which take 4 GB)")
    add("--scratch-iterations", type=int, help="of --from-scratch (2140; with --data 120000)")
    add("--batch-size", type=int, help="images in an iteration (16; with --data 32)")
    add("--lr", type=float, help="highest learning rate of fine-tuning (0.005; with --data 0.01)")
    add("--mask-warmup", type=float, metavar="SHARE", help="share of fine-tuning in which true boxes "
        "are active even if not predicted (0.2; with --data 0.0216, five epochs)")
    add("--missed-pixel", type=float, metavar="WEIGHT", help="of a missed pixel against a wasted one "
        "in the mask's loss: higher loses fewer objects and computes more (8; with --data 1)")
    add("--size-balance", type=float, metavar="POWER", help="0: every missed pixel counts alike, as in "
        "the paper; 1: every missed object does (0.5; with --data 0)")
    add("--supervision", choices=SUPERVISIONS, default="direct", help="of the mask: "
        + "; ".join(f"{name}: {text}" for name, text in SUPERVISIONS.items()) + " (%(default)s)")
    add("--density", type=float, help="active share of pixels that gumbel, distilled and capacity aim at (0.3)")
    add("--seeds", "--seed", type=int, nargs="+", default=[0],
        help="fine-tune both once per seed (%(default)s)")
    add("--eval-images", type=int,
        help="evaluate the first so many test images, 0: all (200; with --data all)")
    add("--timed-images", type=int, default=16, help="test images time is measured on (%(default)s)")
    add("--timed-batches", type=int, nargs="+", default=[1, 8], help="batch sizes of it (%(default)s)")
    add("--repeats", type=int, default=7, help="passes over them that are timed (%(default)s)")
    add("--out", type=Path, default=Path("runs") / recipe.name, help="folder for all output (%(default)s)")
    add("--workers", type=int, default=1, help="processes preparing training images (%(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(),
        help="CPU threads of an operation (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--amp", choices=["auto", "off", "bfloat16", "float16"], default="auto",
        help="precision of training; auto: bfloat16 where the processor has units for it (%(default)s)")
    add("--accumulate", type=int, default=1, metavar="PARTS", help="divide each batch into so many "
        "parts, computed one after the other, to take less memory (%(default)s)")
    add("--ema", type=float, metavar="DECAY", help="leave the moving average of a detector's weights, "
        "such as 0.999, not the last ones")
    args = parser.parse_args()
# fmt: on

    preset = recipe.paper if args.data else recipe.demo
    for name in ("width", "eval_images", "checkpoint"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    mine = preset.training
    args.training = given(
        mine,
        finetune=given(mine.finetune, iterations=args.iterations, batch_size=args.batch_size, lr=args.lr),
        selector=given(mine.selector, iterations=args.selector_iterations, batch_size=args.batch_size),
        selector_batches=args.selector_batches,
        selector_by_task=args.selector_iterations,
        supervision=args.supervision,
        density=args.density,
        mask_warmup=args.mask_warmup,
        missed_pixel=args.missed_pixel,
        size_balance=args.size_balance,
        workers=args.workers,
        accumulate=args.accumulate,
        ema=args.ema,
        amp=precision(args.amp, args.device),
    )
    args.scratch = given(preset.scratch, iterations=args.scratch_iterations, batch_size=args.batch_size)
    if args.dense_only and not args.from_scratch:
        parser.error("--dense-only goes with --from-scratch")
    args.imagenet = bool(args.data and args.from_scratch and recipe.imagenet and args.imagenet)
    if args.imagenet and args.width != 1:
        parser.error("ImageNet weights are of width 1: add --no-imagenet")
    if not args.from_scratch and args.checkpoint is None:
        parser.error("no dense checkpoint for this comes with the recipe: use --checkpoint or --from-scratch")
    return args


def given(settings: Any, **values) -> Any:
    """The settings, a dataclass, with those of the values that are not None."""
    return replace(settings, **{name: value for name, value in values.items() if value is not None})


def precision(asked: str, device: str) -> bool | torch.dtype:
    """Of `Training.amp`."""
    if asked == "float16":
        return torch.float16
    return asked == "bfloat16" or (asked == "auto" and bfloat16_is_fast(device))


def bfloat16_is_fast(device: str) -> bool:
    """Whether the processor has units for it: vector instructions alone, avx512_bf16, are no faster than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
