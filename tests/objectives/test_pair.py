"""`Pair`: parameters of its own, whatever names its programs use."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_vae as pv
from pyro_vae.utils.serialization import CheckpointError

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


def write_pair(*, dropout: float = 0.0, width: int = 4) -> pv.Pair:
    """A pair in Pyro's idiom: functions that name modules and parameters."""
    encoder = nn.Sequential(
        nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(dropout), nn.Linear(width, 2)
    )
    decoder = nn.Linear(2, 3)

    def model(x):
        pyro.module("decoder", decoder)
        noise = pyro.param("noise", lambda: torch.rand(3) + 0.5, constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", torch.tensor([0.5, 0.7]), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    pair = pv.Pair(model, guide)
    pair.encoder_itself = lambda: encoder  # of the functions, hidden from torch
    return pair


def make(**options) -> pv.Pair:
    torch.manual_seed(1)
    pair = write_pair(**options)
    pair.make_parameters(X)
    return pair


def train(pair: pv.Pair, steps: int = 5, *, engine: str = "eager") -> list[float]:
    torch.manual_seed(2)
    pair.train()
    svi = pv.SVI(
        pair.model, pair.guide, torch.optim.Adam(pair.parameters(), 0.05), Trace_ELBO(), engine=engine
    )
    return [svi.step(X) for _ in range(steps)]


def test_parameters_are_the_pairs_own_and_pyros_store_stays_empty():
    pyro.clear_param_store()
    names = [name for name, _ in make().named_parameters()]
    assert {"stored.noise", "stored.scale", "stored.encoder.0.weight", "stored.decoder.bias"} <= set(names)
    assert len(names) == len(set(names)) == 10
    assert len(pyro.get_param_store()) == 0


def test_the_store_is_not_read():
    pyro.clear_param_store()
    pyro.param("scale", torch.tensor([100.0, 100.0]), constraint=constraints.positive)
    assert make().stored.scale.exp().detach() == pytest.approx([0.5, 0.7])
    assert pyro.param("scale").tolist() == pytest.approx([100.0, 100.0])
    pyro.clear_param_store()


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_pairs_with_the_same_names_train_apart(engine):
    pyro.clear_param_store()
    alone = train(make(), engine=engine)
    first, second = make(), make()
    assert train(first, engine=engine) == alone
    before = copy.deepcopy(second.state_dict())
    train(first, engine=engine)
    assert all(torch.equal(before[key], value) for key, value in second.state_dict().items())
    assert train(second, engine=engine) == alone
    assert len(pyro.get_param_store()) == 0


def test_losses_are_those_of_pyros_svi_on_functions_and_of_pyros_svi_on_the_pair():
    ours = train(make())
    pyro.clear_param_store()
    torch.manual_seed(1)
    bare = write_pair()
    model, guide = bare.written
    with torch.no_grad():
        bare.encoder_itself().eval()
        guide(X)
        model(X)
        bare.encoder_itself().train()
    upstream = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    torch.manual_seed(2)
    assert [upstream.step(X) for _ in range(5)] == pytest.approx(ours, rel=1e-5)
    pyro.clear_param_store()
    pair = make()
    by_pyro = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    torch.manual_seed(2)
    assert [by_pyro.step(X) for _ in range(5)] == pytest.approx(ours, rel=1e-5)
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_copy_trains_by_itself_also_where_functions_hold_the_original_modules(engine):
    pair = make()
    copied = copy.deepcopy(pair)
    before = copy.deepcopy(pair.state_dict())
    losses = train(copied, engine=engine)
    assert losses == train(make(), engine=engine)
    assert all(torch.equal(before[key], value) for key, value in pair.state_dict().items())
    assert not torch.equal(copied.stored.encoder[0].weight, pair.stored.encoder[0].weight)
    assert not torch.equal(copied.stored.encoder[1].running_mean, pair.stored.encoder[1].running_mean)
    assert pair.encoder_itself()[0].weight is pair.stored.encoder[0].weight


def test_evaluation_mode_reaches_named_modules():
    pair = make(dropout=0.5)
    pair.eval()
    torch.manual_seed(0)
    first = pv.terms(pair.model, pair.guide, X).log_guide
    assert not pair.encoder_itself().training
    torch.manual_seed(0)
    assert torch.equal(first, pv.terms(pair.model, pair.guide, X).log_guide)


@pytest.mark.parametrize("made", [True, False], ids=["met", "not met yet"])
def test_saved_values_are_loaded(made, tmp_path):
    pair = make()
    train(pair)
    pair.save(tmp_path / "pair.pt")
    torch.manual_seed(5)
    other = write_pair()
    if made:
        other.make_parameters(X)
    other.load(tmp_path / "pair.pt")
    other.make_parameters(X)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in pair.state_dict().items())
    assert other.encoder_itself()[0].weight is other.stored.encoder[0].weight
    assert train(other) == train(pair)


