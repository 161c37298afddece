"""Chunks of examples and particles, their progress, and weights that are not finite."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from solved import data, linear_gaussian

import pyro_vae as pv
from pyro_vae.evaluation import draws
from pyro_vae.evaluation.annealed_importance import AnnealedEvidence
from pyro_vae.evaluation.importance_weights import WeightSummary
from pyro_vae.evaluation.latents import AggregatePosterior
from pyro_vae.evaluation.result import PerDatum


@pytest.mark.parametrize(
    ("event_shape", "num_particles", "examples", "particles"),
    [
        ((3,), 7, 1170, 7),  # 8,192 draws // 7
        ((1, 28, 28), 7, 573, 7),  # 3 · 2²⁰ values in 4,012 draws, // 7
        ((1, 28, 28), 1000, 16, 250),  # at most 250 particles at once
        ((20_001,), 1000, 1, 157),  # 157 draws
        ((2**22,), 1000, 1, 1),
    ],
)
def test_the_sizes_of_chunks(event_shape, num_particles, examples, particles):
    """The draws of a seed depend on them, so that they are the same wherever a model is evaluated."""
    batches = SimpleNamespace(shape=(11, *event_shape))
    sizes = draws.chunk_sizes(batches, num_particles)
    assert sizes == (examples, particles)
    assert all(type(size) is int for size in sizes)


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "12"), (5, "12, 13, 14, 15, 16"), (6, "12, 13, 14, 15, 16, …")]
)
def test_five_examples_are_named_and_more_are_marked(count, shown):
    log_weight = torch.zeros(3, 8)
    log_weight[0, 1 : 1 + count] = torch.nan
    log_weight[2, 1] = -torch.inf
    message = f"for {count} of the examples 11 to 18, counted from 0: index {shown}; example 12 has 2 such"
    with pytest.raises(pv.NonFiniteError, match=message):
        draws.require_finite(log_weight, first_index=11)


class Bar:
    """Stands in for a progress bar."""

    def __init__(self, total, **options):
        self.total, self.done, self.options = total, 0, options

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count):
        self.done += count


@pytest.mark.parametrize("rows", [8, 8192])
def test_progress_ends_at_its_total(monkeypatch, rows):
    exact, vae = linear_gaussian()
    x, bars = data(exact, 7), []

    def progress_bar(total, **options):
        bars.append(Bar(total, **options))
        return bars[-1]

    for module in ("importance_sampling", "annealed_importance", "arviz_export"):
        monkeypatch.setattr(f"pyro_vae.evaluation.{module}.progress_bar", progress_bar)
    monkeypatch.setattr(draws, "_ROWS", rows)
    pv.evaluate(vae, x, num_particles=3, aggregate_size=5)
    pv.annealed_importance_sampling(vae, x, num_chains=3, num_temperatures=2, num_leapfrog=1)
    pv.to_inference_data(vae, x, num_samples=3, oversample=2)
    assert [bar.done for bar in bars] == [bar.total for bar in bars] == [7 * 3, 5**2, 2 * 7 * 2, 7]
    assert all(bar.options["shown"] is True for bar in bars)


@pytest.mark.parametrize(
    "result", [AggregatePosterior, AnnealedEvidence, draws.Chunk, pv.Evaluation, PerDatum, WeightSummary]
)
def test_results_of_tensors_are_compared_by_identity(result):
    """By value, the comparison of two tensors would raise, and the hash too."""
    fields = [torch.zeros(2)] * len(dataclasses.fields(result))
    one, other = result(*fields), result(*fields)
    assert one != other
    assert len({one, other}) == 2
