"""Models and guides of the examples in a clone of Pyro's repository, on small random data."""

import importlib.util
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pyro.contrib.examples.polyphonic_data_loader as poly
import torch
from pyro import poutine
from pyro.contrib.cevae import CEVAE, TraceCausalEffect_ELBO
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceTMC_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal, init_to_feasible

__all__ = ["Call", "examples"]

ABSENT = ("observations", "scanpy", "scvi", "visdom", "wget")  # they play no part in the pairs


class Call(NamedTuple):
    """Arguments of one step."""

    args: tuple
    kwargs: dict[str, Any]


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


Pair = tuple[Callable, Callable, list[Call]]
Makers = dict[str, tuple[Callable[[], Pair], Callable[[], Any]]]


def examples(clone: Path) -> Makers:
    """Return makers of the pairs, and of their losses, by the example's name; a missing file raises."""
    load = partial(_load, clone / "examples")
    enum, enum_2 = (partial(TraceEnum_ELBO, max_plate_nesting=nesting) for nesting in (1, 2))
    tmc = partial(TraceTMC_ELBO, max_plate_nesting=1)
    found: Makers = {
        "vae/vae.py": (partial(vae, load), Trace_ELBO),
        "vae/ss_vae_M2.py, unsupervised": (partial(ss_vae, load, "parallel", "u"), enum),
        "vae/ss_vae_M2.py, supervised": (partial(ss_vae, load, "parallel", "s"), enum),
        "vae/ss_vae_M2.py, mixed": (partial(ss_vae, load, "parallel", "usuus"), enum),
        "vae/ss_vae_M2.py, sequential": (partial(ss_vae, load, "sequential", "u"), enum),
        "vae/ss_vae_M2.py, auxiliary": (partial(ss_vae_auxiliary, load), Trace_ELBO),
        "cvae/cvae.py": (partial(cvae, load), Trace_ELBO),
        "air/air.py": (partial(air, load), TraceGraph_ELBO),
        "air/air.py, prior by step": (partial(air, load, by_step=True), TraceGraph_ELBO),
        "air/air.py, no baselines": (partial(air, load, use_baselines=False), Trace_ELBO),
        "dmm.py": (partial(dmm, load), Trace_ELBO),
        "dmm.py, annealed": (partial(dmm, load, annealed=True), Trace_ELBO),
        "dmm.py, flows": (partial(dmm, load, num_iafs=2, iaf_dim=5), Trace_ELBO),
        "dmm.py, TMC": (partial(dmm, load, enumerate="parallel"), tmc),
        "scanvi/scanvi.py": (partial(scanvi, load), TraceEnum_ELBO),
        "lda.py": (partial(lda, load), enum_2),
        "sparse_gamma_def.py, custom": (partial(sparse_gamma, load, "custom"), Trace_ELBO),
        "sparse_gamma_def.py, auto": (partial(sparse_gamma, load, "auto"), Trace_ELBO),
        "sparse_gamma_def.py, easy": (partial(sparse_gamma, load, "easy"), Trace_ELBO),
        "sparse_regression.py": (partial(sparse_regression, load), Trace_ELBO),
        "svi_torch.py": (partial(svi_torch, load), Trace_ELBO),
        "eight_schools/svi.py": (partial(eight_schools, load), Trace_ELBO),
        "toy_mixture_model_discrete_enumeration.py": (partial(toy_mixture, load), enum),
        "contrib/autoname/mixture.py": (partial(autoname, load, "mixture"), Trace_ELBO),
        "contrib/autoname/scoping_mixture.py": (partial(autoname, load, "scoping_mixture"), enum),
        "contrib/autoname/tree_data.py": (partial(autoname, load, "tree_data"), Trace_ELBO),
        "contrib/cevae": (cevae, TraceCausalEffect_ELBO),
    }
    for number in range(1, 6):
        loss = partial(TraceEnum_ELBO, max_plate_nesting=1, num_particles=5, vectorize_particles=True)
        found[f"capture_recapture/cjs.py, model_{number}"] = (partial(cjs, load, number), loss)
    for number in range(8):
        loss = partial(
            TraceEnum_ELBO, max_plate_nesting=2 if number else 1, strict_enumeration_warning=number != 7
        )
        found[f"hmm.py, model_{number}"] = (partial(hmm, load, number), loss)
        found[f"hmm.py, model_{number}, args bound"] = (partial(hmm, load, number, is_bound=True), loss)
        found[f"hmm.py, model_{number}, whole batch"] = (partial(hmm, load, number, batch_size=None), loss)
    found["hmm.py, model_6, Raftery"] = (partial(hmm, load, 6, raftery_parameterization=True), loss)
    found["hmm.py, model_1, fixed length"] = (partial(hmm, load, 1, jit=True), loss)
    for group, individual in [
        (None, None),
        ("discrete", None),
        (None, "discrete"),
        ("discrete", "discrete"),
        ("continuous", None),
        (None, "continuous"),
        ("continuous", "continuous"),
    ]:
        name = f"mixed_hmm, group {group}, individual {individual}"
        found[name] = (partial(mixed_hmm, load, group, individual), enum_2)
    return found


