"""What the four recipes share: dense and selective detector, fine-tuned from one dense checkpoint, then compared."""

import argparse
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

import distributed
import sparsenet
from data.coco import COCOError
from data.sets import Data
from data.voc import VOCError
from evaluation.detector import evaluate, look
from evaluation.paper_like import paper_like_operations
from evaluation.speed import compare_speed
from evaluation.voc_map import mean_average_precision
from figures import draw_seen
from finetune import (
    BY_TASK,
    SUPERVISIONS,
    Training,
    budget,
    finetune_dense,
    finetune_selective,
    made_selective,
    train_dense,
)
from memory import keep_freed_memory
from options import COUNT, DECAY, NATURAL, PART, POSITIVE, SHARE, device
from report import Comparison, coco_percent, markdown, origin, thinned, write_json
from storage import CheckpointError, ensure_writable, load_checkpoint, replacing, save_checkpoint
from training import NotFiniteError, Schedule

CHECKPOINTS = Path(__file__).parent / "checkpoints"  # that come along


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
        detector: (classes with the background, width, and the `variants` by name) -> the dense detector, with random
            weights.
        imagenet: gives a detector of width 1 an ImageNet trunk (a download), if there is one for it.
        trunk: gives a detector the trunk of a classifier from a file, if it can.
        variants: what else the detector can be asked for: "six" anchors in every cell, or no "batch_norm".
        least_images: that one training pass takes: two where normalisation is of maps of one pixel.
        load: (root or `None` for embedded data, test images) -> the data.
        at: the stage after which pixels are selected.
        demo: on embedded data.
        paper: on the real data.
    """

    about: str
    name: str
    detector: Callable[..., Any]
    load: Callable[[Path | None, int], Data]
    at: str
    demo: Preset
    paper: Preset
    imagenet: Callable[[Any], None] | None = None
    trunk: Callable[[Any, Path], None] | None = None
    variants: tuple[str, ...] = ()
    least_images: int = 1


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
    with messages(), distributed.processes(args.device):
        compare(recipe, args)


@contextmanager
def messages() -> Iterator[None]:
    """Errors that the user can mend end the command with what they say, without the way that the program came."""
    before = threading.excepthook

    def in_another_thread(found: threading.ExceptHookArgs) -> None:
        if not issubclass(found.exc_type, OSError):  # which TensorBoard's writer has the main thread raise, too
            before(found)

    threading.excepthook = in_another_thread
    try:
        yield
    except (CheckpointError, COCOError, NotFiniteError, VOCError, OSError) as error:
        kind = type(error).__name__
        # Of a worker's error, the message has its whole traceback.
        said = str(error).rpartition(f"{kind}: ")[2].strip().rstrip(".")
        way = " Mend that and repeat the command; what was saved is still there." * isinstance(error, OSError)
        raise SystemExit(f"{kind}: {said}.{way}") from error
    finally:
        threading.excepthook = before


def compare(recipe: Recipe, args: argparse.Namespace) -> None:
    """Train the two, evaluate them, and write what came out; of several processes, the first measures and writes."""
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    if distributed.first():
        ensure_writable(args.out, "--out")
    data = recipe.load(args.data, args.eval_images)
    train, test, classes = data.train, data.test, data.classes
    torch.manual_seed(args.seeds[0])
    base = recipe.detector(1 + len(classes), args.width, **args.variant).to(args.device)
    if not args.dense_only:
        check_stage(base, args)
    if args.from_scratch:
        if args.imagenet:
            assert recipe.imagenet is not None
            recipe.imagenet(base)
        if args.trunk:
            assert recipe.trunk is not None
            recipe.trunk(base, args.trunk)
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
    figures = Comparison(
        args.seeds, dense_runs, selective_runs, times, paper_like_operations(dense, images[0])
    ).figures()
    table = markdown(figures)
    print(f"\n{table}")
    with replacing(args.out / "result.md") as temporary:
        temporary.write_text(table)
    settings = {
        "at": args.at,
        "width": args.width,
        **args.variant,
        **asdict(args.training),
        "amp": str(args.training.half),
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    write_json(args.out / "result.json", origin(selective) | settings | figures)
    draw_seen([look(selective, test[i][0], classes) for i in range(min(5, len(test)))], args.out / "selection.png")
    for file in args.out.glob("*.resume.pt"):
        file.unlink()
    print(f"{args.out} now holds", ", ".join(sorted(file.name for file in args.out.iterdir())))


def check_stage(base: Any, args: argparse.Namespace) -> None:
    """See that the detector can be made selective as asked, before hours of training, not after."""
    try:
        budget(made_selective(base, args.at, args.training), args.training)
    except (RuntimeError, ValueError) as error:
        said = str(error).rstrip(".")
        asked = f"--at {args.at}, --width {args.width}" + (f", --macs {args.macs}" if args.macs else "")
        raise SystemExit(f"{asked}: {said}. Choose another stage or width.") from error


def pretrain(model: Any, train: Dataset, test: Dataset, classes: Sequence[str], args) -> None:
    """Train the dense detector both start from; write it, and a log of how it came about."""
    began = time.perf_counter()
    begun = {"trunk": args.trunk, "ImageNet": args.imagenet, "width": args.width, **args.variant}
    title = "dense from scratch"
    losses = train_dense(model, train, args.scratch, title, args.seeds[0], args.training, args.out, about=begun)
    minutes = (time.perf_counter() - began) / 60
    found = evaluate(model, test, len(classes), "evaluation")
    matches = found.matches
    if not distributed.first():
        return
    save_checkpoint(model, args.out / "dense_from_scratch.safetensors", **about(classes, args))
    eleven, area = mean_average_precision(matches)
    log = {
        "seed": args.seeds[0],
        "width": args.width,
        **args.variant,
        "trunk": str(args.trunk) if args.trunk else None,
        "schedule": asdict(args.scratch),
        "half_precision": str(args.training.half),
        "minutes": round(minutes, 1),
        "test_images": len(matches.positives),
        "map_11_point": round(100 * eleven, 3),
        "map_area": round(100 * area, 3),
        "coco": coco_percent(found.coco) if found.coco else None,
        "loss": thinned(losses),
    }
    write_json(args.out / "dense_from_scratch.json", origin(model) | log)
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
            save_checkpoint(model, path, **about(classes, args), at=args.at)
    return dense, selective


def about(classes: Sequence[str], args) -> dict[str, Any]:
    """What a checkpoint says about itself: what it takes to build its detector."""
    return {"classes": classes, "width": args.width, **args.variant}


# fmt: off
def add_training(parser: argparse.ArgumentParser) -> None:
    """Options of how training runs, which recipes and tables share."""
    add = parser.add_argument
    add("--workers", type=NATURAL, default=1, help="processes preparing training images (%(default)s)")
    add("--threads", type=COUNT, default=torch.get_num_threads(),
        help="CPU threads of an operation (%(default)s)")
    add("--amp", choices=PRECISIONS, default="auto",
        help="precision of training; auto: bfloat16 where the processor has units for it (%(default)s)")
    add("--accumulate", type=COUNT, default=1, metavar="PARTS", help="divide each batch into so many "
        "parts, computed one after the other, to take less memory (%(default)s)")
    add("--ema", type=DECAY, metavar="DECAY", help="leave the moving average of a detector's weights, "
        "such as 0.999, not the last ones")


def parse_arguments(recipe: Recipe) -> argparse.Namespace:
    """The command line; what it leaves open is the preset's."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=recipe.about, formatter_class=raw)
    add = parser.add_argument

    def preset(value: Callable[[Preset], float]) -> str:
        return f"({value(recipe.demo):g}; with --data {value(recipe.paper):g})"

    add("--data", type=Path, metavar="ROOT",
        help="folder of the real data set; without it, embedded digits")
    add("--at", default=recipe.at, help="the stage after which pixels are selected (%(default)s)")
    add("--width", type=POSITIVE, help="factor on all channel counts " + preset(lambda p: p.width))
    if "six" in recipe.variants:
        add("--six-anchors", dest="six", action="store_true", help="six anchors in every cell (11,640), which "
            "the paper's cost fits, not the original's 4, 6, 6, 6, 4, 4 (8,732)")
    if "batch_norm" in recipe.variants:
        add("--no-batchnorm", dest="batch_norm", action="store_false",
            help="the original's trunk, without BatchNorm; learning rates are then a tenth, as the original's")
    add("--checkpoint", type=Path, help="dense checkpoint to start from"
        + (" (for digits the one in checkpoints/)" if recipe.demo.checkpoint else ""))
    add("--from-scratch", action="store_true", help="train that checkpoint first")
    add("--dense-only", action="store_true", help="stop after --from-scratch")
    if recipe.imagenet:
        add("--no-imagenet", dest="imagenet", action="store_false",
            help="let --data --from-scratch begin at random, not from ImageNet weights (a download)")
    if recipe.trunk:
        add("--trunk", type=Path, metavar="FILE", help="let --from-scratch begin with the trunk of "
            "this classifier, not at random: PeleeNet's authors' (.pth.tar), or one of `peleenet` (.safetensors)")
    add("--iterations", type=COUNT,
        help="of fine-tuning, each detector " + preset(lambda p: p.training.finetune.iterations))
    add("--selector-iterations", type=COUNT, help="of the selector alone, before fine-tuning "
        + preset(lambda p: p.training.selector.iterations))
    add("--selector-batches", type=COUNT, metavar="BATCHES", help="whose features are kept in memory for it "
        + preset(lambda p: p.training.selector_batches))
    add("--scratch-iterations", type=COUNT, help="of --from-scratch " + preset(lambda p: p.scratch.iterations))
    add("--batch-size", type=COUNT, help="images in an iteration " + preset(lambda p: p.scratch.batch_size))
    add("--lr", type=POSITIVE, help="highest learning rate of fine-tuning " + preset(lambda p: p.training.finetune.lr))
    add("--scratch-lr", type=POSITIVE, help="the same of --from-scratch " + preset(lambda p: p.scratch.lr))
    add("--mask-warmup", type=PART, metavar="SHARE", help="share of fine-tuning in which true boxes "
        "are active even if not predicted " + preset(lambda p: p.training.mask_warmup))
    add("--missed-pixel", type=POSITIVE, metavar="WEIGHT", help="of a missed pixel against a wasted one "
        "in the mask's loss: higher loses fewer objects and computes more; 1 in the paper "
        + preset(lambda p: p.training.missed_pixel))
    add("--size-balance", type=PART, metavar="POWER", help="0: every missed pixel counts alike, as in "
        "the paper; 1: every missed object does " + preset(lambda p: p.training.size_balance))
    add("--supervision", choices=SUPERVISIONS, default="direct", help="of the mask: "
        + "; ".join(f"{name}: {text}" for name, text in SUPERVISIONS.items()) + " (%(default)s)")
    add("--density", type=SHARE, help="active share of pixels that gumbel, distilled and capacity aim at (0.3)")
    add("--macs", type=SHARE, help="share of the dense detector's multiply-accumulates that gumbel aims at instead")
    add("--seeds", "--seed", type=NATURAL, nargs="+", default=[0],
        help="fine-tune both once per seed (%(default)s)")
    add("--eval-images", type=NATURAL, help="evaluate the first so many test images, 0: all "
        + preset(lambda p: p.eval_images))
    add("--timed-images", type=COUNT, default=16, help="test images time is measured on (%(default)s)")
    add("--timed-batches", type=COUNT, nargs="+", default=[1, 8], help="batch sizes of it (%(default)s)")
    add("--repeats", type=COUNT, default=7, help="passes over them that are timed (%(default)s)")
    add("--out", type=Path, default=Path("runs") / recipe.name, help="folder for all output (%(default)s)")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="what it runs on; with torchrun, cuda is a GPU for each process (%(default)s)")
    add_training(parser)
    args = parser.parse_args()
