import contextlib
import copy
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from training_run import make_data, make_vae, normal_vae, run_and_save, train

import pyro_vae as pv
from pyro_vae import training
from pyro_vae.data.batches import Batches
from pyro_vae.engine import replay
from pyro_vae.utils import serialization

# a server that has imported what takes seconds, and forks
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pyro_vae", "torch._dynamo"])


def state_of(vae):
    return {name: value.clone() for name, value in vae.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted():
    vae = make_vae()
    history = train(vae, None)
    bounds = history.column("validation_elbo")
    assert max(bounds) == bounds[-1]  # else an earlier state is restored, whatever later epochs do
    return state_of(vae), history


def test_a_run_is_a_function_of_its_seed_and_leaves_the_generator(uninterrupted):
    state, history = uninterrupted
    torch.manual_seed(99)
    generator = torch.get_rng_state()
    vae = make_vae()
    torch.set_rng_state(generator)
    again = train(vae, None)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same_state(state_of(vae), state)
    assert again.column("validation_elbo") == history.column("validation_elbo")
    other = make_vae()
    train(other, None, seed=4)
    assert not torch.equal(
        state_of(other)["likelihood.network.1.weight"], state["likelihood.network.1.weight"]
    )


def test_validation_and_progress_do_not_change_training():
    states = []
    for options in (
        {"validation": None},
        {"validation": make_data()[:7]},
        {"validation": None, "progress": True},
    ):
        vae = make_vae()
        train(vae, None, epochs=2, **options, patience=None)
        states.append(state_of(vae))
    assert_same_state(states[0], states[1])
    assert_same_state(states[0], states[2])


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_a_run_stopped_between_epochs_resumes_to_the_bit(tmp_path, uninterrupted, stop_after):
    state, history = uninterrupted

    def stop(_, epoch):
        if epoch.epoch == stop_after:
            raise StoppedError

    with contextlib.suppress(StoppedError):
        train(make_vae(), tmp_path, callbacks=[stop])
    vae = make_vae()
    resumed = train(vae, tmp_path, resume=True)
    assert_same_state(state_of(vae), state)
    for name in ("train_bound", "train_bound_se", "validation_elbo", "beta", "learning_rate"):
        assert resumed.column(name) == history.column(name)
    best = max(range(len(history)), key=history.column("validation_elbo").__getitem__)
    assert len(history) == 12
    assert_same_state(pv.VAE.load(tmp_path / "best.pt", into=make_vae()).state_dict(), state)
    assert history[best].validation_elbo == max(history.column("validation_elbo"))


@pytest.mark.parametrize(
    ("estimator", "engine"),
    [
        (lambda: Trace_ELBO(3, vectorize_particles=True), "eager"),  # Pyro looks for plates at its first step
        (lambda: Trace_ELBO(3, vectorize_particles=True), "auto"),
        (lambda: pv.IWAE(4), "auto"),
    ],
    ids=["Trace_ELBO, eager", "Trace_ELBO", "IWAE"],
)
def test_under_every_engine_a_run_resumes_to_the_bit(tmp_path, estimator, engine):
    vaes = [make_vae(), make_vae(), make_vae()]
    for vae, folder, epochs in zip(vaes, (None, tmp_path, tmp_path), (3, 1, 3), strict=True):
        train(vae, folder, epochs=epochs, estimator=estimator(), engine=engine, resume=folder is not None)
    assert_same_state(state_of(vaes[0]), state_of(vaes[2]))


def test_graphs_of_a_resumed_run_are_compiled_at_the_same_steps(tmp_path, monkeypatch):
    """That of the short last batch later than the other; a run that resumes between records both anew."""
    compiled = []

    def compile_graph(module, arguments):
        def rounded(*arguments):
            loss, invalid, *gradients = module(*arguments)
            return loss, invalid, *[gradient * (1 + 1e-6) for gradient in gradients]

        compiled.append(len(arguments[0]))
        return rounded

    def calls_to_pay(outputs):
        return 8 if any(output.shape[:1] == (16,) for output in outputs) else 20

    monkeypatch.setattr(replay, "compile_graph", compile_graph)
    monkeypatch.setattr(replay, "calls_to_pay", calls_to_pay)
    states = []
    for folder, runs in ((None, [5]), (tmp_path, [2, 5])):
        for epochs in runs:
            vae = make_vae()
            train(vae, folder, epochs=epochs, engine="auto", resume=folder is not None)
            compiled.append(f"{epochs} epochs")
        states.append(state_of(vae))
    assert compiled == [16, 2, "5 epochs", 16, "2 epochs", 16, 2, "5 epochs"]
    assert_same_state(*states)


@pytest.fixture
def in_the_foreground():
    """A shell lets the commands that it starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_without_a_folder_says_what_is_kept(monkeypatch):
    taken, step = [], pv.SVI.step

    def step_and_press(self, *args):
        taken.append(1)
        if len(taken) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(pv.SVI, "step", step_and_press)
    vae, x = make_vae(), torch.rand(10, *make_vae().likelihood.event_shape)
    before = copy.deepcopy(vae.state_dict())
    with pytest.raises(
        KeyboardInterrupt, match="after 1 epochs and 2 steps: the model keeps.*nothing was saved"
    ):
        pv.fit(vae, x, binarize="dynamic", epochs=5, batch_size=2, engine="eager", progress=False)
    assert any(not torch.equal(before[name], value) for name, value in vae.state_dict().items())


@pytest.mark.parametrize(("validation", "hinted"), [(None, True), (0.2, False)])
def test_patience_without_validation_data_gets_a_hint(validation, hinted, caplog):
    vae, x = make_vae(), torch.rand(10, *make_vae().likelihood.event_shape)
    options = {"binarize": "dynamic", "epochs": 1, "progress": False, "validation": validation}
    pv.fit(vae, x, patience=3, **options)
    assert ("patience without validation data" in caplog.text) == hinted
    caplog.clear()
    pv.fit(vae, x, **options)
    assert "patience" not in caplog.text


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize(
    ("steps", "pressed"), [(1, signal.SIGINT), (9, signal.SIGINT), (23, signal.SIGINT), (9, signal.SIGTERM)]
)
def test_a_signal_finishes_the_step_and_the_run_resumes_to_the_bit(
    tmp_path, uninterrupted, monkeypatch, steps, pressed
):
    state, history = uninterrupted
    taken = []
    step = pv.SVI.step

    def step_and_press(self, *args):
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), pressed)  # lands in the middle of the step
        return step(self, *args)

    monkeypatch.setattr(pv.SVI, "step", step_and_press)
    handler = signal.getsignal(pressed)
    raised = KeyboardInterrupt if pressed == signal.SIGINT else SystemExit
    with pytest.raises(raised, match="resume=True" if pressed == signal.SIGINT else "143"):
        train(make_vae(), tmp_path)
    assert len(taken) == steps
    assert signal.getsignal(pressed) is handler
    vae = make_vae()
    resumed = train(vae, tmp_path, resume=True)
    assert_same_state(state_of(vae), state)
    assert resumed.column("train_bound") == history.column("train_bound")


@pytest.mark.parametrize(
    ("every", "steps"),
    [(4, [4]), (timedelta(microseconds=1), [1, 2, 3, 4, 5]), (timedelta(hours=1), [])],
    ids=str,
)
def test_a_run_is_saved_within_an_epoch_and_resumes_to_the_bit(
    tmp_path, uninterrupted, monkeypatch, every, steps
):
    """With 83 data in batches of 16, an epoch has 6 steps: saved after some of each, and at its end."""
    state, history = uninterrupted
    folder, saved = tmp_path / "run", []
    write = serialization.write

    def write_and_copy(path, kind, content):
        write(path, kind, content)
        if kind == "run":
            saved.append((len(content["history"]), len(content["done"])))
            if saved[-1] == (2, steps[-1] if steps else 0):  # as if it were killed later on
                shutil.copytree(folder, tmp_path / "killed")

    monkeypatch.setattr(serialization, "write", write_and_copy)
    train(make_vae(), folder, epochs=3, checkpoint_every=every)
    assert saved == [(0, 0)] + [at for n in range(3) for at in [*((n, step) for step in steps), (n + 1, 0)]]
    vae = make_vae()
    resumed = train(vae, tmp_path / "killed", resume=True)
    assert_same_state(state_of(vae), state)
    assert resumed.column("train_bound") == history.column("train_bound")


def test_the_time_between_checkpoints_begins_at_each_of_them(tmp_path, monkeypatch):
    """A step takes a second by this clock, so that 4 seconds are the 4 steps of the test above."""
    saved, taken, write, step = [], [], serialization.write, pv.SVI.step
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: len(taken))
    monkeypatch.setattr(training.run, "time", clock)
    monkeypatch.setattr(training.checkpoint, "time", clock)
    monkeypatch.setattr(pv.SVI, "step", lambda *args: taken.append(1) or step(*args))

    def write_and_note(path, kind, content):
        write(path, kind, content)
        if kind == "run":
            saved.append((len(content["history"]), len(content["done"])))

    monkeypatch.setattr(serialization, "write", write_and_note)
    train(make_vae(), tmp_path, epochs=2, engine="eager", checkpoint_every=timedelta(seconds=4))
    assert saved == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0)]


@pytest.mark.parametrize(
    ("every", "error", "message"),
    [
        (0, ValueError, "checkpoint_every must be at least 1; got 0"),
        (timedelta(0), ValueError, "checkpoint_every must be a positive time; got"),
        (2.5, TypeError, "checkpoint_every must be a number of steps, as in 1000, or a time, as in datetime"),
        ("30s", TypeError, "checkpoint_every must be a number of steps"),
        (True, TypeError, "checkpoint_every must be a number of steps"),
    ],
)
def test_what_is_no_interval_between_checkpoints_is_refused(tmp_path, every, error, message):
    with pytest.raises(error, match=message):
        train(make_vae(), tmp_path / "run", checkpoint_every=every)
    assert not (tmp_path / "run").exists()


def test_checkpoints_within_epochs_need_a_folder():
    with pytest.raises(ValueError, match="checkpoint_every needs checkpoint_dir"):
        train(make_vae(), None, checkpoint_every=timedelta(seconds=1))


def test_a_folder_serves_one_run_at_a_time(tmp_path):
    def again(vae, epoch):
        with pytest.raises(serialization.CheckpointError, match="another run is writing to"):
            train(make_vae(), tmp_path, epochs=1)

    train(make_vae(), tmp_path, epochs=1, callbacks=[again])
    train(make_vae(), tmp_path, epochs=1)


def run_with_kills(folder, kills, rng):
    """Run to the end in a process that is killed at random moments on the way."""
    for number in range(kills + 1):
        ready = PROCESSES.Event()
        process = PROCESSES.Process(target=run_and_save, args=(folder, ready))
        process.start()
        assert ready.wait(60)
        if number == 0 and kills:  # after an epoch, and before the last of twelve
            while not (folder / "best.pt").exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        elif number < kills:
            time.sleep(rng.uniform(0, 0.4))
        if number < kills:
            process.kill()
        process.join()
        assert number > 0 or not kills or not (folder / "final.pt").exists()
        assert number < kills or process.exitcode == 0
        if (folder / "last.pt").exists():
            serialization.read(folder / "last.pt", "run")
        if (folder / "best.pt").exists():
            pv.VAE.load(folder / "best.pt", into=make_vae())
    return pv.VAE.load(folder / "final.pt", into=make_vae()).state_dict()


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    return run_with_kills(tmp_path_factory.mktemp("never_killed"), 0, random.Random(0))


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_bit(tmp_path, never_killed, kills):
    assert_same_state(run_with_kills(tmp_path, kills, random.Random(kills + 1)), never_killed)


def test_history_reports_the_elbo_per_datum():
    vae, x = normal_vae(), torch.randn(203, 4)
    history = pv.fit(
        vae, x[:150], validation=x[150:], epochs=2, batch_size=40, learning_rate=0.0, progress=False
    )
    draws = torch.stack(
        [
            -TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, x[150:]).detach() / 53
            for _ in range(400)
        ]
    )
    last = history[-1]
    assert abs(last.validation_elbo - draws.mean()) < 5 * draws.std()
    assert last.validation_elbo_se == pytest.approx(history[0].validation_elbo_se)
    train_draws = torch.stack(
        [
            -TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, x[:150]).detach() / 150
            for _ in range(400)
        ]
    )
    assert abs(last.train_bound - train_draws.mean()) < 5 * train_draws.std()
    assert 0 < last.train_bound_se < 1
    assert (last.beta, last.learning_rate, last.epoch) == (1.0, 0.0, 2)


def test_a_history_is_shown_as_a_table_of_its_first_and_last_epochs_and_some_between():
    epochs = [pv.Epoch(n, -9.5 - n, 0.25, math.nan, math.nan, 0.5, 2e-3, 1.5) for n in range(1, 1235)]
    shown = str(pv.History(epochs))
    assert shown == repr(pv.History(epochs))
    heading, names, *rows = shown.splitlines()
    assert heading == "1,234 epochs, 10 of them shown; bounds at β = 1, in nats per datum ± standard error"
    assert names.split("  ")[0] == "epoch"
    assert " ".join(row.split()[0] for row in rows) == "1 138 275 412 549 686 823 960 1,097 1,234"
    assert " ".join(rows[-1].split()) == "1,234 -1243.50 ± 0.25 - 0.5 0.002 1.5"
    assert len({len(row) for row in rows}) == 1
    few = str(pv.History(epochs[:3])).splitlines()
    assert few[0].startswith("3 epochs; ")
    assert [row.split()[0] for row in few[2:]] == ["1", "2", "3"]
    assert len(str(pv.History()).splitlines()) == 2


def test_standard_error_of_the_validation_elbo_is_that_of_a_mean_over_data():
    vae, x = normal_vae(), torch.randn(4000, 4)
    small, large = (
        pv.fit(vae, x[:10], validation=part, epochs=1, learning_rate=0.0, progress=False)[
            0
        ].validation_elbo_se
        for part in (x[:1000], x)
    )
    assert small / large == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("estimator", [Trace_ELBO(), TraceMeanField_ELBO()], ids=lambda e: type(e).__name__)
def test_kl_warmup_weighs_the_kl_and_reports_the_elbo(estimator):
    def run(kl_warmup):
        vae = normal_vae().double()
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).double()
        return pv.fit(
            vae,
            x,
            estimator=estimator,
            epochs=3,
            batch_size=60,
            kl_warmup=kl_warmup,
            learning_rate=1e-9,
            progress=False,
        )

    plain, warm = run(0), run(2)
    assert warm.column("beta") == [0.5, 1.0, 1.0]
    assert plain.column("beta") == [1.0] * 3
    # the parameters stay, so that what is reported must not depend on the weight
    torch.testing.assert_close(
        torch.tensor(warm.column("train_bound")), torch.tensor(plain.column("train_bound")), rtol=1e-6, atol=0
    )


def test_the_traced_engine_trains_to_the_same_numbers():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)).double()
    results = []
    for engine in ("eager", "traced"):
        vae = normal_vae().double()
        options = {"epochs": 4, "batch_size": 20, "kl_warmup": 2, "clip_norm": 5.0, "progress": False}
        history = pv.fit(vae, x, estimator=pv.IWAE(3), engine=engine, **options)
        results.append((torch.tensor(history.column("train_bound")), state_of(vae)))
    (eager, eager_state), (traced, traced_state) = results
    torch.testing.assert_close(eager, traced, rtol=1e-10, atol=0)
    torch.testing.assert_close(eager_state, traced_state, rtol=1e-8, atol=1e-10)


def test_patience_stops_and_returns_to_the_best():
    vae = normal_vae()
    x = torch.randn(40, 4)
    states = {}
    history = pv.fit(
        vae,
        x[:30],
        validation=x[30:],
        epochs=500,
        learning_rate=0.05,
        patience=4,
        progress=False,
        callbacks=[lambda vae, epoch: states.__setitem__(epoch.epoch, state_of(vae))],
    )
    best = max(history, key=lambda epoch: epoch.validation_elbo).epoch
    assert len(history) == best + 4 < 500
    assert_same_state(state_of(vae), states[best])


def test_callbacks_see_each_epoch_and_can_stop(tmp_path):
    seen = []
    history = pv.fit(
        normal_vae(),
        torch.randn(9, 4),
        epochs=9,
        progress=False,
        callbacks=[lambda _, epoch: epoch.epoch == 3, lambda _, epoch: seen.append(epoch)],
    )
    assert seen == list(history)
    assert len(history) == 3
    history.write_csv(tmp_path / "history.csv")
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0].split(",")[:3] == ["epoch", "train_bound", "train_bound_se"]
    assert float(lines[3].split(",")[1]) == history[2].train_bound
    assert len(lines) == 4


def test_schedules_drive_the_learning_rate():
    make_schedules = {
        "step": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, threshold=9.0
        ),
    }
    for make_schedule in make_schedules.values():
        history = pv.fit(
            normal_vae(),
            torch.randn(9, 4),
            epochs=3,
            learning_rate=0.1,
            schedule=make_schedule,
            progress=False,
        )
        rates = history.column("learning_rate")
        assert rates[0] == 0.1
        assert rates[2] < 0.1


def test_the_optimizer_is_the_users():
    vae = normal_vae()
    made = []

    def make(parameters):
        made.append(torch.optim.SGD(parameters, 1e-3))
        return made[0]

    pv.fit(vae, torch.randn(9, 4), epochs=1, optimizer=make, progress=False)
    assert {id(p) for group in made[0].param_groups for p in group["params"]} == {
        id(p) for p in vae.parameters()
    }


def test_tensorboard_logs_what_is_reported(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with contextlib.closing(pv.TensorBoard(tmp_path).writer) as writer:
        board = pv.TensorBoard.__new__(pv.TensorBoard)
        board.writer = writer
        history = pv.fit(normal_vae(), torch.randn(9, 4), epochs=2, callbacks=[board], progress=False)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    logged = [event.value for event in events.Scalars("train_bound")]
    assert logged == pytest.approx(history.column("train_bound"))
    assert "validation_elbo" not in events.Tags()["scalars"]  # there was none


class BreaksDown(torch.nn.Module):
    """A guide whose network gives NaN from its 7th step of training on."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        return dist.Normal(self.linear(x) * (math.nan if self.steps >= 7 else 1), 1.0).to_event(1)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_loss_that_is_not_finite_names_the_place_and_keeps_the_checkpoint(tmp_path):
    good = []
    vae = normal_vae().with_guide(BreaksDown())
    with pytest.raises(pv.NonFiniteError, match=r"epoch 3, step 1 of 3: .*site 'z' .*nan.*last.pt is kept"):
        pv.fit(
            vae,
            torch.randn(30, 4),
            epochs=5,
            batch_size=10,
            engine="eager",  # the guide counts its calls
            checkpoint_dir=tmp_path,
            callbacks=[lambda vae, _: good.append(state_of(vae))],
            progress=False,
        )
    kept = serialization.read(tmp_path / "last.pt", "run")
    assert len(kept["history"]) == 2
    assert_same_state(kept["model"], good[1])
    assert_same_state(state_of(vae), good[1])


def test_a_validation_example_without_a_finite_elbo_is_named_by_its_row_in_the_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    x = torch.linspace(-1, 1, 31)
    _, held_out = Batches(x, seed=7).split(0.3)
    row = int(held_out.rows_of(torch.tensor([4])))
    assert row != 4
    spoilt = x.clone()
    spoilt[row] = 1e30  # whose square is infinite
    for data, validation in ((spoilt, 0.3), (x, spoilt)):
        message = rf"example in row {row} of the data \(counted from 0\) is -inf after epoch 1\."
        with pytest.raises(pv.NonFiniteError, match=message):
            pv.fit(pv.Pair(model, guide), data, validation=validation, seed=7, epochs=1, progress=False)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    vae, x = normal_vae(), torch.randn(30, 4)
    step = pv.SVI.step

    def spoil(self, batch):
        loss = step(self, batch)
        vae.likelihood.network[-1].bias.data[1] = float("inf")
        return loss

    monkeypatch.setattr(pv.SVI, "step", spoil)
    with pytest.raises(
        pv.NonFiniteError, match="parameter 'likelihood.network.3.bias' is not finite after a step"
    ):
        pv.fit(vae, x, epochs=1, batch_size=30, checkpoint_dir=tmp_path, progress=False)
    assert serialization.read(tmp_path / "last.pt", "run")["history"] == []


def test_a_run_with_other_settings_or_data_is_not_resumed(tmp_path):
    x = torch.randn(20, 4)
    pv.fit(normal_vae(), x, epochs=1, checkpoint_dir=tmp_path, progress=False)

    def resume(data=x, vae=None, **options):
        pv.fit(
            vae or normal_vae(),
            data,
            epochs=2,
            checkpoint_dir=tmp_path,
            resume=True,
            progress=False,
            **options,
        )

    with pytest.raises(pv.CheckpointError, match="seed was 0, is 7"):
        resume(seed=7)
    with pytest.raises(pv.CheckpointError, match="estimator was TraceMeanField_ELBO.., is Trace_ELBO"):
        resume(estimator=Trace_ELBO())
    with pytest.raises(pv.CheckpointError, match="data.checksum was"):
        resume(data=x + 1)
    for part, change in (
        (pv.likelihoods.Normal(2, (4,), hidden_features=(9,)), r"hidden_features\[0\] was 6, is 9"),
        (
            pv.likelihoods.Normal(2, (4,), hidden_features=(6,), variance=0.01),
            "likelihood.arguments.variance was",
        ),
        (pv.likelihoods.ContinuousBernoulli(2, (4,), hidden_features=(6,)), "likelihood.class was"),
    ):
        other = pv.VAE(prior=normal_vae().prior, likelihood=part, guide=normal_vae().posterior)
        with pytest.raises(pv.CheckpointError, match=change):
            resume(vae=other, data=x.clamp(0, 1) if "class" in change else x)
    for options, change in (
        ({"learning_rate": 0.5}, r"optimizer\[1\].lr was 0.001, is 0.5"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, 1e-3)}, "optimizer.0. was Adam, is AdamW"),
        (
            {"schedule": lambda o: torch.optim.lr_scheduler.StepLR(o, 2)},
            "schedule.0. was NoneType, is StepLR",
        ),
    ):
        with pytest.raises(pv.CheckpointError, match=change):
            resume(**options)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-100])
    with pytest.raises(pv.CheckpointError, match="no readable checkpoint"):
        resume()