def test_a_file_of_another_pair_is_refused(tmp_path):
    make(width=5).save(tmp_path / "pair.pt")
    with pytest.raises(CheckpointError, match="size mismatch"):
        make().load(tmp_path / "pair.pt")
    with pytest.raises(FileNotFoundError):
        make().load(tmp_path / "absent.pt")


def test_a_constraint_that_has_changed_is_refused(tmp_path):
    def with_constraint(constraint):
        def model(x):
            scale = pyro.param("scale", torch.tensor(0.5), constraint=constraint)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0, 1))
                pyro.sample("x", dist.Normal(z, scale), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0, 1))

        pair = pv.Pair(model, guide)
        pair.make_parameters(torch.zeros(2))
        return pair

    with_constraint(constraints.positive).save(tmp_path / "pair.pt")
    with pytest.raises(CheckpointError, match=r"'scale' was GreaterThan.*, is Interval"):
        with_constraint(constraints.interval(0.0, 1.0)).load(tmp_path / "pair.pt")


def test_an_initial_value_is_copied():
    shared = torch.tensor(0.3)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", shared), 1))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0, 1)), 1), obs=x)

    pair = pv.Pair(model, guide)
    pair.make_parameters(X[:, 0])
    with torch.no_grad():
        pair.stored.loc.add_(1)
    assert shared == torch.tensor(0.3)
    assert not shared.requires_grad


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def test_pyro_modules_and_autoguides():
    pyro.clear_param_store()
    y = X.sum(1)
    torch.manual_seed(0)
    model = Regression()
    pair = pv.Pair(model, AutoNormal(model))
    pair.make_parameters(X, y)
    svi = pv.SVI(pair.model, pair.guide, torch.optim.Adam(pair.parameters(), 0.05), Trace_ELBO())
    losses = [svi.step(X, y) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    assert len(list(pair.parameters())) == 3  # bias; location and scale of the weight
    assert len(pyro.get_param_store()) == 0


def test_a_parameter_met_after_the_first_step_is_named():
    def guide(x, y=None):
        loc = pyro.param("a", torch.tensor(0.0))
        if y is not None:
            loc = loc + pyro.param("b", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1))

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0, 1)), 1), obs=x)

    pair = pv.Pair(model, guide)
    x = X[:, 0]
    pair.make_parameters(x)
    for engine in ("eager", "traced"):
        svi = pv.SVI(pair.model, pair.guide, torch.optim.Adam(pair.parameters()), Trace_ELBO(), engine=engine)
        svi.step(x)
        with pytest.raises(ValueError, match="'b'"):
            svi.step(x, y=x)
        pair = pv.Pair(model, guide)
        pair.make_parameters(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((dist.Normal(0, 1), print), "expected two Pyro functions"),
        ((pv.VAE, print), "expected two Pyro functions"),
        ((3, print), "expected a model and a guide"),
    ],
    ids=["distribution", "class", "number"],
)
def test_what_is_no_program_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        pv.Pair(*arguments)


def test_pickling_works_where_the_programs_can_be_pickled():
    model = Regression()
    pair = pv.Pair(model, AutoNormal(model))
    pair.make_parameters(X, X.sum(1))
    again = pickle.loads(pickle.dumps(pair))
    assert all(torch.equal(again.state_dict()[key], value) for key, value in pair.state_dict().items())


def line(x, loc):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc(z), 1.0), obs=x)


def draw(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))


