"""Sum out discrete sites that the model enumerates and the guide lacks: log p(x, z) = log Σ_y p(x, y, z).

Pyro runs the model with all values of such a site along a dimension of its own, left of the plates. The sum
over them is a contraction of the sites' log-densities, plate by plate, as in `TraceEnum_ELBO`.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pyro import poutine
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.packed import unpack
from torch import Tensor

from pyro_vae.objectives.sites import Site, Sites

__all__ = ["Sums", "enumerated_sites", "sum_out"]


def enumerated_sites(model_sites: Sites, guide_sites: Sites) -> list[str]:
    """Return the latent sites that the model marks to be enumerated in parallel, and the guide lacks."""
    return [
        name
        for name, site in model_sites.items()
        if name not in guide_sites
        and not site["is_observed"]
        and site["infer"].get("enumerate") == "parallel"
    ]


class Sums(NamedTuple):
    """What replaces the log-densities of sites that depend on enumerated values y.

    Attributes:
        names: The sites.
        log_prior: Terms whose sum is log Σ_y p(y) Π p(z|y), over latent ones.
        log_likelihood: Terms whose sum is log Σ_y p(y) Π p(z|y) Π p(x|y, z) less the above.
    """

    names: frozenset[str] = frozenset()
    log_prior: Sequence[Tensor] = ()
    log_likelihood: Sequence[Tensor] = ()


def sum_out(trace: poutine.Trace, enumerated: list[str]) -> Sums:
    """Sum over all values of the enumerated sites in a trace of the model, whose log-densities are known.

    The sums have the batch dimensions of the plates.
    """
    if not enumerated:
        return Sums()
    trace.pack_tensors()
    values = _dims_of_values(trace, enumerated)
    names = [
        name for name, site in trace.nodes.items() if name not in enumerated and values & set(_dims(site))
    ]
    of_z = [name for name in names if not trace.nodes[name]["is_observed"]]
    log_prior = _log_sum(trace, of_z, enumerated) if of_z else []
    log_joint = _log_sum(trace, names, enumerated)
    return Sums(frozenset(names), log_prior, [*log_joint, *(-term for term in log_prior)])


def _log_sum(trace: poutine.Trace, names: list[str], enumerated: list[str]) -> list[Tensor]:
    """Return terms whose sum is log Σ_y p(y) Π p(site|y)."""
    plates = trace.plate_to_symbol
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for name in [*enumerated, *names]:
        site = trace.nodes[name]
        ordinal = frozenset(plates[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)
        # a mask hides what is observed, but not that the probabilities of y sum to 1
        key = "unscaled_log_prob" if name in enumerated else "log_prob"
        factors.setdefault(ordinal, []).append(site["packed"][key])
    contracted = contract_tensor_tree(factors, _dims_of_values(trace, enumerated))
    return [unpack(term, trace.symbol_to_dim) for terms in contracted.values() for term in terms]


def _dims_of_values(trace: poutine.Trace, enumerated: Iterable[str]) -> set[str]:
    plates = set(trace.plate_to_symbol.values())
    return set().union(*(_dims(trace.nodes[name]) for name in enumerated)) - plates


def _dims(site: Site) -> str:
    return site["packed"]["log_prob"]._pyro_dims if "log_prob" in site.get("packed", {}) else ""
