"""Results as JSON files that say what was measured, on what, with what, and when.

A result holds counts, not rounded accuracies, the digests of weights and images, and nothing of the
machine but the name of its device. A file is written whole or not at all and never overwritten; one
that is malformed is refused with the place where it is.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from ensembles import __version__
from ensembles.experiments.training.runs import make_folder, write_whole

if TYPE_CHECKING:
    import torch

    from ensembles.experiments.data.images import ImageSet
    from ensembles.experiments.evaluation.scores import Evaluation, Scores

__all__ = [
    "SCHEMA_VERSION",
    "Data",
    "EvaluatedData",
    "Model",
    "Result",
    "Score",
    "WeightFile",
    "read_result",
    "read_results",
    "write_result",
]

SCHEMA_VERSION: Literal[1] = 1

RECORDED = ("torch", "torchvision", "numpy", "pillow", "scikit-learn", "scipy", "lightning")
"""Packages whose release may change a figure."""

SHOWN_ERRORS = 5

LONGEST_NAME = 80
"""Characters of a model's name, and of the names of sets, in that of a file."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """What all parts of a result have in common: no further keys, no conversions, no changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Score(_Part):
    """What one classifier got right.

    Attributes:
        correct: Samples classified correctly.
        n: Samples of the set.
        interval: Exact (Clopper-Pearson) 95 % interval of the accuracy, fractions.
        nll: Mean negative log-likelihood, in nats; None where it is infinite, as that of a vote in
            which a label got no vote.
    """

    correct: Count
    n: Annotated[int, Field(ge=1)]
    interval: tuple[float, float]
    nll: Annotated[float, Field(ge=0)] | None

    @property
    def accuracy(self) -> float:
        """The share of samples that are classified correctly."""
        return self.correct / self.n

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.correct > self.n:
            raise ValueError(f"correct is {self.correct}, of only n = {self.n} samples")
        low, high = self.interval
        if not 0 <= low <= self.accuracy <= high <= 1:
            raise ValueError(
                f"the interval {low} to {high} does not hold the accuracy {self.correct}/{self.n}"
            )
        return self


class Data(_Part):
    """A set of images.

    Attributes:
        name: Its name.
        version: What tells it from others of this name.
        split: "train", "validation" or "test".
        sha256: Digest of its pixels and labels.
        n: Images.
        counts: Images by class.
    """

    name: str
    version: str
    split: str
    sha256: Digest
    n: Annotated[int, Field(ge=1)]
    counts: dict[str, Count]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if sum(self.counts.values()) != self.n:
            raise ValueError(
                f"counts add up to {sum(self.counts.values())}, and n is {self.n}: every image "
                "has one class"
            )
        return self


class EvaluatedData(_Part):
    """What a model made of a set of images.

    Attributes:
        data: The set.
        members: Scores by member.
        reduced: The members that the reductions are of.
        reductions: Scores of the ensemble by reduction; empty where there is one member only.
    """

    data: Data
    members: Annotated[dict[str, Score], Field(min_length=1)]
    reduced: list[str]
    reductions: dict[str, Score]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for kind, scores in (("members", self.members), ("reductions", self.reductions)):
            for name, score in scores.items():
                if score.n != self.data.n:
                    raise ValueError(
                        f"{kind}.{name}.n is {score.n}, and the set has {self.data.n} images: "
                        "every sample counts"
                    )
        for name in self.reduced:
            if name not in self.members:
                raise ValueError(f"reduced names {name!r}, which is no member")
        return self


class WeightFile(_Part):
    """A file of weights.

    Attributes:
        file: Its name, without folders.
        sha256: Digest of its content.
    """

    file: str
    sha256: Digest


class Model(_Part):
    """The model that was evaluated.

    Attributes:
        name: What it is called in plots and file names.
        options: What it was built from.
        weights: The files that its weights were read from; empty for one that was not trained.
    """

    name: Annotated[str, Field(min_length=1)]
    options: dict[str, JsonValue]
    weights: list[WeightFile]


