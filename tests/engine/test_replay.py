"""Every engine takes the eager steps: the same numbers, errors and side effects for the same seed."""

import copy
import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro.infer import (
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from test_agreement import GUIDES, LIKELIHOODS
from torch import nn

import pyro_vae as pv
from pyro_vae.engine import products, replay
from pyro_vae.engine.compiler import NotCompiled
from pyro_vae.engine.recorder import record
from pyro_vae.objectives.kl_weighting import KLWeighted

EVENT, K, BATCH, LAST = (2, 3), 4, 7, 5
TRACED_AND_COMPILED = ["traced", pytest.param("compiled", marks=pytest.mark.slow)]

ESTIMATORS = {
    **{name: case.make for name, case in CASES.items()},
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "Trace_ELBO, particles in a loop": lambda: Trace_ELBO(num_particles=3),
    "Trace_ELBO, vectorised": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceMeanField_ELBO, vectorised": lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "scheduled β": lambda: KLWeighted(TraceMeanField_ELBO(), lambda step: min(1.0, step / 15)),
    "scheduled β, IWAE": lambda: KLWeighted(pv.IWAE(3), lambda step: min(1.0, step / 15)),
    "free bits": lambda: KLWeighted(TraceMeanField_ELBO(), 0.7, free_bits=0.3),
}


def make_vae(likelihood="Bernoulli", guide="DiagonalNormal", dtype=torch.float64, layer=None):
    torch.manual_seed(1)
    case = LIKELIHOODS[likelihood]
    options = {}
    if layer:  # no bias before BatchNorm: its gradient is rounding error, which Adam would amplify
        first = nn.Linear(6, 9, bias=False)
        options["network"] = nn.Sequential(nn.Flatten(), first, layer(), nn.Linear(9, 2 * K))
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=case.make(K, case.event or EVENT, hidden_features=(8,), **case.options),
        guide=GUIDES[guide][0](case.event or EVENT, K, **options),
    )
    return vae.to(dtype)


def batches(likelihood="Bernoulli", dtype=torch.float64, steps=20, sizes=(BATCH, LAST)):
    """Yield batches; every fourth is smaller."""
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        n = sizes[-1] if step % 4 == 3 else BATCH
        case = LIKELIHOODS[likelihood]
        yield case.data(torch.rand(n, *(case.event or EVENT), generator=generator).to(dtype))


def adam(parameters):
    return torch.optim.Adam(parameters, 0.01)


def make_svi(vae, engine, estimator=TraceMeanField_ELBO, optimizer=adam, **options):
    return pv.SVI(vae.model, vae.guide, optimizer(vae.parameters()), estimator(), engine=engine, **options)


def train(vae, svi, data, each=lambda svi, step: None):
    torch.manual_seed(3)
    losses = []
    for step, x in enumerate(data):
        each(svi, step)
        losses.append(svi.step(x))
    return torch.tensor(losses, dtype=torch.float64), copy.deepcopy(vae.state_dict()), torch.get_rng_state()


def assert_same(found, expected, rtol=1e-10):
    for (losses, state, noise), (other_losses, other_state, other_noise) in [(found, expected)]:
        torch.testing.assert_close(losses, other_losses, rtol=rtol, atol=0)
        for name in other_state:
            size = other_state[name].double().nan_to_num().abs().max().item()
            torch.testing.assert_close(
                state[name], other_state[name], rtol=rtol, atol=rtol * size, equal_nan=True, msg=name
            )
        assert torch.equal(noise, other_noise)


def assert_traced(svi):
    assert not svi._replay.disabled
    if svi.engine == "compiled":
        assert svi._replay.engine == "compiled"
        assert all(recording.is_compiled for recording in svi._replay.recordings.values())


def compare(
    engine="traced",
    *,
    likelihood="Bernoulli",
    dtype=torch.float64,
    layer=None,
    guide="DiagonalNormal",
    sizes=(BATCH, LAST),
    **options,
):
    each = options.pop("each", lambda svi, step: None)
    runs = []
    for how in ("eager", engine):
        vae = make_vae(likelihood, guide, dtype, layer)
        svi = make_svi(vae, how, **options)
        runs.append(train(vae, svi, batches(likelihood, dtype, sizes=sizes), each))
    assert_traced(svi)
    assert_same(runs[1], runs[0], rtol=1e-10 if dtype == torch.float64 else 1e-5)
    return svi


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("engine", TRACED_AND_COMPILED)
def test_every_estimator(estimator, engine):
    compare(engine, estimator=ESTIMATORS[estimator])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("engine", TRACED_AND_COMPILED)
