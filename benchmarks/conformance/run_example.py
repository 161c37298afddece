"""Run an example of Pyro with another `SVI`, and print the losses of its steps: ENGINE SCRIPT ARGUMENTS."""

import json
import runpy
import sys
import warnings
from typing import Any

import pyro
import torch
from table import Reasons, as_tuple, parameters_of, what_ran

import pyro_vae as pv

PyroSVI = pyro.infer.SVI
MOST_STEPS = 40
losses: list[tuple[float, ...]] = []
ran: list[str] = []
reasons = Reasons()


class Enough(Exception):  # noqa: N818
    """No more steps are wanted."""


class KeptSVI:
    """`SVI` that makes its optimiser at the first step, when the parameters are there, and keeps losses."""

    engine = "upstream"

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any, **_: Any):
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self.svi: Any = None

    def make(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        with torch.random.fork_rng():
            parameters = parameters_of(self.model, self.guide, args, kwargs)
        if self.engine == "upstream":
            return PyroSVI(self.model, self.guide, self.optim, self.loss)
        options = self.optim.pt_optim_args
        if callable(options):
            raise TypeError("the example gives each parameter its own options, which torch takes as groups")
        optimizer = self.optim.pt_optim_constructor(parameters, **options)
        return pv.SVI(self.model, self.guide, optimizer, self.loss, engine=self.engine)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.svi = self.svi or self.make(args, kwargs)
        loss = self.svi.step(*args, **kwargs)
        losses.append(as_tuple(loss))
        ran[:] = [what_ran(self.svi, reasons)] if self.engine != "upstream" else []
        if len(losses) == MOST_STEPS:
            raise Enough
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.svi = self.svi or self.make(args, kwargs)
        return self.svi.evaluate_loss(*args, **kwargs)


def main() -> None:
    KeptSVI.engine, script, *arguments = sys.argv[1:]
    pyro.infer.SVI = pyro.infer.svi.SVI = KeptSVI
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(script.rpartition("/")[0]))
    error = ""
    try:
        runpy.run_path(script, run_name="__main__")
    except Enough:
        pass
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    except SystemExit as end:
        error = f"it ended with {end.code}" if end.code else ""
    print(json.dumps({"losses": losses, "error": error, "ran": "".join(ran)}))


if __name__ == "__main__":
    main()
