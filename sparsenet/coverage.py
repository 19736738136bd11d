"""The catalogue: every model of torchvision, and one of every architecture file of timm, put through the contract.

Each model gets random weights that behave like trained ones, is embedded at its stride-4 or stride-8 stage, and must
equal the original where every pixel is active, and the reference storage under a random mask. What cannot be guided is
counted and named.
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsenet import context
from sparsenet.features import Features
from sparsenet.masks import blobs
from sparsenet.record import record
from sparsenet.regions import Everywhere
from sparsenet.selector import GivenMask
from sparsenet.stage import watch
from sparsenet.surgery import call, densify, example_inputs, plan, quietly, selectify, stages

STAGES = ("stride4", "stride8")
DENSITY = 0.3
# A result may be this many times as wrong as the dense network's own, measured by float32 against float64: the orders
# of summation differ, and a sum of a few thousand numbers strays by a few times its rounding either way.
FACTOR = 16.0


@dataclass
class Result:
    """What the catalogue found of one model.

    Attributes:
        status: "passed"; "failed", for `reason`; "refused", by a clear error, which is `reason`.
        family: the file of its library that defines it.
        share: guided share of `conv_macs`, the multiply-accumulates of convolutions over maps after the stage;
            `macs_cut` is the share of all the network's that the mask saves.
        errors: by check, the error relative to what is allowed.
        exits: how often features left the region, by operation and reason.
    """

    model: str
    suite: str
    family: str
    status: str
    reason: str = ""
    stage: str = ""
    share: float = 0.0
    conv_macs: int = 0
    macs_cut: float = 0.0
    reenter: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


# -- the suites ------------------------------------------------------------------------------------------------


def torchvision_models(names: list[str] | None = None) -> dict[str, str]:
    """These models of torchvision, or all but the quantised, and the file that defines each."""
    import torchvision

    every = [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]
    known = {name: torchvision.models.get_model_builder(name).__module__.rpartition(".")[2] for name in every}
    return _chosen("torchvision", names, known)


def timm_models(names: list[str] | None = None) -> dict[str, str]:
    """These models of timm, or the smallest of each of its architecture files, and the file."""
    import timm

    by_file = {family: timm.list_models(module=family) for family in timm.list_modules()}
    if names is not None:
        return _chosen("timm", names, {name: family for family, models in by_file.items() for name in models})
    smallest: dict[str, str] = {}
    for family, models in by_file.items():
        sizes: list[tuple[int, str]] = []
        for name in models:
            with torch.device("meta"):
                model = timm.create_model(name)
            sizes.append((sum(parameter.numel() for parameter in model.parameters()), name))
        if sizes:
            smallest[min(sizes)[1]] = family
    return smallest


def _chosen(suite: str, names: list[str] | None, known: dict[str, str]) -> dict[str, str]:
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(f"{suite} has no model {', '.join(unknown)}")
    return known if names is None else {name: known[name] for name in names}


SUITES: dict[str, Callable[[list[str] | None], dict[str, str]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
}


def named(name: str) -> nn.Module:
    """A model by its name in torchvision or timm; "timm:resnet18" where both have it and timm's is meant.

    Raises:
        ValueError: for a name that neither has.
    """
    import timm
    import torchvision

    library, _, rest = name.rpartition(":")
    if library != "timm" and rest in torchvision.models.list_models():
        return build("torchvision", rest)
    if rest in timm.list_models():
        return build("timm", rest)
    raise ValueError(f"neither torchvision nor timm has a model {name!r}: see timm.list_models()")


def build(suite: str, name: str) -> nn.Module:
    """A model of a suite with random weights; nothing is downloaded."""
    if suite == "timm":
        import timm

        model: nn.Module = timm.create_model(name)
        return model
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    weights = [name for name in ("weights", "weights_backbone") if name in inspect.signature(builder).parameters]
    built: nn.Module = builder(**dict.fromkeys(weights))
    return built


# -- one model -------------------------------------------------------------------------------------------------


def check(suite: str, name: str, family: str, *, reenter: bool = False) -> Result:
    """Put one model through the contract."""
    start = time.perf_counter()
    result = Result(name, suite, family, "failed", reenter=reenter)
    try:
        torch.manual_seed(0)
        _check(build(suite, name).eval(), result)
    except Exception as error:  # whatever a model of the catalogue raises is a finding
        result.reason = f"{type(error).__name__}: {error}"
    result.seconds = round(time.perf_counter() - start, 1)
    gc.collect()
    return result


@torch.no_grad()
def _check(model: nn.Module, result: Result) -> None:
    try:
        inputs = example_inputs(model)
    except ValueError as error:
        result.status, result.reason = "refused", str(error)
        return
    at, refusals = _stage(model, inputs, result.reenter)
    if at is None:
        result.status, result.reason = "refused", " | ".join(refusals)
        return
    enliven(model, inputs)
    original = copy.deepcopy(model.state_dict())  # with its metadata, by which MNASNet tells the versions of its layers
    plain = _outputs(model, inputs)
    model.double()
    doubled = tree_map_only(Tensor, Tensor.double, inputs)
    with _Precision() as precision:
        truth = _outputs(model, doubled)
    model.float()

    selectify(model, at, selector=GivenMask(), example_inputs=inputs, reenter=result.reenter, inplace=True)
    found = plan(model)
    result.stage, result.share, result.conv_macs = found.stage, found.guided_conv_share, found.conv_macs
    result.exits = dict(
        Counter(f"{step.operation.name}: {step.operation.reason}" for step in found.exits).most_common()
    )
    keys = set(model.state_dict())
    if not set(original) <= keys or any(not key.startswith("selector.") for key in keys - set(original)):
        raise AssertionError("surgery changed the keys of the state_dict")
    if model.load_state_dict(original, strict=False).unexpected_keys:
        raise AssertionError("the original state_dict does not load")

    mask = blobs(1, found.size, DENSITY)
    with context.setting(regions=Everywhere(), backend="rows"):
        active = _outputs(model, inputs)
    with context.use_mask(mask), context.use_backend("reference"):
        single = _outputs(model, inputs)
    model.double()
    with context.use_mask(mask):
        with context.use_backend("reference"):
            reference = _outputs(model, doubled)
        with context.use_backend("rows"), record(model) as rec:
            rows = _outputs(model, doubled)
    result.macs_cut = 1 - rec.macs / rec.dense_macs
    _hold(result, "all active", active.raw, truth.raw, FACTOR * own_error(plain.raw, truth.raw))
    in_double = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    allowed = FACTOR * own_error(single.raw, reference.raw) * (1.0 if precision.single else in_double)
    _hold(result, "masked", rows.raw, reference.raw, allowed)
    if truth.final:
        with context.setting(regions=Everywhere(), backend="rows"):
            active = _outputs(model, doubled)
        _hold(result, "all active, detections", active.final, truth.final, 1e-6 * largest(truth.final))
        _hold(result, "masked, detections", rows.final, reference.final, 1e-6 * largest(reference.final))
    if not rec.macs < rec.dense_macs:
        raise AssertionError("the mask saves no multiply-accumulates")
    if gap(rows.raw, truth.raw) <= (10 if precision.single else 1e3) * allowed:
        raise AssertionError("the output does not see the mask, so nothing was checked")
    result.status = "passed"


def _stage(model: nn.Module, inputs: Any, reenter: bool) -> tuple[str | None, list[str]]:
    """The first stage of the catalogue that a model can be embedded at, and why it is not one before. A network without
    a map at these strides is tried at whatever else has a name, and at the first module that gives a map."""
    refusals = []
    with quietly(model):
        maps = watch(model, lambda: call(model, inputs)).maps
    others = [stage.path for stage in stages(model, example_inputs=inputs)]
    for at in dict.fromkeys([*STAGES, *others, *(found.path for found in maps[:1])]):
        try:
            selectify(model, at, selector=GivenMask(), example_inputs=inputs, reenter=reenter, inplace=True)
        except ValueError as error:
            refusals.append(f"{at}: {error}")
        else:
            found = plan(model).stage
            densify(model)
            return found, refusals
    return None, refusals


class _Precision(TorchDispatchMode):
    """Notices whether a network computes in float32 even where it is given float64 (some normalisations insist)."""

    single = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.single |= any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in args)
        return result


def _hold(result: Result, name: str, got: list[Tensor], wanted: list[Tensor], allowed: float) -> None:
    """Compare, note, and raise where a bound does not hold."""
    found = gap(got, wanted)
    result.errors[name] = found / allowed
    if not found <= allowed:
        raise AssertionError(f"{name}: error {found:.3g}, allowed {allowed:.3g}")


def own_error(single: list[Tensor], double: list[Tensor]) -> float:
    """How wrong a computation in float32 is by itself: at least one rounding of its largest number."""
    return max(gap(single, double), torch.finfo(torch.float32).eps * largest(double))


@dataclass
class Outputs:
    """What a model gives: `raw` tensors, and a detector's `final` ones, which come of comparisons, so that float32 and
    float64 may differ in whole objects."""

    raw: list[Tensor]
    final: list[Tensor]


def _outputs(model: nn.Module, inputs: Any) -> Outputs:
    if not isinstance(inputs, list):
        return Outputs(_floating(call(model, inputs)), [])
    heads: list[Any] = []
    parts: Any = model
    head = parts.rpn.head if hasattr(model, "rpn") else parts.head
    handle = head.register_forward_hook(lambda module, args, output: heads.append(_as_read(output)))
    try:
        final = call(model, (inputs,))
    finally:
        handle.remove()
    return Outputs(_floating(heads), _floating(final))


def _as_read(output: Any) -> Any:
    """A detector's head as what follows reads it."""
    return tree_map_only(Features, lambda features: features.dense("the catalogue"), output)


