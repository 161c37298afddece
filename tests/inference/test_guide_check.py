"""Reports and errors of `check_guide`.

    uv run python tests/inference/test_guide_check.py

prints the messages for deliberately broken guides, as listed in broken_guides.txt.
"""

import dataclasses
import functools
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal, AutoNormalMessenger
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inference.guide_check import GuideError, check_guide, check_training, untrained_parameters
from pyro_vae.networks import positive

EVENT, K, N = (2, 3), 4, 5


def make_vae(guide: Any = None, prior: nn.Module | None = None) -> pv.VAE:
    return pv.VAE(
        prior=prior or pv.priors.StandardNormal(K),
        likelihood=pv.likelihoods.Normal(K, EVENT, hidden_features=(7,)),
        guide=guide or pv.guides.DiagonalNormal(EVENT, K, hidden_features=(6,)),
    )


class OwnGuide(nn.Module):
    """A user-defined guide with a given family and sizes, which may be wrong."""

    def __init__(self, family: Callable[[Tensor, Tensor], Any], outputs: int = 2 * K, inputs: int = 6):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.family = family

    def forward(self, x: Tensor) -> Any:
        return self.family(*self.linear(x.flatten(1)).chunk(2, -1))


def normal(loc: Tensor, raw: Tensor) -> Any:
    return dist.Normal(loc, positive(raw)).to_event(1)


def sampling(name: str, *, plate: bool = True, **infer: Any) -> Callable[[Tensor], Any]:
    """A Pyro guide function that draws a site of a given name, inside or outside the data plate."""

    def guide(x: Tensor) -> None:
        q = dist.Normal(torch.zeros(len(x), K), 1.0).to_event(1)
        if plate:
            with pyro.plate("data", len(x)):
                pyro.sample(name, q, infer=infer)
        else:
            pyro.sample(name, q)

    return guide


def observed_too(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(N, K), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.zeros(N, *EVENT), 1.0).to_event(2))


def nan_network() -> nn.Module:
    guide = OwnGuide(normal)
    nn.init.constant_(guide.linear.bias, float("nan"))
    return guide


BROKEN: dict[str, Callable[[], Any]] = {
    "another event shape of the data": lambda: OwnGuide(normal, inputs=8),
    "another latent size": lambda: OwnGuide(normal, outputs=2 * 3),
    "another site name": lambda: sampling("latent"),
    "no plate": lambda: sampling("z", plate=False),
    "a forgotten .to_event": lambda: OwnGuide(lambda loc, raw: dist.Normal(loc, positive(raw))),
    "a scale that is not positive": lambda: OwnGuide(
        lambda loc, _: dist.Normal(loc, 0 * loc - 1).to_event(1)
    ),
    "NaN from the network": nan_network,
    "another dtype": lambda: OwnGuide(normal).double(),
    "another device": lambda: pv.guides.DiagonalNormal(EVENT, K).to("meta"),
    "no distribution": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, K)),
    "draws of another dtype": lambda: OwnGuide(lambda loc, raw: normal(loc.double(), raw.double())),
    "a discrete guide": lambda: OwnGuide(lambda logits, _: dist.Bernoulli(logits=logits).to_event(1)),
    "a site that the model observes": lambda: observed_too,
    "draws that overflow": lambda: OwnGuide(lambda loc, raw: normal(9e38 + loc, raw)),
    "more draws than data": lambda: OwnGuide(lambda loc, raw: normal(loc.expand(3, N, K), raw)),
    "an error of its own": lambda: OwnGuide(lambda loc, raw: {}["missing"]),
}
LISTING = Path(__file__).with_name("broken_guides.txt")


def error_of(name: str) -> GuideError:
    vae = make_vae(BROKEN[name]())
    with pytest.raises(GuideError) as caught:
        check_guide(vae.model, vae.guide, torch.randn(N, *EVENT))
    return caught.value


def entry(name: str) -> str:
    """A guide's entry in the listing, without torch's error messages."""
    message = re.sub(r"RuntimeError: .*", "RuntimeError: ...", str(error_of(name)))
    return f"{name}\n" + textwrap.indent(message, "    ")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_guides_raise_the_listed_messages(name):
    listed = {text.partition("\n")[0]: text for text in LISTING.read_text().rstrip().split("\n\n")}
    assert entry(name) == listed[name]


