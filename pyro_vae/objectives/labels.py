"""Names of estimators, for tables, figures and settings: Pyro's own have no repr."""

import copy
import inspect

from pyro.infer import ELBO

__all__ = ["family", "label"]


def label(estimator: ELBO) -> str:
    """Name an estimator by its class and the settings that differ from their defaults.

    Not by `max_plate_nesting`, which says something of the pair, and which Pyro's estimators change when
    they first see one.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> label(Trace_ELBO(max_plate_nesting=1)), label(Trace_ELBO(num_particles=5))
        ('Trace_ELBO()', 'Trace_ELBO(num_particles=5)')
    """
    if type(estimator).__repr__ is not object.__repr__:
        return repr(estimator)
    settings = [
        f"{name}={getattr(estimator, name)}"
        for name, parameter in inspect.signature(type(estimator)).parameters.items()
        if name != "max_plate_nesting"
        and isinstance(getattr(estimator, name, None), bool | int | float | str)
        and getattr(estimator, name) != parameter.default
    ]
    return f"{type(estimator).__name__}({', '.join(settings)})"


def family(estimator: ELBO) -> str:
    """Name an estimator but for its number of particles, S.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> family(Trace_ELBO(num_particles=5)) == family(Trace_ELBO())
        True
    """
    kind = copy.copy(estimator)
    kind.num_particles = "S"
    if isinstance(getattr(estimator, "estimator", None), ELBO):  # it is wrapped, as by KLWeighted
        kind.estimator = copy.copy(kind.estimator)
        kind.estimator.num_particles = "S"
    return label(kind)
