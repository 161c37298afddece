"""Arguments of `SVI` as `pyro.infer.SVI` takes them: losses that are functions, and Pyro's keywords."""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any, ParamSpec

from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from torch import Tensor

from pyro_vae.objectives.estimators import Loss
from pyro_vae.objectives.sites import Program

__all__ = ["FunctionLoss", "as_estimator", "explain_pyro_keywords"]

_Arguments = ParamSpec("_Arguments")

_GRADIENT_METHODS = ("differentiable_loss", "loss_and_grads")
_EXPECTED = (
    "loss must be a pyro.infer.ELBO, such as Trace_ELBO() or TraceEnum_ELBO(), or a function "
    "loss(model, guide, *args) that returns a differentiable tensor"
)
_KEYWORDS = {
    "optim": "call it optimizer, a torch optimiser: SVI(model, guide, optimizer=..., loss=...)",
    "loss_and_grads": "pass the estimator itself as loss, or a function that returns a differentiable tensor",
    "num_steps": "call step in a loop",
    "num_samples": "draw samples by pyro.infer.Predictive",
}


class FunctionLoss(Loss):
    """Loss that a function computes, as Pyro's custom objectives do.

    Args:
        function: Takes the model, the guide and their arguments, and returns the loss: a tensor of one
            number, or a number if it calls `backward` itself.

    Raises:
        TypeError: When the loss is computed, if the function returns nothing.
        ValueError: When the loss is computed, if the function returns a tensor of several numbers.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> def annealed(model, guide, x, weight):
        ...     return weight * Trace_ELBO().differentiable_loss(model, guide, x)
        >>> FunctionLoss(annealed)
        FunctionLoss(annealed)
    """

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.__wrapped__ = function  # the name by which the guards of a graph find what the function reads

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        loss = self.__wrapped__(model, guide, *args, **kwargs)
        if loss is None:
            raise TypeError(f"{self!r} returned nothing: return the loss, a differentiable tensor")
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                f"{self!r} returned a tensor of shape {tuple(loss.shape)}: return one number, for example "
                "its sum()"
            )
        return loss

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        return self.differentiable_loss(model, guide, *args, **kwargs)

    def __repr__(self) -> str:
        name = getattr(self.__wrapped__, "__name__", type(self.__wrapped__).__name__)
        return f"FunctionLoss({name})"


def as_estimator(loss: Any) -> ELBO:
    """Return a loss as an estimator: an ELBO as it is, its method as that ELBO, a function as `FunctionLoss`.

    Raises:
        TypeError: If the loss is anything else, or a method of an ELBO that has no gradient.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> elbo = Trace_ELBO()
        >>> as_estimator(elbo.differentiable_loss) is elbo
        True
    """
    if isinstance(loss, ELBO):
        return loss
    if isinstance(loss, type):
        raise TypeError(f"{_EXPECTED}; got {loss.__name__} itself: call it")
    owner = loss.__self__ if isinstance(loss, MethodType) else None
    if isinstance(owner, ELBO):
        if loss.__name__ not in _GRADIENT_METHODS:
            raise TypeError(
                f"loss is the method {loss.__name__} of {type(owner).__name__}, which gives no gradient: "
                f"pass the {type(owner).__name__} itself"
            )
        return owner
    if isinstance(loss, ELBOModule):
        raise TypeError(f"{_EXPECTED}; got an ELBO called with a pair: pass the ELBO itself")
    if not callable(loss):
        raise TypeError(f"{_EXPECTED}; got {type(loss).__name__}")
    return FunctionLoss(loss)


def explain_pyro_keywords(make: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Decorate the constructor of `SVI` to say what stands for a keyword of `pyro.infer.SVI`.

    Raises:
        TypeError: When called with such a keyword.

    Example:
        >>> from pyro_vae import SVI
        >>> SVI(print, print, optim=None, loss=None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        TypeError: SVI has no argument 'optim' of pyro.infer.SVI: call it optimizer, a torch optimiser: ...
    """

    @wraps(make)
    def explained(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        for name in kwargs:
            if name in _KEYWORDS:
                raise TypeError(f"SVI has no argument {name!r} of pyro.infer.SVI: {_KEYWORDS[name]}")
        make(*args, **kwargs)

    return explained