@pytest.mark.parametrize("name", BROKEN)
def test_the_error_carries_the_report(name):
    error = error_of(name)
    if error.report is None:
        assert "fail" in str(error) or "entries" in str(error)
    else:
        assert "\n".join(error.report.problems) == str(error)
        assert str(error.report).startswith("the guide does not fit the model")


@pytest.mark.parametrize("name", [n for n in BROKEN if n not in ("NaN from the network", "another device")])
def test_no_broken_guide_is_evaluated_or_trained(name):
    """Except with a parameter that is NaN or on the meta device: `evaluate` checks these first."""
    vae, x = make_vae(BROKEN[name]()), torch.randn(N, *EVENT)
    svi = pv.SVI(vae.model, vae.guide, torch.optim.Adam(vae.parameters()), Trace_ELBO())
    for use in (svi.step, lambda x: pv.evaluate(vae, x, num_particles=3, progress=False)):
        with pytest.raises(GuideError) as caught:
            use(x)
        found, expected = (  # the batch may have another size
            re.sub(r"\d+", "n", str(error).partition(":")[0]) for error in (caught.value, error_of(name))
        )
        assert found == expected


@pytest.mark.parametrize("name", [n for n in BROKEN if n != "another device"])
@pytest.mark.parametrize(
    "estimator",
    [
        Trace_ELBO(num_particles=2, vectorize_particles=True),
        TraceEnum_ELBO(),
        TraceEnum_ELBO(max_plate_nesting=1),
        pv.IWAE(2),
    ],
    ids=["particles", "enumeration, guessed plates", "enumeration", "IWAE"],
)
def test_a_broken_guide_is_explained_under_every_tracing(name, estimator):
    vae = make_vae(BROKEN[name]())
    with pytest.raises(GuideError) as caught:
        check_training(vae.model, vae.guide, estimator, vae.parameters(), torch.randn(N, *EVENT))
    assert str(caught.value).split()[:4] == str(error_of(name)).split()[:4]


def test_too_many_plates_for_the_estimator_name_its_argument():
    def program(x: Tensor, *, observe: bool = False) -> None:
        with pyro.plate("rows", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pair = functools.partial(program, observe=True), program
    with pytest.raises(ValueError, match="pass max_plate_nesting=2"):
        check_training(*pair, pv.IWAE(2), [], torch.randn(N))
    check_training(*pair, pv.IWAE(2, max_plate_nesting=2), [], torch.randn(N))


def test_errors_of_terms_point_to_check_guide():
    vae = make_vae(BROKEN["another dtype"]())
    with pytest.raises(RuntimeError) as caught:
        pv.terms(vae.model, vae.guide, torch.randn(N, *EVENT))
    assert "check_guide" in caught.value.__notes__[0]


def test_a_forgotten_to_event_is_found_if_sizes_agree():
    vae = make_vae(OwnGuide(lambda loc, raw: dist.Normal(loc, positive(raw))))
    with pytest.raises(
        GuideError, match=r"has batch shape \(4, 4\) and event shape \(\).*add .to_event\(1\)"
    ):
        check_guide(vae.model, vae.guide, torch.randn(K, *EVENT))


def test_missing_and_extra_sites_are_in_the_report():
    report = error_of("another site name").report
    assert [(site.name, site.status) for site in report.sites] == [("z", "missing"), ("latent", "extra")]
    assert report.sites[0].guide is None
    assert report.sites[0].model == ("Normal", (N,), (K,))
    assert report.sites[1].model is None
    assert not report.mean_field


def two_sites(*names: str) -> Callable[[Tensor], None]:
    """A program of two latent sites of different shapes."""

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name, size in zip(names, (3, K), strict=True):
                pyro.sample(name, dist.Normal(torch.zeros(len(x), size), 1.0).to_event(1))

    return program


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("top", "codes"), "the guide draws 'codes', expected 'code': rename 'codes' to 'code'"),
        (
            ("topp", "codes"),
            "the guide draws 'topp', expected 'top': rename 'topp' to 'top'\n"
            "the guide draws 'codes', expected 'code': rename 'codes' to 'code'",
        ),
    ],
)
def test_a_misspelt_site_gives_one_message(names, message):
    with pytest.raises(GuideError) as caught:
        check_guide(two_sites("top", "code"), two_sites(*names), torch.zeros(N))
    assert str(caught.value) == message


