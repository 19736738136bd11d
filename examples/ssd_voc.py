"""Dense and selective SSD300 side by side: fine-tuned from one dense checkpoint, then compared.

    python examples/ssd_voc.py                      # a demonstration on embedded data, about 8 minutes on 2 cores
    python examples/ssd_voc.py --voc-root ROOT --from-scratch      # the paper's experiment on Pascal VOC

The selective detector gets a Selective Module after `--at`, which predicts where objects are; all
that follows is computed there only. Both detectors see the same images in the same order for the
same number of iterations, so what differs afterwards is the selection. Everything written goes
under `--out`; the same command resumes an interrupted run.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

import sparsenet
from data import digits_voc, voc
from data.augment import digits_augmentation, evaluation_transform, ssd_augmentation
from detectors.ssd import load_imagenet_trunk, ssd300_vgg16_bn
from evaluation.speed import compare_speed
from evaluation.voc_map import Matches, match, mean_average_precision, paired_bootstrap
from figures import Seen, draw_seen
from storage import load_checkpoint, replacing, save_checkpoint
from training import Schedule, batches, fit

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """What differs between the demonstration and the paper's experiment."""

    width: float
    scratch: Schedule  # of the dense detector that both start from
    finetune: Schedule  # of each of the two
    mask_warmup: float  # share of the fine-tuning in which objects' pixels are active even if not predicted
    eval_images: int  # 0: all
    checkpoint: Path | None


DEMO = Preset(
    width=0.25,
    scratch=Schedule(iterations=2140, batch_size=16, lr=0.02),
    finetune=Schedule(iterations=120, batch_size=16, lr=0.005),
    mask_warmup=0.4,
    eval_images=200,
    checkpoint=HERE / "checkpoints" / "ssd300_digits.safetensors",
)

# The original's schedule with the paper's rate, batch and five epochs of warm-up. The paper trains
# for twice the baseline's iterations: here, the dense detector's and as many again of fine-tuning.
PAPER_SCHEDULE = Schedule(
    iterations=120_000, batch_size=32, lr=0.01, warmup=0.0216, milestones=(2 / 3, 5 / 6)
)
PAPER = Preset(
    width=1.0,
    scratch=PAPER_SCHEDULE,
    finetune=PAPER_SCHEDULE,
    mask_warmup=0.0216,
    eval_images=0,
    checkpoint=None,
)


def main() -> None:
    args, preset = parse_arguments()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    train, test, classes = load_data(args)
    test = Subset(test, range(min(args.eval_images or len(test), len(test))))

    base = ssd300_vgg16_bn(num_classes=1 + len(classes), width=args.width).to(args.device)
    if args.from_scratch:
        pretrain(base, train, test, classes, args, preset)
        if args.dense_only:
            return
    else:
        load_checkpoint(base, args.checkpoint)

    runs = []
    for seed in args.seeds:
        dense, selective = finetune(base, train, classes, seed, args)
        runs.append({
            "seed": seed,
            "dense": evaluate(dense, test, len(classes), f"dense, seed {seed}: evaluation"),
            "selective": evaluate(selective, test, len(classes), f"selective, seed {seed}: evaluation", guided=True),
        })  # fmt: skip
    report(runs, time_both(dense, selective, test, args), args, seconds=time.perf_counter() - began)
    draw_seen([look(selective, test[i][0], classes) for i in range(5)], args.out / "selection.png")
    for file in args.out.glob("*.resume.pt"):
        file.unlink()
    print(f"\nWritten to {args.out}: " + ", ".join(sorted(p.name for p in args.out.iterdir())))


# Data ---------------------------------------------------------------------------------------------


def load_data(args) -> tuple[Dataset, Dataset, Sequence[str]]:
    """Training set, test set and class names: VOC 2007+2012, or the embedded digits."""
    if args.voc_root:
        train = voc.voc_train(args.voc_root, ssd_augmentation())
        return train, voc.voc_test(args.voc_root, evaluation_transform()), voc.CLASSES
    root = digits_voc.DigitsVOC().generate(Path("runs/data/digits-voc"))
    names = digits_voc.CLASSES
    train = voc.VOCBoxes(
        root, "2007", "trainval", names, drop_difficult=True, transforms=digits_augmentation()
    )
    return train, voc.VOCBoxes(root, "2007", "test", names, transforms=evaluation_transform()), names


