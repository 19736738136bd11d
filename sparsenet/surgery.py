"""`selectify` and `densify`: make a model selective, and give the original back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from sparsenet import backends, context
from sparsenet.features import Departed
from sparsenet.hooks import BeginHook, EndHook, StageHook
from sparsenet.masked_conv import MaskedConv2d
from sparsenet.masked_norm import MaskedSyncBatchNorm
from sparsenet.plan import Plan, Step
from sparsenet.record import Record, observing, selector_of
from sparsenet.regions import Everywhere
from sparsenet.selection import Operation, Options
from sparsenet.selector import SelectiveModule, Selector
from sparsenet.selector.levels import learned_octaves
from sparsenet.stage import Stages, check_output, list_stages, resolve, watchable

# The Selective Module's share of the model's multiply-accumulates, at most.
BUDGET = 0.02


def selectify(
    model: nn.Module,
    at: str,
    *,
    selector: nn.Module | None = None,
    example_inputs: Any = None,
    backend: str = "auto",
    strict: bool = False,
    reenter: bool = False,
    mean: str = "all",
    capacity: float | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Insert a selector after a stage; what follows computes only the pixels that it selects.

    Args:
        model: any module whose stage gives a map (N, C, H, W). It is left as it is unless `inplace`.
        at: "poolN" (the N-th pooling module in execution order), "strideN" (the last module at that stride),
            or a module path; the features it gives are what the selector reads.
        selector: a module from features (N, C, H, W) to one logit per pixel, (N, 1, H, W) or (N, H, W); by default
            the Selective Module of SCN (arXiv 2002.01205), of at most 2 % of the model's MACs. `GivenMask()`
            takes every mask from the caller (`use_mask`).
        example_inputs: what a dry run calls the model with: a tensor, a tuple of arguments, a dict of keyword
            arguments, or a detector's list of images. By default the size that the model's family is trained at.
        backend: "auto" (rows, and the dense operation where every pixel is active), "reference", "rows" or "spconv";
            see `use_backend`.
        strict: raise wherever features leave the guided region, instead of going on with ordinary tensors.
        reenter: where features have left (attention over the map, say) and a convolution meets the result as a map of
            the size they had, let it take up their sites again. The result counts as having every pixel. For hybrids
            (CoAtNet, MobileViT), whose blocks return to the grid that they left.
        mean: what a mean over space divides by: "all" pixels of the map, as the dense network does, or the "active"
            ones.
        capacity: the share of the pixels that is active in each image, at every size: the max(1, round(capacity·H·W))
            of the strongest saliency, of equal ones the first; maps of 3x3 and below are always on. Every shape then
            follows from the input's, so that no pass waits to learn how many pixels matter, `sparsenet.traced` and CUDA
            graphs (`sparsenet.freeze`) can take the model, and a pass takes the same time whatever the images show. A
            given mask is a ranking then: those cells are active which it covers most. By default as many pixels are
            active as pass the saliency's threshold, or as the mask has.
        inplace: change `model` itself and keep the identity of its parameters; by default a deep copy is changed.

    Returns:
        The selective model: same call, same outputs, every key of the original `state_dict` plus `selector.*`.
        Guided `nn.Conv2d` have become `MaskedConv2d`.

    Raises:
        ValueError: for a capacity that is no share, an unknown stage, a stage whose output is no 4-D map or which no
            convolution follows, a model that has an attribute `selector`, inputs that cannot be guessed, and models
            whose modules cannot be watched or hold no numbers yet: compiled, scripted, on the meta device, or (in
            place) with lazy parameters.
        RuntimeError: when the stage never fires.
        Nothing of `model` is changed then.
    """
    from sparsenet import adapters

    options = Options(backends.check(backend), strict, reenter, mean, capacity)
    if hasattr(model, "selector"):
        raise ValueError(
            "the model has an attribute 'selector', which is where sparsenet puts its branch: rename it"
            if not isinstance(model.selector, Selector)
            else "the model is selective already: sparsenet.densify(model) gives the original back"
        )
    check_model(model, inplace)
    adapter = adapters.find(model)
    inputs = _inputs(model, adapter, example_inputs)
    if not inplace:
        modes = _modes(model)
        model = copy.deepcopy(model)
        _restore(model, modes)  # torchvision's traced feature extractors forget theirs in a copy

    def run() -> Any:
        with quietly(model):
            return call(model, inputs)

    stage = resolve(model, at, adapter.aliases(model), run)
    plan = _dry_run(model, at, stage, run, options)
    if not any(step.operation.name == "conv2d" for step in plan.steps):
        exits = "; ".join(f"{step.path}: {step.operation.name}: {step.operation.reason}" for step in plan.exits)
        raise ValueError(
            f"no convolution reads the output of stage {stage!r} as a map (N, C, H, W), so there is nothing to skip "
            f"after it (left the region: {exits or 'nothing'}): choose an earlier stage, or one whose output is NCHW"
        )
    guiding = selector
    if guiding is None:
        guiding = SelectiveModule.fit(plan.channels, size=plan.size, budget=BUDGET * plan.total_macs)
    reference = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    branch = Selector(guiding, learned_octaves(plan.size, list(plan.sizes)), options)
    if reference is not None:
        branch.to(reference.device, reference.dtype)
    branch.train(model.training)
    branch.plan = plan
    branch.near_heads = adapter.near_heads(model, plan)
    fills = adapter.fills(model)
    modules = dict(model.named_modules())
    for step in plan.steps:
        module = modules[step.path]
        if step.operation.name == "conv2d" and type(module) is nn.Conv2d:
            fill = fills.get(step.path)
            MaskedConv2d.guide(module, step.path, step.operation.size, None if fill is None else fill.to(module.weight))
    for module in modules.values():
        if type(module) is nn.SyncBatchNorm:
            MaskedSyncBatchNorm.guide(module)
    _attach(model, modules[stage], branch)
    model.selector = branch
    adapter.attach(model)
    return model