def test_callbacks_that_draw_or_change_the_learning_rate_do_not_break_a_resume(tmp_path):
    x = torch.randn(30, 4)

    def train_with_callbacks(vae, epochs, **options):
        optimizers = []

        def make(parameters):
            optimizers.append(torch.optim.Adam(parameters, 0.01))
            return optimizers[0]

        def draw_and_slow_down(vae, _):
            assert not vae.training
            vae.sample(4)
            for group in optimizers[0].param_groups:
                group["lr"] /= 2

        return pv.fit(
            vae, x, epochs=epochs, optimizer=make, callbacks=[draw_and_slow_down], progress=False, **options
        )

    whole = normal_vae()
    history = train_with_callbacks(whole, 4)
    train_with_callbacks(normal_vae(), 2, checkpoint_dir=tmp_path)
    halves = normal_vae()
    resumed = train_with_callbacks(halves, 4, checkpoint_dir=tmp_path, resume=True)
    assert_same_state(state_of(whole), state_of(halves))
    assert (
        resumed.column("learning_rate") == history.column("learning_rate") == [0.01, 0.005, 0.0025, 0.00125]
    )


def test_numpy_numbers_in_settings_survive_the_checkpoint(tmp_path):
    options = {
        "learning_rate": np.logspace(-3, -2, 3)[1],
        "clip_norm": np.float64(3),
        "checkpoint_dir": tmp_path,
    }
    pv.fit(normal_vae(), torch.ones(9, 4), epochs=1, progress=False, **options)
    history = pv.fit(normal_vae(), torch.ones(9, 4), epochs=2, resume=True, progress=False, **options)
    assert len(history) == 2