def _floating(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def largest(tensors: list[Tensor]) -> float:
    return max((tensor.abs().max().item() for tensor in tensors if tensor.numel()), default=1.0)


def gap(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference; infinite where shapes differ or a number is lost."""
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in wanted]:
        return float("inf")
    differences = [(a.double() - b.double()).abs().max() for a, b in zip(got, wanted, strict=True) if a.numel()]
    largest = torch.stack(differences).max().item() if differences else 0.0
    return largest if largest == largest else float("inf")


def enliven(model: nn.Module, inputs: Any) -> None:
    """Give a model with fresh weights the liveliness of a trained one: normalisations with statistics of their own, and
    no branch that starts closed or as an identity. Otherwise a masked network could be wrong and look right."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_floating_point() and (parameter == parameter.flatten()[0]).all():
            if parameter.numel() > max(parameter.shape, default=1):
                nn.init.normal_(parameter, std=parameter.numel() ** -0.5 * 4)
            elif name.rpartition(".")[2] in ("bias", "beta"):
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.uniform_(parameter, 0.6, 1.4)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        twice = [*inputs, *inputs] if isinstance(inputs, list) else tree_map_only(Tensor, _pair, inputs)
        call(model, (twice,) if isinstance(twice, list) else twice)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
    for module in model.modules():
        if hasattr(module, "score_thresh"):  # random scores are low, and detections are to be compared
            vars(module)["score_thresh"] = 0.001


def _pair(images: Tensor) -> Tensor:
    """A batch and the same mirrored, so that what was pooled to one number per channel varies."""
    return torch.cat([images, images.flip(-1) ** 2])


# -- the catalogue ---------------------------------------------------------------------------------------------


def run(suite: str, names: list[str] | None = None, path: Path | None = None) -> Iterator[Result]:
    """Check the models of a suite, in order; those that `path` already holds are taken from there, and each one that is
    done is written there at once, so that a run can be interrupted. A hybrid, whose attention leaves the grid and
    returns to it, is checked with `reenter`.

    Raises:
        ValueError: for an unknown suite, or models that it does not have.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
    results = load(path)
    known = SUITES[suite](names)
    for name, family in known.items():
        found = next((each for each in results if (each.suite, each.model) == (suite, name)), None)
        if found is None:
            found = check(suite, name, family)
            if (found.stage and found.share < 0.99) or "left the region" in found.reason:
                again = check(suite, name, family, reenter=True)
                found = found if again.status == "refused" else again
            results.append(found)
            if path is not None:
                save(results, path)
        yield found


def load(path: Path | None) -> list[Result]:
    """The results in a file; none if there is no file yet."""
    return [Result(**entry) for entry in json.loads(path.read_text())] if path is not None and path.exists() else []


def save(results: list[Result], path: Path) -> None:
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps([asdict(result) for result in results], indent=1))
    draft.replace(path)


def summary(results: list[Result]) -> str:
    """How many models passed, in one line."""
    found = Counter(result.status for result in results)
    tried = found["passed"] + found["failed"]
    whole = sum(result.status == "passed" and result.share >= 0.99 for result in results)
    return (
        f"{found['passed']} of {tried} models passed, {whole} of them with at least 99 % of their convolutions' MACs "
        f"guided; {found['refused']} take no images, or have no convolution after a stage of 2-D maps, and were "
        "refused with a clear error"
    )


_INTRODUCTION = """# Coverage

What `make coverage` found with {versions}, on random weights that behave like trained ones. Each model is embedded at
its stride-4 stage, or at its stride-8 stage where that does not do, or at the first stage that has a name. It passes if

- with every pixel active it equals the original in float32, within {factor:g} times the dense network's own error
  against float64, on rows (not by falling back to dense operations);
- under a random mask of blobs ({density:.0%} of the pixels) rows equal the reference storage in float64, within the
  same multiple of the error that float32 makes of that very computation, scaled to float64 (not scaled where a network
  computes in float32 all the same), and differ from the unmasked output by a thousand (ten) times as much or more, so
  that the comparison sees the mask;
- a detector's detections equal those of the original, and of the reference storage, in float64;
- the original `state_dict` loads into the selective model, and the mask saves multiply-accumulates.

*Guided* is the share of the MACs of 2-D convolutions over maps of more than one pixel, whose input comes of the stage's
output, that the mask can cut; the denominator stands beside it. (A convolution of what was pooled to 1x1, as in
squeeze-and-excitation, is a linear layer.) *Cut* is what the mask of {density:.0%} saves of the whole network's MACs.
*Exits* are the operations after which features were ordinary tensors, and how often. Models marked *reenter* are
hybrids: their attention leaves the grid and returns to it, and `selectify(..., reenter=True)` takes the mask up again.

"""


def report(path: Path, every: list[Result]) -> None:
    """Write results as Markdown, suite by suite."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm"))
    parts = [_INTRODUCTION.format(versions=versions, factor=FACTOR, density=DENSITY)]
    for suite in dict.fromkeys(result.suite for result in every):
        results = [result for result in every if result.suite == suite]
        parts.append(f"## {suite}\n\n{summary(results)}.\n\n")
        parts.append("| model | file | stage | guided | of MMACs | cut | exits |\n|---|---|---|---|---|---|---|\n")
        for result in results:
            if result.status == "refused":
                continue
            exits = "; ".join(f"{name} ({count})" for name, count in result.exits.items())
            exits = f"**failed**: {result.reason}" if result.status == "failed" else exits
            stage = f"{result.stage}{', reenter' if result.reenter else ''}"
            parts.append(
                f"| {result.model} | {result.family} | {stage} | {result.share:.2%} | {result.conv_macs / 1e6:,.1f} "
                f"| {result.macs_cut:.0%} | {exits} |\n"
            )
        refused = [result for result in results if result.status == "refused"]
        if refused:
            parts.append("\nRefused, with the error's first sentence:\n\n")
            parts += [f"- {result.model} ({result.family}): {_first(result.reason)}\n" for result in refused]
        parts.append("\n")
    path.write_text("".join(parts).rstrip() + "\n")


def _first(reason: str) -> str:
    """What is to be said of a refusal: of the first stage that exists, if there is one."""
    tries = reason.split(" | ")
    told = next((each for each in tries if "no stage" not in each), tries[0])
    return told.split(". Stages:")[0].split("; the closest")[0]
