"""Trains in processes that are killed, and prints what became of them as JSON.

One process imports what training needs and forks the others, which then begin at once. It trains
nothing itself: a process that has used autograd is not forked.

    python killed_runs.py FOLDER SEED
"""

import dataclasses
import json
import os
import random
import signal
import socket
import stat
import sys
import time
import traceback
from pathlib import Path


def forked(job, log, *arguments):
    """Starts a process that does one job."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            job(*arguments)
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child):
    """How a process ended: 0, a positive status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(place, moment, count):
    """Makes the present process kill itself when it writes something for the n-th time.

    Args:
        place: "checkpoint" or "table".
        moment: "half": when it is written but not on the disk, of which the last bytes are lost;
            "unnamed": before it takes its name; "named": after.
        count: The n.
    """
    from ensembles.experiments.training import checkpoints

    fsync, replace, write_whole = os.fsync, os.replace, checkpoints.write_whole
    state = {"place": "table", "left": count}

    def perhaps(now):
        state["left"] -= (state["place"], now) == (place, moment)
        return state["left"] == 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_fsync(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and perhaps("half"):
            os.ftruncate(descriptor, max(os.fstat(descriptor).st_size - 7, 0))
            die()
        fsync(descriptor)

    def dying_replace(source, target):
        if perhaps("unnamed"):
            die()
        replace(source, target)
        if perhaps("named"):
            die()

    def checkpoint(*arguments, **options):
        state["place"] = "checkpoint"
        write_whole(*arguments, **options)
        state["place"] = "table"

    os.fsync, os.replace, checkpoints.write_whole = dying_fsync, dying_replace, checkpoint


def last_step(folder):
    return max((int(path.stem[5:]) for path in folder.glob("checkpoints/step_*.ckpt")), default=0)


def main(place, seed):
    import torch
    from torch import nn

    from ensembles.experiments.data.sources import load_images
    from ensembles.experiments.training.networks import NamedEnsemble
    from ensembles.experiments.training.schedules import Schedule
    from ensembles.experiments.training.trainer import Execution, TrainingOptions, train
    from ensembles.models.objectives import Stochastic

    images = load_images("digits", "train").select(range(100))

    class Family(NamedEnsemble):
        """Independent members under the names that the stochastic objective knows."""

        member_names = ("parent", "subnet_0_0", "subnet_0_1")

    def made(kind, count):
        """Small networks with all that has a state: BatchNorm, dropout."""
        torch.manual_seed(seed)
        return kind(
            nn.Sequential(
                nn.Conv2d(3, 6, 3),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Flatten(),
                nn.Linear(216, 10),
            )
            for _ in range(count)
        )

    options = TrainingOptions(
        seed=seed,
        epochs=3,
        batch_size=16,
        validation=20,
        order="own",
        augment="own",
        schedule=Schedule(warmup_epochs=0.5),
    )
    coins = TrainingOptions(
        seed=seed, epochs=2, batch_size=16, validation=20, objective=Stochastic(0.5)
    )
    execution = Execution(accelerator="cpu", checkpoint_every=2, progress=False, tensorboard=False)

    def one(folder, *point):
        if point:
            dying_at(*point)
        train(made(NamedEnsemble, 2), options, images, folder, execution=execution)

    def linear():
        """Without BatchNorm, two devices compute what one does."""
        torch.manual_seed(seed)
        return NamedEnsemble(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)) for _ in range(2))

    def rank(folder, number, port, *point):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(number))
        if point and number == 0:
            dying_at(*point)
        two = dataclasses.replace(execution, devices=2)
        run = train(made(Family, 3), coins, images, folder, execution=two)
        if not point and folder.name == "pair":
            train(linear(), double, images, place / "linear_pair", execution=two)
        torch.distributed.destroy_process_group()
        print(run)

    def pair(folder, *point):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        children = [
            forked(rank, place / f"rank_{number}.log", folder, number, port, *point)
            for number in range(2)
        ]
        first = ended(children[0])
        if first:  # as a launcher does when one of its processes dies
            os.kill(children[1], signal.SIGKILL)
        return [first, ended(children[1])]

    double = TrainingOptions(seed=seed, epochs=2, batch_size=16, validation=20, precision="64-true")
    train_linear = lambda: train(  # noqa: E731
        linear(), double, images, place / "linear", execution=execution
    )
    drawn = random.Random(seed)
    log = place / "one.log"
    started = time.monotonic()
    report = {"whole": ended(forked(one, log, place / "whole")), "kills": []}
    took = time.monotonic() - started
    moments = [("table", "half")]
    moments += [("checkpoint", moment) for moment in ("half", "unnamed", "named")]
    drawn.shuffle(moments)
    for what, moment in moments:
        how = ended(forked(one, log, place / "killed", what, moment, 2))
        report["kills"].append([f"{what} {moment}", how, last_step(place / "killed")])
    report["killed"] = ended(forked(one, log, place / "killed"))

    for _ in range(2):
        child = forked(one, log, place / "late")
        time.sleep(drawn.uniform(0.3, 0.9) * took)
        os.kill(child, signal.SIGKILL)
        report["kills"].append(["late", ended(child), last_step(place / "late")])
    report["late"] = ended(forked(one, log, place / "late"))

    report["linear"] = ended(forked(train_linear, log))
    report["pair"] = pair(place / "pair")
    report["pair killed"] = pair(place / "pair_killed", "checkpoint", "half", drawn.randrange(2, 5))
    report["pair again"] = pair(place / "pair_killed")
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