class Result(_Part):
    """An evaluation with all that is needed to do it again.

    Attributes:
        schema_version: Of this form.
        time: When it was made, UTC.
        command: The command line, as it was given; empty from Python.
        seed: What was drawn is a function of it; None where nothing was.
        device: Name of the device that computed.
        packages: Releases of Python, of this package, and of those that may change a figure.
        model: The model.
        evaluations: One for each set: the first is in distribution, the others are shifted.
    """

    schema_version: Literal[1]
    time: AwareDatetime
    command: list[str]
    seed: int | None
    device: str
    packages: dict[str, str]
    model: Model
    evaluations: Annotated[list[EvaluatedData], Field(min_length=1)]

    @field_validator("evaluations")
    @classmethod
    def _once(cls, evaluations: list[EvaluatedData]) -> list[EvaluatedData]:
        digests = [(e.data.name, e.data.sha256) for e in evaluations]
        for name, digest in digests:
            if digests.count((name, digest)) > 1:
                raise ValueError(f"{name} is evaluated more than once")
        return evaluations

    @classmethod
    def of(
        cls,
        evaluations: Sequence[Evaluation],
        *,
        model: str,
        options: Mapping[str, Any] | None = None,
        weights: Sequence[WeightFile] = (),
        seed: int | None = None,
        command: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> Result:
        """The result of evaluations, made now.

        Args:
            evaluations: One for each set, in distribution first.
            model: The model's name.
            options: What it was built from, as plain values.
            weights: The files that its weights were read from.
            seed: What was drawn is a function of it.
            command: The command line.
            device: What computed.
        """
        return cls(
            schema_version=SCHEMA_VERSION,
            time=datetime.now(UTC),
            command=list(command),
            seed=seed,
            device=device_name(device),
            packages=packages(),
            model=Model(name=model, options=dict(options or {}), weights=list(weights)),
            evaluations=[_evaluated(evaluation) for evaluation in evaluations],
        )

    @property
    def identifier(self) -> str:
        """Model, sets and time, as a file may be called."""
        names = [evaluation.data.name for evaluation in self.evaluations]
        sets = "_to_".join(names)
        if len(sets) > LONGEST_NAME:  # cut off, it would name fewer sets than there are
            sets = f"{names[0]}_to_{len(names) - 1}_sets"
        time = self.time.astimezone(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        plain = (re.sub(r"[^\w.+-]+", "_", part)[:LONGEST_NAME] for part in (self.model.name, sets))
        return "-".join([*plain, time])


def write_result(result: Result, place: Path | str) -> Path:
    """Writes a result to a new file; nothing is ever overwritten.

    Args:
        result: The result.
        place: A name that ends in .json, or a folder, in which the file is called by model, data
            and time; folders are made where they are missing.

    Returns:
        The file.

    Raises:
        FileExistsError: If there is such a file; it is left as it is.
        OSError: If it cannot be written, as on a full disk: no part of it is left.
    """
    place = Path(place)
    path = place if place.suffix == ".json" else place / f"{result.identifier}.json"
    make_folder(path.parent)
    write_whole(path, (result.model_dump_json(indent=2) + "\n").encode(), replace=False)
    return path


def read_result(path: Path | str) -> Result:
    """Reads a result, and refuses one that is malformed.

    Args:
        path: The file.

    Returns:
        The result.

    Raises:
        ValueError: Naming the file and the place in it: text that is no JSON, a key that is missing
            or unknown, a value of another type, counts that contradict each other, a schema of
            another release.
        OSError: If there is no such file, or it cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
        raw = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except ValueError as error:
        raise ValueError(f"{path} is no result: it is no JSON text: {error}") from error
    version = raw.get("schema_version", SCHEMA_VERSION) if isinstance(raw, dict) else SCHEMA_VERSION
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version is {version!r}, and this release of pytest-ensembles "
            f"({__version__}) reads {SCHEMA_VERSION}: read it with the release that wrote it"
        )
    try:
        return Result.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{path} is no result:{_places(error)}") from error


def read_results(places: Iterable[Path | str]) -> list[Result]:
    """Reads results from files, and from all .json files of folders, in the order of their names.

    Args:
        places: Files and folders.

    Returns:
        The results, at least one.

    Raises:
        ValueError: As `read_result` does, or if a folder has no .json file.
        OSError: If there is no such file or folder.
    """
    return [read_result(path) for path in _files(places)]


def device_name(device: torch.device | str) -> str:
    """What a device is, without what machine it is in.

    Example:
        >>> device_name("cpu").startswith("cpu")
        True
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {platform.machine()}"


def packages() -> dict[str, str]:
    """Releases of Python, of this package, and of those that may change a figure."""
    found = {"python": platform.python_version(), "pytest-ensembles": __version__}
    for name in RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _evaluated(evaluation: Evaluation) -> EvaluatedData:
    return EvaluatedData(
        data=_described(evaluation.images),
        members={name: _score(scores) for name, scores in evaluation.members.items()},
        reduced=list(evaluation.reduced) if evaluation.reductions else [],
        reductions={name: _score(scores) for name, scores in evaluation.reductions.items()},
    )


def _described(images: ImageSet) -> Data:
    return Data(
        name=images.name,
        version=images.version,
        split=images.split,
        sha256=images.sha256,
        n=len(images),
        counts=dict(zip(images.classes, images.counts(), strict=True)),
    )


def _score(scores: Scores) -> Score:
    from ensembles.experiments.evaluation.counts import clopper_pearson

    return Score(
        correct=scores.correct,
        n=scores.n,
        interval=clopper_pearson(scores.correct, scores.n),
        nll=max(0.0, scores.nll) if math.isfinite(scores.nll) else None,
    )


def _files(places: Iterable[Path | str]) -> Iterator[Path]:
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"there is no result {place}: `ensembles evaluate` writes them")
        if not place.is_dir():
            yield place
            continue
        found = sorted(place.glob("*.json"))
        if not found:
            raise ValueError(
                f"{place} has no results: there is no .json file in it. `ensembles evaluate --out "
                f"{place}` writes them there"
            )
        yield from found


def _places(error: ValidationError) -> str:
    """What is wrong where, one thing in a line."""
    found = error.errors(include_url=False)
    lines = []
    for one in found[:SHOWN_ERRORS]:
        place = ".".join(map(str, one["loc"])) or "the whole"
        given = one["input"]
        plain = given is None or isinstance(given, (bool, int, float, str))
        said = f", got {given!r}" if plain and one["type"] != "missing" else ""
        lines.append(f"\n  {place}: {one['msg'].removeprefix('Value error, ')}{said}")
    hidden = len(found) - len(lines)
    return "".join(lines) + (f"\n  ... {hidden} more" if hidden else "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} is there twice")
    return dict(pairs)


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")
