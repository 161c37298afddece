"""Machine, date and package versions of a benchmark."""

import datetime
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("pyro_vae", "torch", "pyro-ppl", "numpyro", "jax", "jaxlib", "pythae")


def describe() -> dict:
    """Return machine, date and versions, for the head of a table."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load before": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def head(facts: dict) -> str:
    """Return two lines of text for the head of a page."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    where = f"{facts['processor']}, {facts['cores']} cores, load before {facts['load before']}"
    return f"{facts['date']}, {where}.\n{versions}."


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    family = f"family {found.get('cpu family')}, model {found.get('model')}"
    widest = next((f for f in ("avx512f", "avx2", "avx") if f in found.get("flags", "").split()), "no AVX")
    return f"{found['model name']} ({family}, {widest})"


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
