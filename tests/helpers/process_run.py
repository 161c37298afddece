"""What the tests of several processes run in each of them: torchrun process_run.py FOLDER COMMAND.

python process_run.py FOLDER SIZE ... runs everything that is compared, once by each number of processes.
Results go to FOLDER/rank-of-size.pt. With one process it gives what the others are compared with.
"""

import itertools
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.nn.parallel import DistributedDataParallel

import pyro_vae as pv
from pyro_vae.utils import serialization
from pyro_vae.utils.processes import Processes, alone, join

SHARDS, NUM_DATA = 6, 101


def make_vae(seed: int = 5) -> pv.VAE:
    """A small VAE in float64."""
    torch.manual_seed(seed)
    return pv.VAE(
        prior=pv.priors.StandardNormal(3),
        likelihood=pv.likelihoods.Bernoulli(3, (7,), hidden_features=(9,)),
        guide=pv.guides.DiagonalNormal((7,), 3, hidden_features=(8,)),
    ).double()


def make_data() -> torch.Tensor:
    """Bits (101, 7)."""
    generator = torch.Generator().manual_seed(9)
    return torch.bernoulli(torch.full((NUM_DATA, 7), 0.4, dtype=torch.float64), generator=generator)


def scaled_pair() -> pv.Pair:
    """A pair that speaks for 500 data, with a latent variable that they share."""
    weight = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.loc = weight, torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def model(self, x):
            mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            with pyro.plate("data", 500, subsample_size=len(x), subsample=torch.arange(len(x))):
                z = pyro.sample("z", dist.Normal(mean, 1.0))
                pyro.sample("x", dist.Normal(z * weight[0] + weight[1], 0.7), obs=x)

        def guide(self, x):
            pyro.sample("mean", dist.Delta(self.loc))
            with pyro.plate("data", 500, subsample_size=len(x), subsample=torch.arange(len(x))):
                pyro.sample("z", dist.Delta(x * weight[0]))

    shared = Shared()
    return pv.Pair(shared.model, shared.guide)