def test_of_two_further_sites_the_one_of_a_similar_name_is_the_misspelt_one():
    def program(*names: str) -> Callable[[Tensor], None]:
        def draw(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                for name in names:
                    pyro.sample(name, dist.Normal(torch.zeros(len(x), K), 1.0).to_event(1))

        return draw

    with pytest.raises(GuideError) as caught:
        check_guide(program("code"), program("other", "codes"), torch.zeros(N))
    assert "the guide draws 'codes', expected 'code': rename 'codes' to 'code'" in str(caught.value)
    assert "the guide draws 'other', which the model does not" in str(caught.value)


@pytest.mark.parametrize("names", [("codes", "topp"), ("a", "b")], ids=["of another shape", "unlike"])
def test_unrelated_names_are_not_taken_for_misspellings(names):
    with pytest.raises(
        GuideError, match="has no site 'top'.*\n.*has no site 'code'.*\n.*draws.*\n.*draws"
    ) as caught:
        check_guide(two_sites("top", "code"), two_sites(*names), torch.zeros(N))
    assert "rename 'codes'" not in str(caught.value)


@pytest.mark.parametrize(("p_dim", "q_dim"), [(-2, -1), (-1, -2)])
def test_a_plate_at_another_dimension_is_another_plate(p_dim, q_dim):
    def program(dim: int, *, is_model: bool) -> Callable[[Tensor], None]:
        def draw(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=dim):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                if is_model:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(N, 1) if dim < -1 else x)

        return draw

    message = rf"lies in plates \[\('data', {q_dim}, {N}\)\], expected \[\('data', {p_dim}, {N}\)\]"
    with pytest.raises(GuideError, match=message):
        check_guide(program(p_dim, is_model=True), program(q_dim, is_model=False), torch.zeros(N))


def in_plate(name: str, *options: Any, enumerate_: str | None = None, **keywords: Any) -> tuple[Any, Any]:
    """A model of a coin and a number per example in the plate "data", and its guide in another plate."""

    def model(x: Tensor, **subsample: Any) -> None:
        with pyro.plate("data", **{"size": len(x), **subsample}) as index:
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x: Tensor, **subsample: Any) -> None:
        with pyro.plate(name, *options, **({"size": len(x), **subsample} | keywords)) as index:
            pyro.sample("z", dist.Bernoulli(logits=x[index]), infer={"enumerate": enumerate_})

    return model, guide


def drawing(q: Any) -> Callable[[Tensor], None]:
    """A program that draws one latent variable "z" from q and observes x, if q is a prior."""

    def program(x: Tensor) -> None:
        pyro.sample("z", q)

    return program


def observing(p: Any) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        pyro.sample("z", p)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return model


