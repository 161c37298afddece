"""The compiled step of Adam: agrees with torch's, changes nothing if a gradient is not finite."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from pyro_vae.engine import optimizer_step
from pyro_vae.engine.optimizer_step import OptimizerStep

pytestmark = pytest.mark.usefixtures("compiler")

SHAPES = ((37, 11), (5,), (3, 2, 19), (1, 1))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def compiled(optimizer: Any) -> OptimizerStep:
    """Return the step of an optimiser that has its state, with its kernels compiled."""
    step = OptimizerStep(optimizer)
    step.is_compiled = True
    return step


def flag(value: float = 0.0) -> Tensor:
    return torch.tensor(value)


def is_by_kernel(step: OptimizerStep) -> bool:
    return [kernel.compiled is not None for kernel in step.kernels] == [True]


def values(optimizer: Any) -> list[Tensor]:
    """Return copies of all that a step changes."""
    held = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    state = [tensor for each in optimizer.state.values() for tensor in each.values()]
    return [tensor.clone() for tensor in [*held, *state]]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("make", [Adam, AdamW])
def test_agrees_with_torch_in_float64(make: Any, weight_decay: float, threads: int) -> None:
    ours, exact = parameters(), parameters(torch.float64)
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": weight_decay}
    optimizer, reference = make(ours, **options), make(exact, **options)
    step, before = compiled(optimizer), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number in range(12):
            for group in (*optimizer.param_groups, *reference.param_groups):
                group["lr"] = 0.01 / (1 + number)  # a schedule
            given: list[Tensor | None] = list(gradients(number))
            if number % 3 == 1:
                given[1] = None  # so that it has taken fewer steps
            assert step(given, skip=flag()) == 0
            for parameter, gradient in zip(exact, given, strict=True):
                parameter.grad = None if gradient is None else gradient.double()
            reference.step()
    finally:
        torch.set_num_threads(before)
    assert is_by_kernel(step)
    for found, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        for name, value in reference.state[expected].items():
            torch.testing.assert_close(
                optimizer.state[found][name].double(), value.double(), rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("which", [(0, (36, 10)), (0, (0, 0)), (1, (4,)), (3, (0, 0))])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, which: tuple[int, Any]) -> None:
    optimizer = Adam(parameters(), 0.01)
    step = compiled(optimizer)
    for number in range(2):
        step(gradients(number), skip=flag())
    before, bad = values(optimizer), gradients(2)
    bad[which[0]][which[1]] = value
    assert step(bad, skip=flag()) == 1
    assert all(map(torch.equal, values(optimizer), before))
    assert step(gradients(2), skip=flag(1.0)) == 1
    assert all(map(torch.equal, values(optimizer), before))
    assert step(gradients(2), skip=flag()) == 0
    assert is_by_kernel(step)
    assert not any(map(torch.equal, values(optimizer), before))


def test_the_largest_finite_gradient_is_finite() -> None:
    optimizer = Adam(parameters(), 0.01)
    step = compiled(optimizer)
    step(gradients(0), skip=flag())
    large = gradients(1)
    large[1][2] = torch.finfo(torch.float32).max
    assert step(large, skip=flag()) == 0


def test_follows_data_that_are_replaced() -> None:
    ours, theirs = parameters(), parameters()
    step, reference = compiled(Adam(ours, 0.01)), OptimizerStep(Adam(theirs, 0.01))
    for number in range(6):
        if number == 3:
            for each in (ours, theirs):
                each[0].data = torch.full((37, 11), 0.25)
        for each in (step, reference):
            each(gradients(number), skip=flag())
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert is_by_kernel(step)


@pytest.mark.parametrize(
    "case", ["amsgrad", "maximize", "float64", "two groups", "transposed", "no compiler"]
)
def test_torch_takes_the_steps_that_the_kernel_does_not(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[list[nn.Parameter], Adam]:
        held = parameters(torch.float64 if case == "float64" else torch.float32)
        if case == "transposed":
            held[0] = nn.Parameter(held[0].detach().t().contiguous().t())
        groups: Any = (
            [{"params": held[:2], "lr": 0.1}, {"params": held[2:]}] if case == "two groups" else held
        )
        return held, Adam(groups, 0.01, amsgrad=case == "amsgrad", maximize=case == "maximize")

    if case == "no compiler":
        monkeypatch.setattr(optimizer_step.AdamKernel, "is_available", staticmethod(lambda: False))
    (ours, optimizer), (theirs, reference) = make(), make()
    step = compiled(optimizer)
    for number in range(4):
        given = [
            gradient.to(p.dtype) if p.is_contiguous() else gradient.t().contiguous().t()
            for p, gradient in zip(ours, gradients(number), strict=True)
        ]
        step(given, skip=flag())
        for parameter, gradient in zip(theirs, given, strict=True):
            parameter.grad = gradient.clone()
        reference.step()
    assert step.kernels
    assert not is_by_kernel(step)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_an_option_set_later_ends_the_kernel() -> None:
    optimizer = Adam(parameters(), 0.01)
    step = compiled(optimizer)
    for number in range(2):
        step(gradients(number), skip=flag())
    assert is_by_kernel(step)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.param_groups[0]["maximize"] = True
    ones = [torch.full(shape, 50.0) for shape in SHAPES]
    step(ones, skip=flag())
    assert not is_by_kernel(step)
    for parameter, old in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert (parameter > old).all()


def after_three_steps(*, is_compiled: bool) -> tuple[Adam, OptimizerStep]:
    optimizer = Adam(parameters(), 0.01)
    step = OptimizerStep(optimizer)
    step.is_compiled = is_compiled
    for number in range(3):
        step(gradients(number), skip=flag())
    return optimizer, step


@pytest.mark.parametrize("is_compiled", [False, True])
def test_data_of_another_size_raise_the_error_of_torch(is_compiled: bool) -> None:
    optimizer, step = after_three_steps(is_compiled=is_compiled)
    shrunk, memory = optimizer.param_groups[0]["params"][1], torch.zeros(5)
    shrunk.data = memory[:2]
    given = gradients(3)
    given[1] = torch.ones(2)
    with pytest.raises(RuntimeError, match="size of tensor"):
        step(given, skip=flag())
    assert torch.equal(memory[2:], torch.zeros(3))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_graph_that_holds_a_parameter_notices_the_step(is_compiled: bool) -> None:
    optimizer, step = after_three_steps(is_compiled=is_compiled)
    parameter = optimizer.param_groups[0]["params"][0]
    squared = (parameter**2).sum()
    step(gradients(3), skip=flag())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()