def test_every_likelihood(likelihood, dtype, engine):
    compare(engine, likelihood=likelihood, dtype=dtype)


@pytest.mark.parametrize("sizes", [(BATCH,), pytest.param((BATCH, LAST), marks=pytest.mark.slow)])
def test_the_compiled_step(sizes):
    """One case that combines many features; the other compiled cases are slow tests."""
    estimator = ESTIMATORS["scheduled β, IWAE"]
    svi = compare("compiled", sizes=sizes, estimator=estimator, clip_norm=0.5, layer=nn.Dropout)
    assert svi._replay.num_recordings == svi._replay.num_compilations == len(sizes)  # one for each shape


def test_auto_compiles_at_the_break_even_step(monkeypatch, caplog):
    """A resumed run starts to compile at the same step."""
    compiled = []

    def compile_graph(module, arguments):
        compiled.append((svi.steps, len(arguments[0])))
        return module.forward

    monkeypatch.setattr(replay, "compile_graph", compile_graph)
    vae = make_vae()
    svi = make_svi(vae, "auto")
    svi.step(next(batches()))
    (recording,) = svi._replay.recordings.values()
    assert 1_000 < recording.break_even < 100_000
    monkeypatch.setattr(replay, "calls_to_pay", lambda outputs: 6.5)
    for start in (0, 4):
        compiled.clear()
        svi = make_svi(vae, "auto")
        svi.steps = start
        train(vae, svi, list(batches())[start:])
        assert compiled == [(7, LAST), (8, BATCH)]
        assert svi.steps == 20
    assert not caplog.records


def test_without_a_compiler_the_graph_is_interpreted(monkeypatch, caplog):
    def compile_graph(module, arguments):
        raise NotCompiled("no C++ compiler")

    monkeypatch.setattr(replay, "compile_graph", compile_graph)
    runs = []
    for engine in ("traced", "compiled"):
        vae = make_vae()
        svi = make_svi(vae, engine)
        runs.append(train(vae, svi, batches()))
    assert not svi._replay.disabled
    assert_same(runs[1], runs[0], rtol=0)
    assert caplog.messages == ["the graph of the SVI step is interpreted, not compiled: no C++ compiler"]


def compiler_with_an_error(factor, uses=None):
    """Return a compiler whose graphs scale the first gradient, at every use or at these uses."""

    def compile_graph(module, arguments):
        number = 0

        def wrong(*arguments):
            nonlocal number
            number += 1
            loss, invalid, first, *gradients = module(*arguments)
            is_wrong = uses is None or number in uses
            return loss, invalid, factor * first if is_wrong else first, *gradients

        return wrong

    return compile_graph


def test_a_compiled_graph_that_disagrees_is_interpreted(monkeypatch, caplog):
    monkeypatch.setattr(replay, "compile_graph", compiler_with_an_error(1.01))
    runs = []
    for engine in ("eager", "compiled"):
        vae = make_vae()
        svi = make_svi(vae, engine)
        runs.append(train(vae, svi, batches()))
    assert not svi._replay.disabled
    assert_same(runs[1], runs[0], rtol=1e-10)
    assert len(caplog.messages) == 1
    assert "the compiled graph disagrees with the eager step" in caplog.messages[0]


@pytest.mark.parametrize(
    ("factor", "uses"),
    [
        (1.01, {1}),  # a value moved across the kink of a ReLU: that step is eager
        (1 + 1e-9, None),  # rounding, as exponentials of log weights amplify it
    ],
)
def test_rounding_by_the_compiler_does_not_disagree(monkeypatch, caplog, factor, uses):
    monkeypatch.setattr(replay, "compile_graph", compiler_with_an_error(factor, uses))
    runs = []
    for engine in ("eager", "compiled"):
        vae = make_vae()
        svi = make_svi(vae, engine)
        runs.append(train(vae, svi, batches()))
    assert not caplog.records
    assert all(recording.is_compiled for recording in svi._replay.recordings.values())
    assert_same(runs[1], runs[0], rtol=1e-7)


