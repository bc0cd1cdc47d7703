"""Whether one seed gives the same bits, another seed other weights, and loaders repeat nothing."""

from __future__ import annotations

from collections.abc import Iterator

from ensembles.checks.determinism.claim import DeterminismClaim
from ensembles.checks.determinism.loaders import LoaderDeterminism
from ensembles.checks.determinism.measurement import Determinism
from ensembles.findings import Count, Finding, Findings
from ensembles.instruments.divergence import Divergence
from ensembles.instruments.loader_rng import DRAWS, INDICES
from ensembles.message import assert_held, listed

__all__ = ["assert_deterministic", "assert_loader_deterministic", "judge"]


def assert_deterministic(determinism: Determinism, *, loaded: bool = False) -> None:
    """Checks that one seed gives the same bits, and that another seed gives other weights.

    Args:
        determinism: From `measure_determinism`.
        loaded: Whether all weights come from a file, so that they need not depend on the seed.

    Raises:
        AssertionError: If two runs differ, naming the first step, tensor and operation; or if no
            weight depends on the seed; or if construction leaves a generator in one state.

    Example:
        >>> from ensembles import measure_determinism
        >>> assert_deterministic(measure_determinism(lambda: nn.Linear(4, 2), torch.randn(3, 4)))
        >>> def seeds_itself():
        ...     torch.manual_seed(0)
        ...     return nn.Linear(4, 2)
        >>> assert_deterministic(measure_determinism(seeds_itself))
        Traceback (most recent call last):
        AssertionError: construction is claimed to draw from the seed, but does not
        ...
    """
    __tracebackhide__ = True
    assert_held(judge(determinism, DeterminismClaim(loaded=loaded, steps=determinism.steps)))


def assert_loader_deterministic(loading: LoaderDeterminism, *, augmented: bool = True) -> None:
    """Checks that batches repeat under the seed, and that no worker or epoch repeats another.

    Args:
        loading: From `measure_loader_determinism`.
        augmented: Whether samples are claimed to be augmented at random, as in training. Without,
            only that batches repeat under the seed is checked.

    Raises:
        ValueError: If augmentation is claimed and nothing random was found.
        AssertionError: If batches differ between two passes, two streams are one, or a shuffled
            order is that of every epoch.

    Example:
        >>> from ensembles import measure_loader_determinism
        >>> data = [torch.full((2,), float(i)) for i in range(4)]
        >>> assert_loader_deterministic(measure_loader_determinism(
        ...     lambda: torch.utils.data.DataLoader(data, shuffle=True)), augmented=False)
    """
    __tracebackhide__ = True
    items = tuple(_of_loader(loading, augmented=augmented))
    assert_held(_findings(items, _LOADER_CLAIMS, seed=loading.seed, first=0, loading=loading))


def judge(determinism: Determinism, claim: DeterminismClaim) -> Findings:
    """What does not repeat from one seed, what another seed leaves, and what loaders repeat."""
    items = [*_of_runs(determinism), *_of_construction(determinism, loaded=claim.loaded)]
    augmented = claim.loaders == "augmented"
    for member, loading in determinism.loaders.items():
        items += _of_loader(loading, augmented=augmented, member=str(member))
    first = determinism.diverged[0].step if determinism.diverged else 0
    return _findings(
        tuple(items),
        {**_CLAIMS, **_LOADER_CLAIMS},
        seed=determinism.seed,
        first=first,
        determinism=determinism,
    )


def _findings(
    items: tuple[Finding, ...],
    claims: dict[str, str],
    *,
    seed: int,
    first: int,
    determinism: Determinism | None = None,
    loading: LoaderDeterminism | None = None,
) -> Findings:
    kind = items[0].kind if items else next(iter(claims))
    apart = determinism is not None and determinism.apart
    claim = claims[kind].format(
        seed=seed,
        runs="two processes" if apart else "two runs",
        where=f"from step {first} on" if first else "at construction",
    )
    return Findings(claim=claim, items=items, affected=_affected(items, determinism, loading))


def _affected(
    items: tuple[Finding, ...],
    determinism: Determinism | None,
    loading: LoaderDeterminism | None,
) -> tuple[Count, ...]:
    if not items:
        return ()
    if loading is not None:
        return (Count(loading.differing, "batch", of=loading.batches),)
    assert determinism is not None
    if determinism.diverged:
        return (Count(len(determinism.diverged), "recorded value", of=determinism.compared),)
    if determinism.drawn and items[0].kind != "refused":
        unseeded = len(determinism.unseeded)
        return (Count(unseeded, "parameter of the same values", of=len(determinism.drawn)),)
    return ()


# --- two runs -----------------------------------------------------------------------------------

_CLAIMS = {
    "differs": "one seed is claimed to give the same bits, but {runs} from seed {seed} differ "
    "{where}",
    "refused": "training is claimed to repeat bit by bit, but an operation cannot",
    "constant generator": "construction is claimed to draw from the seed, but does not",
    "unseeded": "initial weights are claimed to come from the seed, but do not",
}
"""By kind of the first finding: the claim, and how it is broken."""

_LOADER_CLAIMS = {
    "other batches": "batches are claimed to repeat from seed {seed}, but do not",
    "repeated stream": "workers and epochs are claimed to augment each in its own way, but repeat "
    "each other",
    "one order": "epochs are claimed to differ, but are shuffled into one order",
}


