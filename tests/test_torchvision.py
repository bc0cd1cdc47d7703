"""No check fires on any classification model of torchvision, alone or as an ensemble of two.

One model of each family runs by default, and all others under the marker `slow`. As a program,
`python tests/test_torchvision.py`, it measures every model that is not in docs/torchvision.jsonl,
each in a process of its own, and writes docs/torchvision.md from that record.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.regnet import BlockParams, RegNet

from ensembles import Subject, check_ensemble
from ensembles.case import Case
from ensembles.instruments.recording import RunOptions, recorded
from ensembles.registry import PROMISES, default_claims
from ensembles.subject import whole

PAGE = Path(__file__).parents[1] / "docs" / "torchvision.md"
RECORD = PAGE.with_suffix(".jsonl")

GIGABYTES = 16
"""What a process may hold when all models are measured; a check that needs more says so."""

NAMES = torchvision.models.list_models(module=torchvision.models)
"""The classification models: torchvision keeps all others in modules of their own."""

FAMILIES = (
    *("efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"),
    *("regnet_x_400mf", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1"),
)
"""Runs by default: one model of each family that takes seconds; the others of it are slow."""

LARGER_FAMILIES = ("convnext_tiny", "densenet121", "resnet18", "resnext50_32x4d", "swin_t")
"""By default only what they claim by default. Left to the slow ones are alexnet, inception, maxvit,
vgg and vision transformers."""

CLAIMS = {
    "alone": {
        **default_claims("module"),
        "hygiene": "clean",
        "batch": "rows",
        "determinism": "bitwise",
    },
    "two": {**default_claims("ensemble"), "diversity": "independent"},
}
"""What holds of networks that are drawn and trained: more than they claim by default."""

SIDES = {"alexnet": 64, "googlenet": 64, "inception_v3": 299, "maxvit_t": 224}
"""Side of the image, where 32 pixels are too few: inception_v3's auxiliary head takes 299."""

GIVEN: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": True, "init_weights": False},
    "inception_v3": {"aux_logits": True, "init_weights": False},
    **{name: {"image_size": 32} for name in ("vit_b_16", "vit_l_16")},
    **{name: {"image_size": 64} for name in ("vit_b_32", "vit_l_32")},
    "vit_h_14": {"image_size": 28},
}
SIDES |= {name: given["image_size"] for name, given in GIVEN.items() if "image_size" in given}


def vit_h_14() -> nn.Module:
    """Two of its 32 blocks, which are all of one class and one size."""
    return torchvision.models.VisionTransformer(
        image_size=SIDES["vit_h_14"], patch_size=14, num_layers=2, num_heads=16, hidden_dim=1280,
        mlp_dim=5120, num_classes=10,
    )  # fmt: skip


def regnet_y_128gf() -> nn.Module:
    """One block of each of its four widths, in place of 2, 7, 17 and 1."""
    full = BlockParams.from_init_params(
        depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25
    )
    short = BlockParams(
        [1] * len(full.depths),
        full.widths,
        full.group_widths,
        full.bottleneck_multipliers,
        full.strides,
        full.se_ratio,
    )
    return RegNet(short, num_classes=10)


SHORTENED: dict[str, Callable[[], nn.Module]] = {
    "vit_h_14": vit_h_14,
    "regnet_y_128gf": regnet_y_128gf,
}
"""Whole, they have 630 million parameters and more: an ensemble of two is built of the same blocks,
and fewer."""


def built(name: str, how: str) -> nn.Module:
    """The model with ten classes; where it is one of two and very large, with fewer blocks."""
    if how == "two" and name in SHORTENED:
        return SHORTENED[name]()
    return torchvision.models.get_model(name, num_classes=10, **GIVEN.get(name, {}))


def digits(side: int) -> torch.Tensor:
    """Two handwritten digits as RGB images."""
    images, _ = load_digits(return_X_y=True)
    grey = torch.tensor(images[:2], dtype=torch.float32).view(2, 1, 8, 8) / 16
    return F.interpolate(grey, size=(side, side), mode="bilinear").expand(2, 3, side, side)