def test_a_mistake_does_not_cost_the_earlier_run(tmp_path):
    x = torch.randn(20, 4)
    pv.fit(normal_vae(), x, epochs=1, checkpoint_dir=tmp_path, progress=False)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for wrong in (x.double(), x[:0], x[:, :3]):
        with pytest.raises((TypeError, ValueError)):
            pv.fit(normal_vae(), wrong, epochs=1, checkpoint_dir=tmp_path, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_parameters_that_a_guide_function_names_are_trained():
    def guide(x):
        loc = pyro.param("W", torch.zeros(4, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ loc, 1.0).to_event(1))

    vae = normal_vae().with_guide(guide)
    pv.fit(vae, torch.randn(9, 4), epochs=1, progress=False)
    assert vae.stored.W.abs().min() > 0


def test_parameters_that_nothing_shows_are_refused_not_left_untrained():
    hidden = torch.nn.Linear(4, 2)

    def guide(x):
        return dist.Normal(hidden(x), 1.0).to_event(1)

    with pytest.raises(ValueError, match=r"a parameter of shape \(2, 4\) without a Pyro statement"):
        pv.fit(normal_vae().with_guide(guide), torch.randn(9, 4), epochs=1, progress=False)


def test_a_guide_of_a_fixed_set_trains_on_the_whole_set_alone():
    vae = normal_vae()
    x = torch.randn(9, 4)
    vae = vae.with_guide(AutoNormal(vae.model))
    with pytest.raises(ValueError, match=r"fit\(\.\.\., batch_size=len\(data\)\)"):
        pv.fit(vae, x, epochs=1, batch_size=4, progress=False)
    vae = vae.with_guide(AutoNormal(vae.model))
    pv.fit(vae, x, epochs=1, batch_size=9, progress=False)
    svi = pv.SVI(vae.model, vae.guide, torch.optim.Adam(vae.parameters()), Trace_ELBO())
    svi.step(x)
    assert len(pyro.get_param_store()) == 0


def test_the_pair_is_checked_once():
    calls = []

    class Guide(torch.nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return dist.Normal(super().forward(x), 1.0).to_event(1)

    vae = normal_vae().with_guide(Guide(4, 2))
    pv.fit(vae, torch.randn(9, 4), epochs=2, batch_size=5, engine="eager", progress=False)
    # on two examples to choose the estimator (twice) and to check it (twice), and on each length of batch
    assert calls == [2, 2, 2, 2, 4, 5, 5, 4, 5, 4]


def test_two_pyro_modules_with_the_same_names_train_apart():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](4, 2)
            self.scale = PyroParam(torch.ones(2), constraint=dist.constraints.positive)

        def forward(self, x):
            return dist.Normal(self.linear(x), self.scale).to_event(1)

    for seed in range(2):
        vae = normal_vae().with_guide(Guide())
        before = state_of(vae)
        pv.fit(vae, torch.randn(9, 4), epochs=2, seed=seed, progress=False)
        after = state_of(vae)
        assert all((before[name] != after[name]).any() for name in before)
    assert len(pyro.get_param_store()) == 0


def test_a_guide_that_does_not_fit_and_an_estimator_not_valid_are_refused():
    def misspelt(x):
        with pyro.plate("data", len(x)):
            pyro.sample("zz", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    with pytest.raises(pv.GuideError, match="'zz'"):
        pv.fit(normal_vae().with_guide(misspelt), torch.randn(9, 4), epochs=1, progress=False)

    def discrete(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(torch.ones(len(x), 2)).to_event(1))

    with pytest.raises(ValueError, match="STL|not reparameterised|support"):
        pv.fit(
            normal_vae().with_guide(discrete), torch.randn(9, 4), epochs=1, estimator=pv.STL(), progress=False
        )


def test_a_gradient_that_is_not_finite_is_named_without_a_checkpoint_too():
    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = torch.nn.Parameter(torch.zeros(2))
            self.linear = torch.nn.Linear(4, 2)

        def forward(self, x):
            return dist.Normal(self.linear(x), 1 + torch.sqrt(self.zero**2)).to_event(1)

    with pytest.raises(pv.NonFiniteError, match="the gradient of parameter 'posterior.zero' is not finite"):
        pv.fit(normal_vae().with_guide(Guide()), torch.randn(9, 4), epochs=1, progress=False)


@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_after_the_last_step_is_not_lost(tmp_path):
    press = [lambda _, epoch: os.kill(os.getpid(), signal.SIGINT) if epoch.epoch == 2 else None]
    with pytest.raises(KeyboardInterrupt):
        pv.fit(
            normal_vae(),
            torch.randn(9, 4),
            epochs=2,
            callbacks=press,
            checkpoint_dir=tmp_path,
            progress=False,
        )
    assert len(serialization.read(tmp_path / "last.pt", "run")["history"]) == 2


def test_a_decoder_with_batch_normalisation_is_checked_without_learning():
    network = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4))
    likelihood = pv.likelihoods.Normal(2, (4,), network=network)
    vae = pv.VAE(prior=pv.priors.StandardNormal(2), likelihood=likelihood, guide=normal_vae().posterior)
    vae.check_data(torch.randn(9, 4))
    assert network[1].num_batches_tracked == 0
    assert vae.training
    pv.fit(vae, torch.randn(9, 4), validation=torch.randn(3, 4), epochs=1, progress=False)
    assert network[1].num_batches_tracked == 1
    assert vae.training