def densify(model: nn.Module) -> nn.Module:
    """The original model again, in place: its convolutions, hooks and keys; the selector is dropped.

    Raises:
        ValueError: for a model that `selectify` did not make.
    """
    from sparsenet import adapters

    selector = selector_of(model)
    check_model(model, inplace=False)
    adapters.find(model).detach(model)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, StageHook | BeginHook | EndHook) and hook.selector is selector:
                    _remove_hook(module, key)
        if isinstance(module, MaskedConv2d | MaskedSyncBatchNorm):
            module.release()
    del model.selector
    return model


def stages(model: nn.Module, *, example_inputs: Any = None) -> Stages:
    """The places of a model to embed at that have a name, with their size, stride, channels and the share of the
    network's multiply-accumulates that come after each.

    Args:
        model: as `selectify` takes it; it is left as it is.
        example_inputs: as there.

    Raises:
        ValueError: for inputs that cannot be guessed.
    """
    from sparsenet import adapters

    check_model(model, inplace=True)
    adapter = adapters.find(model)
    inputs = _inputs(model, adapter, example_inputs)
    with quietly(model):
        return list_stages(model, adapter.aliases(model), lambda: call(model, inputs))


def plan(model: nn.Module) -> Plan:
    """What surgery found: which operations are guided and at which size, which left the guided region and why, and the
    share of the MACs after the stage that is guided, with its denominator.

    Raises:
        ValueError: for a model that `selectify` did not make.
    """
    return selector_of(model).plan