OUTSIDE = {  # prior, guide, what the message says
    "real for positive": (
        dist.Gamma(2.0, 1.0),
        dist.Normal(-9.0, 1.0),
        r"its draw = -\d.* of the model's Gamma, GreaterThanEq\(lower_bound=0.0\); 1 of 1 values do",
    ),
    "real for half of a normal": (
        dist.HalfNormal(1.0),
        dist.Normal(-9.0, 1.0),
        r".* the model's HalfNormal, ",
    ),
    "real for positive, seldom outside": (
        dist.Gamma(2.0, 1.0),
        dist.Normal(1.0, 0.4),
        r"its draw\[\d+\] = -0.\d+ lies outside .* Gamma, .*; \d+ of 1000 values do",
    ),
    "positive for an interval": (dist.Uniform(0.0, 2.0), dist.LogNormal(0.0, 1.0), r".*Interval.* of 1000"),
    "real for counts": (dist.Poisson(2.0), dist.Normal(3.0, 1.0), r".*IntegerGreaterThan.*; 1 of 1 values"),
    "entries of a simplex that do not add up": (
        dist.Dirichlet(torch.ones(3)),
        dist.Beta(torch.ones(3), 1.0).to_event(1),
        r"its draw = \[0.\d+, 0.\d+, 0.\d+\] lies outside .* Dirichlet, Simplex\(\); 1 of 1 events of shape",
    ),
    "bounds of their own": (
        dist.Uniform(torch.zeros(3), torch.tensor([1.0, 2.0, 1.0])).to_event(1),
        dist.Uniform(torch.zeros(3), 2.0).to_event(1),
        r"its draw.* lies outside the support of the model's Uniform",
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_draws_outside_the_models_support_raise(name):
    prior, guide, message = OUTSIDE[name]
    with pytest.raises(GuideError, match=f"the guide's site 'z': {message}.*: use a distribution with that"):
        check_guide(observing(prior), drawing(guide), torch.randn(N))


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        (dist.Gamma(2.0, 1.0), dist.LogNormal(0.0, 1.0)),
        (dist.Uniform(0.0, 10.0), dist.Normal(5.0, 0.1)),
        (dist.Dirichlet(torch.ones(3)), dist.Delta(torch.tensor([0.2, 0.5, 0.3]), event_dim=1)),
        (dist.LKJCholesky(3, 1.0), dist.Delta(torch.eye(3), event_dim=2)),
        (dist.OneHotCategorical(torch.ones(3)), dist.Delta(torch.eye(3)[1], event_dim=1)),
        (dist.Bernoulli(0.3), dist.Delta(torch.tensor(1.0))),
        (dist.Normal(0.0, 1.0), dist.Gamma(1.0, 1.0)),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), dist.Normal(torch.zeros(2), 1.0).to_event(1)),
    ],
)
def test_any_distribution_that_draws_within_the_support_fits(prior, guide):
    assert check_guide(observing(prior), drawing(guide), torch.randn(N)).problems == ()


def test_a_support_that_depends_on_an_earlier_draw_is_that_of_the_same_draw():
    def program(x: Tensor, *, observe: bool) -> None:
        top = pyro.sample("top", dist.LogNormal(0.0, 2.0))
        z = pyro.sample("z", dist.Uniform(0.0, top) if observe else dist.Delta(top / 2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x) if observe else None

    pair = (lambda x: program(x, observe=True)), (lambda x: program(x, observe=False))
    assert check_guide(*pair, torch.randn(N)).problems == ()


def test_draws_of_low_precision_fit_where_torch_converts_them():
    vae = make_vae(OwnGuide(normal))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vae.encode(torch.randn(N, *EVENT)).sample().dtype == torch.bfloat16
        model = in_plate("data")[0]
        check_guide(model, lambda x: in_double_or_half(x, torch.bfloat16), torch.randn(N))
    check_guide(model, lambda x: in_double_or_half(x, torch.float64), torch.randn(N))


def in_double_or_half(x: Tensor, dtype: torch.dtype) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.5, dtype=dtype)))


def test_a_program_without_parameters_fits():
    model, guide = observing(dist.Normal(0.0, 1.0)), drawing(dist.Normal(0.0, 1.0))
    report = check_guide(model, guide, torch.randn(N))
    assert (report.problems, report.without_gradient, report.unregistered) == ((), (), ())
    for estimator in (Trace_ELBO(), TraceEnum_ELBO(max_plate_nesting=1), TraceMeanField_ELBO()):
        check_training(model, guide, estimator, [], torch.randn(N))


def test_an_error_of_the_model_at_the_guides_draws_says_so():
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        assert z < 5
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(AssertionError) as caught:
        check_guide(model, drawing(dist.Normal(9.0, 0.1)), torch.tensor(0.0))
    assert caught.value.__notes__ == ["The model raised this error when it was run at the guide's draws."]


def test_an_estimator_that_raises_is_not_valid_and_the_others_are():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            assert z.dim() == 1, "one particle"
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    report = check_guide(model, guide, torch.randn(N))
    assert report.estimators["Trace_ELBO"] is None
    assert report.estimators["IWAE"].startswith("it raises AssertionError: one particle")


def test_a_guide_that_fails_with_an_improper_prior_is_explained():
    def guide(x: Tensor) -> None:
        raise KeyError("missing")

    model = observing(dist.ImproperUniform(torch.distributions.constraints.positive, (), ()))
    with pytest.raises(GuideError, match="the guide fails, given data of shape .* with KeyError: 'missing'"):
        check_guide(model, guide, torch.randn(N))