# fmt: on

    chosen = recipe.paper if args.data else recipe.demo
    for name in ("width", "eval_images", "checkpoint"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(chosen, name))
    args.variant = {name: getattr(args, name) for name in recipe.variants}
    slower = 1.0 if args.variant.get("batch_norm", True) else 0.1
    mine, size = chosen.training, args.batch_size
    finetune, scratch = (replace(schedule, lr=slower * schedule.lr) for schedule in (mine.finetune, chosen.scratch))
    args.training = given(
        mine,
        finetune=given(finetune, iterations=args.iterations, batch_size=size, lr=args.lr),
        selector=given(mine.selector, iterations=args.selector_iterations, batch_size=size),
        selector_batches=args.selector_batches,
        selector_by_task=args.selector_iterations,
        supervision=args.supervision,
        density=args.density,
        macs=args.macs,
        mask_warmup=args.mask_warmup,
        missed_pixel=args.missed_pixel,
        size_balance=args.size_balance,
        workers=args.workers,
        accumulate=args.accumulate,
        ema=args.ema,
        amp=precision(args.amp, args.device),
    )
    args.scratch = given(scratch, iterations=args.scratch_iterations, batch_size=size, lr=args.scratch_lr)
    if reason := undividable(recipe, args.training):
        parser.error(reason)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("--seeds: one occurs twice")
    if args.macs and args.supervision != "gumbel":
        parser.error("--macs goes with --supervision gumbel")
    if distributed.launched() > 1 and args.device.startswith("cuda:"):
        parser.error(f"each process needs a GPU of its own, not {args.device}: give --device cuda")
    args.trunk = args.trunk if recipe.trunk else None
    for name in ("dense_only", "trunk"):
        if getattr(args, name) and not args.from_scratch:
            parser.error(f"--{name.replace('_', '-')} goes with --from-scratch")
    args.imagenet = bool(args.data and args.from_scratch and recipe.imagenet and args.imagenet)
    if args.imagenet and args.width != 1:
        parser.error("ImageNet weights are of width 1: add --no-imagenet")
    if not args.from_scratch and args.checkpoint is None:
        parser.error("no dense checkpoint for this comes with the recipe: use --checkpoint or --from-scratch")
    return args


