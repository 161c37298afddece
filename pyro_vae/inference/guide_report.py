"""What is reported of a guide beside its model, and the error that says why it does not fit."""

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["DistributionReport", "GuideError", "GuideReport", "SiteReport"]


class DistributionReport(NamedTuple):
    """A site's distribution: its family and shapes."""

    family: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]


@dataclass(frozen=True)
class SiteReport:
    """What is known of one latent site of a pair.

    Args:
        name: The site's.
        status: "match", "missing" in the guide, "extra" in the guide, "auxiliary" to the guide, or "observed"
            by the model though the guide draws it.
        guide: The guide's distribution, or None.
        model: The model's distribution, or None.
        plates: Names of the guide's plates, the outermost first.
        support: What each element of the guide's draws satisfies.
        reparameterised: Whether the guide's draws carry gradients.
        analytic_kl: Whether the KL of the two distributions is known in closed form.
    """

    name: str
    status: str
    guide: DistributionReport | None
    model: DistributionReport | None
    plates: tuple[str, ...] = ()
    support: str = ""
    reparameterised: bool = False
    analytic_kl: bool = False


@dataclass(frozen=True)
class GuideReport:
    """What `check_guide` found; printed, a table.

    Args:
        sites: The latent sites of both.
        problems: Why the guide does not fit: empty if it does.
        estimators: From each estimator's name to why it is not valid for the pair; None if it is.
        without_gradient: Names of parameters that the ELBO does not depend on.
        unregistered: Shapes of parameters that the ELBO depends on but that no Pyro statement shows, as when
            `pyro.module` is forgotten: Pyro's SVI and `fit` do not train them.
    """

    sites: tuple[SiteReport, ...]
    problems: tuple[str, ...] = ()
    estimators: dict[str, str | None] = field(default_factory=dict)
    without_gradient: tuple[str, ...] = ()
    unregistered: tuple[tuple[int, ...], ...] = ()

    @property
    def mean_field(self) -> bool:
        """Whether the KL is the sum of the sites' KLs, as `TraceMeanField_ELBO` takes it to be."""
        return self.estimators.get("TraceMeanField_ELBO", "not tried") is None

    def __str__(self) -> str:
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
                "parameters that no Pyro statement shows, so that Pyro does not train them: of shapes "
                f"{', '.join(map(str, self.unregistered))}; call pyro.module, or make their module the guide"
            )
        return "\n".join(lines)


def _table(sites: tuple[SiteReport, ...]) -> list[str]:
    def cells(part: DistributionReport | None) -> list[str]:
        return [str(cell) for cell in part] if part else ["-"] * 3

    rows = [
        [
            "site",
            "status",
            "guide",
            "batch",
            "event",
            "model",
            "batch",
            "event",
            "plates",
            "support",
            "path",
            "KL",
        ]
    ]
    for site in sites:
        path, kl = (
            ("reparameterised" if site.reparameterised else "score function") if site.guide else "-",
            ("closed form" if site.analytic_kl else "sampled") if site.status == "match" else "-",
        )
        about_guide = [", ".join(site.plates) or "-", site.support or "-", path, kl]
        rows.append([site.name, site.status, *cells(site.guide), *cells(site.model), *about_guide])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


class GuideError(ValueError):
    """A guide that does not fit its model.

    Args:
        message: What is wrong, and what to change.
        report: What was found; None if the guide did not run.
    """

    def __init__(self, message: str, report: GuideReport | None = None):
        super().__init__(message)
        self.report = report
