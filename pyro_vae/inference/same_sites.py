"""Do guide and model draw the same latent sites in a step, as they did in the first?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_vae.inference.guide_report import GuideError
from pyro_vae.objectives.sites import Program, guide_messenger

__all__ = ["naming_step", "with_same_sites"]


class _OtherSitesError(Exception):
    """Of no kind to which Pyro's traces add a table of shapes."""


@contextmanager
def naming_step(step: int | None = None) -> Iterator[None]:
    """Raise GuideError, with the number of the step, where a pair of `with_same_sites` has other sites."""
    try:
        yield
    except _OtherSitesError as error:
        raise GuideError(f"{error}" if step is None else f"step {step}: {error}") from None


def with_same_sites(model: Program, guide: Program, *, sums_out: bool) -> tuple[Program, Program]:
    """Return a pair that raises where a run of the guide, and of the model after it, draw different sites.

    Most of Pyro's estimators give a wrong bound then, with a warning, or a KeyError. Run the two within
    `naming_step`.

    Args:
        model: A Pyro model.
        guide: A Pyro guide.
        sums_out: Whether the estimator sums over sites that the model enumerates and the guide lacks.
    """
    if guide_messenger(guide) is not None:
        return model, guide
    of_model, of_guide = _Latent(), _Latent()

    def compare() -> None:
        for name, infer in of_model.sites.items():
            if name not in of_guide.sites and not (sums_out and infer.get("enumerate") == "parallel"):
                raise _OtherSitesError(_message("guide", "model", name))
        for name, infer in of_guide.sites.items():
            if name not in of_model.names and not infer.get("is_auxiliary"):
                raise _OtherSitesError(_message("model", "guide", name))

    return _followed(model, of_model, compare), _followed(guide, of_guide, lambda: None)


def _message(lacks: str, draws: str, name: str) -> str:
    return (
        f"the {lacks} has no site {name!r}, which the {draws} draws with this batch: both must draw the same "
        "latent sites with each batch. Draw it in both, within `with poutine.mask(mask=...):` if it counts "
        "for some of the examples alone"
    )


class _Latent(Messenger):
    """Note the latent sites of a run, as the program has them."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, dict[str, Any]] = {}  # what guides inference, by name
        self.names: set[str] = set()  # of observed sites, too

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) and not msg["infer"].get("_deterministic"):
            self.names.add(msg["name"])
            if not msg["is_observed"]:
                self.sites[msg["name"]] = msg["infer"]


def _followed(program: Program, latent: _Latent, at_end: Callable[[], None]) -> Program:
    def run(*args: Any, **kwargs: Any) -> Any:
        latent.sites, latent.names = {}, set()
        with latent:
            value = program(*args, **kwargs)
        at_end()
        return value

    run.__wrapped__ = program  # type: ignore[attr-defined]
    return run
