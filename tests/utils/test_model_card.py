"""Cards of models: what they say of parts, data and scores, as text, HTML and Markdown."""

import pandas as pd
import pytest
import torch
from contexts import C, D, conditional, rows, semi_supervised
from torch import nn

import pyro_vae as pv

K, WIDTH = 2, 5
SUPPORTS = {
    "Bernoulli": "0 or 1",
    "ContinuousBernoulli": "numbers from 0 to 1",
    "Normal": "real numbers",
    "StudentT": "real numbers",
    "DiscretizedLogistic": "multiples of 1/255 in [0, 1]",
    "BetaBinomial": "whole numbers from 0 to 255",
    "Poisson": "whole numbers ≥ 0",
    "NegativeBinomial": "whole numbers ≥ 0",
}


def make(likelihood="Normal", features=6):
    return pv.VAE(
        prior=pv.priors.LearnedNormal(K),
        likelihood=getattr(pv.likelihoods, likelihood)(K, (features,), hidden_features=(WIDTH,)),
        guide=pv.guides.DiagonalNormal((features,), K, hidden_features=(WIDTH,)),
    )


@pytest.mark.parametrize("likelihood", SUPPORTS)
def test_the_values_of_the_data_are_said(likelihood):
    assert dict(make(likelihood).describe().rows)["data"] == f"x (N, 6), {SUPPORTS[likelihood]}"


def test_parts_and_their_numbers_of_parameters():
    vae = make()
    card = vae.describe()
    found = dict(card.rows)
    assert list(found) == ["prior", "likelihood", "guide", "data", "versions"]
    assert (
        "Normal(latent_dim=2, event_shape=(6,), hidden_features=(5,)): 51 parameters" in found["likelihood"]
    )
    assert found["guide"].endswith("59 parameters, weights 5 × 6, 4 × 5")
    total = sum(parameter.numel() for parameter in vae.parameters())
    assert card.title == f"VAE: {total} parameters, float32"
    assert make().double().describe().title.endswith("float64")
    assert f"torch {torch.__version__.partition('+')[0]}" in found["versions"]


def test_a_card_changes_nothing():
    vae = make()
    state = torch.get_rng_state()
    vae.describe()
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training


def test_contexts_and_classifiers_are_parts():
    found = dict(semi_supervised().describe().rows)
    assert found["classifier"].startswith(f"MLP(in_features={D}, out_features={C}")
    assert found["data"] == f"x (N, {D}), real numbers; y, classes 0 … {C - 1}, −1 where missing"
    assert dict(conditional().describe().rows)["data"].endswith(f"classes 0 … {C - 1}, or numbers (N, {C})")


def test_parts_of_a_users_own():
    class Likelihood(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(K, 3)

        def forward(self, z):
            return torch.distributions.Independent(torch.distributions.Poisson(self.layer(z).exp()), 1)

    def my_guide(x):
        raise NotImplementedError

    vae = pv.VAE(prior=pv.priors.StandardNormal(K), likelihood=Likelihood(), guide=my_guide)
    found = dict(vae.describe().rows)
    assert found["likelihood"] == "Likelihood: 9 parameters, weights 3 × 2"
    assert found["guide"] == "the function my_guide"
    assert "data" not in found


def test_scores_and_columns():
    frame = pd.DataFrame(rows().numpy(), columns=list("abcde"))
    vae = make(features=D)
    pv.fit(vae, frame, epochs=1, engine="eager", progress=False)
    report = pv.evaluate(vae, frame, num_particles=20, progress=False)
    found = dict(vae.describe(report).rows)
    assert found["columns"] == "a, b, c, d, e"
    assert found["log p(x), lower bound"] == f"{report.mean('log_evidence')} nats per datum, 7 data"
    assert found["active latent dimensions"] == f"{report.active_units} of {K}"
    assert "bits per dimension" not in found
    assert dict(vae.describe({"F1": 0.93}).rows)["F1"] == "0.93"
    with pytest.raises(TypeError, match="must be an Evaluation, what pyro_vae.evaluate returns"):
        vae.describe(0.93)


def test_forms_of_a_card():
    card = make().describe({"log p(x|y)": "<0"})
    lines = repr(card).splitlines()
    assert lines[0] == card.title
    assert len(lines) == len(card.rows) + 1
    assert "| log p(x\\|y) | <0 |" in card.to_markdown().splitlines()
    assert "log p(x|y)</td>" in card._repr_html_()
    assert "&lt;0</td>" in card._repr_html_()