def _load(folder: Path, file: str) -> ModuleType:
    """Import an example anew, with stand-ins for packages that are not installed."""
    path = folder / file
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    with _undisturbed(path.parent):
        spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def _undisturbed(folder: Path) -> Iterator[None]:
    """Undo what examples do to the process as they are imported: dtype, logging, generators, modules."""
    modules, dtype, log = dict(sys.modules), torch.get_default_dtype(), logging.getLogger()
    handlers, level, search = list(log.handlers), log.level, list(sys.path)
    for name in ABSENT:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = stub = ModuleType(name)
            stub.__getattr__ = lambda _: None  # type: ignore[method-assign]
    sys.path.insert(0, str(folder))
    try:
        with torch.random.fork_rng():
            yield
    finally:
        sys.path[:] = search
        log.handlers[:], log.level = handlers, level
        torch.set_default_dtype(dtype)
        for name in sys.modules.keys() - modules.keys():
            file = getattr(sys.modules[name], "__file__", None)
            if name in ABSENT or (file is not None and Path(file).is_relative_to(folder)):
                del sys.modules[name]


def vae(load: Callable) -> Pair:
    net = load("vae/vae.py").VAE(z_dim=4, hidden_dim=9)
    return net.model, net.guide, [call(torch.rand(6, 1, 28, 28))]


def ss_vae(load: Callable, config: str, kinds: str) -> Pair:
    """Semi-supervised autoencoder; kinds are those of the batches, "u" without and "s" with labels."""
    net = load("vae/ss_vae_M2.py").SSVAE(
        output_size=3, input_size=12, z_dim=2, hidden_layers=[7], config_enum=config
    )
    x = torch.bernoulli(torch.full((6, 12), 0.4))
    labels = torch.eye(3)[torch.arange(6) % 3]
    calls = [call(x, labels) if kind == "s" else call(x) for kind in kinds]
    return net.model, config_enumerate(net.guide, config, expand=True), calls


def ss_vae_auxiliary(load: Callable) -> Pair:
    net = load("vae/ss_vae_M2.py").SSVAE(
        output_size=3, input_size=12, z_dim=2, hidden_layers=[7], aux_loss_multiplier=46.0
    )
    batch = call(torch.rand(6, 12), torch.eye(3)[torch.arange(6) % 3])
    return net.model_classify, net.guide_classify, [batch]


def cvae(load: Callable) -> Pair:
    baseline = load("cvae/baseline.py").BaselineNet(8, 8)
    net = load("cvae/cvae.py").CVAE(4, 9, 8, baseline)
    y = torch.rand(6, 28, 28)
    x = y.clone()
    x[:, :14] = -1  # what is to be predicted
    return net.model, net.guide, [call(x, y)]


