"""Linear layers with oneDNN's gradients: the numbers of float64, for what asks for them; the usual way for all else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import FAMILIES, create_model
from models.linear import Linear, linear, use_linear

SMALLEST: dict[str, dict[str, Any]] = {
    "birefnet": {"backbone": "pvt_v2_b0"},
    "segformer": {"variant": "b0", "num_classes": 3},
    "rfdetr": {"variant": "nano", "num_classes": 3},
    "sam2": {"variant": "tiny"},
    "classifier": {"num_classes": 3},
}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(600, 64), (2, 300, 64), (2, 20, 15, 64), (3, 64), (64,)])
@pytest.mark.parametrize("width", [96, 32])  # the gradient of the weight is the product with the fewer columns
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, ...], width: int, has_bias: bool) -> None:
    inputs = [drawn(*shape), drawn(width, 64, seed=1)] + ([drawn(width, seed=2)] if has_bias else [])
    results = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        product = function(*leaves)
        gradients = torch.autograd.grad((product * drawn(*product.shape, seed=3)).sum(), leaves)
        results.append([product, *gradients])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)


def test_inputs_of_any_strides_are_taken() -> None:
    """Also those with gaps, by which oneDNN itself would take minutes."""
    inputs = [(drawn(2, 64, 20, 15).permute(0, 2, 3, 1), drawn(96, 128, seed=1)[:, ::2])]
    inputs.append((drawn(1354, 1024)[:, :512], drawn(1536, 1024, seed=1)[:, 512:]))
    for x, weight in inputs:
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-4)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        direction = drawn(*x.shape[:-1], len(weight), seed=2)
        ours, usual = (torch.autograd.grad((f(*leaves) * direction).sum(), leaves) for f in (linear, F.linear))
        torch.testing.assert_close(ours, usual, rtol=1e-5, atol=1e-3)


@torch.no_grad()
def test_results_are_the_usual_ones_to_the_bit() -> None:
    x, weight, bias = drawn(600, 64), drawn(96, 64, seed=1), drawn(96, seed=2)
    with torch.enable_grad():
        trained = linear(x, weight.requires_grad_(), bias)
    assert trained.grad_fn is not None
    assert torch.equal(trained, F.linear(x, weight, bias))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen: int) -> None:
    leaves = [drawn(300, 64).requires_grad_(), drawn(96, 64).requires_grad_(), drawn(96).requires_grad_()]
    leaves[frozen].requires_grad_(False)
    linear(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [number == frozen for number in range(3)]


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    with torch.no_grad():
        product = linear(drawn(300, 64), drawn(96, 64).requires_grad_())
    assert product.grad_fn is None


def test_autocast_and_other_types_compute_as_usual() -> None:
    x, weight = drawn(300, 64), drawn(96, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


def test_layers_keep_their_keys_and_values_and_can_be_copied() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    before = copy.deepcopy(model)
    use_linear(model)
    assert [type(module) for module in model] == [Linear, nn.ReLU, Linear]
    assert model.state_dict().keys() == before.state_dict().keys()
    x = drawn(300, 64)
    torch.testing.assert_close(copy.deepcopy(model)(x), before(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_uses_them(family: str) -> None:
    layers = {type(m) for m in create_model(family, **SMALLEST[family]).modules() if isinstance(m, nn.Linear)}
    assert nn.Linear not in layers
    assert Linear in layers