def parameters(module: torch.nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def fits() -> dict:
    """Runs of `fit` that give the same for any number of processes."""
    adam, sgd = torch.optim.Adam, torch.optim.SGD
    mean_field = TraceMeanField_ELBO()
    cases = {
        "eager": {},
        "traced": {"engine": "traced"},
        "sgd, clipped": {"clip_norm": 3.0, "optimizer": lambda p: sgd(p, 1e-3), "engine": "traced"},
        "adam, clipped": {"clip_norm": 3.0, "optimizer": lambda p: adam(p, 1e-2)},
        "iwae": {"estimator": pv.IWAE(4), "engine": "traced"},
        "warm-up": {"kl_warmup": 1.5, "estimator": mean_field, "engine": "traced"},
        "validation": {"validation": 0.3, "patience": 2},
        "binarized": {"binarize": "dynamic"},
        "one batch": {"batch_size": NUM_DATA},
        "callbacks": {"callbacks": [shrink], "epochs": 3},
        "freezing": {"callbacks": [freeze] if join().is_first else []},
    }
    found = {}
    for name, options in cases.items():
        vae = make_vae()
        data = make_data() * 0.8 if name == "binarized" else make_data()
        defaults = {"batch_size": 48, "epochs": 2, "progress": False, "shards": SHARDS, "engine": "eager"}
        history = pv.fit(vae, data, **(defaults | options))
        found[name] = parameters(vae), history.column("train_bound"), history.column("validation_elbo")
    return found


def compiled_fit() -> tuple:
    """A run of `fit` by compiled graphs, with parts of one length, and of another at the end of an epoch."""
    vae, data = make_vae(), make_data()[:90]
    options = {"batch_size": 48, "epochs": 3, "progress": False, "shards": SHARDS, "clip_norm": 3.0}
    history = pv.fit(vae, data, engine="compiled", validation=data[:11], **options)
    return parameters(vae), history.column("train_bound"), history.column("validation_elbo")


def shrink(vae, epoch) -> bool:
    """A callback that changes parameters, and evaluates alone."""
    assert join().size == 1
    pv.evaluate(vae, make_data(), num_particles=3, progress=False)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(0.99)
    return epoch.epoch == 2


def freeze(vae, epoch) -> None:
    """A callback that ends the training of the guide."""
    vae.posterior.requires_grad_(False)


class FixedNoise(dist.Normal):
    """A normal whose draws use a given standard noise."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape, _instance=None):
        """It has its shape already."""
        return self

    def rsample(self, sample_shape=()):
        """Return loc + scale · noise."""
        return self.loc + self.scale * self.noise


def steps(processes: Processes, engines: tuple[str, ...] = ("eager", "traced")) -> dict:
    """Steps of `SVI` on this process's part of each batch, with given noise."""
    adam, sgd = torch.optim.Adam, torch.optim.SGD
    cases = itertools.product(
        engines, ((adam, 1e-2), (sgd, 1e-3)), (None, 3.0), (torch.float64, torch.float32)
    )
    found = {}
    for engine, (optimizer, rate), clip_norm, dtype in cases:
        svi = partial(pv.SVI, engine=engine, clip_norm=clip_norm, group=processes.group)
        name = engine, optimizer.__name__, clip_norm, dtype
        found[name] = eight_steps(processes, partial(optimizer, lr=rate), svi, dtype)
    return found


def eight_steps(processes: Processes, make_optimizer, make_svi, dtype: torch.dtype) -> tuple:
    """Parameters before and after eight steps, their losses, and how many of them a graph has taken."""
    vae = make_vae(seed=5 + processes.rank).to(dtype)  # the first one's parameters go to all
    before = parameters(make_vae().to(dtype))

    def guide(x, noise):
        pyro.module("posterior", vae.posterior)
        with pyro.plate("data", len(x)):
            q = vae.posterior(x).base_dist
            pyro.sample("z", FixedNoise(q.loc, q.scale, noise).to_event(1))

    svi = make_svi(lambda x, noise: vae.model(x), guide, make_optimizer(vae.parameters()), Trace_ELBO())
    generator, losses, share = torch.Generator().manual_seed(3), [], processes.shares(32)
    for _ in range(8):
        noise = torch.randn(32, 3, generator=generator, dtype=torch.float64).to(dtype)
        part = slice(share.start, share.stop)
        losses.append(svi.step(make_data()[:32].to(dtype)[part], noise[part]))
    return before, parameters(vae), losses, steps_by_graph(svi)


def steps_by_graph(svi: pv.SVI) -> tuple[int, int]:
    """Steps that graphs have taken: interpreted, compiled."""
    recordings = [] if svi._replay is None else svi._replay.recordings.values()
    taken = [sum(r.steps for r in recordings if r.is_compiled == compiled) for compiled in (False, True)]
    return taken[0], taken[1]


def scaled(processes: Processes) -> tuple:
    """Steps of a pair whose loss speaks for all data, on parts of unequal length."""
    pair = scaled_pair()
    x = torch.linspace(-2, 2, 11, dtype=torch.float64)
    share = processes.shares(11)
    optimizer = torch.optim.SGD(pair.parameters(), 1e-3)
    svi = pv.SVI(pair, optimizer, Trace_ELBO(), group=processes.group, engine="eager")
    losses = [svi.step(x[share.start : share.stop]) for _ in range(5)]
    return parameters(pair), losses


def evaluation() -> dict:
    """Columns of `evaluate`."""
    vae, x = make_vae(), make_data().repeat(17, 1)  # five chunks, the last a smaller one
    report = pv.evaluate(vae, x, num_particles=20, seed=4, progress=False)
    estimators = [Trace_ELBO(), TraceMeanField_ELBO(), pv.IWAE(3), pv.IWAE(5), pv.DReG(5)]
    compared = pv.compare_estimators(
        vae, x[:11], estimators, num_repeats=10, num_reference_particles=20, progress=False
    )
    return {
        "compared": torch.tensor(compared.to_dataframe()[["value", "bias_t", "snr_guide"]].to_numpy()),
        "log_evidence": report.per_datum.log_evidence,
        "kl": report.per_datum.kl,
        "pareto_k": report.per_datum.pareto_k,
        "text": repr(report),
    }


def message(function) -> str:
    """What a function raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failures(processes: Processes) -> dict:
    """Errors in one process, which all are told of at the same step."""
    last = processes.size - 1

    def step_with(value):
        vae = make_vae()
        optimizer = torch.optim.Adam(vae.parameters())
        svi = pv.SVI(vae, optimizer, TraceMeanField_ELBO(), group=processes.group)
        svi.step(make_data()[:4])
        x = make_data()[:4].clone()
        if processes.rank == last:
            x = value(x)
        try:
            svi.step(x)
        finally:
            found["steps"] = svi.steps

    def spoil(x):
        x[2, 3] = float("nan")
        return x

    def other_data():
        pv.fit(make_vae(), make_data()[: 90 + processes.rank], epochs=1, progress=False)

    def other_seed():
        pv.fit(make_vae(), make_data(), seed=processes.rank, epochs=1, progress=False)

    def diverge():
        def schedule(optimizer):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 + processes.rank * epoch)

        pv.fit(make_vae(), make_data(), epochs=3, schedule=schedule, progress=False)

    def wrapped():
        vae = make_vae()
        ddp = DistributedDataParallel(vae)
        pv.SVI(vae, torch.optim.Adam(ddp.parameters()), group=processes.group).step(make_data()[:4])

    def batch_norm():
        vae = make_vae()
        network = torch.nn.Sequential(torch.nn.Linear(7, 6), torch.nn.BatchNorm1d(6)).double()
        vae = vae.with_guide(pv.guides.DiagonalNormal((7,), 3, network=network))
        pv.fit(vae, make_data(), epochs=1, progress=False)

    def free_bits():
        estimator = pv.KLWeighted(TraceMeanField_ELBO(), 1.0, free_bits=0.1)
        pv.fit(make_vae(), make_data(), estimator=estimator, epochs=1, progress=False)

    found: dict = {}
    found["nan"] = message(lambda: step_with(spoil))
    found["shape"] = message(lambda: step_with(lambda x: x[:, :5]))
    found["data"] = message(other_data)
    found["settings"] = message(other_seed)
    found["diverged"] = message(diverge)
    found["wrapped"] = message(wrapped)
    found["batch norm"] = message(batch_norm)
    found["free bits"] = message(free_bits)
    found["few shards"] = message(lambda: pv.fit(make_vae(), make_data(), shards=1, epochs=1))
    found["small batch"] = message(
        lambda: pv.fit(make_vae(), make_data(), batch_size=processes.size - 1, epochs=1, progress=False)
    )
    return found


def refusals(processes: Processes) -> dict:
    """Calls that differ between the processes, or that cannot be divided."""
    last = processes.size - 1

    def semi_supervised():
        vae = pv.SemiSupervisedVAE(
            prior=pv.priors.StandardNormal(2),
            likelihood=pv.likelihoods.Normal(2, (7,), context_dim=3),
            guide=pv.guides.DiagonalNormal((7,), 2, context_dim=3),
            classifier=pv.networks.MLP(7, 3),
            num_classes=3,
        )
        y = torch.tensor([0, 1, 2, -1, -1])
        optimizer = torch.optim.Adam(vae.parameters())
        pv.SVI(vae, optimizer, group=processes.group).step(make_data()[:5].float(), y)

    def in_streams(value, **options):
        def stream():
            while True:
                x = make_data()[processes.rank : processes.rank + 9].clone()
                x[2, 3] = value if processes.rank == last else 1.0
                yield x

        pv.fit(make_vae(), stream(), steps_per_epoch=2, epochs=1, progress=False, **options)

    def validation_divided():
        sampler = torch.utils.data.DistributedSampler(make_data())
        in_streams(1.0, validation=torch.utils.data.DataLoader(make_data(), sampler=sampler))

    def some_options(**options):
        options = {"epochs": 1} | (options if processes.rank == last else {})
        pv.fit(make_vae(), make_data(), progress=False, **options)

    def other_calls():
        if processes.is_first:
            pv.evaluate(make_vae(), make_data(), num_particles=5, progress=False)
        some_options()

    return {
        "calls": message(other_calls),
        "semi-supervised": message(semi_supervised),
        "bad value": message(lambda: in_streams(2.0)),
        "validation divided": message(validation_divided),
        "folder": message(lambda: some_options(checkpoint_dir="not_made")),
        "epochs": message(lambda: some_options(epochs=2)),
        "particles": message(
            lambda: pv.evaluate(make_vae(), make_data(), num_particles=5 + processes.rank, progress=False)
        ),
    }


class Noise:
    """A stream of noise, which knows where it is."""

    def __init__(self, rank: int):
        self.state, self.rank, self.loaded = {"rank": rank, "position": 0}, rank, []

    def __iter__(self):
        return self

    def __next__(self):
        self.state["position"] += 1
        return torch.bernoulli(torch.full((3 + self.rank, 7), 0.5))

    def state_dict(self) -> dict:
        """Whose it is, and the number of batches read."""
        return self.state

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state."""
        self.state = dict(state)
        self.loaded.append(state)


def streams(processes: Processes, folder: Path) -> dict:
    """Streams of each process's own, and DataLoaders that divide their data."""
    directory = folder / "streams"
    options = {"steps_per_epoch": 4, "progress": False, "engine": "eager"}
    batches = []
    pv.fit(make_vae(), (batches.append(b) or b for b in Noise(processes.rank)), epochs=1, **options)
    pv.fit(make_vae(), Noise(processes.rank), epochs=1, checkpoint_dir=directory, **options)
    resumed = Noise(processes.rank)
    pv.fit(make_vae(), resumed, epochs=2, checkpoint_dir=directory, resume=True, **options)

    read = []

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return NUM_DATA

        def __getitem__(self, position):
            read.append(position)
            return make_data()[position]

    rows = Rows()
    sampler = torch.utils.data.DistributedSampler(rows, drop_last=True)
    loader = torch.utils.data.DataLoader(rows, batch_size=1, sampler=sampler)
    history = pv.fit(make_vae(), loader, epochs=2, progress=False)
    share = len(sampler)
    return {
        "first": batches[0],
        "loaded": resumed.loaded,
        "read": [read[1 : 1 + share], read[1 + share :]],
        "bound": history.column("train_bound"),
    }


def graph_on_one(processes: Processes, engine: str = "traced") -> torch.Tensor:
    """A graph that holds in one process only: another takes eager steps."""
    vae = make_vae()
    engine = engine if processes.is_first else "eager"
    optimizer = torch.optim.Adam(vae.parameters())
    svi = pv.SVI(vae, optimizer, TraceMeanField_ELBO(), group=processes.group, engine=engine)
    for step in range(6):
        torch.manual_seed(step + 100 * processes.rank)
        svi.step(make_data()[:5])
    return parameters(vae)


def interrupted(processes: Processes, folder: Path) -> dict:
    """Ctrl-C in the last process only: all stop after the same step, and the run is resumed."""
    pressed = folder / f"pressed-{processes.size}"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores

    class Slow(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return NUM_DATA

        def __getitem__(self, position):
            Slow.reads += 1
            if processes.rank == processes.size - 1 and Slow.reads == 250 and not pressed.exists():
                pressed.touch()
                os.kill(os.getpid(), signal.SIGINT)
            return make_data()[position]

    vae = make_vae()
    options = {"batch_size": 16, "epochs": 3, "progress": False, "shards": SHARDS, "engine": "traced"}
    directory = folder / f"interrupted-{processes.size}"
    stopped = None
    try:
        pv.fit(vae, Slow(), checkpoint_dir=directory, **options)
    except KeyboardInterrupt as error:
        stopped = str(error)
    between = parameters(vae)
    vae = make_vae(seed=77)
    pv.fit(vae, Slow(), checkpoint_dir=directory, resume=True, **options)
    return {"stopped": stopped, "between": between, "resumed": parameters(vae)}


def killed(processes: Processes, folder: Path, rank: int, when: str, every: str) -> None:
    """A run in which a process is killed once: at a read of data, or as a checkpoint is written.

    With checkpoints within epochs it is killed only where the last one is of such.
    """
    marker, last = folder / "killed", folder / "run" / "last.pt"
    intervals = {"epoch": None, "2 steps": 2, "1 µs": timedelta(microseconds=1)}

    def kill() -> None:
        if processes.rank != rank or marker.exists() or not last.exists():
            return
        if every == "epoch" or serialization.read(last, "run")["done"]:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    class Rows(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return NUM_DATA

        def __getitem__(self, position):
            Rows.reads += 1
            if when == "step" and Rows.reads >= 300:
                kill()
            return make_data()[position]

    replace, write = os.replace, torch.save

    def kill_before_renaming(*args) -> None:
        kill()
        replace(*args)

    def kill_while_writing(content, file, **options) -> None:
        write(content, file, **options)
        if isinstance(file, Path) and not marker.exists():
            whole = file.read_bytes()
            os.truncate(file, 100)
            kill()
            file.write_bytes(whole)

    if when == "rename":
        os.replace = kill_before_renaming
    if when == "write" and processes.rank == rank:
        torch.save = kill_while_writing
    vae = make_vae()
    options = {"batch_size": 16, "epochs": 5, "progress": False, "shards": SHARDS, "validation": 0.2}
    options["checkpoint_every"] = intervals[every]
    pv.fit(vae, Rows(), checkpoint_dir=last.parent, resume=True, **options)
    write(parameters(vae), folder / f"{processes.rank}.pt")


def stuck(folder: Path) -> None:
    """The last process is slow at first, for which the others wait, and then stuck."""
    torch.distributed.init_process_group(timeout=timedelta(seconds=6))
    processes = join()
    vae = make_vae()
    svi = pv.SVI(vae, torch.optim.Adam(vae.parameters()), group=processes.group, engine="eager")
    for pause in (0, 3, 30):
        if processes.rank == processes.size - 1:
            time.sleep(pause)
        found = message(lambda: svi.step(make_data()[:4]))
        if found != "nothing":
            (folder / f"{processes.rank}.txt").write_text(f"after {svi.steps} steps, {found}")
            return


def become(size: int) -> bool:
    """Return True in each of so many new processes, in an environment as torchrun's, and False in this one.

    This one waits for them. They are copies of it, so that torch is imported once.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            if size > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            return True
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"one of {size} processes has failed")
    return False


def main() -> None:
    """Run all, and write what was found."""
    folder, command = Path(sys.argv[1]), sys.argv[2:]
    if command[0].isdigit():
        torch.optim.Adam([torch.zeros(1)])  # imports for seconds, as the next line does
        import xarray  # noqa: F401

        if any(become(int(size)) for size in command):
            torch.set_num_threads(1)
            results(join(), folder)
        return
    torch.set_num_threads(1)
    match command:
        case ["stuck"]:
            stuck(folder)
        case ["killed", rank, when, every]:
            killed(join(), folder, int(rank), when, every)
        case ["compiled"]:
            processes = join()
            found = {"steps": steps(processes, ("compiled",)), "fit": compiled_fit()}
            found["graph on one"] = graph_on_one(processes, "compiled")
            torch.save(found, folder / f"{processes.rank}-of-{processes.size}.pt")
        case ["epochs", epochs]:
            vae = make_vae()
            options = {"batch_size": 16, "progress": False, "shards": SHARDS, "validation": 0.2}
            pv.fit(
                vae, make_data(), epochs=int(epochs), checkpoint_dir=folder / "run", resume=True, **options
            )
            torch.save(parameters(vae), folder / f"{join().rank}.pt")


def results(processes: Processes, folder: Path) -> None:
    """Write everything that is compared."""
    found = {
        "fits": fits(),
        "steps": steps(processes),
        "scaled": scaled(processes),
        "evaluation": evaluation(),
    }
    if processes.size > 1:
        found["failures"] = failures(processes) | refusals(processes)
        found["graph on one"] = graph_on_one(processes)
        found["alone"] = alone_size()
        found["streams"] = streams(processes, folder)
    found["interrupted"] = interrupted(processes, folder)
    torch.save(found, folder / f"{processes.rank}-of-{processes.size}.pt")


def alone_size() -> int:
    """Number of processes as code sees it that the others do not run."""
    with alone():
        return join().size


if __name__ == "__main__":
    main()