def sgd(model: Any) -> torch.optim.Optimizer:
    every = model if isinstance(model, nn.Module) else nn.ModuleList(model)
    return torch.optim.SGD(every.parameters(), lr=1e-4)


def alone(name: str) -> Subject:
    return Subject(
        name=name,
        make=lambda: built(name, "alone"),
        batch=lambda: digits(SIDES.get(name, 32)),
        outputs=whole,
        optimizer=sgd,
        claims=CLAIMS["alone"],
    )


def two(name: str) -> Subject:
    return Subject(
        name=f"two {name}",
        make=lambda: [built(name, "two") for _ in range(2)],
        batch=lambda: digits(SIDES.get(name, 32)),
        optimizer=sgd,
        claims=CLAIMS["two"],
    )


SUBJECTS = {"alone": alone, "two": two}


@pytest.mark.parametrize("how", SUBJECTS)
@pytest.mark.parametrize(
    "name",
    [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_no_check_fires_on_a_classification_model_of_torchvision(name, how):
    results = check_ensemble(SUBJECTS[how](name))
    assert results.held, str(results)


EXPLOSIVE = ("densenet121", "efficientnet_b4", "mnasnet0_5", "regnet_x_400mf", "resnext50_32x4d")
"""On two images of 32 pixels, the last BatchNorms have two values a channel, and gradients of the
first layers are 1e3 to 1e16 times as large as weights."""


@pytest.mark.parametrize("optimizer", [None, sgd], ids=["default", "sgd"])
@pytest.mark.parametrize("name", EXPLOSIVE)
def test_default_steps_do_not_run_away_and_move_every_parameter(name, optimizer):
    case = Case.of(built(name, "alone"), digits(SIDES.get(name, 32)), optimizer=optimizer)
    entries = recorded(case, RunOptions(seed=1729, steps=3))
    losses = [entry.norm for entry in entries if entry.kind == "loss"]
    assert max(losses) < 10 * losses[0]
    norms = {entry.name: entry.norm for entry in entries if entry.key[:2] == (0, "parameter")}
    gradients = {entry.name: entry.norm for entry in entries if entry.key[:2] == (1, "gradient")}
    assert max(gradients[place] / max(norm, 1.0) for place, norm in norms.items()) > 1e2
    first, second = (
        {entry.name: entry.digest for entry in entries if entry.key[:2] == (step, "parameter")}
        for step in (0, 1)
    )
    # What a dead ReLU cuts has no gradient.
    assert [n for n in norms if first[n] == second[n] and gradients[n]] == []


@pytest.mark.parametrize("name", LARGER_FAMILIES)
def test_a_larger_model_of_torchvision_holds_what_a_module_claims_by_default(name):
    results = check_ensemble(alone(name).claiming(**default_claims("module")))
    assert results.held, str(results)


# --- what was measured --------------------------------------------------------------------------


def measured(name: str, how: str) -> dict[str, Any]:
    """The verdicts on one model, with what they cost; in a process of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES * 2**30, GIGABYTES * 2**30))
    torch.set_num_threads(1)
    results = check_ensemble(SUBJECTS[how](name))
    claimed = [result for result in results if result.claim is not None]
    verdicts = {
        result.check: "memory" if "allocate memory" in result.message else result.status
        for result in claimed
    }
    for result in claimed:
        if verdicts[result.check] in ("broken", "error"):
            print(name, how, result.check, result.message, file=sys.stderr)
    return {
        "model": name,
        "how": how,
        "parameters": sum(p.numel() for p in built(name, how).parameters()),
        "seconds": round(time.process_time(), 1),
        "gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "verdicts": verdicts,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def rows_on_record() -> dict[tuple[str, str], dict[str, Any]]:
    lines = RECORD.read_text("utf-8").splitlines() if RECORD.is_file() else []
    return {(row["model"], row["how"]): row for row in map(json.loads, lines)}


def told(row: dict[str, Any] | None, check: str) -> str:
    return "" if row is None else row["verdicts"][check]


def page(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The page, from what was measured and from nothing else."""
    alone_checks, two_checks = ({*CLAIMS[how]} for how in SUBJECTS)
    columns = [
        *(("alone", check) for check in PROMISES if check in alone_checks),
        *(("two", check) for check in PROMISES if check in two_checks),
    ]
    versions = sorted({(row["torch"], row["torchvision"]) for row in rows.values()})
    verdicts = [verdict for row in rows.values() for verdict in row["verdicts"].values()]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in sorted({*verdicts}))
    head = [
        "# torchvision's classification models",
        "",
        "No check may fail on a healthy network. This table shows the checks on all "
        f"{len(NAMES)} classification models of torchvision. Each model has ten classes and fresh "
        "weights, and its batch is two images of handwritten digits. It is checked alone, and as "
        "an ensemble of two. `python tests/test_torchvision.py` writes the table from the file "
        "`torchvision.jsonl` beside it; no entry is written by hand. "
        "`pytest tests/test_torchvision.py` runs the checks on one model of each family, and "
        "`tox -e slow` runs them on all models.",
        "",
        f"The verdicts are: {counted}. `held` means that the check looked at the claim, and that "
        f"it holds. `memory` means that the check needs more than {GIGABYTES} GB here, and did not "
        "look. Seconds are those of one CPU thread, with the start of Python. Gigabytes are the "
        "most that the process held. In ensembles of two, "
        + " and ".join(f"`{name}`" for name in SHORTENED)
        + " have fewer blocks of the same kind, because one whole network has more than 600 "
        "million parameters.",
        "",
        "Measured with "
        + "; ".join(f"torch {one}, torchvision {other}" for one, other in versions)
        + f". Claims alone: {claims_told('alone')}. Claims of two: {claims_told('two')}.",
        "",
        "| model | parameters | image | "
        + " | ".join(
            ["alone: s", "GB"]
            + [check for how, check in columns if how == "alone"]
            + ["two: s", "GB"]
            + [check for how, check in columns if how == "two"]
        )
        + " |",
        "|---|---:|---:|---:|---:|"
        + "---|" * len(alone_checks)
        + "---:|---:|"
        + "---|" * len(two_checks),
    ]
    lines = []
    for name in NAMES:
        one, pair = rows.get((name, "alone")), rows.get((name, "two"))
        cells = [name, f"{one['parameters']:,}" if one else "", str(SIDES.get(name, 32))]
        for how, row in (("alone", one), ("two", pair)):
            cells += [str(row["seconds"]), str(row["gigabytes"])] if row else ["", ""]
            cells += [told(row, check) for where, check in columns if where == how]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*head, *lines, ""])


