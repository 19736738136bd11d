"""Batch normalisation across two processes, against one process with both their batches."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsenet
from sparsenet.masked_norm import MaskedSyncBatchNorm
from tests.helpers import STORAGES

RANKS = 2


def network(norm: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), norm(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), norm(4)).double()


def batch() -> tuple[Tensor, Tensor]:
    """Two images per process; the mask of the last two is `nothing` but for one pixel."""
    torch.manual_seed(1)
    images, mask = torch.randn(2 * RANKS, 2, 8, 8).double(), torch.rand(2 * RANKS, 6, 6) < 0.4
    mask[2:] = False
    mask[3, 2, 2] = True
    return images, mask


def learn(model: nn.Module, backend: str, images: Tensor, mask: Tensor) -> Tensor:
    with sparsenet.use_backend(backend), sparsenet.use_mask(mask):
        loss: Tensor = (model(images) * torch.linspace(-1, 1, 36).view(6, 6)).square().sum()
    loss.backward()
    return loss.detach()


def in_one_process(rank: int, folder: Path) -> None:
    """What a rank finds: written to a file, for the parent to read."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    images, mask = (tensor.chunk(RANKS)[rank] for tensor in batch())
    found = {}
    for backend in STORAGES:
        model = sparsenet.selectify(
            network(nn.SyncBatchNorm), "0", selector=sparsenet.GivenMask(), example_inputs=images
        )
        loss = learn(model, backend, images, mask)
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
        torch.distributed.all_reduce(loss)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found[backend] = {"loss": loss, "state": model.state_dict(), "gradients": gradients}
    torch.distributed.destroy_process_group()  # whose threads may end a process that exits with them (SIGABRT)
    torch.save(found, folder / f"{rank}.pt")


def test_two_processes_are_one_with_both_batches(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_one_process, (tmp_path,), RANKS)  # type: ignore[no-untyped-call]
    for backend in STORAGES:
        images, mask = batch()
        alone = sparsenet.selectify(network(nn.BatchNorm2d), "0", selector=sparsenet.GivenMask(), example_inputs=images)
        loss = learn(alone, backend, images, mask)
        for rank in range(RANKS):
            found = torch.load(tmp_path / f"{rank}.pt")[backend]
            torch.testing.assert_close(found["loss"], loss, rtol=1e-9, atol=1e-9)
            for name, parameter in alone.named_parameters():
                torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-9, atol=1e-9)
            for name, value in alone.state_dict().items():
                torch.testing.assert_close(found["state"][name], value, rtol=1e-9, atol=1e-9)


def test_surgery_guides_it_and_densify_releases_it() -> None:
    model = network(nn.SyncBatchNorm)
    images, _ = batch()
    selective = sparsenet.selectify(model, "0", selector=sparsenet.GivenMask(), example_inputs=images)
    assert [type(module) for module in selective.children() if isinstance(module, nn.SyncBatchNorm)] == [
        MaskedSyncBatchNorm
    ] * 2
    assert list(map(type, sparsenet.densify(selective).children())) == list(map(type, model.children()))


@pytest.mark.parametrize("training", [True, False])
def test_in_one_process_it_is_batch_normalisation(training: bool) -> None:
    images, mask = batch()
    results = []
    for norm in (nn.SyncBatchNorm, nn.BatchNorm2d):
        model = sparsenet.selectify(network(norm), "0", selector=sparsenet.GivenMask(), example_inputs=images)
        with sparsenet.use_mask(mask):
            results.append(model.train(training)(images))
    assert torch.equal(*results)