def undividable(recipe: Recipe, training: Training) -> str | None:
    """Why its batches cannot be divided among the processes and into parts, or `None`."""
    processes, parts = distributed.launched(), training.accumulate
    of_selector = parts if training.supervision in BY_TASK else 1
    batches = [(training.finetune, parts, recipe.least_images), (training.selector, of_selector, 1)]
    for schedule, each, least in batches:
        images, rest = divmod(schedule.batch_size, each * processes)
        if rest or images * processes < least:
            return (
                f"a batch of {schedule.batch_size} images cannot be divided among {processes} processes in {each} "
                f"parts each, of {least} images at least in all: choose another --batch-size or --accumulate"
            )
    return None


def given(settings: Any, **values) -> Any:
    """The settings, a dataclass, with those of the values that are not None."""
    return replace(settings, **{name: value for name, value in values.items() if value is not None})


PRECISIONS = ("auto", "off", "bfloat16", "float16")


def precision(asked: str, device: str) -> bool | torch.dtype:
    """Of `PRECISIONS`, for `Training.amp`."""
    if asked == "float16":
        return torch.float16
    return asked == "bfloat16" or (asked == "auto" and bfloat16_is_fast(device))


def bfloat16_is_fast(device: str) -> bool:
    """Whether the processor has units for it: vector instructions alone, avx512_bf16, are no faster than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
