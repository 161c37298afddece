"""A program of a user passes `mypy --strict`: every public name that it uses has types."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
import pyro_vae as pv

vae = pv.VAE(
    prior=pv.priors.StandardNormal(2),
    likelihood=pv.likelihoods.Normal(2, (6,)),
    guide=pv.guides.DiagonalNormal((6,), 2, network=None),
)
x = torch.randn(9, 6)
history = pv.fit(vae, x, epochs=1)
bound: float = history[-1].train_bound
report = pv.evaluate(vae, x)
print(report.elbo, report.log_evidence)
svi = pv.SVI(vae, torch.optim.Adam(vae.parameters(), 1e-3), pv.IWAE(5))
loss = svi.step(x)
sentences: list[str] = pv.compare_estimators(vae, x, [pv.IWAE(5), pv.STL()]).findings()
imputed = pv.applications.impute(vae, x)
labels = pv.applications.AnomalyDetector(vae).fit(x).predict(x)
images: torch.Tensor = pv.data.load("digits")[:4]
axes = pv.plots.image_grid(images)
pair = pv.Pair(vae.model, vae.guide)
print(pv.check_guide(pair, x), pair.load("pair.pt"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "status"), [(PROGRAM, 0), (PROGRAM.replace("bound: float", "bound: str"), 1)]
)
def test_a_program_of_a_user_passes_strict_checks_of_types(tmp_path, program, status):
    (tmp_path / "use.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "use.py"]
    run = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert run.returncode == status, run.stdout