# Training -----------------------------------------------------------------------------------------


def pretrain(
    model: nn.Module, train: Dataset, test: Dataset, classes: Sequence[str], args, preset: Preset
) -> None:
    """Train the dense detector that both start from, and write it with its log."""
    torch.manual_seed(args.seeds[0])
    if args.voc_root and args.imagenet:
        load_imagenet_trunk(model.backbone)
    began = time.perf_counter()
    losses = train_dense(model, train, preset.scratch, "dense from scratch", args.seeds[0], args)
    seconds = time.perf_counter() - began
    save_checkpoint(model, args.out / "dense_from_scratch.safetensors", classes=classes, width=args.width)
    matches = evaluate(model, test, len(classes), "evaluation").matches
    eleven, area = mean_average_precision(matches)
    log = {
        "command": command(),
        "seed": args.seeds[0],
        "schedule": asdict(preset.scratch),
        "minutes": round(seconds / 60, 1),
        "threads": args.threads,
        "test_images": len(test),  # type: ignore[arg-type]
        "map_11_point": round(eleven, 4),
        "map_area": round(area, 4),
        "loss": thinned(losses),
    }
    write_json(log, args.out / "dense_from_scratch.json")
    print(
        f"Dense from scratch: mAP {eleven:.4f} (11-point), {area:.4f} (area) after {seconds / 60:.1f} minutes"
    )


def finetune(
    base: nn.Module, train: Dataset, classes: Sequence[str], seed: int, args
) -> tuple[nn.Module, nn.Module]:
    """Fine-tune the dense detector and the same one made selective, alike."""
    torch.manual_seed(seed)
    dense = copy.deepcopy(base)
    selective = sparsenet.selectify(
        base, at=args.at, example_inputs=[torch.rand(3, 300, 300, device=args.device)]
    )
    if seed == args.seeds[0]:
        print(sparsenet.plan(selective))

    warmup = round(args.mask_warmup * args.schedule.iterations)

    def selective_loss(
        images: list[Tensor], targets: list[dict[str, Tensor]], step: int
    ) -> dict[str, Tensor]:
        boxes = [target["boxes"] for target in targets]
        with sparsenet.train.direct(selective, boxes, warmup=step < warmup) as supervision:
            losses = selective(images, targets)
        return {**losses, "saliency": supervision.loss()}

    train_dense(dense, train, args.schedule, f"dense, seed {seed}", seed, args)
    train_with(selective, selective_loss, train, args.schedule, f"selective, seed {seed}", seed, args)
    for name, model in (("dense", dense), ("selective", selective)):
        path = args.out / f"{name}_seed{seed}.safetensors"
        save_checkpoint(model, path, classes=classes, width=args.width, at=args.at)
    return dense, selective


def train_dense(
    model: nn.Module, train: Dataset, schedule: Schedule, title: str, seed: int, args
) -> list[float]:
    return train_with(
        model, lambda images, targets, step: model(images, targets), train, schedule, title, seed, args
    )


def train_with(
    model: nn.Module, loss, train: Dataset, schedule: Schedule, title: str, seed: int, args
) -> list[float]:
    return fit(
        model.to(memory_format=torch.channels_last),  # twice as fast on CPUs as the default format
        loss,
        lambda start: batches(train, schedule, seed=seed, workers=args.workers, start=start),
        schedule,
        title=title,
        amp=args.amp,
        state=args.out / f"{title.replace(', ', '_').replace(' ', '_')}.resume.pt",
    )


# Evaluation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    matches: Matches
    macs: float = 0.0  # mean over the images; these three of a selective detector only
    dense_macs: float = 0.0
    density: float = 1.0  # mean active share at the embed stage