def claims_told(how: str) -> str:
    return ", ".join(f"{check} {claim}" for check, claim in CLAIMS[how].items())


def test_the_page_is_what_was_measured():
    rows = rows_on_record()
    assert PAGE.read_text("utf-8") == page(rows)
    assert rows.keys() == {(name, how) for name in NAMES for how in SUBJECTS}
    for (name, how), row in rows.items():
        assert set(row["verdicts"]) == set(CLAIMS[how])
        assert set(row["verdicts"].values()) == {"held"}, (name, how)


def measure_all() -> None:
    """Measures what is not in the record yet, small models first, and writes the page anew."""
    size = {name: metadata(name)["num_params"] for name in NAMES}
    for how in SUBJECTS:
        for name in sorted(NAMES, key=size.__getitem__):
            if (name, how) in rows_on_record():
                continue
            done = subprocess.run(
                [sys.executable, __file__, name, how], stdout=subprocess.PIPE, text=True
            )
            if done.returncode == 0:  # else it said why
                with RECORD.open("a", encoding="utf-8") as record:
                    record.write(done.stdout)
            PAGE.write_text(page(rows_on_record()), "utf-8")


def metadata(name: str) -> dict[str, Any]:
    return torchvision.models.get_model_weights(name).DEFAULT.meta


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measured(*sys.argv[1:])))
    else:
        measure_all()
