"""Dense engines: each makes of a network and its images a function that runs it as fast as that engine can.

Those of `ENGINES` run on a CPU, in float32 and on as many threads as PyTorch has (`torch.set_num_threads`); those of
`CUDA_ENGINES` on a CUDA device, in the dtype of the network and its images. Packages that only the benchmark
needs are imported by the engine that wants them.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsenet.cuda_graph import CudaGraph, Graph
from sparsenet.timing import alternate

# Runs the network on the images that it was made with, and gives the tensors of its output.
Run = Callable[[], list[Tensor]]


def eager(network: nn.Module, images: Tensor) -> Run:
    """PyTorch as it is, channels first or last, whichever is faster here."""
    folded = fold(network, images)
    formats = {
        "first": _eager(copy.deepcopy(folded), images),
        "last": _eager(_channels_last(folded), _channels_last(images)),
    }
    seconds = alternate(formats, repeats=5)
    return min(formats.items(), key=lambda item: median(seconds[item[0]]))[1]


def compiled(network: nn.Module, images: Tensor) -> Run:
    """`torch.compile`, with the weights frozen into the code, channels last. Needs a C++ compiler."""
    import torch._inductor.config as inductor

    run = _eager(torch.compile(_channels_last(fold(network, images)), dynamic=False), _channels_last(images))
    with inductor.patch(freezing=True):
        run()  # which compiles it
    return run


def cudnn(network: nn.Module, images: Tensor) -> Run:
    """PyTorch as it is, channels last, where cuDNN's tensor cores read rows of channels."""
    return _eager(_channels_last(fold(network, images)), _channels_last(images))


def cudnn_graph(network: nn.Module, images: Tensor, graph: Callable[[], Graph] = CudaGraph) -> Run:
    """The same, recorded as a CUDA graph, so that Python takes no time of it."""
    recording = graph()
    outputs = recording.capture(cudnn(network, images))

    def run() -> list[Tensor]:
        recording.replay()
        found: list[Tensor] = outputs
        return found

    return run


def autotuned(network: nn.Module, images: Tensor) -> Run:
    """`torch.compile`, which tries all that it can generate and records CUDA graphs, channels last."""
    compiled = torch.compile(_channels_last(fold(network, images)), dynamic=False, mode="max-autotune")
    run = _eager(compiled, _channels_last(images))
    run()  # which compiles it
    return run


def onnxruntime(network: nn.Module, images: Tensor) -> Run:
    """ONNX Runtime, with all its graph optimisations."""
    with bench_extra():
        import onnx  # noqa: F401  # which PyTorch's exporter needs, as it does onnxscript
        import onnxruntime
        import onnxscript  # noqa: F401

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads spin between the layers of a call, which it gains by, but not on after it, which others would lose by.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own
        path = str(Path(folder) / "network.onnx")  # a file, because a message holds 2 GiB at most
        torch.onnx.export(_Flat(network, images), (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: [torch.from_numpy(output) for output in session.run(None, inputs)]


def openvino(network: nn.Module, images: Tensor) -> Run:
    """OpenVINO, for latency. Told to compute in float32: where the processor knows bfloat16, that is its default."""
    with bench_extra():
        import openvino

    model = openvino.convert_model(_Flat(network, images), example_input=images, input=[list(images.shape)])
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # a pinned thread waits where another engine's still spins
    }
    ready = openvino.compile_model(model, "CPU", settings)
    array = images.numpy()

    def run() -> list[Tensor]:
        found = ready(array, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(found[port]) for port in ready.outputs]

    return run


ENGINES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


CUDA_ENGINES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "cudnn": cudnn,
    "cudnn-graph": cudnn_graph,
    "compile": autotuned,
}


@contextmanager
def bench_extra() -> Iterator[None]:
    """Around imports of packages that only the benchmark needs.

    Raises:
        ImportError: which tells how to install what is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error.name or error} is missing: pip install 'sparsenet[bench]'") from error


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a network's output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _eager(network: Callable[[Tensor], Any], images: Tensor) -> Run:
    @torch.inference_mode()
    def run() -> list[Tensor]:
        return tensors(network(images))

    return run


def _channels_last(what: Any) -> Any:
    return what.to(memory_format=torch.channels_last)


class _Flat(nn.Module):
    """A folded network whose output is a tuple of tensors, the one form that every exporter keeps in order."""

    def __init__(self, network: nn.Module, images: Tensor):
        super().__init__()
        self.network = fold(network, images)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(self.network(images)))


# -- folding batch normalisation -------------------------------------------------------------------------------


def fold(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy in evaluation mode, with every batch normalisation folded into the convolution before it, where there is
    one whose output nothing else reads, and each of the two runs once."""
    network = copy.deepcopy(network).eval()
    with torch.no_grad(), _Flow() as flow:
        flow.count(network(images))
    convolutions = {id(module.weight): module for module in network.modules() if isinstance(module, nn.Conv2d)}
    norms: list[Any] = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    remainders: dict[nn.Module, nn.Module] = {}
    for norm in norms:
        conv: Any = convolutions.get(flow.source(norm))
        remainder = _remainder(norm)
        if conv is not None and remainder is not None:
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            remainders[norm] = remainder
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if child in remainders:
                setattr(parent, name, remainders[child])
    return network


def _remainder(norm: Any) -> nn.Module | None:
    """What a normalisation does beside normalising; `None` where that is not known."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    parts = dict(norm.named_children())
    if parts.keys() == {"drop", "act"}:  # timm's normalisation with an activation
        return nn.Sequential(norm.drop, norm.act)
    return None


class _Flow(TorchDispatchMode):
    """Watches what convolutions compute, and who reads it. Modules are known by their tensors: a convolution by its
    weight, so that one which computes another weight first is none here, a normalisation by its running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[int] = Counter()  # by weight, or by running mean
        self.reads: Counter[int] = Counter()  # by output of a convolution
        self.made: dict[int, tuple[Tensor, Tensor]] = {}  # by the same: the output and the weight, kept alive
        self.normalised: dict[int, int] = {}  # by running mean: the output of a convolution

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.count((args, kwargs))
        name = func._overloadpacket.__name__
        if name == "convolution":
            self.calls[id(args[1])] += 1
            self.made[id(result)] = (result, args[1])
        elif "batch_norm" in name:
            self.calls[id(args[3])] += 1
            if id(args[0]) in self.made:
                self.normalised[id(args[3])] = id(args[0])
        return result

    def count(self, read: Any) -> None:
        """Somebody reads these tensors."""
        self.reads.update(id(tensor) for tensor in tensors(read) if id(tensor) in self.made)

    def source(self, norm: nn.BatchNorm2d) -> int:
        """The weight, by identity, of the convolution that can take a normalisation; 0 if there is none."""
        mean = id(norm.running_mean)
        output = self.normalised.get(mean)
        if norm.running_mean is None or output is None or self.calls[mean] != 1 or self.reads[output] != 1:
            return 0
        weight = id(self.made[output][1])
        return weight if self.calls[weight] == 1 else 0
