"""Wall-clock time of detectors, side by side."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import sparsenet


def compare_speed(
    models: dict[str, nn.Module], images: Sequence[Tensor], batch: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds per image of each detector, a value for each of `repeats` passes over the images.

    All are frozen, and take turns. A detector is called with `batch` images at a time, post-processing included.
    """

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