def test_matrix_products_use_the_faster_library(monkeypatch):
    """Both libraries give equal numbers up to rounding."""
    torch.manual_seed(1)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Bernoulli(K, (150,), hidden_features=(90,)),
        guide=pv.guides.DiagonalNormal((150,), K, hidden_features=(90,)),
    )
    x = (torch.rand(110, 150) < 0.3).float()
    start, losses = copy.deepcopy(vae.state_dict()), []
    monkeypatch.setattr(products, "_MIN_SIZE", 100_000)
    for library in ("mkl", "onednn"):
        monkeypatch.setattr(products, "_measure", lambda a, b, with_bias, library=library: library)
        vae.load_state_dict(start)
        svi = make_svi(vae, "traced")
        torch.manual_seed(2)
        losses.append([svi.step(x) for _ in range(5)])
        assert_traced(svi)
        assert set(svi.fastest_products.values()) == {library}
        (recording,) = svi._replay.recordings.values()
        calls = str(recording.graph.module.code).count("onednn_linear")
        assert calls == (0 if library == "mkl" else len(svi.fastest_products))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


SLOW = "Flow, nsf"  # to record: splines of many operations


@pytest.mark.parametrize(
    "guide", [*(name for name in GUIDES if name != SLOW), pytest.param(SLOW, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("engine", TRACED_AND_COMPILED)
def test_every_guide(guide, engine):
    compare(engine, guide=guide)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.9), eps=1e-4),
        lambda p: torch.optim.Adam([{"params": list(p)[:3]}], 0.01),  # the others are not trained
        lambda p: torch.optim.Adam([{"params": [q], "lr": 0.01 / (i + 1)} for i, q in enumerate(p)]),
        lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, 1e-3),
    ],
    ids=["Adam", "AdamW", "some parameters", "groups", "SGD", "RMSprop"],
)
def test_every_optimizer(optimizer):
    compare(optimizer=optimizer)


def test_clipped_gradients():
    compare(clip_norm=0.5)


def test_a_learning_rate_schedule():
    runs = []
    for engine in ("eager", "traced"):
        vae = make_vae()
        svi = make_svi(vae, engine)
        schedule = torch.optim.lr_scheduler.ExponentialLR(svi.optimizer, 0.7)
        runs.append(train(vae, svi, batches(), lambda svi, step, s=schedule: s.step() if step else None))
    assert_traced(svi)
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("layer", [nn.Dropout, lambda: nn.BatchNorm1d(9)], ids=["dropout", "batch norm"])
def test_layers_that_differ_between_training_and_evaluation(layer):
    modes = {10: False, 15: True}

    def switch(svi, step):
        if step in modes:
            svi.model.__self__.train(modes[step])

    svi = compare(layer=layer, each=switch)
    assert svi._replay.num_recordings <= 2 * 3  # two shapes in each of three phases


def test_a_shape_is_recorded_once_and_replays_do_not_call_the_model(monkeypatch):
    vae, calls = make_vae(), []
    svi = make_svi(vae, "traced")
    data = list(batches(steps=100))
    svi.check(data[0])
    # of the engine, since a model or a hook that counts its calls needs the eager step
    run = replay.Replay._loss_and_gradients
    monkeypatch.setattr(replay.Replay, "_loss_and_gradients", lambda *a: calls.append(a) or run(*a))
    for x in data:
        svi.step(x)
    assert svi._replay.num_recordings == 2
    checks = sum(count.bit_length() for count in (75, 25))  # at the 1st, 2nd, 4th ... use
    assert len(calls) == 2 + checks


def test_parameters_changed_in_place_take_effect():
    def spoil(svi, step):
        vae = svi.model.__self__
        if step == 6:
            vae.load_state_dict(start)
        if step == 9:
            vae.posterior.network[1].weight.data.mul_(0.5)
        if step == 12:
            weight = vae.likelihood.network[1].weight
            weight.data = weight.data + 0.1

    start = make_vae().state_dict()
    assert compare(each=spoil)._replay.num_recordings == 2