def test_a_copy_has_its_own_weights_under_every_name_of_a_module():
    net = nn.Linear(1, 1)

    def model(x):
        pyro.module("decoder", net)
        line(x, lambda z: net(z[..., None])[..., 0])

    def guide(x):
        pyro.module("encoder", net)
        draw(x)

    pair = pv.Pair(model, guide)
    pair.make_parameters(X[:, 0])
    copied = copy.deepcopy(pair)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.fill_(9.0)
    trace = pyro.poutine.trace(copied.model).get_trace(X[:, 0])
    expected = 9 * trace.nodes["z"]["value"] + 9
    torch.testing.assert_close(trace.nodes["x"]["fn"].loc, expected)
    assert not torch.equal(net.weight, torch.full((1, 1), 9.0))


def shifted(init, **options):
    def model(x):
        shift = pyro.param("shift", init, **options)
        line(x, lambda z: z + shift)

    return pv.Pair(model, draw)


def test_loading_before_the_first_run(tmp_path):
    path = tmp_path / "pair.pt"
    saved = shifted(nn.Parameter(torch.tensor(5.0)))
    saved.make_parameters(X[:, 0])
    saved.save(path)
    other = nn.Parameter(torch.tensor(0.0))
    loaded = shifted(other).load(path)
    with pytest.raises(ValueError, match=r"has not run since.*make_parameters"):
        loaded.save(path)
    loaded.make_parameters(X[:, 0])
    assert other == 5
    with pytest.raises(ValueError, match="constraint of parameter 'shift' is GreaterThan"):
        shifted(torch.tensor(1.0), constraint=constraints.positive).load(path).make_parameters(X[:, 0])
    with pytest.raises(ValueError, match="the loaded file holds 'shift', which the programs do not name"):
        pv.Pair(lambda x: line(x, lambda z: z * pyro.param("slope", torch.tensor(1.0))), draw).load(
            path
        ).make_parameters(X[:, 0])
    with pytest.raises(CheckpointError, match="stored.shift"):
        make().load(path)


@pytest.mark.parametrize("name", ["names", "training", "type", "a.b"])
def test_any_name_goes(name):
    def model(x):
        shift, again = pyro.param(name, torch.tensor(1.0)), pyro.param("a/b", torch.tensor(2.0))
        line(x, lambda z: z + shift * again)

    pair = pv.Pair(model, draw)
    pair.make_parameters(X[:, 0])
    assert sorted(p.item() for p in pair.parameters()) == [1.0, 2.0]


@pytest.mark.filterwarnings("ignore:weight was not registered")
def test_modules_without_trained_parameters_are_owned_too(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            if frozen:
                self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x):
            if self.training:
                self.mean.lerp_(x.mean(0), 0.5)
            return x - self.mean

    def make():
        scaled, frozen = Scaled(False), Scaled(True)

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(x):
            pyro.module("scaled", scaled)
            pyro.module("frozen", frozen)
            shift = pyro.param("shift", torch.zeros(3))
            with pyro.plate("data", len(x)):
                loc = scaled(x) + frozen(x) * frozen.weight + shift
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

        return pv.Pair(model, guide), scaled

    x = torch.randn(20, 3) + 2
    pair, scaled = make()
    pair.make_parameters(x)
    names = ["stored.frozen.mean", "stored.frozen.weight", "stored.scaled.mean", "stored.shift"]
    assert sorted(pair.state_dict()) == names
    assert not scaled.mean.any()
    options = {"epochs": 3, "batch_size": 5, "progress": False}
    pv.fit(pair, x, checkpoint_dir=tmp_path / "run", **options)
    assert scaled.mean.any()
    pair.save(tmp_path / "pair.pt")
    other, loaded = make()
    other.load(tmp_path / "pair.pt").make_parameters(x)
    assert torch.equal(loaded.mean, scaled.mean)

    parts, resumed = make()
    pv.fit(parts, x, checkpoint_dir=tmp_path / "parts", **{**options, "epochs": 1})
    again, resumed = make()
    pv.fit(again, x, checkpoint_dir=tmp_path / "parts", resume=True, **options)
    assert torch.equal(resumed.mean, scaled.mean)