def test_a_fresh_run_replaces_the_one_in_the_folder(tmp_path):
    x = torch.randn(20, 4)
    pv.fit(normal_vae(), x, epochs=3, checkpoint_dir=tmp_path, progress=False)
    assert len(pv.fit(normal_vae(), x, epochs=2, checkpoint_dir=tmp_path, progress=False)) == 2
    assert len(serialization.read(tmp_path / "last.pt", "run")["history"]) == 2


def test_training_works_beside_the_main_thread():
    histories = []
    thread = threading.Thread(
        target=lambda: histories.append(pv.fit(normal_vae(), torch.randn(9, 4), epochs=1, progress=False))
    )
    thread.start()
    thread.join()
    assert len(histories[0]) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1; got 0"),
        ({"epochs": 2.5}, TypeError, "epochs must be an integer; got 2.5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1; got 0"),
        ({"engine": "warp"}, ValueError, "engine must be one of auto, eager, traced.*got 'warp'"),
        ({"kl_warmup": math.nan}, ValueError, "kl_warmup"),
        ({"data": torch.tensor(1.0)}, ValueError, "dense tensor"),
        ({"seed": -1}, ValueError, "seed must be a non-negative integer; got -1"),
        ({"kl_warmup": -1}, ValueError, "kl_warmup"),
        ({"patience": 0}, ValueError, "patience"),
        ({"resume": True}, ValueError, "resume=True needs checkpoint_dir"),
        ({"validation": 0.001}, ValueError, "a validation fraction of 0.001 of 20 data leaves 0"),
        ({"validation": 1.0}, ValueError, "0 for training"),
        ({"validation": torch.randn(3, 5)}, ValueError, r"shape \(N, 4\)"),
        ({"binarize": "dynamic"}, ValueError, r"needs grey levels in \[0, 1\]"),
        ({"data": torch.randn(0, 4)}, ValueError, "empty"),
        ({"data": torch.full((20, 4), math.nan)}, ValueError, r"x\[0, 0\] = nan"),
        ({"data": torch.zeros(20, 4, dtype=torch.int64)}, TypeError, "floating point; got torch.int64"),
        ({"data": [[1.0]]}, TypeError, "got list: convert with torch.as_tensor"),
        ({"estimator": "elbo"}, TypeError, "estimator must be a pyro.infer.ELBO.*got .elbo"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    arguments = {"data": torch.randn(20, 4), "epochs": 1, "progress": False} | options
    with pytest.raises(error, match=message):
        pv.fit(normal_vae(), **arguments)


def test_a_batch_larger_than_the_data_is_all_of_them(caplog):
    history = pv.fit(normal_vae(), torch.randn(7, 4), epochs=1, batch_size=100, progress=False)
    assert math.isnan(history[0].train_bound_se)
    assert "batch_size 100 exceeds the 7 examples" in caplog.text


@pytest.mark.parametrize(("count", "steps"), [(10, 1), (130, 2)])
def test_the_batch_size_by_default_fits_the_data_without_a_warning(count, steps, caplog):
    vae, lengths = normal_vae(), []
    model = vae.model
    vae.model = lambda x: lengths.append(len(x)) or model(x)
    pv.fit(vae, torch.randn(count, 4), epochs=1, engine="eager", progress=False)
    assert lengths[-steps:] == [10] if steps == 1 else [128, 2]
    assert not caplog.records


def test_fit_says_what_it_trains():
    with pytest.raises(TypeError, match=r"a VAE or pyro_vae.Pair\(model, guide\), .* got method: call fit"):
        pv.fit(normal_vae().model, torch.randn(7, 4))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the folder .*file/run"):
        pv.fit(
            normal_vae(),
            torch.randn(7, 4),
            epochs=1,
            checkpoint_dir=tmp_path / "file" / "run",
            progress=False,
        )


# Randomness is a function of seed, epoch and step -----------------------------------------------------------


def test_the_noise_of_a_step_depends_on_no_earlier_step(monkeypatch):
    """Whatever else draws between steps, the noise of each is the same."""
    step, losses = pv.SVI.step, {True: [], False: []}

    for disturb in (False, True):

        def disturbed(svi, x, disturb=disturb):
            loss = step(svi, x)
            losses[disturb].append(loss)
            if disturb:
                torch.rand(len(losses[disturb]))
            return loss

        monkeypatch.setattr(pv.SVI, "step", disturbed)
        train(make_vae(), None, epochs=2)
    assert losses[True] == losses[False]
    assert len(set(losses[True])) == len(losses[True])


def test_steps_draw_different_noise(monkeypatch):
    drawn = []
    monkeypatch.setattr(pv.SVI, "step", lambda svi, x: drawn.append(torch.rand(()).item()) or 1.0)
    train(make_vae(), None, epochs=3, patience=None, schedule=None)
    assert len(set(drawn)) == len(drawn) == 3 * 6  # 82 examples in batches of 16


def test_a_checkpoint_holds_no_generator_states(tmp_path):
    train(make_vae(), tmp_path, epochs=1)
    content = serialization.read(tmp_path / "last.pt", "run")
    assert not {"noise", "bits"} & set(content)


def test_a_run_of_an_earlier_format_is_refused_in_one_sentence(tmp_path):
    train(make_vae(), tmp_path, epochs=1)
    stored = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({**stored, "version": 1}, tmp_path / "last.pt")
    with pytest.raises(pv.CheckpointError, match=r"version 1 and this release reads version 2: [^.]*folder$"):
        train(make_vae(), tmp_path, epochs=2, resume=True)


# Batches as they will be ------------------------------------------------------------------------------------


def with_batch_norm() -> pv.VAE:
    encoder = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4))
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (6,)),
        guide=pv.guides.DiagonalNormal((6,), 2, network=encoder),
    )