def test_changed_attributes_take_effect():
    def change(svi, step):
        if step == 6:
            svi.model.__self__.posterior.network[2].p = 0.9
        if step == 12:
            svi.clip_norm = 0.1
        if step == 15:
            svi.loss = Trace_ELBO()

    compare(layer=nn.Dropout, each=change)


def test_a_model_moved_to_another_precision_is_recorded_again():
    vae = make_vae(dtype=torch.float32)
    svi = make_svi(vae, "traced")
    for x in batches(dtype=torch.float32, steps=2):
        svi.step(x)
    vae.double()
    for state in svi.optimizer.state.values():
        state.update({name: value.double() for name, value in state.items() if name != "step"})
    loss = svi.step(next(batches()))
    assert_traced(svi)
    assert loss != float(torch.tensor(loss, dtype=torch.float32))


@pytest.mark.parametrize(
    ("first", "second"), [("traced", "eager"), ("eager", "traced"), ("traced", "traced")]
)
def test_a_run_continues_from_state_dicts(first, second):
    data = list(batches())
    vae = make_vae()
    expected = train(vae, make_svi(vae, "eager"), data)

    vae = make_vae()
    svi = make_svi(vae, first)
    losses, _, noise = train(vae, svi, data[:10])
    resumed = make_vae()
    resumed.load_state_dict(vae.state_dict())
    again = make_svi(resumed, second)
    again.optimizer.load_state_dict(copy.deepcopy(svi.optimizer.state_dict()))
    torch.set_rng_state(noise)
    more = torch.tensor([again.step(x) for x in data[10:]], dtype=torch.float64)
    assert_same((torch.cat([losses, more]), resumed.state_dict(), torch.get_rng_state()), expected)


def test_optimizer_state_loaded_between_steps_is_used():
    saved = {}

    def rewind(svi, step):
        if step == 5:
            saved.update(copy.deepcopy(svi.optimizer.state_dict()))
        if step == 9:
            svi.optimizer.load_state_dict(saved)

    compare(each=rewind)
    saved.clear()


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("layer", [None, lambda: nn.BatchNorm1d(9)], ids=["plain", "batch norm"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda x: x.fill_(0.5), ValueError, "outside the support"),
        (lambda x: x.fill_(float("nan")), pv.NonFiniteError, "log prob|posterior|value"),
    ],
    ids=["outside the support", "NaN"],
)
def test_errors_equal_the_eager_ones_and_leave_parameters_unchanged(spoil, error, message, layer):
    states = []
    for engine in ("eager", "traced"):
        vae = make_vae(layer=layer)
        svi = make_svi(vae, engine)
        data = list(batches(steps=7))
        train(vae, svi, data[:6])
        before = copy.deepcopy((list(vae.parameters()), svi.optimizer.state_dict()))
        with pytest.raises(error, match=message) as raised:
            svi.step(spoil(data[6]))
        after = (list(vae.parameters()), svi.optimizer.state_dict())
        torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
        for index, state in before[1]["state"].items():
            for name, value in state.items():
                assert torch.equal(after[1]["state"][index][name], value), name
        states.append((str(raised.value), vae.state_dict(), torch.get_rng_state()))
    (eager_message, eager_state, eager_noise), (message, state, noise) = states
    assert message == eager_message
    assert_same((torch.zeros(0), state, noise), (torch.zeros(0), eager_state, eager_noise))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_loss_that_overflows_raises_the_same_error():
    for engine in ("eager", "traced"):
        vae = make_vae("Normal", dtype=torch.float32)
        svi = make_svi(vae, engine)
        x = torch.randn(BATCH, *EVENT)
        svi.step(x)
        before = copy.deepcopy(vae.state_dict())
        x[2] = 1e30
        with pytest.raises(pv.NonFiniteError, match=r"site '[xz]' has"):
            svi.step(x)
        assert all(torch.equal(vae.state_dict()[name], value) for name, value in before.items())


def pair(weight, branch):
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(branch(z, x), 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(weight * x, 0.7))

    return model, guide


