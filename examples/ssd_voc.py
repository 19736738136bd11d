"""Dense and selective SSD300 side by side: fine-tuned from one dense checkpoint, then compared.

  python examples/ssd_voc.py                                  demonstration on embedded data, minutes
  python examples/ssd_voc.py --voc-root ROOT --from-scratch   the paper's experiment on Pascal VOC

The selective detector gets a Selective Module after --at, which predicts where objects are; what
follows is computed there only. Both detectors see the same images in the same order, so what
differs afterwards is the selection. All output goes under --out; repeating the command of an
interrupted run resumes it.
"""

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

import sparsenet
from data import digits_voc, voc
from data.augment import digits_augmentation, evaluation_transform, ssd_augmentation
from detectors.ssd import load_imagenet_trunk, ssd300_vgg16_bn
from evaluation.detector import evaluate, look
from evaluation.speed import compare_speed
from evaluation.voc_map import mean_average_precision
from figures import draw_seen
from memory import keep_freed_memory
from report import Comparison, markdown, origin, thinned, write_json
from storage import load_checkpoint, replacing, save_checkpoint
from training import Schedule, batches, fit


@dataclass(frozen=True)
class Preset:
    """What differs between the demonstration and the paper's experiment."""

    width: float  # factor on all channel counts
    scratch: Schedule  # of the dense detector both start from
    selector: Schedule  # of the selective detector's new branch alone, on the dense detector's frozen features
    selector_batches: int  # how many batches of these features are made and kept, to be repeated
    finetune: Schedule  # of each of the two
    mask_warmup: float  # share of the fine-tuning in which true boxes are active, predicted or not
    missed_pixel: float  # what a missed pixel counts in the mask's loss against a wasted one; 1 in the paper
    size_balance: float  # from 0, every missed pixel counts alike (the paper), to 1, every missed object does
    eval_images: int  # 0: all
    checkpoint: Path | None


DEMO = Preset(
    width=0.25,
    scratch=Schedule(iterations=2140, batch_size=16, lr=0.02),
    selector=Schedule(iterations=1000, batch_size=16, lr=0.02),
    selector_batches=100,
    finetune=Schedule(iterations=120, batch_size=16, lr=0.005),
    mask_warmup=0.2,
    missed_pixel=8.0,
    size_balance=0.5,
    eval_images=200,
    checkpoint=Path(__file__).parent / "checkpoints" / "ssd300_digits.safetensors",
)

# The original's steps with the paper's rate, batch and five epochs of warm-up. The paper trains for
# twice the baseline's iterations: here those of the dense detector, then as many of fine-tuning.
PAPER_SCHEDULE = Schedule(iterations=120_000, batch_size=32, lr=0.01, warmup=0.0216, milestones=(2 / 3, 5 / 6))
PAPER = Preset(
    width=1.0,
    scratch=PAPER_SCHEDULE,
    selector=Schedule(iterations=2_000, batch_size=32, lr=0.02),
    selector_batches=40,
    finetune=PAPER_SCHEDULE,
    mask_warmup=0.0216,
    missed_pixel=1.0,
    size_balance=0.0,
    eval_images=0,
    checkpoint=None,
)


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    train, test, classes = load_data(args)
    torch.manual_seed(args.seeds[0])
    base = ssd300_vgg16_bn(num_classes=1 + len(classes), width=args.width).to(args.device)
    if args.from_scratch:
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
        "missed_pixel": args.missed_pixel,
        "size_balance": args.size_balance,
        "selector": asdict(args.selector),
        "finetune": asdict(args.finetune),
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    write_json(args.out / "result.json", origin() | settings | figures)
    draw_seen([look(selective, test[i][0], classes) for i in range(min(5, len(test)))], args.out / "selection.png")
    for file in args.out.glob("*.resume.pt"):
        file.unlink()
    print(f"{args.out} now holds", ", ".join(sorted(file.name for file in args.out.iterdir())))


def load_data(args) -> tuple[Dataset, Subset, Sequence[str]]:
    """Training set, the part of the test set to evaluate, and class names: VOC 2007+2012, or digits."""
    if args.voc_root:
        classes: Sequence[str] = voc.CLASSES
        train: Dataset = voc.voc_train(args.voc_root, ssd_augmentation())
        test = voc.voc_test(args.voc_root, evaluation_transform())
    else:
        classes = digits_voc.CLASSES
        root = digits_voc.DigitsVOC().generate(Path("runs/data/digits-voc"))
        augment = digits_augmentation()
        train = voc.VOCBoxes(root, "2007", "trainval", classes, drop_difficult=True, transforms=augment)
        test = voc.VOCBoxes(root, "2007", "test", classes, transforms=evaluation_transform())
    return train, Subset(test, range(min(args.eval_images or len(test), len(test)))), classes


