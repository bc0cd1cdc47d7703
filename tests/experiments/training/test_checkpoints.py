"""Checkpoints: runs that are killed go on bit by bit; files that are not whole are never taken."""

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ensembles.checks.trajectory.judgement import assert_trajectories_equal
from ensembles.checks.trajectory.runs import TrainingTrajectory
from ensembles.experiments.data.batches import evaluation_batches
from ensembles.experiments.data.sources import load_images, split_validation
from ensembles.experiments.training import checkpoints as module
from ensembles.experiments.training.checkpoints import (
    Checkpoint,
    WholeFileIO,
    checkpoint_path,
    convert,
    last_checkpoint,
    load_matching,
    load_network,
    prune_checkpoints,
    read_checkpoint,
)
from ensembles.experiments.training.networks import NetworkOptions, build_network
from ensembles.experiments.training.runs import Table
from ensembles.experiments.training.trainer import Execution, TrainingOptions, train
from ensembles.instruments.recording import Entry, digest
from ensembles.models import ResNet
from ensembles.models.objectives import Stochastic

KILLED_RUNS = Path(__file__).with_name("killed_runs.py")
QUIET = Execution(accelerator="cpu", progress=False, tensorboard=False, checkpoint_every=2)
ENSEMBLE = NetworkOptions(kind="ensemble", members=2, base_channels=2)


@pytest.fixture(scope="module")
def images():
    return load_images("digits", "train").select(range(100))


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A finished run of an ensemble, of 2 steps an epoch, whose files no test changes."""
    options = TrainingOptions(epochs=2, batch_size=40, validation=20)
    return train(ENSEMBLE, options, images, tmp_path_factory.mktemp("run"), execution=QUIET)


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints as Lightning would have them written, of steps 2 and 4."""
    for step in (2, 4):
        content = {"state_dict": {"network.w": torch.full((100,), float(step))}}
        WholeFileIO().save_checkpoint(content, checkpoint_path(tmp_path, step))
    return tmp_path