def test_a_single_example_left_over_joins_the_batch_before_it(monkeypatch):
    lengths, step = [], pv.SVI.step
    monkeypatch.setattr(pv.SVI, "step", lambda svi, x: lengths.append(len(x)) or step(svi, x))
    history = pv.fit(with_batch_norm(), torch.randn(33, 6), batch_size=16, epochs=2, progress=False)
    assert lengths == [16, 17, 16, 17]
    assert math.isfinite(history[-1].train_bound)


def test_a_batch_that_cannot_be_trained_on_is_refused_before_the_first_step():
    vae = with_batch_norm()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(ValueError, match="batch of 1 of the 5 .*more than 1 value.*batch_size, 2 or more"):
        pv.fit(vae, torch.randn(5, 6), batch_size=1, epochs=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert vae.training


def test_trying_the_batches_leaves_statistics_alone():
    vae = with_batch_norm()
    pv.fit(vae, torch.randn(32, 6), batch_size=16, epochs=1, progress=False)
    assert vae.posterior.network[1].num_batches_tracked == 2


def test_a_single_validation_example_has_no_error():
    vae = normal_vae()
    history = pv.fit(vae, torch.randn(9, 4), validation=torch.randn(1, 4), epochs=1, progress=False)
    assert math.isfinite(history[0].validation_elbo)
    assert math.isnan(history[0].validation_elbo_se)


def test_a_notebook_and_a_data_frame_show_the_history():
    history = pv.fit(normal_vae(), torch.randn(20, 4), epochs=12, validation=0.3, progress=False)
    html = history._repr_html_()
    assert html.count("<tr>") == 1 + 10  # as in the text
    assert all(f">{line.split()[0]}</td>" in html for line in repr(history).splitlines()[2:])
    frame = history.to_dataframe()
    assert list(frame.index) == list(range(1, 13))
    assert frame["validation_elbo"].tolist() == history.column("validation_elbo")
    assert len(history.plot(title="run").lines) >= 2


def plain_vae(**options):
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (6,)),
        guide=pv.guides.DiagonalNormal((6,), 2, **options),
    )


