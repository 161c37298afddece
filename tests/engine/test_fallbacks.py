"""A recording lasts, is replaced, or gives way to the eager step early and with one line in the log."""

import argparse
import functools
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.engine import replay

N = 7


def make_svi(engine, read, estimator=Trace_ELBO, draw=dist.Normal):
    """An SVI of a model whose observation has location z + read(z, x, ...)."""
    weight = nn.Parameter(torch.tensor(0.1))

    def model(x, *args, **kwargs):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + read(z, x, *args, **kwargs), 1.0), obs=x)

    def guide(x, *args, **kwargs):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", draw(weight * x, 0.7))

    optimizer = torch.optim.Adam([weight], 0.01)
    return pv.SVI(model, guide, optimizer, estimator(max_plate_nesting=1), engine=engine)


def data(step, n=N):
    return torch.linspace(-1.0, 2.0 + step % 3, n)


def compare(read, steps=30, each=lambda step: None, arguments=lambda step: (data(step),), **options):
    """Take steps by both engines, assert equal losses, and return the traced SVI."""
    losses = {}
    for engine in ("eager", "traced"):
        svi = make_svi(engine, read, **options)
        torch.manual_seed(1)
        losses[engine] = []
        for step in range(steps):
            each(step)
            losses[engine].append(svi.step(*arguments(step)))
    assert losses["traced"] == pytest.approx(losses["eager"], rel=1e-5)
    return svi


SETTINGS = SimpleNamespace(beta=1.0)


def by_setting(z, x):
    return SETTINGS.beta


def test_an_attribute_that_changes_at_each_step_is_recorded_twice(caplog):
    svi = compare(by_setting, 20, each=lambda step: setattr(SETTINGS, "beta", 1.0 + step))
    assert svi._replay.num_recordings == 2
    assert caplog.messages == [
        "SVI steps are eager from now on, without a graph: the model reads attribute 'beta' of "
        "SimpleNamespace, which keeps changing"
    ]


