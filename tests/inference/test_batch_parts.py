"""A step on a batch in parts is that of the batch, or refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.gp.kernels import RBF
from pyro.infer import Trace_ELBO, Trace_MMD
from torch import nn

import pyro_vae as pv
from pyro_vae.engine import products

X = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(12, 2)


class Program(nn.Module):
    """A pair with fixed draws, whose plates are chosen."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.3], dtype=torch.float64))

    def draw(self, x):
        pyro.sample("z", dist.Delta(x[..., :1] * self.weight[0]))

    def observe(self, x):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with self.pixels() as index:
            pyro.sample("x", dist.Normal(z * self.weight[0] + self.weight[1], 1.0), obs=x[:, index])

    def pixels(self):
        return pyro.plate("pixels", 2, dim=-1)

    def data(self, x):
        return pyro.plate("data", len(x), dim=-2)

    def model(self, x):
        with self.data(x) as index:
            self.observe(x[index])

    def guide(self, x):
        with self.data(x) as index:
            self.draw(x[index])


class Pixels(Program):
    """Some elements of each example, which stand for all."""

    def pixels(self):
        return pyro.plate("pixels", 50, subsample=torch.arange(2), dim=-1)


class Inner(Program):
    """A plate that subsamples the batch itself, of which each example is the same."""

    def data(self, x):
        return pyro.plate("data", len(x), subsample=torch.arange(len(x) // 2), dim=-2)


class Outer(Program):
    """A batch that stands for 100 data."""

    def data(self, x):
        return pyro.plate("data", 100, subsample=torch.arange(len(x)), dim=-2)


@pytest.mark.parametrize("program", [Program, Pixels, Inner, Outer])
def test_the_plate_of_the_data_says_whether_losses_are_added_or_averaged(program):
    data = X[:1].repeat(12, 1) if program is Inner else X
    found = []
    for shards in (1, 2, 3):
        pair = program()
        history = pv.fit(
            pair,
            data,
            epochs=2,
            batch_size=12,
            shards=shards,
            optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-4),
            estimator=Trace_ELBO(),
            progress=False,
            engine="eager",
        )
        bounds = torch.tensor(history.column("train_bound"), dtype=torch.float64)
        found.append(torch.cat([pair.weight.detach(), bounds]))
    assert torch.allclose(found[1], found[0], rtol=1e-10)
    assert torch.allclose(found[2], found[0], rtol=1e-10)
    loss = Trace_ELBO().loss(program().model, program().guide, data)
    others = 100 if program is Outer else 12  # the data that a loss speaks for
    assert found[0][2].item() == pytest.approx(-loss / others, rel=1e-10)


def make(**options):
    torch.manual_seed(3)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (2,), hidden_features=(4,)),
        guide=pv.guides.DiagonalNormal((2,), 2, **options),
    ).double()


class Zeroed(torch.optim.SGD):
    """An optimiser that keeps gradients as zeros."""

    def zero_grad(self, set_to_none=False):
        super().zero_grad(set_to_none=set_to_none)


def weights(module):
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def test_an_optimiser_may_keep_gradients_as_zeros():
    found = []
    for kind in (torch.optim.SGD, Zeroed):
        vae = make()
        options = {"optimizer": lambda parameters, kind=kind: kind(parameters, 1e-3), "engine": "eager"}
        pv.fit(vae, X, epochs=3, shards=2, progress=False, **options)
        found.append(weights(vae))
    assert torch.equal(*found)


def test_the_default_dtype_may_be_any():
    found = []
    for dtype in (torch.float32, torch.float64):
        vae = make()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            pv.fit(vae, X, epochs=3, shards=2, engine="eager", progress=False)
        finally:
            torch.set_default_dtype(before)
        found.append(weights(vae))
    assert torch.allclose(*found, rtol=1e-4)


def test_steps_may_be_taken_in_parts_and_not():
    found = []
    for engine in ("eager", "traced"):
        vae = make()
        svi = pv.SVI(vae, torch.optim.SGD(vae.parameters(), 1e-3), pv.IWAE(2), engine=engine)
        for step in range(4):
            torch.manual_seed(step)
            if step % 2:
                svi.step_in_parts([((X[:6],), {}), ((X[6:],), {})])
            else:
                svi.step(X[:6])
        found.append(weights(vae))
    assert torch.allclose(*found, rtol=1e-10)


