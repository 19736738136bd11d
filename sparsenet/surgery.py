"""`selectify` and `densify`: make a model selective, and give the original back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsenet import backends, context
from sparsenet.hooks import BeginHook, EndHook, StageHook
from sparsenet.masked_conv import MaskedConv2d
from sparsenet.masked_norm import MaskedSyncBatchNorm
from sparsenet.plan import Plan, Step
from sparsenet.record import Record, observing, selector_of
from sparsenet.regions import Everywhere
from sparsenet.selection import Operation
from sparsenet.selector import SelectiveModule, Selector
from sparsenet.selector.levels import learned_octaves
from sparsenet.stage import check_output, resolve, watchable

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
        inplace: change `model` itself and keep the identity of its parameters; by default a deep copy is changed.

    Returns:
        The selective model: same call, same outputs, every key of the original `state_dict` plus `selector.*`.
        Guided `nn.Conv2d` have become `MaskedConv2d`.

    Raises:
        ValueError: for an unknown stage, a stage whose output is no 4-D map or which no convolution follows, a model
            that has an attribute `selector`, and inputs that cannot be guessed.
        RuntimeError: when the stage never fires.
        Nothing of `model` is changed then.
    """
    from sparsenet import adapters

    backends.check(backend)
    if hasattr(model, "selector"):
        raise ValueError(
            "the model has an attribute 'selector', which is where sparsenet puts its branch: rename it"
            if not isinstance(model.selector, Selector)
            else "the model is selective already: sparsenet.densify(model) gives the original back"
        )
    adapter = adapters.find(model)
    inputs = _example_inputs(model, adapter, example_inputs)
    if not inplace:
        model = copy.deepcopy(model)

    def run() -> Any:
        with quietly(model):
            return call(model, inputs)

    stage = resolve(model, at, adapter.aliases(model), run)
    plan = _dry_run(model, at, stage, run, backend)
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
    branch = Selector(guiding, learned_octaves(plan.size, list(plan.sizes)), backend, strict)
    if reference is not None:
        branch.to(reference.device, reference.dtype)
    branch.train(model.training)
    branch.plan = plan
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


def plan(model: nn.Module) -> Plan:
    """What surgery found: which operations are guided and at which size, which left the guided region and why, and the
    share of the MACs after the stage that is guided, with its denominator.

    Raises:
        ValueError: for a model that `selectify` did not make.
    """
    return selector_of(model).plan


# -- the dry run -----------------------------------------------------------------------------------------------


def _dry_run(model: nn.Module, at: str, stage: str, run: Callable[[], Any], backend: str) -> Plan:
    """Run the model once with every pixel active behind `stage`, and write down what happens. Leaves no trace."""
    probe = _Probe(Selector(nn.Identity(), 0))
    rows_backend = "rows" if backend in ("auto", "reference") else backend  # whose falls back, the plan names
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
            f"stage {stage!r} did not run on the example inputs: choose a module that the forward pass calls (feature "
            "extractors made by tracing call functions, not the modules they were made from)"
        )
    first = outputs[0]
    return Plan(
        at=at,
        stage=stage,
        size=(first.shape[2], first.shape[3]),
        channels=first.shape[1],
        steps=tuple(probe.steps),
        sizes=tuple(dict.fromkeys(size for selection in probe.selections for size in selection.sizes)),
        total_macs=probe.dense_macs,
        downstream_macs=probe.downstream_macs,
        guided_macs=sum(step.operation.dense_macs for step in probe.steps),
    )


class _Probe(Record):
    """A record of the dry run, which knows the module that is running."""

    def __init__(self, selector: Selector):
        super().__init__(selector)
        self.begin()
        self.path: list[str] = []
        self.steps: list[Step] = []

    def operation(self, operation: Operation) -> None:
        super().operation(operation)
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
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _example_inputs(model: nn.Module, adapter: Any, given: Any) -> Any:
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