def test_a_plate_of_another_name_rules_out_estimators():
    model, guide = in_plate("rows")
    report = check_guide(model, guide, torch.randn(N))
    reason = (
        "the guide's site 'z' lies in the plate 'rows', the model's in 'data': rename the guide's to 'data'"
    )
    assert report.estimators["TraceEnum_ELBO"].startswith(reason)
    assert report.estimators["VIMCO"].startswith(reason)
    assert report.estimators["Trace_ELBO"] is None
    with pytest.raises(ValueError, match=r"TraceEnum_ELBO\(\) is not valid .*rename the guide's to 'data'"):
        pv.SVI(model, guide, torch.optim.SGD([torch.zeros(1)], 0.1), TraceEnum_ELBO()).step(torch.randn(N))


@pytest.mark.filterwarnings("ignore:Found plate statements in guide")
def test_enumeration_is_wrong_for_a_plate_of_another_name():
    x, loss = torch.randn(N), {}
    for name in ("data", "rows"):
        model, guide = in_plate(name, enumerate_="parallel")
        loss[name] = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    q = dist.Bernoulli(logits=x)
    terms = [
        q.log_prob(z).exp()
        * (dist.Bernoulli(0.4).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - q.log_prob(z))
        for z in torch.eye(2)[:, :1]
    ]
    assert loss["data"] == pytest.approx(-float(sum(terms).sum()), abs=1e-4)
    assert loss["rows"] > loss["data"] + 1


def test_a_plate_that_subsamples_other_data_than_the_models_raises():
    model, guide = in_plate("rows")
    x = torch.randn(50)
    with pytest.raises(
        GuideError, match="'rows' subsamples 7 of 50 examples, the model's 'data' .*rename 'rows' to 'data'"
    ):
        check_guide(model, guide, x, subsample_size=7)
    check_guide(model, guide, x, subsample=torch.arange(3, 10))  # the same in both, with any names
    check_guide(*in_plate("data"), x, subsample_size=7)


def test_a_plate_of_another_size_than_the_models_raises():
    x = torch.randn(50)
    model, guide = in_plate("data", size=7)
    with pytest.raises(
        GuideError, match=r"is scaled to 7 examples by its plate 'data', expected 50 .*, 50 and 7 \(train"
    ):
        check_guide(model, guide, x, subsample_size=7)
    scaled = pyro.poutine.scale(guide, 50 / 7)
    assert check_guide(model, scaled, x, subsample_size=7).problems == ()


def test_two_pairs_or_a_model_without_a_guide_raise_with_the_right_call():
    vae, x = make_vae(), torch.randn(N, *EVENT)
    optimizer = torch.optim.Adam(vae.parameters())
    for call, wrong in {
        r"SVI\(pair, optimizer, loss\) or ": lambda m, g: pv.SVI(m, g, optimizer, Trace_ELBO()),
        r"compare_estimators\(pair, x, estimators\) or ": lambda m, g: pv.compare_estimators(
            m, g, x, [Trace_ELBO()]
        ),
        r"check_guide\(pair, x\) or ": lambda m, g: check_guide(m, g, x),
        r"terms\(pair, x\) or ": lambda m, g: pv.terms(m, g, x),
    }.items():
        with pytest.raises(TypeError, match=f"expected one pair; got two, a VAE twice: call {call}"):
            wrong(vae, vae)
        with pytest.raises(TypeError, match=f"expected a model and a guide, .*: call {call}"):
            wrong(vae.model, None)


def test_data_that_are_not_a_tensor_have_no_shape():
    vae = make_vae()
    with pytest.raises(
        GuideError,
        match="before it draws 'z' with TypeError: .* must be a tensor; got list: convert with torch",
    ):
        check_guide(two_sites("z", "y"), vae.guide, [1.0])


