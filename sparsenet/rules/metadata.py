"""What a feature map is asked about itself, and copies of it: no pixel is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsenet.features import Features, Leaves, rule

_ATTRIBUTES = """
    shape ndim dtype device layout is_leaf grad_fn grad is_cuda is_cpu is_meta is_sparse is_quantized
    is_mkldnn is_nested is_xla is_mps itemsize nbytes names _version output_nr
    _backward_hooks _base _cdata
"""
_METHODS = """
    size dim ndimension numel nelement element_size is_floating_point is_complex is_inference is_contiguous
    stride get_device __len__ __hash__ has_names is_signed _is_view
"""


# Properties arrive as the getters and setters of their descriptors.
_Tensor: Any = Tensor


@rule(
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
    Tensor.requires_grad_,
    _Tensor.requires_grad.__set__,
    _Tensor.grad.__set__,
    _Tensor._backward_hooks.__set__,  # autograd resets it when an in-place operation rebases the history
    any_form=True,
)
def metadata(func: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


@rule(_Tensor.requires_grad.__get__, any_form=True)
def requires_grad(func: Any, x: Features) -> bool:
    return bool(metadata(func, x)) or x.value.requires_grad or x.gate_is_live()


@rule(Tensor.__repr__, Tensor.__str__, Tensor.__format__, any_form=True)
def show(func: Any, x: Features, *args: Any, **kwargs: Any) -> str:
    return Features.__repr__(x)


@rule(Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook, any_form=True)
def gradient_hooks(func: Any, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        f"Tensor.{func.__name__} on guided features would never see their gradient, which flows between their "
        "values: hook a parameter, or an ordinary tensor made by `features + 0` outside the guided region"
    )


@rule(torch.autograd.backward, torch.autograd.grad, any_form=True)
def backward(func: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """A backward pass that starts at wrappers, as a reentrant checkpoint's does."""
    for x in tree_leaves(tensors):
        if isinstance(x, Features) and (x.full or x.gate_is_live()):
            raise RuntimeError(
                f"{func.__name__} from guided features would leave out their mask's part of the gradient: use "
                "torch.utils.checkpoint with use_reentrant=False, or start from an ordinary tensor"
            )
    return metadata(func, tensors, *args, **kwargs)


@rule(_Tensor.data.__set__, any_form=True)
def set_data(func: Any, *args: Any) -> None:
    raise RuntimeError("guided features do not take new .data: return a new tensor instead")


@rule(Tensor.detach, torch.detach, _Tensor.data.__get__, any_form=True)
def detach(func: Any, x: Features) -> Features:
    return x.viewed_by(x.like(x.value.detach(), live=False))


@rule(Tensor.contiguous, any_form=True)
def contiguous(func: Any, x: Features, *, memory_format: Any = None) -> Features:
    """How a value lies in memory is its storage's own affair; but whether PyTorch would have copied here, so that a
    write to one does not reach the other, cannot be told."""
    return x.sibling(x.form)


@rule(Tensor.clone, torch.clone, any_form=True)
def clone(func: Any, x: Features, *, memory_format: Any = None) -> Features:
    return x.like(x.value.clone())


@rule(
    Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.bool, Tensor.int, Tensor.long,
    Tensor.type, Tensor.type_as, Tensor.cpu, Tensor.cuda, any_form=True,
)  # fmt: skip
def to(func: Any, x: Features, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("memory_format", None)
    arguments = [other.value if isinstance(other, Features) else other for other in (x, *args)]
    if not isinstance(x, Features):
        return func(*arguments, **kwargs)
    value = func(*arguments, **kwargs)
    if not isinstance(value, Tensor):
        return value  # Tensor.type() without arguments is a string
    if value.device != x.selection.device:
        raise Leaves("moves to another device than its sites")
    return x if value is x.value else x.like(value)


_LIKE = "zeros_like ones_like empty_like full_like rand_like randn_like"


@rule(
    *(getattr(torch, name) for name in _LIKE.split()),
    Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor, any_form=True,
)  # fmt: skip
def fresh(func: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Ordinary tensors that take no more than a map's shape, dtype or device from it."""
    if not isinstance(x, Features):
        raise Leaves("takes a guided map for numbers")
    result: Tensor = func(x._value.new_zeros(()).expand(x.shape), *args, **kwargs)
    return result


@rule(torch.result_type, torch.can_cast, any_form=True)
def types(func: Any, *args: Any) -> Any:
    return func(*(argument._value if isinstance(argument, Features) else argument for argument in args))