# --- runs that are killed -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """Runs that were killed, beside those that were not. Where kills fall, a seed decides."""
    place = tmp_path_factory.mktemp("killed_runs")
    seed = int.from_bytes(os.urandom(2))
    done = subprocess.run(
        [sys.executable, KILLED_RUNS, place, str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    logs = "\n".join(path.read_text() for path in place.glob("*.log"))
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}\n{logs}"
    report = json.loads(done.stdout.splitlines()[-1])
    return place, report, f"seed {seed}: {report}\n{logs}"


def trajectory(folder):
    """The losses of every step, and all that the last one left behind."""
    path = last_checkpoint(folder / "checkpoints")
    content = torch.load(path, weights_only=True)
    step = content["global_step"]
    losses = [
        Entry(row["step"], "loss", "", name, digest(row[name]), row[name])
        for row in table(folder, "steps.csv")
        for name in row
        if name.endswith("loss")
    ]
    states = [
        Entry(step, "parameter", "", name, digest(value))
        for name, value in content["state_dict"].items()
    ]
    optimizer = [
        Entry(step, "state", "", f"{parameter}.{name}", digest(value))
        for parameter, values in content["optimizer_states"][0]["state"].items()
        for name, value in values.items()
    ]
    assert losses
    assert optimizer
    rest = {name: content[name] for name in ("lr_schedulers", "loops", "epoch", module.RUN_KEY)}
    text = Entry(step, "generator", "", "everything else", digest(plain(rest)))
    return TrainingTrajectory(0, (), (*losses, *states, *optimizer, text))


def plain(value):
    if isinstance(value, torch.Tensor):
        return digest(value)
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def table(folder, name):
    return Table(folder / name).read()


def test_a_run_that_is_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(killed_runs):
    """In the middle of epochs and of writing: weights, statistics, momentum, losses, generators."""
    place, report, told = killed_runs
    assert [report[run] for run in ("whole", "killed", "late")] == [0, 0, 0], told
    killed = {moment: step for moment, how, step in report["kills"] if how == -9}
    moments = {"table half", "checkpoint half", "checkpoint unnamed", "checkpoint named"}
    assert moments <= set(killed), told
    assert any(step % 5 for step in killed.values()), f"none in the middle of an epoch\n{told}"
    for run in ("killed", "late"):
        assert_trajectories_equal(trajectory(place / "whole"), trajectory(place / run))
        for name in ("steps.csv", "epochs.csv", "options.json"):
            assert (place / "whole" / name).read_bytes() == (place / run / name).read_bytes(), name


def test_the_uninterrupted_run_took_all_steps(killed_runs):
    """Of 80 images in batches of 16, over 3 epochs; a comparison of nothing would pass too."""
    place, *_ = killed_runs
    steps = [row["step"] for row in table(place / "whole", "steps.csv")]
    assert steps == list(range(1, 16))
    assert len(table(place / "whole", "epochs.csv")) == 3
    assert not list((place / "killed").rglob(".*.tmp"))


def test_two_processes_that_are_killed_go_on_bit_by_bit(killed_runs):
    place, report, told = killed_runs
    assert report["pair"] == [0, 0], told
    assert report["pair killed"][0] == -9, told
    assert report["pair again"] == [0, 0], told
    assert_trajectories_equal(trajectory(place / "pair"), trajectory(place / "pair_killed"))
    tables = [(place / run / "steps.csv").read_bytes() for run in ("pair", "pair_killed")]
    assert tables[0] == tables[1]


def test_two_processes_throw_the_same_coins_and_count_all_images(killed_runs):
    place, *_ = killed_runs
    options = json.loads((place / "pair" / "options.json").read_text())
    seed = options["training"]["seed"]
    names = ("parent", "subnet_0_0", "subnet_0_1")
    rows = table(place / "pair", "steps.csv")
    coins = [Stochastic(0.5).asked(names, step=step, seed=seed) for step in range(10)]
    assert [tuple(row["asked"].split()) for row in rows] == coins
    for row in rows:
        assert {name for name in names if f"{name}/loss" in row} == set(row["asked"].split())
    for epoch, row in enumerate(table(place / "pair", "epochs.csv")):
        parent = 16 * coins[5 * epoch : 5 * epoch + 5].count(("parent",))
        assert row.get("train/parent/n", 0) == parent
        assert row["val/parent/n"] == row["val/ensemble/n"] == 20


def test_two_processes_validate_what_their_checkpoint_holds(killed_runs):
    """BatchNorm's statistics too, of which each process has its own until the first's are taken."""
    place, *_ = killed_runs
    state = read_checkpoint(last_checkpoint(place / "pair" / "checkpoints")).state
    parent = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Identity(),  # dropout, which evaluation leaves out
        nn.Flatten(),
        nn.Linear(216, 10),
    )
    begin = "members.0."
    load_matching(parent, {n.removeprefix(begin): v for n, v in state.items() if begin in n})
    _, validation = split_validation(load_images("digits", "train").select(range(100)), 20, 0)
    ((x, labels),) = evaluation_batches(validation, 20)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(parent.eval()(x), labels).item()
    last = table(place / "pair", "epochs.csv")[-1]
    assert last["val/parent/loss"] == pytest.approx(loss, rel=1e-6)


def test_two_processes_compute_what_one_does(killed_runs):
    """In double precision, without BatchNorm, whose statistics are of each one's part."""
    place, report, told = killed_runs
    assert report["linear"] == 0, told
    one, two = (last_checkpoint(place / run / "checkpoints") for run in ("linear", "linear_pair"))
    expected, found = read_checkpoint(one).state, read_checkpoint(two).state
    assert {value.dtype for value in expected.values()} == {torch.float64}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)
    for name in ("steps.csv", "epochs.csv"):
        rows = zip(table(place / "linear", name), table(place / "linear_pair", name), strict=True)
        for row, other in rows:
            assert row.pop("asked", "") == other.pop("asked", "")
            assert other == pytest.approx(row, rel=1e-7), name


# --- files ----------------------------------------------------------------------------------------


def test_the_last_whole_checkpoint_is_taken(saved):
    assert last_checkpoint(saved) == checkpoint_path(saved, 4)
    assert last_checkpoint(saved / "nowhere") is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_and_never_loaded(saved, damage):
    path = checkpoint_path(saved, 4)
    content = bytearray(path.read_bytes())
    if damage == "flipped":  # one bit of a weight, which torch.load does not notice
        place = content.find(torch.full((100,), 4.0).numpy().tobytes())
        content[place + 2] ^= 1
        assert place > 0
    path.write_bytes(content if damage == "flipped" else content[: 600 * (damage == "cut")])
    with pytest.warns(UserWarning, match="step_00000004.ckpt is damaged"):
        assert last_checkpoint(saved) == checkpoint_path(saved, 2)
    with pytest.raises(ValueError, match=r"step_00000004.ckpt is no whole checkpoint: .+ earlier"):
        read_checkpoint(path)