def test_the_report_of_a_fitting_guide():
    vae = make_vae()
    report = check_guide(vae.model, vae.guide, torch.randn(N, *EVENT))
    (site,) = report.sites
    assert dataclasses.astuple(site) == (
        *("z", "match", ("Normal", (N,), (K,)), ("Normal", (N,), (K,)), ("data",), "Real()", True, True),
    )
    assert report.mean_field
    assert set(report.estimators.values()) == {None}
    assert report.problems == report.without_gradient == report.unregistered == ()
    lines = str(report).splitlines()
    assert lines[0] == "the guide fits the model"
    assert re.sub(" +", " ", lines[2]) == (
        "z match Normal (5,) (4,) Normal (5,) (4,) data Real() reparameterised closed form"
    )
    assert lines[3] == f"valid estimators: {', '.join(report.estimators)}"
    assert len(report.estimators) == 11
    assert len(lines) == 4


def test_a_sampled_kl_is_reported():
    vae = make_vae(prior=pv.priors.Mixture(K))
    report = check_guide(vae.model, vae.guide, torch.randn(N, *EVENT))
    assert not report.sites[0].analytic_kl
    assert "sampled" in str(report)


def test_a_score_function_guide_rules_out_path_gradients():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logit + x))

    report = check_guide(model, guide, torch.randn(N))
    assert not report.sites[0].reparameterised
    valid = {name for name, reason in report.estimators.items() if reason is None}
    assert valid == {"Trace_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO", "VIMCO"}
    assert "site 'z' is not reparameterised" in report.estimators["DReG"]
    assert "not DReG: DReG(2) needs draws that carry gradients" in str(report)
    assert report.without_gradient == ()  # through the score function


