"""Wall-clock time of detectors, side by side."""

import io
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor, nn

import sparsenet
from memory import keep_freed_memory


def compare_speed(
    models: dict[str, nn.Module], images: Sequence[Tensor], batch: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds per image of each detector, a value for each of `repeats` passes over the images.

    All are frozen, and take turns. A detector is called with `batch` images at a time, post-processing included.

    It happens in a process of its own, as detectors are used: in one that has trained, what lies about in memory takes
    both detectors up to 1 ms of 20 more.
    """
    sent = io.BytesIO()  # not by shared memory, of which containers have little
    torch.save((models, list(images)), sent)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_in_new_process, sent.getvalue(), batch, repeats, torch.get_num_threads()).result()


def _in_new_process(sent: bytes, batch: int, repeats: int, threads: int) -> dict[str, list[float]]:
    keep_freed_memory()
    torch.set_num_threads(threads)
    models, images = torch.load(io.BytesIO(sent), weights_only=False)
    return in_turns(models, images, batch, repeats)


def in_turns(
    models: dict[str, nn.Module], images: Sequence[Tensor], batch: int, repeats: int
) -> dict[str, list[float]]:
    """`compare_speed` in this process."""

    def over_images(model: nn.Module) -> Callable[[], None]:
        def call() -> None:
            for start in range(0, len(images), batch):
                model(list(images[start : start + batch]))
            if images[0].is_cuda:
                torch.cuda.synchronize()

        return call

    with torch.inference_mode():
        frozen = {name: sparsenet.freeze(model, (list(images[:batch]),)) for name, model in models.items()}
        seconds = sparsenet.timing.alternate({name: over_images(model) for name, model in frozen.items()}, repeats)
    return {name: [1000 * s / len(images) for s in values] for name, values in seconds.items()}