def test_recordings_that_paid_do_not_count(monkeypatch, caplog):
    """As an attribute that changes once per epoch."""
    monkeypatch.setattr(replay, "_MAX_RECORDINGS", 3)
    monkeypatch.setattr(replay, "_STEPS_TO_PAY", 4)
    svi = compare(by_setting, 40, each=lambda step: setattr(SETTINGS, "beta", 1.0 + step // 5))
    assert svi._replay.num_recordings == 8
    assert not svi._replay.disabled
    svi = compare(by_setting, 40, each=lambda step: setattr(SETTINGS, "beta", 1.0 + step // 3))
    assert svi._replay.num_recordings == 3
    assert "3 graphs were recorded" in caplog.text


def test_many_shapes_have_a_recording_each(caplog):
    svi = compare(lambda z, x: 0.5, 75, arguments=lambda step: (data(step, n=2 + step % 25),))
    assert svi._replay.num_recordings == 25
    assert not caplog.records


@pytest.mark.parametrize("as_object", [False, True])
def test_numbers_and_objects_that_differ_at_each_step(as_object, caplog):
    def arguments(step):
        number = 1.0 + step
        return data(step), SimpleNamespace(beta=number) if as_object else number

    svi = compare(lambda z, x, b: b.beta if as_object else b, 20, arguments=arguments)
    assert svi._replay.num_recordings <= 8
    assert len(caplog.messages) == 1
    assert "its arguments other than tensors keep changing: pass numbers as tensors" in caplog.text


class Settings:
    def __init__(self):
        self.beta = 0.5
        self.unread = 0


@pytest.mark.parametrize(
    ("argument", "read", "change"),
    [
        (
            functools.partial(lambda a, z, *, b: a * z + b, 0.3, b=0.1),
            lambda z, x, f: f(z),
            lambda f: f.keywords.update(b=0.7),
        ),
        (argparse.Namespace(beta=0.5), lambda z, x, s: s.beta, lambda s: setattr(s, "beta", 0.9)),
        (Settings(), lambda z, x, s: s.beta, lambda s: setattr(s, "beta", 0.9)),
        (lambda z: 0.5 * z, lambda z, x, f: f(z), None),
        (torch.tanh, lambda z, x, f: f(z), None),
        (np.array([0.5, 0.2]), lambda z, x, a: float(a[1]), lambda a: a.__setitem__(1, 0.9)),
        (np.float32(0.5), lambda z, x, a: float(a), None),
        (nn.Linear(1, 1).requires_grad_(False), lambda z, x, f: f(z[:, None])[:, 0], None),
    ],
    ids=["partial", "Namespace", "object", "lambda", "function", "array", "NumPy scalar", "module"],
)
def test_objects_among_the_arguments(argument, read, change, caplog):
    svi = compare(read, 12, arguments=lambda step: (data(step), argument))
    assert svi._replay.num_recordings == 1
    assert not caplog.records
    if change is None:
        return
    change(argument)
    eager = make_svi("eager", read)
    eager.optimizer.param_groups[0]["params"][0].data.copy_(svi.optimizer.param_groups[0]["params"][0])
    losses = []
    for each in (svi, eager):
        torch.manual_seed(3)
        losses.append(each.step(data(0), argument))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert svi._replay.num_recordings == 2


def test_a_graph_that_is_never_valid_again_is_recorded_again(caplog):
    flag = torch.tensor(True)

    def each(step):
        flag.fill_(step < 5)

    svi = compare(lambda z, x: 2 * z if flag else -z, 40, each=each)
    assert svi._replay.num_recordings == 2
    (recording,) = svi._replay.recordings.values()
    assert recording.steps == 40 - 5 - 8
    assert not caplog.records


def test_a_condition_with_another_outcome_at_each_step_is_eager_in_the_end(caplog):
    def read(z, x):
        number = 0
        while x[0] > number:
            number += 1
        return z * number

    svi = compare(read, 40, arguments=lambda step: (torch.linspace(step, 50.0, N),))
    assert svi._replay.num_recordings == 2
    assert svi._replay.disabled
    assert len(caplog.messages) == 1
    assert (
        "what the model reads from tensors into Python keeps differing from what was recorded" in caplog.text
    )


def flag_changed_after_it_is_read(z, x):
    flag = (x > -100).all()
    result = 3 * z if flag else -z
    flag.logical_not_()
    return result + flag.float()


def number_changed_after_it_is_read(z, x):
    total = x.sum()
    number = total.item()
    total.add_(100.0)
    return 0.1 * number * z


def item_of_a_matrix(z, x):
    return x.sum().reshape(1, 1).item() * z


@pytest.mark.parametrize(
    "read", [flag_changed_after_it_is_read, number_changed_after_it_is_read, item_of_a_matrix]
)
def test_values_are_those_at_the_time_of_reading(read, caplog):
    svi = compare(read, 12)
    (recording,) = svi._replay.recordings.values()
    assert recording.steps == 12
    assert not caplog.records


def looked_up(z, x, lengths):
    return z * {3: 2.0}.get(lengths.max().item(), 1.0)


def summed_up_to_a_length(z, x, lengths):
    return z * sum(x[t] for t in range(lengths.max()))


def rounded_down(z, x, lengths):
    return z * int(lengths.sum() / 1.4)


def of_positive_elements(z, x, lengths):
    selected = x.clone()
    selected[lengths[:1] > torch.arange(N)] += z[lengths[:1] > torch.arange(N)]
    return selected * x[x < lengths[0]].mean()


def of_elements_of_a_matrix(z, x, lengths):
    matrix = (z[:, None] * x).clone()
    chosen = torch.arange(N) < lengths[0]
    return matrix[chosen, 0].sum() + matrix[:, chosen].sum() + matrix[matrix.detach().isfinite()].mean()


def of_a_part(z, x, lengths):
    return z * x.tensor_split(lengths[1:])[0].sum()


GRU = nn.GRU(1, 2, batch_first=True).requires_grad_(False)  # the optimiser does not hold its parameters


def by_recurrence(z, x, lengths):
    rows = x.reshape(1, N, 1).expand(3, N, 1)
    packed = nn.utils.rnn.pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
    states, _ = GRU(packed)
    padded, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)
    return z + padded[:, -1].mean()


@pytest.mark.parametrize(
    ("read", "engine"),
    [
        (looked_up, "traced"),
        (summed_up_to_a_length, "traced"),
        (rounded_down, "traced"),
        (of_positive_elements, "compiled"),
        (of_elements_of_a_matrix, "traced"),
        pytest.param(of_elements_of_a_matrix, "compiled", marks=pytest.mark.slow),
        (of_a_part, "traced"),
        (by_recurrence, "traced"),
    ],
)
def test_a_graph_is_used_for_the_integers_that_it_was_recorded_with(read, engine, caplog):
    def arguments(step):
        return data(0), torch.tensor([2, 1, 2] if step % 5 == 3 else [3, 2, 1])

    losses = {}
    for each in ("eager", engine):
        svi = make_svi(each, read)
        torch.manual_seed(1)
        losses[each] = [svi.step(*arguments(step)) for step in range(15)]
    assert losses[engine] == pytest.approx(losses["eager"], rel=1e-5)
    (recording,) = svi._replay.recordings.values()
    assert recording.steps == 12
    assert recording.is_compiled == (engine == "compiled")
    assert not [record for record in caplog.records if record.name == "pyro_vae"]


@pytest.mark.parametrize("lengths", [[1, 3, 4, 1], [4, 3, 1, 1]])
def test_a_packed_sequence_is_read_at_each_step(lengths, caplog):
    network = nn.RNN(1, 2).requires_grad_(False)  # the optimiser does not hold its parameters

    def read(z, x, packed):
        states = network(packed)[0].data
        return z + (torch.arange(len(states)) * states[:, 0]).mean()

    def arguments(step):
        rows = [torch.linspace(0.1, 1.0, n)[:, None] for n in ([4, 2, 2, 1] if step == 9 else lengths)]
        return data(0), nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)

    svi = compare(read, 14, arguments=arguments)
    assert [recording.steps for recording in svi._replay.recordings.values()] == [13]


def test_a_mask_fills_any_number_of_elements(caplog):
    def read(z, x):
        filled = z.clone()
        filled[x > 0] = x.sum()
        return filled

    svi = compare(read, 12)
    (recording,) = svi._replay.recordings.values()
    assert recording.steps == 12
    assert not caplog.records


def test_tracegraph_with_baselines_is_recorded(caplog):
    options = {"estimator": TraceGraph_ELBO, "draw": NonreparameterizedNormal}
    svi = compare(lambda z, x: 0.5 * z, 20, **options)
    assert svi._replay.num_recordings == 1
    assert not caplog.records


@pytest.mark.parametrize("engine", ["traced", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("in_one_block", [False, True])
def test_autocast(engine, in_one_block, caplog):
    """Also in one block of many steps, where autocast keeps the casts of parameters before the first step."""

    def steps(svi, x, dtypes):
        for dtype in dtypes:
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                for _ in range(9 if in_one_block else 1):
                    yield svi.step(x)

    losses, parameters = [], []
    for how in ("eager", engine):
        torch.manual_seed(0)
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(8),
            likelihood=pv.likelihoods.Bernoulli(8, (100,), hidden_features=(64,)),
            guide=pv.guides.FullCovarianceNormal((100,), 8, hidden_features=(64,)),
        )
        x = (torch.rand(64, 100) < 0.3).float()
        optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
        svi = pv.SVI(vae.model, vae.guide, optimizer, TraceMeanField_ELBO(), engine=how)
        torch.manual_seed(1)
        each = [torch.bfloat16, torch.float16, None]
        losses.append(list(steps(svi, x, each if in_one_block else [t for t in each for _ in range(9)])))
        parameters.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if engine == "traced" else 1e-3)
    assert svi._replay.num_recordings == 3
    assert svi._replay.engine == engine
    assert not svi._replay.disabled
    assert not [record for record in caplog.records if record.name == "pyro_vae"]
