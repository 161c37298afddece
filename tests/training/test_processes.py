"""Several processes: the same numbers as one, the same errors in all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "helpers" / "process_run.py"


def launch(size, folder, *command, restarts=0, check=True):
    start = [] if size == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    start += [f"--max-restarts={restarts}"] * (restarts > 0)
    run = [sys.executable, *start, str(SCRIPT), str(folder), *map(str, command)]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=400)
    assert not (check and done.returncode), done.stderr[-5000:]
    return done


def results(size, folder):
    return [torch.load(folder / f"{rank}-of-{size}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def runs(request, tmp_path_factory):
    folder, sizes = tmp_path_factory.mktemp("runs"), (1, request.param)
    launch(1, folder, *sizes)
    return [results(size, folder) for size in sizes]


@pytest.fixture
def one(runs):
    return runs[0][0]


@pytest.fixture
def several(runs):
    return runs[1]


def same(a, b):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-10, atol=1e-10, equal_nan=True)


def test_fit_takes_the_steps_of_one_process(one, several):
    for name, (parameters, bounds, validation) in one["fits"].items():
        for rank in several:
            found, found_bounds, found_validation = rank["fits"][name]
            assert same(found, parameters), name
            assert same(found_bounds, bounds), name
            assert same(found_validation, validation), name
            assert torch.equal(found, several[0]["fits"][name][0]), name
    assert len(one["fits"]["callbacks"][1]) == 2  # the callback stops all


def test_a_step_on_parts_is_that_of_the_whole_batch(one, several):
    for name, (before, parameters, losses, _) in one["steps"].items():
        engine, *_, dtype = name
        tolerance = 1e-4 if dtype == torch.float32 else 1e-10
        moved = (parameters - before).norm()
        for rank in several:
            _, found, found_losses, taken = rank["steps"][name]
            assert (found - parameters).norm() <= tolerance * moved, name
            assert torch.allclose(torch.tensor(found_losses), torch.tensor(losses), rtol=tolerance), name
            assert torch.equal(found, several[0]["steps"][name][1]), name
            graphs = {"eager": [(0, 0)], "traced": [(7, 0), (8, 0)], "compiled": [(0, 7), (0, 8)]}
            assert taken in graphs[engine], name  # the first step imports modules, and may be eager


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_compiled_steps_on_parts_are_those_of_the_whole_batch(tmp_path, size):
    for processes in (1, size):
        launch(processes, tmp_path, "compiled")
    [one], several = results(1, tmp_path), results(size, tmp_path)
    test_a_step_on_parts_is_that_of_the_whole_batch(one, several)
    for rank in several:
        assert all(map(same, rank["fit"], one["fit"]))
        assert torch.equal(rank["fit"][0], several[0]["fit"][0])
    test_a_graph_may_hold_in_one_process_alone(several)


def test_losses_that_speak_for_all_data_are_averaged(one, several):
    for rank in several:
        assert same(rank["scaled"][0], one["scaled"][0])
        assert same(rank["scaled"][1], one["scaled"][1])


def test_an_evaluation_does_not_depend_on_the_number_of_processes(one, several):
    for rank in several:
        for name in ("log_evidence", "kl", "pareto_k", "compared"):
            assert torch.equal(rank["evaluation"][name].nan_to_num(), one["evaluation"][name].nan_to_num())
        assert rank["evaluation"]["text"] == one["evaluation"]["text"]
        assert rank["alone"] == 1


def test_an_error_of_one_process_ends_the_step_of_all(several):
    last = len(several) - 1
    for number, rank in enumerate(several):
        failures = rank["failures"]
        assert failures["steps"] == 1
        assert failures["nan"].startswith(f"NonFiniteError: rank {last}: x[2, 3] = nan lies outside")
        wrong_shape = "DiagonalNormal: x must have shape (*, 7); got (4, 5)"
        own = number == last
        kind = "ValueError: " if own else f"RuntimeError: rank {last} raised ValueError: "
        assert failures["shape"].startswith(kind + wrong_shape)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data", "the processes differ in the data: rank"),
        ("settings", "the processes differ in settings: rank"),
        ("diverged", "the processes differ in the parameters after epoch 2, by their check sum: rank"),
        (
            "wrapped",
            "a parameter belongs to a DistributedDataParallel, which would train every process alone",
        ),
        ("batch norm", "the module 'posterior.network.1', a BatchNorm1d, depends on the batch as a whole"),
        ("free bits", "free bits hold on average over a batch"),
        ("semi-supervised", "a SemiSupervisedVAE weights labelled examples by their share of a batch"),
        ("validation divided", "a DistributedSampler would leave data out"),
        ("folder", "{'with checkpoint_dir': True}, rank 0 has {'with checkpoint_dir': False}"),
        ("epochs", "{'epochs': 2}, rank 0 has {'epochs': 1}"),
        ("particles", "the processes differ in settings of evaluate: rank"),
        ("calls", "at settings, rank 0 at settings of evaluate. All must call fit and evaluate"),
        ("few shards", "shards, 1, must be at least the number of processes"),
        ("small batch", "needs at least one datum"),
    ],
)
def test_what_would_train_wrongly_is_refused_by_all(several, name, message):
    for rank in several:
        assert rank["failures"][name].startswith("ValueError: "), name
        assert message in rank["failures"][name]


def test_an_error_before_the_first_step_is_raised_in_all(several):
    last = len(several) - 1
    for number, rank in enumerate(several):
        kind = "ValueError: " if number == last else f"RuntimeError: rank {last} raised ValueError: "
        assert rank["failures"]["bad value"].startswith(f"{kind}x[2, 3] = 2"), number


def test_each_process_has_its_own_stream(several):
    for number, rank in enumerate(several):
        found = rank["streams"]
        others = [other["streams"]["first"] for other in several[:number]]
        assert not any(torch.equal(found["first"][:3], other[:3]) for other in others)
        start, state = found["loaded"][0], found["loaded"][-1]
        assert start["position"] == 0
        assert state == {"rank": number, "position": 4}


def test_a_distributed_sampler_divides_the_data_in_a_new_order_each_epoch(several):
    first, second = zip(*(rank["streams"]["read"] for rank in several), strict=True)
    assert all(one != other for one, other in zip(first, second, strict=True))
    for epoch in (first, second):
        seen = [position for share in epoch for position in share]
        assert len(seen) == len(set(seen)) == 101 // len(several) * len(several)
    assert all(rank["streams"]["bound"] == several[0]["streams"]["bound"] for rank in several)


def test_a_graph_may_hold_in_one_process_alone(several):
    assert all(torch.equal(rank["graph on one"], several[0]["graph on one"]) for rank in several)


def test_an_interrupt_of_one_process_stops_all_after_the_same_step(one, several):
    assert one["interrupted"]["stopped"]
    for rank in several:
        assert "training interrupted, and saved" in rank["interrupted"]["stopped"]
        assert torch.equal(rank["interrupted"]["between"], several[0]["interrupted"]["between"])
        assert same(rank["interrupted"]["resumed"], one["interrupted"]["resumed"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "rank", "when", "every"),
    [
        (2, 0, "step", "1 µs"),
        (2, 1, "step", "epoch"),
        (2, 0, "write", "epoch"),
        (2, 0, "write", "2 steps"),
        (3, 0, "rename", "epoch"),
        (3, 0, "rename", "1 µs"),
        (3, 2, "step", "2 steps"),
    ],
)
def test_a_process_that_is_killed_changes_nothing(tmp_path, size, rank, when, every):
    for name, number, interval in (("whole", -1, "epoch"), ("killed", rank, every)):
        (tmp_path / name).mkdir()
        launch(size, tmp_path / name, "killed", number, when, interval, restarts=2)
    assert (tmp_path / "killed" / "killed").exists()
    assert not (tmp_path / "whole" / "killed").exists()
    results = [torch.load(tmp_path / name / f"{r}.pt") for name in ("whole", "killed") for r in range(size)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.slow
def test_the_number_of_processes_may_change_when_resumed(tmp_path):
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    whole.mkdir()
    launch(1, whole, "epochs", 6)
    changing.mkdir()
    for size, epochs in ((2, 2), (3, 4), (1, 6)):
        launch(size, changing, "epochs", epochs)
    assert same(torch.load(changing / "0.pt"), torch.load(whole / "0.pt"))


@pytest.mark.slow
def test_a_slow_process_is_waited_for_and_a_stuck_one_named(tmp_path):
    launch(2, tmp_path, "stuck", check=False)
    found = (tmp_path / "0.txt").read_text()
    assert found.startswith("after 2 steps, RuntimeError: rank 1 ended, or did not get here within")
