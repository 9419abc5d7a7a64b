"""Linear layers whose gradients, in float32 on a CPU, are oneDNN's products rather than MKL's.

torch brings both libraries, and sends `F.linear` and its gradients to MKL, which on processors other than Intel's takes
half as fast a way through products of the sizes of these models. Results stay MKL's, since a rounding that falls
otherwise can change which of two near equals a maximum takes (docs/decisions.md has the figures of both).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
_FEWEST_PRODUCTS = 1 << 20  # a call takes some 20 µs; MKL does this many multiplications in that time


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_linear(model: nn.Module) -> None:
    """Let every plain `nn.Linear` of a model, also of its library's blocks, be a `Linear`; keys and values stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (…, in) times the transpose of weight (out, in), plus bias (out). Differentiable once."""
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1×1 convolution of (B, C, H, W) by weights (D, C): (B, D, H, W), channels last in memory."""
    return linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # first: a size that is compared is a condition of what is exported
        and _HAS_BOTH
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= _FEWEST_PRODUCTS
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return F.linear(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t()) if of_rows else None,
            _gradient_of_weight(gradient, rows) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def _gradient_of_weight(gradient: Tensor, rows: Tensor) -> Tensor:
    """(out, in) from (n, out) and (n, in), as the product with the fewer columns: up to twice as fast as the other."""
    if gradient.shape[1] > rows.shape[1]:
        return _product(rows.t(), gradient.t()).t().contiguous()  # as DDP's buckets want it
    return _product(gradient.t(), rows.t())


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """(n, in) times the transpose of (out, in)."""
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), None, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """Itself or a copy: where rows or columns have gaps between them, oneDNN takes minutes."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()