def train_pair(branch, engine, steps=12, estimator=Trace_ELBO):
    weight = nn.Parameter(torch.tensor(0.1))
    model, guide = pair(weight, branch)
    svi = pv.SVI(model, guide, torch.optim.Adam([weight], 0.1), estimator(), engine=engine)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    losses = [svi.step(torch.randn(BATCH, generator=generator)) for _ in range(steps)]
    return (torch.tensor(losses), {"weight": weight.detach()}, torch.get_rng_state()), svi


def test_a_branch_on_data_follows_the_data():
    def branch(z, x):
        return 3 * z if x.mean() > 0 else -z

    eager, _ = train_pair(branch, "eager")
    traced, svi = train_pair(branch, "traced")
    assert_traced(svi)
    assert_same(traced, eager, rtol=1e-6)


class Changing:
    """A class attribute that a model reads."""

    value = 0.0


def changes_class_attribute(z, x):
    Changing.value += 0.1
    return z + Changing.value


def changes_value_unseen(z, x):
    name = "".join(["val", "ue"])  # which no guard follows
    setattr(Changing, name, getattr(Changing, name) + 0.1)
    return z + getattr(Changing, name)


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (lambda z, x: z * float(x.sum()), "it reads values of tensors into Python"),
        (lambda z, x: z + torch.unique(x).mean(), "it reads values of tensors into Python"),
        (changes_class_attribute, "changes attribute 'value' of class 'Changing' in each run"),
        (changes_value_unseen, "disagrees with the eager step"),
        (
            lambda z, x: z + torch.randn((), generator=torch.Generator().manual_seed(1)),
            "it draws from an explicit random generator",
        ),
        (lambda z, x: z + float(x.detach().numpy().sum()), "reads values of tensors into Python"),
        (lambda z, x: z * torch.tensor([x.sum()]), "reads values of tensors into Python"),
        (lambda z, x: z + sum((x > 9).tolist()), "reads values of tensors into Python"),
    ],
    ids=[
        "number",
        "shape",
        "class attribute",
        "unseen",
        "generator",
        "numpy",
        "tensor of tensors",
        "list",
    ],
)
def test_a_model_that_no_graph_represents_is_eager_with_one_warning(branch, reason, caplog):
    Changing.value = 0.0
    eager, _ = train_pair(branch, "eager", steps=2)
    Changing.value = 0.0
    with caplog.at_level(logging.INFO, "pyro_vae"):
        traced, svi = train_pair(branch, "traced", steps=2)
    assert svi._replay.disabled
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert reason in caplog.text
    if branch is not changes_value_unseen:  # which depends on the number of runs
        assert_same(traced, eager, rtol=1e-6)


def test_tracegraph_is_recorded():
    eager, _ = train_pair(lambda z, x: z, "eager", estimator=TraceGraph_ELBO)
    traced, svi = train_pair(lambda z, x: z, "traced", estimator=TraceGraph_ELBO)
    assert_traced(svi)
    assert_same(traced, eager, rtol=1e-6)


def test_estimators_without_a_differentiable_loss_are_eager(caplog):
    eager, _ = train_pair(lambda z, x: z, "eager", estimator=lambda: RenyiELBO(0.5, num_particles=2))
    traced, svi = train_pair(lambda z, x: z, "traced", estimator=lambda: RenyiELBO(0.5, num_particles=2))
    assert svi._replay.disabled
    assert "RenyiELBO has no differentiable_loss" in caplog.text
    assert_same(traced, eager, rtol=0)


@pytest.mark.filterwarnings("ignore")  # of torch.jit
def test_a_loss_that_compiles_itself_takes_the_eager_steps(caplog):
    """Its first run draws once more, which a recording must not spend, and no later run may."""
    losses = []
    for engine in ("eager", "traced", "of Pyro"):
        torch.manual_seed(1)
        net = nn.Linear(1, 1)

        def model(x):
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x, net=net):
            pyro.module("net", net)
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 0.7))

        with pyro.get_param_store().scope():
            if engine == "of Pyro":
                svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), JitTrace_ELBO())
            else:
                svi = pv.SVI(model, guide, adam(net.parameters()), JitTrace_ELBO(), engine=engine)
            losses.append([svi.step(torch.linspace(-1.0, 1.0, BATCH)) for _ in range(9)])
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert "JitTrace_ELBO compiles itself: pass the class without Jit" in caplog.text


