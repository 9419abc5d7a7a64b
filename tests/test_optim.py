"""Learning rates at points computed by hand, and optimizers that skip a bad step and survive a save."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

from errors import UserError
from optim import Schedule, build_optimizer, guarded_step

NAMES = ["adamw", "adam", "sgd", "ranger", "muon", "lion"]


def schedule(name: str, **settings: Any) -> Schedule:
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 2.0}, {"params": [weights[1]], "lr": 0.5}], lr=1.0)
    return Schedule(optimizer, name=name, total_steps=100, steps_per_epoch=10, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("constant", {}, {0: 1, 50: 1, 100: 1}),
        ("poly", {"power": 2.0}, {0: 1, 50: 0.25, 90: 0.01, 100: 0, 130: 0}),
        ("cosine", {}, {0: 1, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 100: 0}),
        ("cosine", {"min_factor": 0.1}, {0: 1, 50: 0.55, 100: 0.1}),
        ("cosine", {"warmup_steps": 20}, {0: 1 / 21, 9: 10 / 21, 19: 20 / 21, 20: 1, 60: 0.5, 100: 0}),
        ("step", {"epochs": [3], "gamma": 0.5}, {0: 1, 29: 1, 30: 0.5, 59: 0.5, 60: 0.25, 99: 0.125}),
        ("multistep", {"epochs": [5, 2]}, {0: 1, 19: 1, 20: 0.1, 49: 0.1, 50: 0.01}),
        ("exponential", {"gamma": 0.25}, {0: 1, 5: 0.5, 10: 0.25, 20: 0.0625}),
    ],
)
def test_factors(name: str, settings: dict[str, Any], expected: dict[int, float]) -> None:
    course = schedule(name, **settings)
    for step, factor in expected.items():
        assert course.factor(step) == pytest.approx(factor, abs=1e-12), step
        course.set(step)
        rates = [group["lr"] for group in course.optimizer.param_groups]
        assert rates == pytest.approx([2 * factor, 0.5 * factor], abs=1e-12)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_plateau_waits_then_falls_and_remembers(higher_is_better: bool) -> None:
    sign = 1 if higher_is_better else -1
    course = schedule("plateau", patience=1, gamma=0.5)
    seen = []
    for value in (0.1, 0.2, 0.2, 0.15, 0.3, 0.3, 0.3, 0.3, 0.3):
        course.on_validation(sign * value, higher_is_better)
        seen.append(course.factor(50))
    assert seen == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    again = schedule("plateau", patience=1, gamma=0.5)
    again.load_state_dict(course.state_dict())
    for value in (0.1, 0.1):
        course.on_validation(sign * value, higher_is_better)
        again.on_validation(sign * value, higher_is_better)
        assert again.factor(60) == course.factor(60)


def problem(name: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 6), (6,))]
    groups = [
        {"params": weights[:1], "lr": 0.01, "weight_decay": 0.1, "lr_scale": 1.0, "name": "matrices"},
        {"params": weights[1:], "lr": 0.02, "weight_decay": 0.0, "lr_scale": 2.0, "name": "vectors"},
    ]
    made = build_optimizer(groups, name=name, lr=0.01, weight_decay=0.1, betas=[0.9, 0.99], momentum=0.9)
    return weights, made


def step(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, number: int, bad: bool = False) -> None:
    generator = torch.Generator().manual_seed(100 + number)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
        if bad:
            weight.grad[0] = math.nan
    guarded_step(optimizer, torch.tensor(float(bad)))


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_step_is_as_if_it_had_never_been(name: str) -> None:
    """Also as the very first step, where an optimizer makes its state."""
    weights, optimizer = problem(name)
    twin_weights, twin = problem(name)
    junk = [torch.full((8, 6), math.nan) for _ in range(50)]
    del junk  # memory that a careless first step would take over
    for number, bad in enumerate([True, False, True, True, False, False, False, True, False, False]):
        before = [weight.detach().clone() for weight in weights]
        step(weights, optimizer, number, bad)
        unmoved = [torch.equal(a, b) for a, b in zip(weights, before, strict=True)]
        assert unmoved == [bad, bad]
        if not bad:
            step(twin_weights, twin, number)
        assert all(torch.equal(a, b) for a, b in zip(weights, twin_weights, strict=True)), number
    assert optimizer.param_groups[1]["lr"] == 0.02


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_optimizer_takes_the_same_next_steps(name: str) -> None:
    weights, optimizer = problem(name)
    for number in range(7):
        step(weights, optimizer, number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, restored = problem(name)
    with torch.no_grad():
        for mine, theirs in zip(again, weights, strict=True):
            mine.copy_(theirs)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for number in range(7, 20):
        step(weights, optimizer, number)
        step(again, restored, number)
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True)), number


def test_adamw_and_sgd_are_their_formulas() -> None:
    weights, optimizer = problem("adamw")
    w = weights[0].detach().clone().double()
    step(weights, optimizer, 0)
    g = weights[0].grad.double()
    expected = w * (1 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8)
    assert torch.allclose(weights[0].double(), expected, atol=1e-6)
    weights, optimizer = problem("sgd")
    w, v = weights[0].detach().clone().double(), torch.zeros(8, 6, dtype=torch.float64)
    for number in range(3):
        step(weights, optimizer, number)
        v = 0.9 * v + weights[0].grad.double() + 0.1 * w
        w = w - 0.01 * v
    assert torch.allclose(weights[0].double(), w, atol=1e-6)


def test_an_unknown_optimizer_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"optimizer\.name is 'adamv', which is unknown \(did you mean adam"):
        problem("adamv")