def air(load: Callable, *, by_step: bool = False, use_baselines: bool = True) -> Pair:
    """Attend, infer, repeat; with a prior that the example anneals by a function of the step."""
    module = load("air/air.py")
    sizes = {"num_steps": 2, "x_size": 12, "window_size": 6, "z_what_size": 3, "rnn_hidden_size": 7}
    net = module.AIR(
        **sizes, encoder_net=[5], decoder_net=[5], use_baselines=use_baselines, scale_prior_mean=2.0
    ).double()

    def prior(step: int, time: int) -> float:
        return 0.5 - 0.01 * step - 0.1 * time

    images = torch.rand(9, 12, 12)
    steps = range(8 if by_step else 1)
    return net.model, net.guide, [call(images, 5, z_pres_prior_p=partial(prior, step)) for step in steps]


def dmm(load: Callable, *, annealed: bool = False, enumerate: str | None = None, **options: Any) -> Pair:
    sizes = {"input_dim": 6, "z_dim": 3, "emission_dim": 5, "transition_dim": 4, "rnn_dim": 7}
    net = load("dmm.py").DMM(**sizes, **options)
    lengths = torch.tensor([5, 3, 4, 2])
    sequences = torch.bernoulli(torch.full((4, 5, 6), 0.3))
    batch = poly.get_mini_batch(torch.arange(4), sequences, lengths)
    guide = net.guide
    if enumerate:
        guide = config_enumerate(guide, default=enumerate, num_samples=3, expand=False)
    weights = [0.1 * (step + 1) for step in range(8)] if annealed else [1.0]
    return net.model, guide, [call(*batch, weight) for weight in weights]


def scanvi(load: Callable) -> Pair:
    net = load("scanvi/scanvi.py").SCANVI(7, 3, 2.0, 1.0, latent_dim=4, scale_factor=1 / 70)
    counts = torch.poisson(torch.full((10, 7), 6.0))
    labels = torch.eye(3)[torch.arange(10) % 3]
    calls = [call(counts, None), call(counts, labels), call(counts.flip(0), None)]
    return net.model, config_enumerate(net.guide, "parallel", expand=True), calls


def lda(load: Callable) -> Pair:
    module = load("lda.py")
    args = Namespace(num_topics=3, num_words=11, num_docs=9, num_words_per_doc=5, layer_sizes="6-5")
    data = module.model(args=args)[2]
    guide = partial(module.parametrized_guide, module.make_predictor(args))
    return module.model, guide, [call(data, args=args, batch_size=4)]


def sparse_gamma(load: Callable, kind: str) -> Pair:
    module = load("sparse_gamma_def.py")
    net = module.SparseGammaDEF()
    net.top_width, net.mid_width, net.bottom_width, net.image_size = 5, 4, 3, 6
    guide = net.guide
    if kind == "auto":
        guide = AutoDiagonalNormal(net.model, init_loc_fn=init_to_feasible)
    elif kind == "easy":
        guide = module.MyEasyGuide(net.model)
    return net.model, guide, [call(torch.poisson(torch.full((7, 6), 3.0)))]


def sparse_regression(load: Callable) -> Pair:
    module = load("sparse_regression.py")
    hypers = dict.fromkeys(["alpha1", "alpha2", "alpha_obs"], 3.0)
    hypers |= dict.fromkeys(["expected_sparsity", "beta1", "beta2", "alpha3", "c", "beta_obs"], 1.0)
    x, y, *_ = module.get_data(N=12, P=5, S=3, Q=2)
    return module.model, AutoDelta(module.model, init_loc_fn=module.init_loc_fn), [call(x, y, hypers)]