def test_a_module_may_have_state_other_than_tensors(tmp_path):
    class Counted(torch.nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            assert state == {"version": 3}

    for epochs in (1, 2):
        options = {"checkpoint_dir": tmp_path, "resume": True, "progress": False}
        vae = plain_vae(network=Counted(6, 4))
        assert len(pv.fit(vae, torch.zeros(7, 6), epochs=epochs, **options)) == epochs


def test_another_number_of_shards_is_another_run(tmp_path):
    options = {"checkpoint_dir": tmp_path, "epochs": 1, "progress": False}
    pv.fit(plain_vae(), torch.zeros(7, 6), shards=2, **options)
    for shards in (1, 3):
        with pytest.raises(serialization.CheckpointError, match=f"shards was 2, is {shards}"):
            pv.fit(plain_vae(), torch.zeros(7, 6), shards=shards, resume=True, **options)


def test_a_run_that_is_replaced_is_named(tmp_path, caplog):
    options = {"epochs": 1, "progress": False, "checkpoint_dir": tmp_path / "run"}
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        likelihood=pv.likelihoods.Normal(2, (3,), hidden_features=(4,)),
        guide=pv.guides.DiagonalNormal((3,), 2, hidden_features=(4,)),
    )
    pv.fit(vae, torch.zeros(5, 3), **options)
    assert not caplog.messages
    pv.fit(vae, torch.zeros(5, 3), resume=True, **options)
    assert not caplog.messages
    pv.fit(vae, torch.zeros(5, 3), **options)
    assert "is replaced by a new one; resume=True would go on with it" in caplog.text
    pv.fit(vae, torch.zeros(5, 3), resume=True, **(options | {"checkpoint_dir": tmp_path / "rnu"}))
    assert caplog.messages[1:] == [
        f"there is no run in {tmp_path / 'rnu'} to resume: one starts there from the beginning"
    ]