def test_a_recording_leaves_no_parameter_in_the_store():
    """A parameter that the optimiser lacks raises the same error in both engines, with the same draw."""
    found = []
    for engine in ("eager", "traced"):
        weight = nn.Parameter(torch.tensor(0.1))
        with pyro.get_param_store().scope():
            model, guide = pair(weight, lambda z, x: z * pyro.param("scale", lambda: torch.rand(())))
            estimator = Trace_ELBO(max_plate_nesting=1)
            svi = pv.SVI(model, guide, torch.optim.Adam([weight], 0.1), estimator, engine=engine)
            svi._checked = (svi.model, svi.guide, svi.loss)
            torch.manual_seed(2)
            with pytest.raises(ValueError, match="the optimiser does not hold 'scale'"):
                svi.step(torch.linspace(-1.0, 1.0, BATCH))
            found.append((dict(pyro.get_param_store().items()), torch.get_rng_state()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_enumeration():
    logits = nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))

    @pyro.infer.config_enumerate
    def model(x):
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(k.to(x.dtype) * logits.sum(), 1.0), obs=x)

    def guide(x):
        pass

    states = []
    for engine in ("eager", "traced"):
        logits.data = torch.tensor([0.1, -0.2, 0.3])
        optimizer = torch.optim.Adam([logits], 0.1)
        svi = pv.SVI(model, guide, optimizer, TraceEnum_ELBO(max_plate_nesting=1), engine=engine)
        generator = torch.Generator().manual_seed(1)
        losses = [svi.step(torch.randn(BATCH, generator=generator)) for _ in range(5)]
        states.append((torch.tensor(losses), {"logits": logits.detach().clone()}, torch.get_rng_state()))
    assert_same(states[1], states[0], rtol=1e-5)


def test_the_number_of_recordings_is_limited(caplog):
    _, svi = train_pair(lambda z, x: z, "traced", steps=1)
    for n in range(2, 60):
        svi.step(torch.randn(n))
    assert svi._replay.disabled
    assert "shapes or attributes keep changing" in caplog.text


def test_numbers_among_the_arguments_are_part_of_the_graph():
    weight = nn.Parameter(torch.tensor(0.1))

    def model(x, *, scale):
        with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, *, scale):
        with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=scale):
            pyro.sample("z", dist.Normal(weight * x, 0.7))

    def losses(engine, as_tensor):
        weight.data = torch.tensor(0.1)
        svi = pv.SVI(model, guide, torch.optim.Adam([weight], 0.1), Trace_ELBO(), engine=engine)
        torch.manual_seed(1)
        scales = [0.5, 1.0, 0.5, 2.0]
        return svi, [svi.step(torch.ones(BATCH), scale=torch.tensor(s) if as_tensor else s) for s in scales]

    _, expected = losses("eager", False)
    for as_tensor, recordings in ((False, 3), (True, 1)):
        svi, found = losses("traced", as_tensor)
        assert found == pytest.approx(expected, rel=1e-6)
        assert svi._replay.num_recordings == recordings
        assert_traced(svi)


def test_two_svis_share_an_optimizer():
    """Each SVI counts the other's steps in the optimiser."""
    losses = []
    for engine in ("eager", "traced"):
        vae = make_vae()
        optimizer = adam(vae.parameters())
        estimators = (TraceMeanField_ELBO(), Trace_ELBO())
        pairs = [pv.SVI(vae.model, vae.guide, optimizer, e, engine=engine) for e in estimators]
        torch.manual_seed(3)
        losses.append([pairs[step % 2].step(x) for step, x in enumerate(batches())])
        assert {float(state["step"]) for state in optimizer.state.values()} == {20.0}
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def changed_state(svi, step):
    state = svi.optimizer.state[next(svi.model.__self__.parameters())]
    if step == 6:
        state["step"] = torch.zeros_like(state["step"])
    if step == 9:
        state["exp_avg_sq"] = 2 * state["exp_avg_sq"]


def test_optimizer_state_set_by_a_user_is_used():
    compare(each=changed_state)


