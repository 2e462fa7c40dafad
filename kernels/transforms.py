"""Operators of `torch.library` under the transforms of `torch.func`.

`torch.library` registers the rule of a derivative as an old kind of `torch.autograd.Function`,
which `torch.func.grad`, `vjp` and `jacrev` refuse. `transformable` gives an operator a function of
the new kind beside it, with the same rules, and a call takes that while a transform is active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformable(
    name: str,
    operator: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """An operator with the rule of its derivative, registered and callable under `torch.func`.

    `vmap` makes one call for each sample of the mapped axis, so that the gradients of what is not
    mapped, such as weights, are those of each sample.

    Args:
        name: of the public function, for messages.
        operator: of `torch.library.custom_op`, returning tensors; its rules are registered here.
        setup_context: as in `torch.autograd.Function`.
        backward: as in `torch.autograd.Function`.
    Returns:
        What to call in place of the operator.
    """

    def refuse(*_: Any) -> NoReturn:
        raise _not_provided(name, "forward-mode derivatives")

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*args)
        if torch._C._are_functorch_transforms_active():
            return differentiable.apply(*args)
        # The dispatcher would drop the tangents without a word.
        if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in args):
            refuse()
        return operator(*args)

    def run(*args: Any) -> Any:
        return _as_tuple(operator(*args))

    def each(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        results = [
            call(
                *(
                    x.select(dim, i) if isinstance(dim, int) else x
                    for x, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(same) for same in zip(*results, strict=True)]
        kind = type(results[0])
        return kind(stacked), kind([0] * len(stacked))

    def each_in_a_tuple(*args: Any) -> tuple[Any, Any]:
        results, dims = each(*args)
        return _as_tuple(results), _as_tuple(dims)

    rules = {
        "forward": run,
        "setup_context": setup_context,
        "backward": backward,
        "vmap": each_in_a_tuple,
        "jvp": refuse,
    }
    methods = {key: staticmethod(rule) for key, rule in rules.items()}
    differentiable: Any = type(name, (torch.autograd.Function,), methods)
    operator.register_autograd(backward, setup_context=setup_context)
    operator.register_vmap(each)
    return call


def derivative(name: str, operator: Any) -> Callable[..., Any]:
    """The operator that computes a derivative; to differentiate it once more is refused.

    Args:
        name: of the public function, for messages.
        operator: of `torch.library.custom_op`.
    Returns:
        What to call in place of the operator.
    """

    def refuse(*_: Any) -> NoReturn:
        raise _not_provided(name, "second derivatives")

    return transformable(name, operator, lambda *_, **__: None, refuse)


def _not_provided(name: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: {what} are not provided; implementation='reference', plain torch, has them"
    )


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _as_tuple(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x
