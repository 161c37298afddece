"""Parameters that a pair depends on, and whether an optimiser holds them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pyro_vae.inference.guide_fit import FittingPair
from pyro_vae.objectives.guide_problems import parameters
from pyro_vae.objectives.pair import stored_parameters
from pyro_vae.objectives.sites import sample_sites

__all__ = [
    "forgotten_by_model",
    "leaves",
    "untrained_parameters",
    "untrained_problem",
    "without_gradient",
]


def without_gradient(loss: Tensor, registered: dict[Tensor, str]) -> tuple[str, ...]:
    """Return the names of registered parameters that a loss does not depend on."""
    trainable = [parameter for parameter in registered if parameter.requires_grad]
    if not trainable:
        return ()
    gradients = torch.autograd.grad(loss, trainable, allow_unused=True, retain_graph=True)
    return tuple(registered[p] for p, g in zip(trainable, gradients, strict=True) if g is None or not g.any())


def leaves(loss: Tensor) -> list[Tensor]:
    """Return the leaf tensors that a backward pass from the loss reaches."""
    seen, waiting, leaves = set(), [loss.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            waiting += [parent for parent, _ in node.next_functions]
    return leaves


def forgotten_by_model(pair: FittingPair, held: Iterable[Tensor]) -> str | None:
    """Return a message for a tensor that the model depends on, but that no Pyro statement names, or None.

    It may be left untrained on purpose; but then it should not require a gradient.
    """
    registered = parameters(pair.guide_trace, pair.model_trace)
    known = {id(tensor) for tensor in [*held, *registered]}
    draws = {id(site["value"]) for site in sample_sites(pair.guide_trace).values()}
    for name, site in sample_sites(pair.model_trace).items():
        for leaf in leaves(site["fn"].log_prob(site["value"]).sum()):
            if id(leaf) not in known | draws:
                return (
                    f"the model's site {name!r} depends on a parameter of shape {tuple(leaf.shape)} that no "
                    "Pyro statement names and the optimiser does not hold: it is neither trained nor saved. "
                    "Name its module by pyro.module in the model, or freeze it with requires_grad_(False)"
                )
    return None


def untrained_problem(pair: FittingPair, held: Iterable[Tensor]) -> str | None:
    """Return a message for a parameter that a pair depends on and that is not among the tensors held.

    A parameter with a "param" site of a `VAE`, or one that the model takes from a module, may be omitted on
    purpose. One that `pyro.param` creates may not, and neither may the guide's parameters of a store or
    without a Pyro statement.
    """
    held = list(held)
    registered = parameters(pair.guide_trace, pair.model_trace)
    stored = {id(parameter) for parameter in stored_parameters(pair.model, pair.guide).values()}
    known = {id(tensor) for tensor in held} | {id(leaf) for leaf in registered if id(leaf) not in stored}
    draws = sample_sites(pair.guide_trace).values()
    terms = [site["value"].sum() + site["fn"].log_prob(site["value"]).sum() for site in draws]
    for leaf in [leaf for term in terms for leaf in leaves(term)]:
        if id(leaf) not in known:
            what = f"a parameter of shape {tuple(leaf.shape)} without a Pyro statement"
            fix = "name its module by pyro.module in the guide, or make that module the guide"
            if leaf in registered:
                what = f"the parameter {registered[leaf]!r} (of pyro.param or pyro.module)"
                fix = (
                    "run the guide once before you make the optimiser, if its first run creates its "
                    f"parameters, as in an autoguide; {fix}; train by pyro.infer.SVI"
                )
            return (
                f"the guide depends on {what}, but the optimiser does not hold it, so that it would not be "
                f"trained: {fix}; or freeze it with requires_grad_(False)"
            )
    created = stored - {id(leaf) for leaf in registered if isinstance(leaf, nn.Parameter)}
    waiting = created - {id(tensor) for tensor in held}
    names = [name for leaf, name in registered.items() if id(leaf) in waiting]
    return _untrained_message(names) if names else None


def untrained_parameters(trained: Iterable[Tensor], stored: Mapping[str, Tensor]) -> str | None:
    """Return a message if stored parameters are not among those of an optimiser, or None.

    To be called when a store has grown during a step: a parameter that the programs first met then is in no
    optimiser that was made before.

    Args:
        trained: The parameters of the optimiser.
        stored: The unconstrained parameters by name.

    Example:
        >>> untrained_parameters([], {"late": torch.zeros(2, requires_grad=True)})  # doctest: +ELLIPSIS
        "the optimiser does not hold 'late' (of pyro.param or pyro.module), ..."
    """
    held = {id(tensor) for tensor in trained}
    names = [
        name
        for name, parameter in stored.items()
        if parameter.requires_grad
        and id(parameter) not in held
        and not name.startswith("__baseline_avg")  # state of TraceGraph_ELBO, which no gradient moves
    ]
    return _untrained_message(names) if names else None


def _untrained_message(names: list[str]) -> str:
    return (
        f"the optimiser does not hold {', '.join(map(repr, names))} (of pyro.param or pyro.module), so that "
        "it would not be trained: run guide and model with such arguments first, as "
        "pair.make_parameters(*batch) before fit does; with pyro_vae.SVI, before you make the optimiser, or "
        "add it by optimizer.add_param_group; or train by pyro.infer.SVI"
    )