def test_gradients_stay_on_parameters_and_hooks_run():
    seen = {"eager": [], "traced": []}

    def look(svi, step):
        found = seen["traced" if svi.engine == "traced" else "eager"]
        if step == 3:
            svi.optimizer.register_step_post_hook(lambda *_: found.append("hook"))
        if step:
            found.append(round(float(svi.optimizer.param_groups[0]["params"][0].grad.norm()), 10))

    compare(each=look)
    assert seen["traced"] == seen["eager"]
    assert seen["traced"].count("hook") == 17


def test_post_accumulate_gradient_hooks_make_the_step_eager(caplog):
    vae = make_vae()
    next(vae.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    svi = make_svi(vae, "traced")
    svi.step(next(batches()))
    assert svi._replay.disabled
    assert "hooks" in caplog.text


def test_a_buffer_that_seldom_changes_is_updated_once_per_step():
    counts = []
    for engine in ("eager", "traced"):
        count, weight = torch.zeros(()), nn.Parameter(torch.tensor(0.1))

        def model(x, count=count):
            count.add_((x > 8).sum())
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        _, guide = pair(weight, None)
        svi = pv.SVI(model, guide, torch.optim.Adam([weight], 0.1), Trace_ELBO(), engine=engine)
        svi.check(torch.zeros(BATCH))
        for step in range(20):
            svi.step(torch.full((BATCH,), 9.0 if step in (3, 7, 15) else 0.0))
        counts.append(float(count))
    assert counts[0] == counts[1] == 3 * BATCH


def test_arguments_changed_in_place_or_passed_twice():
    weight = nn.Parameter(torch.tensor(0.1))

    def model(x, y):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(weight * x, 0.7))

    losses = []
    for engine in ("eager", "traced"):
        weight.data = torch.tensor(0.1)
        svi = pv.SVI(model, guide, torch.optim.Adam([weight], 0.1), Trace_ELBO(), engine=engine)
        torch.manual_seed(1)
        x, other = torch.arange(float(BATCH)), torch.ones(BATCH)
        losses.append([svi.step(x, x) for _ in range(4)] + [svi.step(x, other) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def changing(x):
        x.sub_(0.5)
        return pair(weight, lambda z, x: z)[0](x)

    def guide_without_data(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(weight.expand(len(x)), 0.7))

    svi = pv.SVI(changing, guide_without_data, torch.optim.Adam([weight], 0.1), Trace_ELBO(), engine="traced")
    x = torch.full((BATCH,), 9.0)
    svi._checked = (svi.model, svi.guide, svi.loss)
    svi.step(x)
    assert svi._replay.disabled
    assert torch.equal(x, torch.full((BATCH,), 8.5))


def test_a_handler_around_the_step_takes_effect():
    losses = []
    for engine in ("eager", "traced"):
        vae = make_vae()
        svi = make_svi(vae, engine)
        torch.manual_seed(3)
        for step, x in enumerate(batches(steps=8)):
            with pyro.poutine.scale(scale=1.0 + step):
                losses.append(svi.step(x))
    assert losses[:8] == pytest.approx(losses[8:], rel=1e-10)


def test_a_copy_of_an_svi_takes_the_same_steps():
    vae = make_vae()
    svi = make_svi(vae, "traced")
    train(vae, svi, batches(steps=5))
    other = copy.deepcopy(svi)
    losses = []
    for each in (svi, other):
        torch.manual_seed(4)
        losses.append([each.step(x) for x in batches(steps=5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_rounding_by_another_library_does_not_disagree(monkeypatch):
    """Even large rounding: the compared graph has the matrix products of eager torch."""
    original = replay.choose_matmul_libraries

    def choose_matmul_libraries(module, fastest):
        module = copy.deepcopy(original(module, fastest))
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        loss, invalid, first, *rest = output.args[0]
        with module.graph.inserting_before(output):
            output.args = ((loss, invalid, module.graph.call_function(torch.mul, (first, 1.1)), *rest),)
        module.recompile()
        return module

    monkeypatch.setattr(replay, "choose_matmul_libraries", choose_matmul_libraries)
    vae = make_vae()
    svi = make_svi(vae, "traced")
    train(vae, svi, batches(steps=5))
    assert not svi._replay.disabled


def test_a_constant_mask_leaves_no_data_dependent_operation_in_the_graph():
    """Compilers do not support shapes that depend on a mask; the recorder knows them for a constant mask."""
    weight = torch.randn(6, requires_grad=True)

    def loss_and_gradients(x):
        mask = torch.arange(3) <= torch.arange(3).unsqueeze(-1)
        matrix = torch.zeros(3, 3)
        matrix[mask] = weight
        loss = (matrix @ x).exp()[mask[2]].sum() + matrix[torch.nonzero(~mask)].sum()
        return loss, torch.autograd.grad(loss, [weight])

    graph = record(loss_and_gradients, [torch.randn(3, 2)])
    data_dependent = ("nonzero", "masked", "_local_scalar")
    assert not [
        node for node in graph.module.graph.nodes if any(word in str(node.target) for word in data_dependent)
    ]
    assert not [tensor for tensor in graph.captured if tensor.dtype == torch.bool]
    x = torch.randn(3, 2)
    with torch.no_grad():
        weight.mul_(2.0)
    expected, (gradient,) = loss_and_gradients(x)
    with torch.no_grad():
        loss, invalid, found = graph.module(x, *graph.captured)
    assert not invalid
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, gradient)


def swap_parameters(svi, weight):
    other = nn.Parameter(torch.full_like(weight, 0.4))
    svi.optimizer.param_groups[0]["params"] = [other]


def replace_group(svi, weight):
    svi.optimizer.param_groups[0] = {**svi.optimizer.param_groups[0], "lr": 0.5}


def decouple_weight_decay(svi, weight):
    svi.optimizer.param_groups[0]["decoupled_weight_decay"] = True


def hook_gradient(svi, weight):
    weight.register_hook(lambda gradient: 0.1 * gradient)


def reshape(svi, weight):
    weight.data = torch.full((BATCH,), 0.2)


@pytest.mark.parametrize(
    "change", [swap_parameters, replace_group, decouple_weight_decay, hook_gradient, reshape]
)
def test_changes_of_optimizer_and_parameters_take_effect_at_the_next_step(change):
    found = {}
    for engine in ("eager", "traced"):
        weight = nn.Parameter(torch.tensor(0.1))
        model, guide = pair(weight, lambda z, x: z)
        kind = torch.optim.SGD if change is reshape else torch.optim.Adam
        optimizer = kind([weight], 0.01, weight_decay=0.1)
        svi = pv.SVI(model, guide, optimizer, Trace_ELBO(), engine=engine)
        torch.manual_seed(2)
        losses = []
        for step in range(13):
            if step == 9:
                change(svi, weight)
            losses.append(svi.step(torch.linspace(-1.0, 1.0, BATCH)))
        trained = svi.optimizer.param_groups[0]["params"][0]
        found[engine] = [torch.tensor(losses), weight.detach(), trained.detach()]
    assert_traced(svi)
    torch.testing.assert_close(found["traced"], found["eager"], rtol=1e-5, atol=1e-6)


def accumulate(z, x):
    total = torch.tensor(0.0)
    total += z.sum()
    return z + total


def accumulate_indices(z, x):
    index = torch.nonzero(torch.tensor([0, 1]))[0]
    index += 1
    return z + z[index]


@pytest.mark.parametrize("branch", [accumulate, accumulate_indices])
def test_a_constant_changed_in_place_is_copied_at_each_step(branch):
    eager, _ = train_pair(branch, "eager")
    traced, svi = train_pair(branch, "traced")
    assert_traced(svi)
    assert_same(traced, eager, rtol=1e-6)


def test_an_argument_that_the_model_also_reads_as_a_global_variable():
    known = torch.linspace(-1.0, 2.0, BATCH)
    losses = {}
    for engine in ("eager", "traced"):
        weight = nn.Parameter(torch.tensor(0.1))
        model, guide = pair(weight, lambda z, x: z + known.mean())
        svi = pv.SVI(model, guide, torch.optim.Adam([weight], 0.1), Trace_ELBO(), engine=engine)
        torch.manual_seed(2)
        losses[engine] = [svi.step(x) for x in (known, known + 1, known - 1, known, known + 2)]
    assert_traced(svi)
    assert losses["traced"] == pytest.approx(losses["eager"], rel=1e-5)


def test_an_unknown_engine_raises():
    with pytest.raises(ValueError, match=r"engine must be one of .*traced.*; got 'jit'"):
        make_svi(make_vae(), "jit")