def check_model(model: nn.Module, inplace: bool) -> None:
    """Raise for a model that no dry run can be made of, or none that leaves no trace."""
    if any(getattr(module, "frozen", False) is True for module in model.modules()):
        raise ValueError("the model is frozen already: take the model that sparsenet.freeze was given")
    if hasattr(model, "_orig_mod"):  # asked for by name, because torch._dynamo takes seconds to import
        raise ValueError(
            "the model is compiled: select first, and compile then, by "
            "torch.compile(sparsenet.selectify(model._orig_mod, ...))"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is scripted, and its modules take no hooks: give the Python model it was made from")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy and inplace:
        raise ValueError(f"parameters are not initialised, {lazy[0]} among them: call the model on an input first")
    meta = [name for name, tensor in tensors if tensor.is_meta]
    if meta:
        raise ValueError(
            f"parameters are on the meta device, {meta[0]} among them, where a mask has no pixels: give them memory "
            "first, by model.to_empty(device='cpu') and a checkpoint, say"
        )


# -- the dry run -----------------------------------------------------------------------------------------------


def _dry_run(model: nn.Module, at: str, stage: str, run: Callable[[], Any], options: Options) -> Plan:
    """Run the model once with every pixel active behind `stage`, and write down what happens. Leaves no trace."""
    probe = _Probe(Selector(nn.Identity(), 0, replace(options, strict=False, capacity=None)))
    rows_backend = "rows" if options.backend in ("auto", "reference") else options.backend  # whose falls back, is named
    module = model.get_submodule(stage)
    outputs: list[Tensor] = []

    def embed(module: nn.Module, args: Any, output: Any) -> Any:
        check_output(stage, output)
        outputs.append(output)
        return probe.selector.enter(output)

    # Guided already, because an `nn.Conv2d` that pads by reflection calls two functions, and the first of them leaves.
    guided = [MaskedConv2d.guide(part, path, (0, 0)) for path, part in model.named_modules() if type(part) is nn.Conv2d]
    handles = [module.register_forward_hook(embed)]
    for path, part in watchable(model):
        handles += [
            part.register_forward_pre_hook(lambda *_, path=path: probe.path.append(path), prepend=True),
            part.register_forward_hook(lambda *_: (probe.path.pop(), None)[1], always_call=True),
        ]
    try:
        with context.setting(regions=Everywhere(), backend=rows_backend, supervision=None), observing(probe):
            run()
    finally:
        for handle in handles:
            handle.remove()
        for convolution in guided:
            convolution.release()
    if not outputs:
        raise RuntimeError(
            f"stage {stage!r} did not run on the example inputs: choose a module that the forward pass calls, such as "
            "'strideN' finds (what was traced or exported calls the smallest modules, or functions only, and not the "
            "modules it was made from: there, select before tracing)"
        )
    first = outputs[0]
    return Plan(
        at=at,
        stage=stage,
        batch=first.shape[0],
        size=(first.shape[2], first.shape[3]),
        channels=first.shape[1],
        steps=tuple(probe.steps),
        sizes=tuple(dict.fromkeys(size for selection in probe.selections for size in selection.sizes)),
        total_macs=probe.dense_macs,
        downstream_macs=probe.downstream_macs,
        guided_macs=sum(step.operation.dense_macs for step in probe.steps),
        conv_macs=probe.conv_macs,
    )


class _Probe(Record):
    """A record of the dry run, which knows the module that is running.

    Attributes:
        conv_macs: of convolutions over maps that come of the stage's output, guided or not, in the original model.
    """

    follows = True

    def __init__(self, selector: Selector):
        super().__init__(selector)
        self.begin()
        self.conv_macs = 0
        self.path: list[str] = []
        self.steps: list[Step] = []

    def count(self, macs: int, convolved: Tensor | None = None) -> None:
        super().count(macs, convolved)
        if self._counting and isinstance(convolved, Departed):
            self.conv_macs += macs

    def operation(self, operation: Operation) -> None:
        super().operation(operation)
        if operation.convolves:
            self.conv_macs += operation.dense_macs
        self.steps.append(Step(self.path[-1] if self.path else "", operation))


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with example inputs in one of the forms of `selectify`."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and the random state as it was: nothing of a run inside remains."""
    modes = _modes(model)
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        _restore(model, modes)


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def _restore(model: nn.Module, modes: list[bool]) -> None:
    """By the root's own `train` first, which may do more than set modes: one of torchvision changes graphs."""
    if model.training != modes[0]:
        model.train(modes[0])
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode


def example_inputs(model: nn.Module) -> Any:
    """What a dry run calls a model with where it is told nothing.

    Raises:
        ValueError: where no family knows.
    """
    from sparsenet import adapters

    return _inputs(model, adapters.find(model), None)


def _inputs(model: nn.Module, adapter: Any, given: Any) -> Any:
    if given is not None:
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(given)):
            raise ValueError(
                "example_inputs has no tensor: give what the model is called with, such as torch.rand(1, 3, 224, 224)"
            )
        return given
    inputs = adapter.example_inputs(model)
    if inputs is None:
        raise ValueError(
            f"no example inputs are known for {type(model).__module__}.{type(model).__name__} (tried: the family's "
            "adapter, timm's pretrained_cfg['input_size'], torchvision's training sizes): give "
            "example_inputs=torch.rand(1, 3, H, W), or whatever the model is called with"
        )
    return inputs


# -- hooks -----------------------------------------------------------------------------------------------------


def _attach(model: nn.Module, stage: nn.Module, selector: Selector) -> None:
    stage.register_forward_hook(StageHook(selector))
    model.register_forward_pre_hook(BeginHook(selector), with_kwargs=True)
    model.register_forward_hook(EndHook(selector), always_call=True)


def _remove_hook(module: nn.Module, key: int) -> None:
    for name in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        getattr(module, name).pop(key, None)