def test_the_parts_that_a_kill_left_are_no_checkpoints(saved):
    checkpoint_path(saved, 4).rename(saved / ".step_00000006.ckpt.12.tmp")
    (saved / "step_7.ckpt.tmp").write_bytes(b"")
    assert last_checkpoint(saved) == checkpoint_path(saved, 2)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_what_to_do(saved, monkeypatch):
    before = checkpoint_path(saved, 4).read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for step in (4, 6):
        with pytest.raises(OSError, match="No space left on device while writing") as caught:
            WholeFileIO().save_checkpoint({"a": 1}, checkpoint_path(saved, step))
        assert caught.value.errno == errno.ENOSPC
        assert "Free some space, and give the same command again" in str(caught.value)
    assert checkpoint_path(saved, 4).read_bytes() == before
    assert sorted(path.name for path in saved.iterdir()) == [
        "step_00000002.ckpt",
        "step_00000004.ckpt",
    ]


def test_a_run_whose_disk_was_full_goes_on_with_the_same_bits(images, tmp_path, monkeypatch):
    options = TrainingOptions(epochs=2, batch_size=25, validation=0)
    whole = train(ENSEMBLE, options, images, tmp_path / "whole", execution=QUIET)
    write_whole = module.write_whole
    written = []

    def full_at_the_second(path, content, *, replace):
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_whole(path, content, replace=replace)

    monkeypatch.setattr(module, "write_whole", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        train(ENSEMBLE, options, images, tmp_path / "full", execution=QUIET)
    assert last_checkpoint(tmp_path / "full" / "checkpoints").name == "step_00000002.ckpt"
    again = train(ENSEMBLE, options, images, tmp_path / "full", execution=QUIET)
    assert_trajectories_equal(trajectory(whole.folder), trajectory(again.folder))


def test_a_run_goes_on_from_an_earlier_checkpoint_where_the_last_is_damaged(images, tmp_path):
    options = TrainingOptions(epochs=2, batch_size=25, validation=0)
    whole = train(ENSEMBLE, options, images, tmp_path / "one", execution=QUIET)
    other = train(ENSEMBLE, options, images, tmp_path / "two", execution=QUIET)
    other.checkpoint.write_bytes(other.checkpoint.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is damaged"):
        again = train(ENSEMBLE, options, images, tmp_path / "two", execution=QUIET)
    assert again.finished
    assert_trajectories_equal(trajectory(whole.folder), trajectory(again.folder))


def test_only_the_last_checkpoints_stay(trained, saved):
    found = sorted(path.name for path in (trained.folder / "checkpoints").iterdir())
    assert found == ["step_00000002.ckpt", "step_00000004.ckpt"]
    prune_checkpoints(saved, keep=1)
    assert [path.name for path in saved.iterdir()] == ["step_00000004.ckpt"]


class Exploit:
    def __reduce__(self):
        return os.system, ("false",)


def test_a_checkpoint_that_would_execute_something_is_not_loaded(tmp_path):
    path = tmp_path / "step_00000001.ckpt"
    torch.save({"state_dict": {}, "more": Exploit()}, path, pickle_module=pickle)
    with pytest.raises(ValueError, match="holds more than tensors and plain values") as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f"{path} holds more than tensors and plain values (posix.system), or is no file of "
        "torch.save, and is not loaded: it might execute something. Save a state dict alone."
    )


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        read_checkpoint(tmp_path / "text.ckpt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(
        ValueError, match="no checkpoint of `ensembles train`: it holds weight, bias"
    ):
        read_checkpoint(tmp_path / "plain.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="an object of type list"):
        read_checkpoint(tmp_path / "list.pt")


# --- networks -------------------------------------------------------------------------------------


def test_a_checkpoint_says_what_it_is(trained):
    checkpoint = read_checkpoint(trained.checkpoint)
    assert isinstance(checkpoint, Checkpoint)
    assert (checkpoint.step, checkpoint.steps) == (4, 4)
    assert NetworkOptions.from_dict(checkpoint.run["network"]) == ENSEMBLE
    assert checkpoint.run["data"]["name"] == "digits"
    assert list(checkpoint.state) == list(build_network(ENSEMBLE).state_dict())


def test_the_network_of_a_checkpoint_is_the_one_that_was_validated(trained, images):
    from ensembles.experiments.data.sources import split_validation

    network = load_network(trained.checkpoint)
    assert not network.training
    _, validation = split_validation(images, 20, 0)
    with torch.no_grad():
        logits = network(validation.normalised())
    last = trained.epochs()[-1]
    for name, found in logits.items():
        right = int((found.argmax(1) == validation.labels).sum())
        assert right == last[f"val/{name}/accuracy"] * last[f"val/{name}/n"]


def test_another_architecture_names_the_first_keys_that_differ():
    network = ResNet(18, stem="cifar", base_channels=2, num_classes=10)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    other = ResNet(34, stem="cifar", base_channels=4, num_classes=10).state_dict()
    with pytest.raises(ValueError, match="another architecture") as caught:
        load_matching(network, other, source="old.ckpt")
    assert str(caught.value).splitlines() == [
        "old.ckpt is of another architecture than ResNet: 197 of 218 keys differ",
        "  conv1.weight      (2, 3, 3, 3) in the network, (4, 3, 3, 3) in the file",
        "  bn1.weight        (2,) in the network, (4,) in the file",
        "  bn1.bias          (2,) in the network, (4,) in the file",
        "  bn1.running_mean  (2,) in the network, (4,) in the file",
        "  bn1.running_var   (2,) in the network, (4,) in the file",
        "  ... 192 more",
        "Build the network with the options that it was trained with.",
    ]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_state_dict_goes_back_bit_by_bit():
    one, two = (build_network(ENSEMBLE, seed=seed) for seed in (1, 2))
    load_matching(two, one.state_dict())
    state = two.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


# --- conversion -----------------------------------------------------------------------------------


def test_the_whole_network_is_converted_to_a_plain_state_dict(trained, tmp_path):
    convert(trained.checkpoint, tmp_path / "sub" / "network.pt")
    state = torch.load(tmp_path / "sub" / "network.pt", weights_only=True)
    network = build_network(ENSEMBLE)
    network.load_state_dict(state)
    x = torch.ones(2, 3, 8, 8)
    expected = load_network(trained.checkpoint)(x)
    found = network.eval()(x)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_member_is_converted_to_the_state_dict_of_a_plain_network(trained, tmp_path):
    convert(trained.checkpoint, tmp_path / "one.pt", member="member_1")
    plain_network = ResNet(18, stem="cifar", base_channels=2, num_classes=10)
    plain_network.load_state_dict(torch.load(tmp_path / "one.pt", weights_only=True))
    x = torch.ones(2, 3, 8, 8)
    expected = load_network(trained.checkpoint)(x)["member_1"]
    assert torch.equal(plain_network.eval()(x), expected)
    with pytest.raises(ValueError, match="member_2"):
        convert(trained.checkpoint, tmp_path / "two.pt", member="member_2")
    assert not (tmp_path / "two.pt").exists()


def test_a_subnet_is_converted_to_a_narrow_network(images, tmp_path):
    network = NetworkOptions(kind="subnets", width=2, base_channels=2)
    options = TrainingOptions(epochs=1, batch_size=50, validation=0)
    run = train(network, options, images, tmp_path / "run", execution=QUIET)
    convert(run.checkpoint, tmp_path / "subnet.pt", member="subnet_1_0")
    narrow = ResNet(18, stem="cifar", base_channels=2, num_classes=10)
    narrow.load_state_dict(torch.load(tmp_path / "subnet.pt", weights_only=True))
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    expected = load_network(run.checkpoint)(x)["subnet_1_0"]
    torch.testing.assert_close(narrow.eval()(x), expected, rtol=1e-4, atol=1e-5)
    # Not one byte of the parent is in the file.
    assert (tmp_path / "subnet.pt").stat().st_size < run.checkpoint.stat().st_size / 6


def test_a_conversion_stores_no_more_than_the_values_it_is_asked_for(tmp_path):
    """A view would bring all of its storage along, and channels last its strides."""
    whole = torch.rand(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    path = checkpoint_path(tmp_path, 1)
    content = {
        "state_dict": {"network.slice": whole[:2]},
        "global_step": 1,
        module.RUN_KEY: {"run": {}, "steps": 1},
    }
    WholeFileIO().save_checkpoint(content, path)
    convert(path, tmp_path / "plain.pt")
    (value,) = torch.load(tmp_path / "plain.pt", weights_only=True).values()
    assert torch.equal(value, whole[:2])
    assert value.is_contiguous()
    assert value.untyped_storage().nbytes() == value.nbytes


def test_a_conversion_overwrites_nothing(trained, tmp_path):
    (tmp_path / "kept.pt").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"kept\.pt exists, and is not overwritten"):
        convert(trained.checkpoint, tmp_path / "kept.pt")
    assert (tmp_path / "kept.pt").read_bytes() == b"precious"
