"""Steps of `fit` between which nothing but steps runs: equal to single ones, and guarded where others run."""

import logging
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import Dataset

import pyro_vae as pv
from pyro_vae.engine.replay import _Recording

X = torch.randn(23, 3, generator=torch.Generator().manual_seed(3)).double()


class Scaled(nn.Module):
    """A pair whose model reads an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.scale = 1.0

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * self.scale, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.weight * x, 0.7).to_event(1))


def fit(pair: Any, data: Any, engine: str, **options: Any) -> list[float]:
    """Return the bounds of the epochs, of batches of 5, 5, 5, 5 and 3."""
    options = {"epochs": 4, "batch_size": 5, "estimator": Trace_ELBO(), "progress": False} | options
    return pv.fit(pair, data, engine=engine, seed=4, **options).column("train_bound")


def assert_close(found: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-10, atol=0)


@pytest.mark.parametrize("data", [X, (X,), {"x": X}], ids=["tensor", "tuple", "dict"])
def test_what_programs_read_is_compared_once_per_epoch_and_shape(
    data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    holds = _Recording.holds
    monkeypatch.setattr(_Recording, "holds", lambda recording: calls.append(1) or holds(recording))
    assert_close(fit(Scaled(), data, "traced"), fit(Scaled(), data, "eager"))
    # 4 epochs of 2 shapes, each of which has been recorded in the first, where Adam's own code took a step
    assert len(calls) == 2 * 4 - 2 + 1


def test_an_attribute_set_between_epochs_takes_effect() -> None:
    def train(engine: str) -> list[float]:
        pair = Scaled()

        def change(pair: Any, epoch: pv.Epoch) -> None:
            pair.scale = 1.0 + epoch.epoch

        return fit(pair, X, engine, callbacks=[change])

    assert_close(train("traced"), train("eager"))


class Changing(Dataset):
    """Data whose reading changes an attribute of the model."""

    def __init__(self, pair: Scaled):
        self.pair = pair

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Tensor:
        self.pair.scale = 1.0 + (index % 2)
        return X[index]


def test_an_attribute_set_by_the_data_takes_effect() -> None:
    def train(engine: str) -> list[float]:
        pair = Scaled()
        return fit(pair, Changing(pair), engine, batch_size=6)

    assert_close(train("traced"), train("eager"))


class Unseen(Scaled):
    """A pair whose model counts its runs where no guard looks."""

    count = 0.0

    def model(self, x: Tensor) -> None:
        name = "".join(["co", "unt"])
        setattr(Unseen, name, getattr(Unseen, name) + 0.1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + getattr(Unseen, name), 0.5).to_event(1), obs=x)


def test_a_graph_that_disagrees_is_found_in_a_repeated_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pyro_vae"):
        fit(Unseen(), X[:20], "traced", epochs=1)
    assert "disagrees with the eager step" in caplog.text


@pytest.mark.parametrize("estimator", [Trace_ELBO(), pv.IWAE(3)], ids=["ELBO", "IWAE"])
def test_a_repeated_step_is_a_step(estimator: Any) -> None:
    def train(*, again: bool) -> tuple[list[float], Tensor]:
        pair = Scaled()
        loss = pv.KLWeighted(estimator, beta=lambda step: min(1.0, 0.1 * (step + 1)))
        svi = pv.SVI(pair, torch.optim.Adam(pair.parameters(), 0.02), loss, engine="traced")
        pyro.set_rng_seed(5)
        step = svi.step_again if again else svi.step
        losses = [step(X[start : start + 5]) for start in (0, 5, 10, 15, 18, 20, 1)]
        assert (svi.steps, loss.steps) == (7, 7)
        return losses, pair.weight.detach()

    (found, weight), (expected, other) = train(again=True), train(again=False)
    assert found == expected
    assert torch.equal(weight, other)


def test_a_repeated_step_raises_as_a_step_does() -> None:
    pair = Scaled()
    svi = pv.SVI(pair, torch.optim.Adam(pair.parameters(), 0.02), Trace_ELBO(), engine="traced")
    for start in (0, 5):
        svi.step_again(X[start : start + 5])
    before, bad = pair.weight.detach().clone(), X[:5].clone()
    bad[3, 1] = 1e200
    with pytest.raises(pv.NonFiniteError, match=r"site 'z' has log prob -inf at index \[3\]"):
        svi.step_again(bad)
    assert torch.equal(pair.weight, before)
    assert svi.step_again(X[:5]) > 0


def test_a_hook_of_the_optimizer_takes_effect_at_the_next_step() -> None:
    def train(engine: str) -> list[float]:
        pair, taken = Scaled(), []

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            made = torch.optim.Adam(parameters, 0.02)

            def change(*_: Any) -> None:
                taken.append(1)
                pair.scale = 1.0 + len(taken) // 3

            made.register_step_post_hook(change)
            return made

        return fit(pair, X, engine, optimizer=optimizer)

    assert_close(train("traced"), train("eager"))


@pytest.mark.parametrize("change", ["parts", "clip_norm", "optimizer", "loss"])
def test_a_repeated_step_follows_its_svi(change: str) -> None:
    def train(*, again: bool) -> tuple[list[float], Tensor]:
        pair = Scaled()
        svi = pv.SVI(pair, torch.optim.Adam(pair.parameters(), 0.02), Trace_ELBO(), engine="traced")
        pyro.set_rng_seed(5)
        losses = [svi.step(X[:5]) for _ in range(3)]
        if change == "parts":
            losses += [svi.step_in_parts([((X[:5],), {})]) for _ in range(3)]
        elif change == "clip_norm":
            svi.clip_norm = 1e-3
        elif change == "optimizer":
            svi.optimizer = torch.optim.Adam(pair.parameters(), 0.5)
        else:
            svi.loss = pv.IWAE(3)
        step = svi.step_again if again else svi.step
        return [*losses, *(step(X[5:10]) for _ in range(3))], pair.weight.detach()

    (found, weight), (expected, other) = train(again=True), train(again=False)
    assert found == expected
    assert torch.equal(weight, other)


def test_a_schedule_that_follows_the_loss_needs_no_guard(caplog: pytest.LogCaptureFixture) -> None:
    pair = Scaled()

    class Controller:
        value = 0.1

        def beta(self, step: int) -> float:
            return self.value

    controller = Controller()
    loss = pv.KLWeighted(Trace_ELBO(), beta=controller.beta)
    svi = pv.SVI(pair, torch.optim.Adam(pair.parameters(), 0.02), loss, engine="traced")
    for _ in range(6):
        controller.value = min(1.0, abs(svi.step(X[:5])) / 100)
    assert svi._replay is not None
    assert not svi._replay.disabled
    assert svi._replay.num_recordings == 1
    assert not caplog.messages