def test_a_bottom_up_guide_rules_out_only_the_mean_field_estimator():
    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(top, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("top", dist.Normal(z, 1.0))

    report = check_guide(model, guide, torch.randn(N))
    assert [site.name for site in report.sites] == ["top", "z"]
    assert [name for name, reason in report.estimators.items() if reason is not None] == [
        "TraceMeanField_ELBO"
    ]
    assert "draws 'z' given 'top'" in report.estimators["TraceMeanField_ELBO"]
    assert not report.mean_field


def test_a_global_latent_rules_out_all_but_pyros_estimators():
    def model(x):
        shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shared, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("shared", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    report = check_guide(model, guide, torch.randn(N))
    assert report.estimators["TraceMeanField_ELBO"] is None
    assert "'shared' lies outside the data plate" in report.estimators["IWAE"]


@pytest.mark.parametrize("make", [AutoNormal, AutoLowRankMultivariateNormal])
def test_pyros_autoguides_fit(make):
    vae = make_vae()
    guide = make(vae.model)
    report = check_guide(vae.model, guide, torch.randn(N, *EVENT))
    assert not list(guide.parameters())  # not initialised, so that another batch size fits too
    assert check_guide(vae.model, guide, torch.randn(N + 2, *EVENT)).problems == ()
    assert report.estimators["Trace_ELBO"] is None
    assert {site.status for site in report.sites} == {"match", "auxiliary"}
    assert len(pyro.get_param_store()) == 0


def test_a_value_that_both_observe_is_auxiliary_if_it_is_marked():
    def program(x, **infer):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x, infer=infer)

    def guide(x):
        program(x, is_auxiliary=True)

    report = check_guide(program, guide, torch.randn(N))
    assert {site.name: site.status for site in report.sites} == {"z": "match", "x": "auxiliary"}
    assert report.problems == ()
    with pytest.raises(GuideError, match="the guide draws 'x', which the model observes"):
        check_guide(program, program, torch.randn(N))


def test_a_reason_against_several_estimators_is_printed_once():
    vae = make_vae()
    report = check_guide(vae.model, AutoLowRankMultivariateNormal(vae.model), torch.randn(N, *EVENT))
    assert str(report).count("lies outside the data plate") == 1
    assert "not IWAE, PIWAE, CIWAE, Renyi, STL, DReG, VIMCO: " in str(report)


def test_parameters_without_gradient_are_named():
    guide = OwnGuide(normal)
    guide.forgotten = nn.Linear(2, 3)
    guide.frozen = nn.Linear(2, 3).requires_grad_(False)
    vae = make_vae(guide)
    report = check_guide(vae.model, vae.guide, torch.randn(N, *EVENT))
    assert report.without_gradient == ("posterior.forgotten.weight", "posterior.forgotten.bias")
    assert "without gradient: posterior.forgotten.weight" in str(report)


def test_parameters_without_a_pyro_statement_are_reported():
    hidden = OwnGuide(normal)
    report = check_guide(make_vae().model, make_vae(hidden.forward).guide, torch.randn(N, *EVENT))
    assert sorted(report.unregistered) == [(2 * K,), (2 * K, 6)]
    assert "without a Pyro statement, which Pyro does not train, have the shapes" in str(report)

    def registered(x):
        pyro.module("hidden", hidden)
        return hidden(x)

    vae = make_vae(registered)
    assert check_guide(vae.model, vae.guide, torch.randn(N, *EVENT)).unregistered == ()


@pytest.fixture
def store():
    yield pyro.get_param_store()
    pyro.clear_param_store()


def test_parameters_first_met_after_the_optimiser_was_made_are_named(store):
    def guide(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.param("a", torch.tensor(0.0))
        if y is not None:
            a = a + pyro.param("b", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a, 1.0))

    x = torch.randn(N)
    guide(x)
    trained = [parameter for _, parameter in store.named_parameters()]
    assert untrained_parameters(trained, dict(store.named_parameters())) is None
    guide(x, x)
    stored = dict(store.named_parameters())
    message = untrained_parameters(trained, stored)
    assert message.startswith("the optimiser does not hold 'b' (of pyro.param")
    assert "optimizer.add_param_group" in message
    assert untrained_parameters([*trained, stored["b"]], stored) is None
    pyro.module("frozen", nn.Linear(2, 3).requires_grad_(False).eval())
    assert untrained_parameters([*trained, stored["b"]], dict(store.named_parameters())) is None


def test_a_parameter_that_the_model_creates_is_trained_or_raises(store):
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.randn(N)
    with pytest.raises(ValueError, match="the optimiser does not hold 'loc' .* run guide and model"):
        check_training(model, guide, Trace_ELBO(), [], x)
    model(x)
    check_training(model, guide, Trace_ELBO(), [store["loc"].unconstrained()], x)
    with pytest.raises(ValueError, match="the optimiser does not hold 'loc'"):
        check_training(model, guide, Trace_ELBO(), [], x)

    decoder = nn.Linear(1, 1)  # of a module: a part of the model may rest on purpose

    def of_a_module(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(decoder(z[:, None])[:, 0], 1.0), obs=x)

    check_training(of_a_module, guide, Trace_ELBO(), [], x)


def test_a_guide_that_runs_the_model_itself_is_for_pyros_estimators(store):
    model = make_vae().model
    report = check_guide(model, AutoNormalMessenger(model), torch.randn(N, *EVENT))
    assert report.problems == ()
    assert report.estimators["Trace_ELBO"] is None
    assert report.estimators["IWAE"].startswith("the guide runs the model itself")


def test_the_check_has_no_side_effects():
    guide = OwnGuide(normal)
    guide.linear = nn.Sequential(nn.Linear(6, 2 * K), nn.BatchNorm1d(2 * K), nn.Dropout(0.5))
    vae, x = make_vae(guide), torch.randn(N, *EVENT)
    (vae.likelihood.network[1].weight.sum() * 2).backward()
    state = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in vae.parameters()]
    kept = pyro.param("kept", torch.tensor(3.0))
    random_state = torch.get_rng_state()
    try:
        with pyro.poutine.trace() as tracer:
            check_guide(vae.model, vae.guide, x)
            with pytest.raises(GuideError):
                check_guide(vae.model, sampling("latent"), x)
        assert not tracer.trace.nodes
        assert torch.equal(torch.get_rng_state(), random_state)
        assert pyro.param("kept") is kept
        assert list(pyro.get_param_store().keys()) == ["kept"]
    finally:
        pyro.clear_param_store()
    assert all(torch.equal(tensor, state[name]) for name, tensor in vae.state_dict().items())
    for parameter, gradient in zip(vae.parameters(), gradients, strict=True):
        assert gradient is None if parameter.grad is None else torch.equal(parameter.grad, gradient)


def test_an_error_of_the_model_is_not_a_guide_error():
    vae = make_vae()
    with pytest.raises(ValueError, match="x must have shape") as caught:
        check_guide(vae.model, vae.guide, torch.randn(N, 7))
    assert not isinstance(caught.value, GuideError)


if __name__ == "__main__":
    print("\n\n".join(entry(name) for name in BROKEN))
