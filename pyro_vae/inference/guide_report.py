"""Report on the sites of a model and a guide, printed as a table; the error of a guide that does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pyro_vae.utils.display import aligned

__all__ = [
    "DistributionReport",
    "GuideError",
    "GuideReport",
    "SiteReport",
]


class DistributionReport(NamedTuple):
    """Family and shapes of a site's distribution."""

    family: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]


@dataclass(frozen=True)
class SiteReport:
    """Report on one latent site of a pair.

    Args:
        name: Name of the site.
        status: "match", "missing" (from the guide), "extra" (in the guide), "auxiliary" (in the guide), or
            "observed" (by the model, though the guide draws it).
        guide: The guide's distribution, or None.
        model: The model's distribution, or None.
        plates: Names of the guide's plates, outermost first.
        support: Constraint on each element of the guide's draws.
        reparameterised: Whether the guide's draws carry gradients.
        analytic_kl: Whether the KL of the two distributions has a closed form.
    """

    name: str
    status: str
    guide: DistributionReport | None
    model: DistributionReport | None
    plates: tuple[str, ...] = ()
    support: str = ""
    reparameterised: bool = False
    analytic_kl: bool = False


@dataclass(frozen=True, repr=False)
class GuideReport:
    """Result of `check_guide`, shown as a table.

    Args:
        sites: The latent sites of both.
        problems: Reasons why the guide does not fit, empty if it does.
        estimators: The reason why each estimator is not valid for the pair, by name, or None if it is valid.
        without_gradient: Names of parameters that the ELBO does not depend on.
        unregistered: Shapes of parameters that the ELBO depends on but that have no Pyro "param" site, for
            instance without `pyro.module`: Pyro's SVI and `fit` do not train them.
    """

    sites: tuple[SiteReport, ...]
    problems: tuple[str, ...] = ()
    estimators: dict[str, str | None] = field(default_factory=dict)
    without_gradient: tuple[str, ...] = ()
    unregistered: tuple[tuple[int, ...], ...] = ()

    @property
    def mean_field(self) -> bool:
        """Whether the KL is the sum of the KLs of the sites, as `TraceMeanField_ELBO` assumes."""
        return self.estimators.get("TraceMeanField_ELBO", "not tried") is None

    def __repr__(self) -> str:
        lines = ["the guide does not fit the model" if self.problems else "the guide fits the model"]
        lines += [f"  {problem}" for problem in self.problems]
        lines += _table(self.sites)
        if self.estimators:
            valid = (name for name, reason in self.estimators.items() if reason is None)
            lines.append(f"valid estimators: {', '.join(valid)}")
            for reason in dict.fromkeys(filter(None, self.estimators.values())):
                names = ", ".join(name for name, other in self.estimators.items() if other == reason)
                lines.append(f"not {names}: {reason}")
        if self.without_gradient:
            lines.append(f"parameters without gradient: {', '.join(self.without_gradient)}")
        if self.unregistered:
            lines.append(
                "parameters without a Pyro statement, which Pyro does not train, have the shapes "
                f"{', '.join(map(str, self.unregistered))}: call pyro.module, or make their module the guide"
            )
        return "\n".join(lines)


_COLUMNS = [
    *("site", "status", "guide", "batch", "event", "model", "batch", "event"),
    *("plates", "support", "path", "KL"),
]


def _table(sites: tuple[SiteReport, ...]) -> Iterator[str]:
    rows = []
    for site in sites:
        gradient, kl = (
            ("reparameterised" if site.reparameterised else "score function") if site.guide else "-",
            ("closed form" if site.analytic_kl else "sampled") if site.status == "match" else "-",
        )
        distributions = [str(cell) for part in (site.guide, site.model) for cell in part or ("-", "-", "-")]
        about_guide = [", ".join(site.plates) or "-", site.support or "-", gradient, kl]
        rows.append([site.name, site.status, *distributions, *about_guide])
    return aligned(_COLUMNS, rows, left=len(_COLUMNS))


class GuideError(ValueError):
    """Error of a guide that does not fit its model.

    Args:
        message: The problems and how to fix them.
        report: The report with these problems, or None if the guide raised an error.
    """

    def __init__(self, message: str, report: GuideReport | None = None):
        super().__init__(message)
        self.report = report
