"""Values of arguments that are left out: what a call without them computes depends on each."""

import inspect

import pytest

import pyro_vae as pv
from pyro_vae.distributions import BetaBinomial, DiscretizedLogistic, FlowDistribution, build_flow

EVALUATION = {"binarize": None, "missing": None, "seed": 0, "max_plate_nesting": 1, "progress": True}
NETWORK = {"hidden_features": (400,), "activation": "relu", "network": None, "context_dim": 0}
DEFAULTS = {
    pv.evaluate: {"num_particles": 1000, "aggregate_size": 5000, "group": "auto", **EVALUATION},
    pv.annealed_importance_sampling: {
        "num_chains": 16,
        "num_temperatures": 1000,
        "num_leapfrog": 10,
        **EVALUATION,
    },
    pv.to_inference_data: {"num_samples": 200, "oversample": 1, **EVALUATION},
    pv.terms: {"num_particles": 1, "max_plate_nesting": 1},
    pv.IWAE: {"num_groups": 1, "max_plate_nesting": 1},
    pv.PIWAE: {"max_plate_nesting": 1},
    pv.CIWAE: {"max_plate_nesting": 1},
    pv.Renyi: {"max_plate_nesting": 1},
    pv.STL: {"num_particles": 1, "num_groups": 1, "max_plate_nesting": 1},
    pv.DReG: {"max_plate_nesting": 1},
    pv.VIMCO: {"max_plate_nesting": 1},
    pv.KLWeighted: {"free_bits": 0.0, "per": "dimension"},
    pv.guides.DiagonalNormal: {**NETWORK, "mask_input": False},
    pv.guides.FullCovarianceNormal: {**NETWORK, "mask_input": False},
    pv.guides.LowRankNormal: {"rank": 2},
    pv.guides.LowRankNormal.sizes: {"rank": 2},
    pv.guides.Mixture: {"num_components": 4},
    pv.guides.Mixture.sizes: {"num_components": 4},
    pv.guides.Flow: {"flow": "iaf", "num_context": 32, "num_transforms": 3, "flow_features": (64, 64)},
    pv.guides.Flow.sizes: {"num_context": 32},
    pv.guides.SemiAmortised: {"num_steps": 10, "step_size": 0.05, "num_particles": 1, "end_to_end": True},
    BetaBinomial: {"total_count": 255, "validate_args": None},
    pv.likelihoods.BetaBinomial: {"total_count": 255},
    DiscretizedLogistic: {"levels": 256, "validate_args": None},
    FlowDistribution: {"loc": 0.0, "scale": 1.0, "validate_args": None},
    build_flow: {"context": 0},
}


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda function: function.__qualname__)
def test_the_defaults_are_those_documented(function):
    parameters = inspect.signature(function).parameters
    defaults = {key: value.default for key, value in parameters.items() if value.default is not value.empty}
    assert defaults == DEFAULTS[function]
    assert [type(value) for value in defaults.values()] == [type(DEFAULTS[function][key]) for key in defaults]