def svi_torch(load: Callable) -> Pair:
    model = load("svi_torch.py").Model(20)
    covariates = torch.randn(20)
    calls = [call(c, 2 * c) for c in covariates.split(5)]
    return model, AutoNormal(model), calls


def eight_schools(load: Callable) -> Pair:
    module = load("eight_schools/svi.py")
    return module.model, module.guide, [call(module.data)]


def toy_mixture(load: Callable) -> Pair:
    module = load("toy_mixture_model_discrete_enumeration.py")
    prior, _, data = module.generate_data(15)
    return module.model, module.guide, [call(prior, data, 15)]


def autoname(load: Callable, name: str) -> Pair:
    module = load(f"contrib/autoname/{name}.py")
    numbers = torch.tensor([0.0, 1.0, 2.0, 20.0, 30.0, 40.0])
    if name == "mixture":
        return module.model, module.guide, [call(numbers, k=2)]
    if name == "scoping_mixture":
        return module.model, config_enumerate(module.guide, "parallel"), [call(2, numbers)]
    one = torch.tensor(1.0)
    tree = {"foo": one, "bar": [0 * one, one], "baz": {"noun": {"a": 4 * one, "b": 6 * one}, "verb": 2 * one}}
    return module.model, module.guide, [call(tree)]


def cevae() -> Pair:
    net = CEVAE(feature_dim=3, latent_dim=2, hidden_dim=5, num_layers=2, num_samples=3)
    x, t, y = torch.randn(8, 3), (torch.arange(8) % 2).to(torch.get_default_dtype()), torch.ones(8)
    net.whiten = torch.nn.Identity()
    return net.model, net.guide, [call(x, t, y, size=20)]


def cjs(load: Callable, number: int) -> Pair:
    model = load("capture_recapture/cjs.py").models[str(number)]
    guide = AutoDiagonalNormal(poutine.block(model, expose_fn=lambda msg: msg["name"][:3] in ("phi", "rho")))
    captures = torch.bernoulli(torch.full((9, 5), 0.5))
    return model, guide, [call(captures, torch.bernoulli(torch.full((9,), 0.5)) if number > 3 else None)]


def hmm(
    load: Callable,
    number: int,
    *,
    is_bound: bool = False,
    batch_size: int | None = 3,
    jit: bool = False,
    raftery_parameterization: bool = False,
) -> Pair:
    """Hidden Markov models; with the settings as arguments, as the example has them, or bound."""
    model = load("hmm.py").models[str(number)]
    args = Namespace(
        hidden_dim=4, nn_dim=5, nn_channels=2, jit=jit, raftery_parameterization=raftery_parameterization
    )
    settings = {"args": args, "batch_size": batch_size}
    guide = AutoDelta(poutine.block(model, expose_fn=lambda msg: msg["name"].startswith("probs_")))
    data = torch.bernoulli(torch.full((5, 4, 6), 0.4)), torch.tensor([4, 2, 3, 1, 3])
    if is_bound:
        return partial(model, **settings), partial(guide, **settings), [call(*data)]
    return model, guide, [call(*data, **settings)]


def mixed_hmm(load: Callable, group: str | None, individual: str | None) -> Pair:
    module = load("mixed_hmm/model.py")
    missing, shape = 1e-6, (3, 2, 4)  # individuals, groups, timesteps
    step, omega = torch.rand(shape) + 0.1, torch.rand(shape).clamp(0.1, 0.9)
    step[0, 0, 1] = omega[1, 1, 2] = missing
    config = {
        "MISSING": missing,
        "sizes": {"state": 3, "random": 2, "group": 2, "individual": 3, "timesteps": 4},
        "group": {"random": group},
        "individual": {"random": individual, "mask": torch.ones(3, 2, dtype=torch.bool)},
        "timestep": {"mask": torch.rand(shape) < 0.8},
        "observations": {"step": step, "angle": torch.rand(shape), "omega": omega},
    }
    return partial(module.model_generic, config), partial(module.guide_generic, config), [call()]
