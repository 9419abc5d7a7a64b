"""Layers of which the loss looks at few rows: those of the queries that are matched with objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 1024  # computed at once: what a layer makes of them stays in the cache


def few_rows(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`function` of rows (…, C) by themselves, which uses `parameters`; the result is for a loss on few of them.

    On a CPU only the rows that have a gradient are computed again in backward, and nothing is kept for the others.
    Elsewhere to count them would make the host wait, and compilers cannot follow.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    return _FewRows.apply(function, x, *(parameter for parameter in parameters if parameter.requires_grad))


class _FewRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function, ctx.parameters = function, parameters
        ctx.autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        ctx.save_for_backward(x)
        return torch.cat([function(rows) for rows in x.flatten(0, -2).split(ROWS)]).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        rows = gradient.any(-1).nonzero()[:, 0]
        chosen = x.flatten(0, -2)[rows].requires_grad_()
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=enabled):
            result = ctx.function(chosen)
        own, *others = torch.autograd.grad(result, [chosen, *ctx.parameters], gradient[rows])
        whole = torch.zeros_like(x)
        whole.flatten(0, -2)[rows] = own
        return None, whole, *others