def pretrain(model: Any, train: Dataset, test: Dataset, classes: Sequence[str], args) -> None:
    """Train the dense detector both start from; write it, and a log of how it came about."""
    if args.voc_root and args.imagenet:
        load_imagenet_trunk(model.backbone)
    began = time.perf_counter()
    losses = train_alone(model, train, args.scratch, "dense from scratch", args.seeds[0], args)
    minutes = (time.perf_counter() - began) / 60
    save_checkpoint(model, args.out / "dense_from_scratch.safetensors", classes=classes, width=args.width)
    matches = evaluate(model, test, len(classes), "evaluation").matches
    eleven, area = mean_average_precision(matches)
    log = {
        "seed": args.seeds[0],
        "width": args.width,
        "schedule": asdict(args.scratch),
        "bfloat16": args.amp,
        "minutes": round(minutes, 1),
        "test_images": len(matches.positives),
        "map_11_point": round(100 * eleven, 3),
        "map_area": round(100 * area, 3),
        "loss": thinned(losses),
    }
    write_json(args.out / "dense_from_scratch.json", origin() | log)
    print(f"dense: mAP {100 * eleven:.1f} (11-point), {100 * area:.1f} (area) after {minutes:.1f} minutes")


def finetune(base: nn.Module, train: Dataset, classes: Sequence[str], seed: int, args):
    """Fine-tune the dense detector, and the same one made selective, alike; returns both."""
    dense = copy.deepcopy(base)
    train_alone(dense, train, args.finetune, f"dense, seed {seed}", seed, args)

    torch.manual_seed(seed)
    example = [torch.rand(3, 300, 300, device=args.device)]
    selective: Any = sparsenet.selectify(base, at=args.at, example_inputs=example)
    selective.to(memory_format=torch.channels_last)
    if seed == args.seeds[0]:
        print(sparsenet.plan(selective))
    train_selector(selective, train, seed, args)
    warmup = round(args.mask_warmup * args.finetune.iterations)

    def loss(images: list[Tensor], targets: list[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        with supervised(selective, targets, args, warmup=step < warmup) as supervision:
            losses = selective(images, targets)
        return losses | {"saliency": supervision.loss()}

    schedule, branch = args.finetune, list(selective.selector.parameters())
    ids = {id(parameter) for parameter in branch}
    groups = [
        {"params": [parameter for parameter in selective.parameters() if id(parameter) not in ids]},
        {"params": branch, "lr": 10 * schedule.lr},  # it follows the features that it reads as they change
    ]
    train_on(loss, selective, train, schedule, f"selective, seed {seed}", seed, args, schedule.sgd(groups))
    for name, model in (("dense", dense), ("selective", selective)):
        path = args.out / f"{name}_seed{seed}.safetensors"
        save_checkpoint(model, path, classes=classes, width=args.width, at=args.at)
    return dense, selective


def supervised(selective: nn.Module, targets: list[dict[str, Tensor]], args, warmup: bool = False):
    """The context in which boxes teach the mask."""
    boxes = [target["boxes"] for target in targets]
    return sparsenet.train.direct(
        selective, boxes, warmup=warmup, positive_weight=args.missed_pixel, size_balance=args.size_balance
    )


def train_selector(selective: Any, train: Dataset, seed: int, args) -> None:
    """The new branch first learns alone where objects are: nothing after it runs, and the detector stays as it is, so
    that both detectors' own weights are trained for equally many iterations. The features it reads are kept and
    repeated: images and the layers before it take five times as long as its own step."""
    schedule, selector = args.selector, selective.selector
    frozen = [parameter for parameter in selective.parameters() if parameter.requires_grad]
    selective.eval().requires_grad_(False)
    selector.requires_grad_(True)

    def features(start: int) -> Iterator[tuple[list, list[dict[str, Tensor]]]]:
        kept: list[tuple[list, list[dict[str, Tensor]]]] = []
        count = min(args.selector_batches, schedule.iterations)
        made = batches(train, replace(schedule, iterations=count), seed=seed, workers=args.workers)
        for images, targets in tqdm(made, desc=f"features, seed {seed}", unit="batch"):
            with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                found = sparsenet.train.stage_features(selective, [image.to(args.device) for image in images])
            kept.append(([found.to("cpu")], targets))
        for step in range(start, schedule.iterations):
            yield kept[step % len(kept)]

    def loss(features: list, targets: list[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        with supervised(selective, targets, args) as supervision:
            sparsenet.train.selector_only(selective, *features)
        return {"saliency": supervision.loss()}

    # Adam, for a fresh branch: after 300 iterations SGD at its best rate is where Adam is after 120.
    optimizer = torch.optim.AdamW(selector.parameters(), schedule.lr, betas=(0.9, 0.99), weight_decay=0.1)
    train_with(loss, selector, features, schedule, f"selector, seed {seed}", seed, args, optimizer)
    for parameter in frozen:
        parameter.requires_grad_(True)


def train_alone(model: nn.Module, train: Dataset, schedule: Schedule, title: str, seed: int, args):
    """Train with the detector's own loss."""
    return train_on(lambda images, targets, step: model(images, targets), model, train, schedule, title, seed, args)


def train_on(
    loss, model: Any, train: Dataset, schedule: Schedule, title: str, seed: int, args, optimizer=None
) -> list[float]:
    """Train on shuffled batches of a data set."""

    def shuffled(start: int):
        return batches(train, schedule, seed=seed, workers=args.workers, start=start)

    return train_with(loss, model, shuffled, schedule, title, seed, args, optimizer)


def train_with(loss, model: Any, data, schedule: Schedule, title: str, seed: int, args, optimizer=None) -> list[float]:
    torch.manual_seed(seed)
    return fit(
        model.to(memory_format=torch.channels_last),  # twice as fast on CPUs as the default format
        loss,
        data,
        schedule,
        optimizer=optimizer,
        title=title,
        amp=args.amp,
        state=args.out / f"{title.replace(', ', '_').replace(' ', '_')}.resume.pt",
    )


# fmt: off
def parse_arguments() -> argparse.Namespace:
    """The command line; what it leaves open is the preset's."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--voc-root", type=Path, metavar="ROOT",
        help="folder with VOCdevkit/VOC2007 and VOC2012; without it, embedded digits")
    add("--at", default="pool2", help="the stage after which pixels are selected (%(default)s)")
    add("--width", type=float, help="factor on all channel counts (0.25; with --voc-root 1)")
    add("--checkpoint", type=Path,
        help="dense checkpoint to start from (for digits the one in checkpoints/)")
    add("--from-scratch", action="store_true", help="train that checkpoint first")
    add("--dense-only", action="store_true", help="stop after --from-scratch")
    add("--no-imagenet", dest="imagenet", action="store_false",
        help="let --voc-root --from-scratch begin at random, not from ImageNet weights (a download)")
    add("--iterations", type=int, help="of fine-tuning, each detector (120; with --voc-root 120000)")
    add("--selector-iterations", type=int,
        help="of the selector alone, before fine-tuning (1000; with --voc-root 2000)")
    add("--selector-batches", type=int, metavar="BATCHES", help="whose features are kept for it, and "
        "repeated (100; with --voc-root 40, which take 4 GB)")
    add("--scratch-iterations", type=int, help="of --from-scratch (2140; with --voc-root 120000)")
    add("--batch-size", type=int, help="images in an iteration (16; with --voc-root 32)")
    add("--lr", type=float, help="highest learning rate of fine-tuning (0.005; with --voc-root 0.01)")
    add("--mask-warmup", type=float, metavar="SHARE", help="share of fine-tuning in which true boxes "
        "are active even if not predicted (0.2; with --voc-root 0.0216, five epochs)")
    add("--missed-pixel", type=float, metavar="WEIGHT", help="of a missed pixel against a wasted one "
        "in the mask's loss: higher loses fewer objects and computes more (8; with --voc-root 1)")
    add("--size-balance", type=float, metavar="POWER", help="0: every missed pixel counts alike, as in "
        "the paper; 1: every missed object does (0.5; with --voc-root 0)")
    add("--seeds", "--seed", type=int, nargs="+", default=[0],
        help="fine-tune both once per seed (%(default)s)")
    add("--eval-images", type=int,
        help="evaluate the first so many test images, 0: all (200; with --voc-root all)")
    add("--timed-images", type=int, default=16, help="test images time is measured on (%(default)s)")
    add("--timed-batches", type=int, nargs="+", default=[1, 8], help="batch sizes of it (%(default)s)")
    add("--repeats", type=int, default=7, help="passes over them that are timed (%(default)s)")
    add("--out", type=Path, default=Path("runs/ssd_voc"), help="folder for all output (%(default)s)")
    add("--workers", type=int, default=1, help="processes preparing training images (%(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(),
        help="CPU threads of an operation (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="train in bfloat16 (where the processor has it)")
    args = parser.parse_args()
# fmt: on

    preset = PAPER if args.voc_root else DEMO
    names = "width selector_batches mask_warmup missed_pixel size_balance eval_images checkpoint"
    for name in names.split():
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    if args.amp is None:
        args.amp = bfloat16_is_fast(args.device)
    args.finetune = given(preset.finetune, iterations=args.iterations, batch_size=args.batch_size, lr=args.lr)
    args.selector = given(preset.selector, iterations=args.selector_iterations, batch_size=args.batch_size)
    args.scratch = given(preset.scratch, iterations=args.scratch_iterations, batch_size=args.batch_size)
    if args.dense_only and not args.from_scratch:
        parser.error("--dense-only goes with --from-scratch")
    if args.voc_root and args.from_scratch and args.imagenet and args.width != 1:
        parser.error("ImageNet weights are of width 1: add --no-imagenet")
    if not args.from_scratch and args.checkpoint is None:
        parser.error("no dense checkpoint of VOC comes with this recipe: use --checkpoint or --from-scratch")
    return args


def given(schedule: Schedule, **values) -> Schedule:
    """The schedule with those of the values that are not None."""
    return replace(schedule, **{name: value for name, value in values.items() if value is not None})


def bfloat16_is_fast(device: str) -> bool:
    """Whether the processor has units for it: vector instructions alone, avx512_bf16, are no faster than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


if __name__ == "__main__":
    main()