def _of_runs(determinism: Determinism) -> Iterator[Finding]:
    if determinism.refused:
        yield Finding(
            kind="refused",
            place=determinism.refused,
            meaning="Two runs from one seed differ wherever it runs in parallel.",
            remedy="Use another operation: the message of PyTorch, and its page on "
            "reproducibility, name some.",
        )
    if not determinism.diverged:
        return
    first = determinism.diverged[0]
    cause, remedy = _reason(first, determinism.apart)
    meaning = "Everything before is the same; what comes later follows from the first difference."
    if determinism.operation:
        yield Finding(
            kind="differs",
            place=f"step {first.step}, operation {determinism.operation}",
            found="the first that differs",
            meaning=meaning,
            cause=cause,
            remedy=remedy,
        )
    for each, count in determinism.firsts:
        yield Finding(
            kind="differs",
            place=f"step {each.step}, {each.what}",
            found=f"{count} {'differs' if count == 1 else 'differ'}",
            amount=count,
            meaning=meaning,
            cause=cause,
            remedy=remedy,
        )


_UNREACHED = "random numbers from a generator that the seed does not reach"

_REASONS = {
    "generator": (
        "",
        "Construction draws a different number of random numbers: it depends on the clock, on the "
        "order of a set, or on what was built before.",
    ),
    "batch": (
        f"{_UNREACHED} (numpy.random.default_rng(), os.urandom)",
        "The batch itself differs: draw it from torch's global generator.",
    ),
    "operation": (
        f"{_UNREACHED}, the order of a set, state kept outside of buffers, or an operation that "
        "does not repeat",
        "",
    ),
    "output": (f"{_UNREACHED}, in the code between modules", ""),
    "loss": ("", "The outputs were the same: the loss draws random numbers of its own."),
    "gradient": (
        "",
        "Outputs and loss were the same: the backward pass of an operation does not repeat.",
    ),
    "state": (
        "",
        "Gradients were the same: the optimizer draws random numbers, or keeps state between runs.",
    ),
    "construction": (
        "a seed from the clock, weights from numpy.random.default_rng() or os.urandom, or a "
        "factory that keeps a generator between calls",
        "Draw them from torch's global generator.",
    ),
    "import": (
        "weights drawn while a module is imported, before seeding, or from numpy at import; or "
        "layers built in the order of a set, which is that of hashes",
        "Draw in make(), and sort what is a set.",
    ),
}
"""By what differs first: the usual cause, and what to do."""


def _reason(first: Divergence, apart: bool) -> tuple[str, str]:
    if first.step == 0 and apart:
        return _REASONS["import"]
    if first.step == 0 and first.kind in ("parameter", "buffer"):
        return _REASONS["construction"]
    return _REASONS.get(first.kind, _REASONS["state"])


# --- construction -------------------------------------------------------------------------------


def _of_construction(determinism: Determinism, *, loaded: bool) -> Iterator[Finding]:
    for name in determinism.constant:
        yield Finding(
            kind="constant generator",
            place=f"generator {name}",
            found="is in one state after construction, whatever the seed",
            meaning="Members that are built one after the other start alike, and so do runs with "
            "different seeds.",
            cause="torch.manual_seed(0) inside a constructor",
            remedy="Seed once, outside; in a constructor use torch.random.fork_rng().",
        )
    every = determinism.drawn and determinism.unseeded == determinism.drawn
    for name in determinism.unseeded if every and not loaded else ():
        yield Finding(
            kind="unseeded",
            place=name,
            found="the same from another seed",
            meaning="Runs with different seeds start from one network.",
            cause="weights drawn at import or before seeding and then copied, or a generator with "
            "a seed of its own",
            remedy="Draw them in make(). Weights that come from a file are claimed as loaded.",
        )


# --- loaders ------------------------------------------------------------------------------------


def _of_loader(
    loading: LoaderDeterminism, *, augmented: bool, member: str = ""
) -> Iterator[Finding]:
    of = f"member {member}, " if member else ""
    members = (member,) if member else ()
    if loading.differs is not None:
        epoch, batch = loading.differs
        yield Finding(
            kind="other batches",
            place=f"{of}epoch {epoch}, batch {batch}",
            members=members,
            found="is the first that differs",
            amount=loading.differing,
            meaning="Two runs from one seed see other data.",
            cause="augmentation from numpy.random.default_rng() or random() seeded by the clock, "
            "or a data set in the order of a set or of os.listdir",
            remedy="Draw from torch's generator in the worker.",
        )
    if not augmented:
        return
    if not loading.random and loading.differs is None:
        raise ValueError(_nothing_random(loading))
    for stream in loading.repeated:
        yield Finding(
            kind="repeated stream",
            place=f"{of}{stream.what}",
            members=members,
            found=f"one stream in {listed(stream.places, 3)}",
            amount=len(stream.places),
            meaning="The same random numbers augment other samples over and over.",
            cause="a generator that is made with the data set: each worker copies it, in each "
            "epoch anew"
            if stream.held
            else "a worker_init_fn that seeds with a constant or with the worker number, or a "
            "generator in a place that was not looked through",
            remedy="In worker_init_fn, seed it with torch.initial_seed(), which is another in "
            "every worker and epoch.",
        )
    if loading.shuffled and loading.one_order:
        yield Finding(
            kind="one order",
            place=f"{of}order of the samples",
            members=members,
            found=f"is the same in all {loading.epochs} epochs",
            meaning="Every epoch makes the same batches of the same samples.",
            cause="a DistributedSampler without sampler.set_epoch(epoch), or a sampler that seeds "
            "its generator in __iter__()",
            remedy="An order that is meant to stay is claimed with augmented=False.",
        )


def _nothing_random(loading: LoaderDeterminism) -> str:
    why = (
        f"{INDICES} samples were the same each of {DRAWS} times: nothing random is drawn."
        if loading.asked
        else "an IterableDataset, or what is no DataLoader, cannot be asked for one sample several "
        "times."
    )
    return f"augmentation is claimed, but {why} For data without it, claim augmented=False (plain)."