def test_instances_may_be_normalised_but_no_batches():
    layers = nn.Unflatten(-1, (1, 2)), nn.InstanceNorm1d(1), nn.Flatten(-2), nn.Linear(2, 4)
    pv.fit(make(network=nn.Sequential(*layers)), X, epochs=1, shards=2, progress=False)
    vae = make(network=nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4)))
    with pytest.raises(ValueError, match="a BatchNorm1d, depends on the batch as a whole"):
        pv.fit(vae, X, epochs=1, shards=2, progress=False)


def test_batch_normalisation_in_a_function_is_refused_too():
    norm, net = nn.BatchNorm1d(2).double(), nn.Linear(2, 1).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z[:, None].expand_as(x), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("norm", norm)
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(norm(x))[:, 0], 1.0))

    optimizer = torch.optim.SGD([*norm.parameters(), *net.parameters()], 1e-3)
    svi = pv.SVI(model, guide, optimizer, Trace_ELBO())
    with pytest.raises(ValueError, match="a BatchNorm1d, depends on the batch as a whole"):
        svi.step_in_parts([((X[:5],), {}), ((X[5:],), {})])
    pyro.clear_param_store()


def test_what_compares_draws_of_a_whole_batch_is_refused():
    kernel = RBF(2).double()
    with pytest.raises(ValueError, match="Trace_MMD compares the draws of a batch as a whole"):
        pv.fit(make(), X, estimator=Trace_MMD(kernel, 1), epochs=1, shards=2, progress=False)


def test_a_part_must_be_an_argument():
    weight = nn.Parameter(torch.tensor(0.1))

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(weight, 1.0))

    svi = pv.SVI(model, guide, torch.optim.SGD([weight], 1e-3), Trace_ELBO())
    with pytest.raises(ValueError, match="a batch must hold a tensor"):
        svi.step_in_parts([((), {})])


def test_data_are_read_with_their_own_precision():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(X)

        def __getitem__(self, position):
            product = X[position].float() @ torch.eye(2)
            read.add(product.dtype)
            return product.float()

    read = set()
    pv.fit(make().float(), Rows(), epochs=1, shards=2, precision="bf16", progress=False)
    assert read == {torch.float32}


def test_labels_that_are_missing_are_refused_and_others_not():
    vae = pv.SemiSupervisedVAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (2,), context_dim=3),
        guide=pv.guides.DiagonalNormal((2,), 2, context_dim=3),
        classifier=pv.networks.MLP(2, 3),
        num_classes=3,
    )
    x = X.float()
    svi = pv.SVI(vae, torch.optim.SGD(vae.parameters(), 1e-3))
    y = torch.arange(12) % 3
    svi.step_in_parts([((x[:5], y[:5]), {}), ((x[5:], y[5:]), {})])
    y[7:] = -1
    with pytest.raises(ValueError, match="a SemiSupervisedVAE weights labelled examples by their share"):
        svi.step_in_parts([((x[:5], y[:5]), {}), ((x[5:], y[5:]), {})])


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_parts_multiply_by_the_library_that_the_first_process_found_faster(library, monkeypatch):
    monkeypatch.setattr(products, "_measure", lambda *operands, with_bias: library)
    monkeypatch.setattr(products, "_MIN_SIZE", 100)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (30,), hidden_features=(7,)),
        guide=pv.guides.DiagonalNormal((30,), 2, hidden_features=(7,)),
    )
    svi = pv.SVI(vae, torch.optim.SGD(vae.parameters(), 1e-3), engine="traced")
    x = torch.randn(11, 30)
    svi.step_in_parts([((x[:6],), {}), ((x[6:],), {})])
    assert svi.fastest_products[products.ANY_SHAPE] == library
    monkeypatch.setattr(products, "_measure", None)  # is not called again
    svi.step_in_parts([((x[:6],), {}), ((x[6:],), {})])
    codes = [str(recording.graph.module.code) for recording in svi._replay.recordings.values()]
    assert codes
    assert all(("onednn_linear" in code) == (library == "onednn") for code in codes)