@torch.inference_mode()
def evaluate(
    model: nn.Module, test: Dataset, num_classes: int, title: str, guided: bool = False
) -> Evaluation:
    """Detect on every test image, one by one, and match to the objects."""
    device = next(model.parameters()).device
    predictions, targets, records = [], [], []
    for i in tqdm(range(len(test)), desc=title, unit="image"):  # type: ignore[arg-type]
        image, target = test[i]
        if guided:
            with sparsenet.record(model) as rec:
                [prediction] = model([image.to(device)])
            records.append((rec.macs, rec.dense_macs, rec.density[max(rec.density)]))
        else:
            [prediction] = model([image.to(device)])
        predictions.append({name: value.cpu() for name, value in prediction.items()})
        targets.append(target)
    matches = match(predictions, targets, num_classes)
    return Evaluation(matches, *(mean(column) for column in zip(*records, strict=True)))


def time_both(dense: nn.Module, selective: nn.Module, test: Dataset, args) -> dict[str, list[float]]:
    """Milliseconds per image of both, see `compare_speed`, on images spread over the test set."""
    chosen = range(0, len(test), -(-len(test) // args.timed_images))  # type: ignore[arg-type]
    images = [test[i][0].to(args.device) for i in chosen]
    return compare_speed({"dense": dense, "selective": selective}, images, args.repeats)


@torch.inference_mode()
def look(model: nn.Module, image: Tensor, classes: Sequence[str]) -> Seen:
    """What the selective detector computes and finds (scores above 0.5) in one image."""
    with sparsenet.record(model) as rec:
        [found] = model([image.to(next(model.parameters()).device)])
    size = max(rec.masks)
    sure = found["scores"] > 0.5
    return Seen(
        image=image,
        saliency=rec.saliency[size][0].float().cpu(),
        mask=rec.masks[size][0].bool().cpu(),
        boxes=found["boxes"][sure].cpu(),
        labels=[classes[label - 1] for label in found["labels"][sure].tolist()],
        scores=found["scores"][sure].cpu(),
    )


# Report -------------------------------------------------------------------------------------------


def report(runs: list[dict], milliseconds: dict[str, list[float]], args, seconds: float) -> None:
    """Print the table; write it as Markdown, and all figures as JSON."""
    scores = {
        name: [mean_average_precision(run[name].matches) for run in runs] for name in ("dense", "selective")
    }
    low, high = paired_bootstrap([(run["dense"].matches, run["selective"].matches) for run in runs])
    eleven = {name: mean(s[0] for s in values) for name, values in scores.items()}
    area = {name: mean(s[1] for s in values) for name, values in scores.items()}
    macs = mean(run["selective"].macs for run in runs)
    dense_macs = mean(run["selective"].dense_macs for run in runs)
    density = mean(run["selective"].density for run in runs)
    speed = {name: median(values) for name, values in milliseconds.items()}
    difference = 100 * (eleven["selective"] - eleven["dense"])

    lines = [
        "| | mAP, 11-point | mAP, area | difference, 95 % interval | GMACs | cut | active | ms per image | speed-up |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| dense | {100 * eleven['dense']:.1f} | {100 * area['dense']:.1f} | | {dense_macs / 1e9:.3f} | | 100 % "
        f"| {speed['dense']:.1f} | |",
        f"| selective, {args.at} | {100 * eleven['selective']:.1f} | {100 * area['selective']:.1f} "
        f"| {difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] | {macs / 1e9:.3f} "
        f"| {100 * (1 - macs / dense_macs):.1f} % | {100 * density:.1f} % | {speed['selective']:.1f} "
        f"| {speed['dense'] / speed['selective']:.2f}× |",
    ]  # fmt: skip
    images = len(runs[0]["dense"].matches.positives)
    notes = (
        f"{images} test images, seeds {', '.join(map(str, args.seeds))}, {args.schedule.iterations} iterations of "
        f"fine-tuning each. MACs are of a whole forward pass, the Selective Module included. Times: medians of "
        f"{args.repeats} alternating repeats on {args.device}, batch 1, {args.threads} threads, post-processing "
        f"included, BatchNorm folded, each in its faster memory format."
    )
    text = "\n".join([*lines, "", notes]) + "\n"
    print("\n" + text, end="")
    with replacing(args.out / "report.md") as temporary:
        temporary.write_text(text)
    write_json(
        {
            "command": command(),
            "torch": torch.__version__,
            "width": args.width,
            "at": args.at,
            "schedule": asdict(args.schedule),
            "test_images": images,
            "map_11_point": {
                n: dict(zip(args.seeds, (s[0] for s in v), strict=True)) for n, v in scores.items()
            },
            "map_area": {n: dict(zip(args.seeds, (s[1] for s in v), strict=True)) for n, v in scores.items()},
            "difference_95": [low, high],
            "macs": {"dense": dense_macs, "selective": macs},
            "active": density,
            "milliseconds": milliseconds,
            "minutes": round(seconds / 60, 1),
        },
        args.out / "result.json",
    )


def command() -> str:
    return " ".join(["python examples/ssd_voc.py", *sys.argv[1:]])


def thinned(losses: list[float], points: int = 100) -> list[float]:
    """The mean loss of each of `points` equal stretches."""
    step = max(1, len(losses) // points)
    return [round(mean(losses[i : i + step]), 3) for i in range(0, len(losses), step)]


def write_json(content: dict, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


# Command line -------------------------------------------------------------------------------------


def parse_arguments() -> tuple[argparse.Namespace, Preset]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--voc-root",
        type=Path,
        help="folder with VOCdevkit/VOC2007 and VOC2012; without it the embedded digits",
    )
    add("--width", type=float, help="factor on all channel counts (0.25; with --voc-root 1)")
    add("--at", default="pool2", help="the stage after which pixels are selected (%(default)s)")
    add("--checkpoint", type=Path, help="dense checkpoint to start from (the one beside this script)")
    add("--from-scratch", action="store_true", help="train that dense checkpoint first")
    add("--dense-only", action="store_true", help="stop after --from-scratch")
    add(
        "--imagenet",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --voc-root and --from-scratch, begin with torchvision's ImageNet weights (a download; width 1)",
    )
    add("--iterations", type=int, help="of fine-tuning, for each detector (120; with --voc-root 120000)")
    add("--scratch-iterations", type=int, help="of --from-scratch (2140; with --voc-root 120000)")
    add("--batch-size", type=int, help="images an iteration (16; with --voc-root 32)")
    add("--lr", type=float, help="highest learning rate of the fine-tuning (0.005; with --voc-root 0.01)")
    add("--mask-warmup", type=float, help="share of the iterations in which the true boxes are active, too")
    add("--seeds", "--seed", type=int, nargs="+", default=[0], help="fine-tune once per seed (%(default)s)")
    add(
        "--eval-images",
        type=int,
        help="test images, the first of the list; 0 for all (200; with --voc-root all)",
    )
    add("--timed-images", type=int, default=10, help="test images the times are measured on (%(default)s)")
    add("--repeats", type=int, default=11, help="timed passes over them (%(default)s)")
    add("--out", type=Path, default=Path("runs/ssd_voc"), help="folder for all output (%(default)s)")
    add("--workers", type=int, default=1, help="processes that prepare images (%(default)s)")
    add(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="of each operation on the CPU (%(default)s)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction, default=None,
        help="train in bfloat16 (where the processor computes in it)")  # fmt: skip
    args = parser.parse_args()

    preset = PAPER if args.voc_root else DEMO
    given = {"iterations": args.iterations, "batch_size": args.batch_size, "lr": args.lr}
    args.schedule = replace(
        preset.finetune, **{name: value for name, value in given.items() if value is not None}
    )
    given = {"iterations": args.scratch_iterations, "batch_size": args.batch_size}
    scratch = replace(preset.scratch, **{name: value for name, value in given.items() if value is not None})
    for name in ("width", "eval_images", "mask_warmup", "checkpoint"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    if args.amp is None:
        args.amp = bfloat16_is_fast(args.device)
    if not args.from_scratch and args.checkpoint is None:
        parser.error(
            "there is no dense checkpoint for VOC here; give --checkpoint, or train one with --from-scratch"
        )
    if args.dense_only and not args.from_scratch:
        parser.error("--dense-only goes with --from-scratch")
    return args, replace(preset, scratch=scratch)


def bfloat16_is_fast(device: str) -> bool:
    """Whether the processor has instructions for it; a training step takes half the time then."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


if __name__ == "__main__":
    main()
