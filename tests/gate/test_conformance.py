import gc
import json
import os
import re
import subprocess
import sys
import textwrap
import unittest
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from ensembles.checks.graph.measurement import measure_autograd_graph
from ensembles.claims import ClaimError
from ensembles.gate.conformance import (
    check_ensemble,
    checks_for,
    parametrize_with_checks,
)
from ensembles.handling.state import generators_kept
from ensembles.models import Ensemble
from ensembles.registry import PROMISES, default_claims
from ensembles.sources.factories import as_subject, resolve
from ensembles.subject import Subject

LEFT, RIGHT = nn.Linear(4, 2), nn.Linear(4, 2)


def pair() -> list[nn.Module]:
    return [nn.Linear(4, 2), nn.Linear(4, 2)]


def of(results, check: str):
    (found,) = (result for result in results if result.check == check)
    return found


# --- what a subject claims ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thing", "claims"),
    [
        ([LEFT, RIGHT], default_claims("ensemble")),
        ({"a": LEFT, "b": RIGHT}, default_claims("ensemble")),
        (nn.ModuleList([LEFT, RIGHT]), default_claims("ensemble")),
        (pair, default_claims("ensemble")),
        (LEFT, default_claims("module")),
        ([LEFT], default_claims("ensemble")),
        (nn.Sequential(LEFT, RIGHT), default_claims("module")),
        (lambda: LEFT, default_claims("module")),
        (Ensemble([LEFT, RIGHT]), default_claims("container")),
        (lambda: Ensemble(pair()), default_claims("container")),
        (Ensemble([LEFT]), default_claims("module")),
        (Subject(make=pair), {}),
        (lambda: Subject(make=pair, claims={"sharing": "tied"}), {"sharing": "tied"}),
    ],
    ids=[
        *("list", "dict", "module_list", "factory_of_list", "module", "list_of_one", "sequential"),
        *("factory_of_module", "container", "factory_of_container", "container_of_one"),
        *("subject", "factory_of_subject"),
    ],
)
def test_what_is_claimed_by_default(thing, claims):
    assert dict(as_subject(thing).claims) == dict(claims)


def test_every_check_is_bound_and_says_whether_it_is_claimed():
    bound = list(checks_for(Subject(make=pair, claims={"sharing": "independent"})))
    assert [b.name for b in bound] == list(PROMISES)
    assert [b.name for b in bound if b.claimed] == ["sharing"]


def test_default_claims_hold_for_healthy_members():
    results = check_ensemble(pair)
    assert results.held
    assert [r.check for r in results if r.status == "held"] == list(default_claims("ensemble"))


def test_default_claims_are_broken_by_one_module_twice():
    results = check_ensemble([LEFT, LEFT])
    assert not results.held
    assert of(results, "sharing").status == of(results, "ownership").status == "broken"


def test_nothing_claimed_is_not_held():
    results = check_ensemble(Subject(make=pair))
    assert {result.status for result in results} == {"not claimed"}
    assert not results.held


def test_what_is_not_claimed_is_skipped_and_never_passed():
    (bound, *_) = checks_for(Subject(make=pair, name="pair"))
    with pytest.raises(pytest.skip.Exception, match=r"^not claimed$"):
        bound()


def test_an_unknown_claim_is_refused():
    with pytest.raises(ValueError, match=r"subject 'pair' claims 'shraing', but there is no such"):
        check_ensemble(Subject(make=pair, claims={"shraing": "independent"}))


# --- results ------------------------------------------------------------------------------------


def test_results_print_as_a_table_with_the_messages_below():
    text = str(check_ensemble(Subject(make=lambda: [LEFT, LEFT], claims={"sharing": "tied"})))
    first, *others = text.splitlines()
    assert re.fullmatch(
        r"sharing +held +2 members, 4 parameters and buffers, 2 shared pieces .*", first
    )
    assert [line.split() for line in others] == [
        [name, "not", "claimed"] for name in PROMISES if name != "sharing"
    ]
    text = str(check_ensemble(Subject(make=pair, claims={"sharing": "tied"})))
    assert "\n\nmembers 0, 1 are claimed to share *, but do not\n\n" in text


def test_a_failing_check_does_not_keep_the_others_from_running():
    def optimizer(model):
        raise MemoryError("no room")

    subject = Subject(
        make=pair,
        batch=lambda: torch.randn(3, 4),
        optimizer=optimizer,
        claims={"coverage": "complete", "coupling": "independent", "sharing": "independent"},
    )
    results = check_ensemble(subject)
    assert of(results, "sharing").status == "held"
    assert of(results, "coverage").status == of(results, "coupling").status == "error"


def test_any_error_of_a_check_names_its_type(monkeypatch):
    def fails(case, claim):
        raise KeyError("weight")

    monkeypatch.setattr(PROMISES["sharing"].module("measurement"), "measure", fails)
    found = of(check_ensemble(LEFT), "sharing")
    line = fails.__code__.co_firstlineno + 1
    assert found.status == "error"
    assert found.message == f"KeyError: 'weight' (tests/gate/test_conformance.py:{line})"


def test_an_assertion_without_a_text_is_told_by_its_type(monkeypatch):
    def fails(case, claim):
        raise AssertionError

    monkeypatch.setattr(PROMISES["sharing"].module("measurement"), "measure", fails)
    found = of(check_ensemble(LEFT), "sharing")
    line = fails.__code__.co_firstlineno + 1
    assert found.status == "broken"
    assert found.message == f"AssertionError (tests/gate/test_conformance.py:{line})"


# --- what skips, or exits -----------------------------------------------------------------------


def skip():
    pytest.skip("no data here")


def expect_a_failure():
    pytest.xfail("no data here")


def skip_as_unittest_does():
    raise unittest.SkipTest("no data here")


def leave():
    sys.exit("no data here")


def end():
    pytest.exit("no data here", returncode=0)


def fail():
    pytest.fail("no data here")


WAYS = {
    skip: "Skipped",
    expect_a_failure: "XFailed",
    skip_as_unittest_does: "SkipTest",
    leave: "SystemExit",
    end: "Exit",
    fail: "Failed",
}


class Leaving(nn.Linear):
    """A layer whose forward pass, backward pass or copy never ends."""

    def __init__(self, way, *, where: str) -> None:
        super().__init__(4, 3)
        self.way, self.where = way, where

    def forward(self, x):
        if self.where == "forward":
            self.way()
        y = super().forward(x)
        if self.where == "backward" and y.requires_grad:
            y.register_hook(lambda gradient: self.way())
        return y

    def __deepcopy__(self, memo):
        if self.where == "copy":
            self.way()
        return Leaving(self.way, where=self.where)


def leaving(where: str, way) -> Subject:
    """A subject that leaves in the function of this name, with a claim that calls it."""
    sharing, ownership = {"sharing": "independent"}, {"ownership": "independent"}
    coverage, determinism = {"coverage": "complete"}, {"determinism": "bitwise"}
    claims = {
        "make": sharing,
        "members": sharing,
        "batch": ownership,
        "forward": ownership,
        "outputs": ownership,
        "optimizer": coverage,
        "loss": coverage,
        "scheduler": determinism,
        "clip": determinism,
        "backward": determinism,
        "predict": {"prediction": "arithmetic"},
        "data": {"data": "paired"},
        "copy": {"round_trips": ["deepcopy"]},
    }
    parts = {
        "make": pair,
        "batch": lambda: torch.randn(5, 4),
        "loss": total,
        "optimizer": optimizer,
    }
    if where in ("forward", "backward", "copy"):
        parts["make"] = lambda: [Leaving(way, where=where) for _ in range(2)]
    else:
        parts[where] = lambda *given: way()
    return Subject(name="leaver", claims=claims[where], **parts)


WHERE = {
    "make": "the factory of subject 'leaver' raised ",
    "members": "members=... raised ",
    "batch": "batch=... raised ",
    "forward": "calling member 0 (Leaving) on the batch (5, 4) torch.float32 on cpu raised ",
    "outputs": "outputs=... raised ",
    "optimizer": "optimizer=... raised ",
    "loss": "loss=... raised ",
    "scheduler": "scheduler=... raised ",
    "clip": "clip=... raised ",
    "backward": "in step 1, the backward pass of the loss raised ",
    "predict": "predict=... raised ",
    "data": "data(0) raised ",
    "copy": "the code of subject 'leaver' raised ",
}


@pytest.mark.parametrize(
    ("where", "way"),
    [
        *((where, way) for where in WHERE for way in (skip, leave)),
        *(("make", way) for way in WAYS if way not in (skip, leave)),
        ("forward", fail),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_claim_that_was_not_looked_at_is_an_error_that_says_who_left(where, way):
    (found,) = (r for r in check_ensemble(leaving(where, way)) if r.claim is not None)
    line = way.__code__.co_firstlineno + 1
    told = f"{WAYS[way]}: no data here (tests/gate/test_conformance.py:{line})."
    who = "the code of subject 'leaver' raised " if way is fail else WHERE[where]
    assert found.status == "error"
    assert found.message.partition(" A claim that nothing looked at")[0].startswith(who + told)


@pytest.mark.parametrize("where", WHERE)
def test_ctrl_c_stops_every_check(where):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_ensemble(leaving(where, interrupted))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_factory_that_leaves_is_no_subject(way):
    def factory():
        return way()

    told = (
        f"the factory 'factory' raised {WAYS[way]}: no data here (tests/gate/test_conformance.py:"
    )
    for takes in (check_ensemble, lambda given: parametrize_with_checks([given])):
        with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
            takes(factory)


# --- seeds and generators -----------------------------------------------------------------------


def counting(make):
    """A factory, and the list of what it made."""
    made = []

    def counted():
        made.append(make())
        return made[-1]

    return counted, made


def test_the_model_is_made_once_under_the_seed_for_all_checks():
    make, made = counting(pair)
    claims = {**NUMERIC, "sharing": "independent"}
    subject = Subject(
        make=make, batch=lambda: torch.ones(3, 4), optimizer=optimizer, loss=total, claims=claims
    )
    for seed in (5, 5, 6):
        assert check_ensemble(subject, seed=seed).held
    assert len(made) == 3
    first, second, other = made
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_only_what_looks_at_construction_makes_more():
    make, made = counting(pair)
    claims = default_claims("ensemble")
    check_ensemble(Subject(make=make, batch=lambda: torch.ones(1, 4), claims=claims))
    # Once for all, and diversity builds one more.
    assert len(made) == 1 + 1


def test_a_case_that_a_check_left_otherwise_is_made_anew(monkeypatch):
    measurement = PROMISES["ownership"].module("measurement")
    measure = measurement.measure

    def careless(case, claim):
        with torch.no_grad():
            case.model[0].weight.add_(1.0)
        return measure(case, claim)

    monkeypatch.setattr(measurement, "measure", careless)
    make, made = counting(pair)
    subject = Subject(
        make=make,
        batch=lambda: torch.ones(3, 4),
        claims={"ownership": "independent", "coverage": "complete"},
    )
    assert check_ensemble(subject).held
    assert len(made) == 2
    assert torch.equal(made[1][0].weight, made[0][0].weight - 1.0)


def test_a_factory_that_fails_is_asked_once_for_each_check_and_told_each_time():
    subject = Subject(
        make=lambda: {}["weights"], claims={"sharing": "distinct", "hygiene": "clean"}
    )
    found = check_ensemble(subject)
    assert [found[check].status for check in subject.claims] == ["error", "error"]
    assert "KeyError: 'weights'" in found["hygiene"].message


def test_the_callers_random_generators_are_as_before():
    def drawn():
        return float(torch.rand(())), float(numpy.random.rand())

    with generators_kept():
        expected = drawn()
    with generators_kept():
        check_ensemble(pair)
        assert drawn() == expected


def test_the_users_model_is_as_before():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert check_ensemble([model, other]).held
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Deep(nn.Sequential):
    """What checks look through: a norm, activations, a softmax, products, a lookup."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Softmax(1)),
            *(nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)),
        )


HELD = {
    **default_claims("ensemble"),
    "graph": lambda: str(measure_autograd_graph([Deep(), Deep()], torch.ones(3, 4))),
    "cost": {"flops": 10_000},
    "determinism": "bitwise",
    "trajectory": {"members": "separate"},
    "prediction": "arithmetic",
    "loss_scale": "sum",
    "batch": "rows",
    "round_trips": ["deepcopy", "state_dict"],
    "hygiene": "clean",
}


@pytest.mark.parametrize("check", [name for name in PROMISES if name != "data"])
def test_nothing_of_a_model_is_kept_when_a_check_is_over(check):
    tensors = []

    def make():
        members = [Deep(), Deep()]
        tensors.extend(weakref.ref(p) for member in members for p in member.parameters())
        return members

    target = torch.tensor([0, 1, 1])
    subject = Subject(
        make=make,
        batch=lambda: torch.randn(3, 4),
        optimizer=optimizer,
        loss=lambda outputs: sum(
            nn.functional.cross_entropy(output, target) for output in outputs.values()
        ),
        predict=lambda members, x: sum(member(x).softmax(1) for member in members) / 2,
        claims={check: HELD[check]() if callable(HELD[check]) else HELD[check]},
    )
    results = check_ensemble(subject)
    assert results.held, str(results)
    gc.collect()
    assert tensors
    assert not any(tensor() is not None for tensor in tensors)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc"
)
def test_a_large_model_has_few_copies_in_any_check():
    """Weights, the state to return to, that of before a step, and gradients."""
    program = """
        import re
        from pathlib import Path
        import torch
        from torch import nn
        from ensembles import Subject, check_ensemble
        from ensembles.registry import default_claims

        def layers(count, size=800):
            return nn.Sequential(*(nn.Linear(size, size) for _ in range(count)))

        def size(checked):
            for make, claims in (
                (lambda: layers(checked), {**default_claims("module"), "hygiene": "clean"}),
                (lambda: [layers(checked // 2) for _ in range(2)], default_claims("ensemble")),
            ):
                subject = Subject(make=make, batch=lambda: torch.rand(2, 800), claims=claims)
                results = check_ensemble(subject)
                assert results.held, str(results)
            # Not that of getrusage, which is no less than the size of the process that started it.
            found = re.search("VmHWM: *(.*) kB", Path("/proc/self/status").read_text())
            return int(found[1]) * 1024

        torch.set_num_threads(1)
        start = size(2)
        print((size(18) - start) / (16 * 4 * 800**2))
    """
    # So that what is freed is the system's again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert not run.returncode, run.stderr
    assert 3 < float(run.stdout) < 4.7


# --- parametrize --------------------------------------------------------------------------------


def test_tests_are_named_by_subject_and_check():
    mark = parametrize_with_checks([Subject(make=pair, name="two"), LEFT]).mark
    assert [p.id for p in mark.args[1]] == [
        f"{s}-{c}" for s in ("two", "subject1") for c in PROMISES
    ]


def test_no_subjects_are_refused():
    with pytest.raises(ValueError, match="got no subjects: there is nothing to check"):
        parametrize_with_checks([])


def test_subjects_of_one_name_are_refused():
    with pytest.raises(ValueError, match="2 subjects are named 'pair', so reports could not tell"):
        parametrize_with_checks([Subject(make=pair), pair])


# --- expected failures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "told"),
    [
        ("shraing", "subject 'pair' expects 'shraing' to fail, but there is no such check. Checks"),
        ("cost", "subject 'pair' expects cost to fail, but does not claim it"),
    ],
)
def test_an_expected_failure_of_what_is_not_claimed_is_refused(check, told):
    subject = Subject(make=pair, claims={"sharing": "tied"}, expected_failures={check: "known"})
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        check_ensemble(subject)


def test_an_expected_failure_is_a_strict_xfail_of_a_broken_claim():
    expected = {"sharing": "the head is one"}
    subject = Subject(make=pair, name="two", claims={"sharing": "tied"}, expected_failures=expected)
    (_, params) = parametrize_with_checks([subject]).args
    failing = [p.id for p in params if any(m.name == "xfail" for m in p.marks)]
    assert failing == ["two-sharing"]
    (mark,) = (m for m in params[0].marks if m.name == "xfail")
    expected = {"reason": "the head is one", "strict": True, "raises": AssertionError}
    assert mark.kwargs == expected


@pytest.mark.parametrize(
    ("make", "status", "held"),
    [
        (pair, "fails as expected", True),
        (lambda: [LEFT, LEFT], "passes unexpectedly", False),
        (lambda: {}["weights"], "error", False),
    ],
)
def test_a_script_sees_what_fails_as_expected(make, status, held):
    subject = Subject(
        make=make,
        claims={"sharing": "tied", "coverage": "complete"},
        expected_failures={"sharing": "known"},
    )
    results = check_ensemble(subject)
    assert results["sharing"].status == status
    assert results.held is held


# --- results ------------------------------------------------------------------------------------


def test_results_are_found_by_name_and_by_place():
    results = check_ensemble([LEFT, LEFT])
    assert results["sharing"] is results[0]
    assert results[:1] == (results["sharing"],)
    with pytest.raises(
        KeyError, match=r"there is no check 'shraing'\. Checks are: sharing, ownership"
    ):
        results["shraing"]


def test_results_are_plain_data_and_json():
    results = check_ensemble(Subject(make=lambda: [LEFT, LEFT], claims={"sharing": "independent"}))
    found = json.loads(results.to_json())
    assert found["subject"] == "<lambda>" or found["subject"]
    assert found["held"] is False
    (sharing,) = (r for r in found["results"] if r["check"] == "sharing")
    assert sharing["claim"] == "independent"
    assert sharing["findings"]["items"][0]["place"] == "weight"
    assert sharing["findings"]["items"][0]["members"] == ["0", "1"]
    assert sharing["findings"]["affected"][0] == {"number": 2, "noun": "parameter", "of": 2}


def test_results_are_a_table_in_a_notebook_and_a_line_in_a_console():
    results = check_ensemble(Subject(make=lambda: [LEFT, LEFT], claims={"sharing": "independent"}))
    page = results._repr_html_()
    assert page.count("<table>") == page.count("</table>") == 1
    assert "<td>sharing</td><td>broken</td>" in page
    assert "<pre" in page
    assert repr(results) == "<Results of subject: 1 broken, 14 not claimed>"


# --- claims are parsed first --------------------------------------------------------------------

WRONG = {
    "sharing": "independant",
    "ownership": {"*": "indep"},
    "coupling": {"parnet": "wide"},
    "coverage": "all",
    "graph": 3,
    "cost": {"flop": 1},
    "determinism": {"steps": 0},
    "trajectory": {"members": "one"},
    "prediction": {"reduction": "mean"},
    "loss_scale": {"loss": "sum", "rate": 1},
    "diversity": "different",
    "data": "same",
    "batch": "columns",
    "round_trips": ["deepcpy"],
    "hygiene": {"updates": -1},
}


@pytest.mark.parametrize("check", PROMISES)
def test_a_claim_that_cannot_be_parsed_is_told_before_anything_is_built(check):
    make, made = counting(pair)
    subject = Subject(make=make, name="mine", claims={check: WRONG[check]})
    with pytest.raises(ClaimError) as refused:
        check_ensemble(subject)
    assert str(refused.value).startswith(f"subject 'mine': {check} cannot be claimed to be ")
    assert "It can be: " in str(refused.value)
    assert made == []


def test_a_claim_that_is_nearly_right_is_suggested():
    with pytest.raises(ClaimError, match=r"'independant'\. Did you mean 'independent'"):
        check_ensemble(Subject(make=pair, claims={"sharing": "independant"}))


# --- paths --------------------------------------------------------------------------------------


def test_a_path_may_lead_into_a_class():
    assert resolve("torch.nn:modules.activation.ReLU").name == "ReLU"


def test_a_module_that_fails_when_imported_is_refused_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("def model(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = "cannot import 'half_written' for the subject 'half_written:model': SyntaxError: "
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        resolve("half_written:model")


LEAVES_AT_IMPORT = {
    "import sys\nsys.exit(0)\n": (
        'SystemExit: 0 (*script.py:2). Put the work of a script below `if __name__ == "__main__":`.'
    ),
    "import argparse\nargparse.ArgumentParser().parse_args(['--width'])\n": (
        'SystemExit: 2 (*script.py:2). Put the work of a script below `if __name__ == "__main__":`.'
    ),
    "import pytest\npytest.skip('no GPU', allow_module_level=True)\n": (
        "Skipped: no GPU (*script.py:2)."
    ),
    "import pytest\n\npytest.importorskip('nowhere')\n": (
        "Skipped: could not import 'nowhere': No module named 'nowhere' (*script.py:3)."
    ),
    "def __getattr__(name):\n    raise SystemExit(3)\n": (
        'SystemExit: 3 (*script.py:2). Put the work of a script below `if __name__ == "__main__":`.'
    ),
}


@pytest.mark.parametrize(
    "text", LEAVES_AT_IMPORT, ids=["exit", "argparse", "skip", "importorskip", "lazy"]
)
def test_a_module_that_leaves_when_imported_is_refused(text, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "script", raising=False)
    with pytest.raises(ValueError) as refused:
        resolve("script:build")
    sys.modules.pop("script", None)
    told = f"cannot import 'script' for the subject 'script:build': {LEAVES_AT_IMPORT[text]}"
    before, after = told.split("*")
    assert str(refused.value).startswith(before)
    assert str(refused.value).endswith(after)


# --- bad input: each with a clear error that names the place ------------------------------------


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x)


class Restless(Layered):
    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.add_(1.0)
        return self.layer(x)


class Speaking(Layered):
    def forward(self, x):
        return "a cat"


class Failing(Layered):
    def forward(self, x):
        raise KeyError("mask")


class HalfOnMeta(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2, device="meta")


class WithTable(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(3), requires_grad=False)


class WithComplex(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))


class WithNaN(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.layer.weight.data[0, 1:3] = float("nan")


BAD = {
    Restless: "calling the model changes its own parameter 1.layer.weight, so a measurement "
    "depends on how often the model was called.",
    Speaking: "the output of member 1 is an object of type str, and holds no floating-point "
    "tensor.",
    Failing: "calling member 1 (Failing) on the batch (3, 4) torch.float32 on cpu raised "
    "KeyError: 'mask' (tests/gate/test_conformance.py:",
    HalfOnMeta: "parameter 1.head.weight is on the meta device, but this check computes with "
    "numbers.",
    WithTable: "parameter 1.table has dtype torch.int64, but this check needs real "
    "floating-point parameters.",
    WithComplex: "parameter 1.phase has dtype torch.complex64, but this check needs real "
    "floating-point parameters.",
    WithNaN: "parameter 1.layer.weight holds NaN or infinity in 2 of 8 elements.",
    nn.LazyLinear: "parameter 1.weight is lazy and has no shape yet.",
}
NUMERIC = {"ownership": "independent", "coupling": "independent", "coverage": "complete"}


def optimizer(members) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for member in members for p in member.parameters()], 0.1)


def total(outputs) -> torch.Tensor:
    return sum(output.square().sum() for output in outputs.values())


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_bad_input_is_an_error_that_names_the_place(bad):
    subject = Subject(
        make=lambda: [Layered(), bad(2) if bad is nn.LazyLinear else bad()],
        batch=lambda: torch.randn(3, 4),
        optimizer=optimizer,
        loss=total,
        claims=NUMERIC,
    )
    found = {r.check: (r.status, r.message[: len(BAD[bad])]) for r in check_ensemble(subject)}
    assert {name: found[name] for name in NUMERIC} == dict.fromkeys(NUMERIC, ("error", BAD[bad]))


@pytest.mark.parametrize("check", NUMERIC)
def test_a_batch_on_another_device_is_an_error_that_names_both(check):
    subject = Subject(
        make=lambda: [Layered(), Layered()],
        batch=lambda: torch.randn(3, 4, device="meta"),
        optimizer=optimizer,
        loss=total,
        claims={check: NUMERIC[check]},
    )
    found = of(check_ensemble(subject), check)
    assert found.status == "error"
    assert "on the batch (3, 4) torch.float32 on meta" in found.message
    assert "Several devices are in use: " in found.message
    assert "cpu holds layer.weight; meta holds the batch." in found.message


@pytest.mark.parametrize("check", NUMERIC)
def test_members_that_do_not_exist_are_an_error(check):
    subject = Subject(
        make=Layered,
        batch=lambda: torch.randn(3, 4),
        outputs=lambda output: output.heads,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), 0.1),
        loss=total,
        claims={check: NUMERIC[check]},
    )
    found = of(check_ensemble(subject), check)
    assert found.status == "error"
    assert found.message.startswith(
        "outputs=... raised AttributeError: 'Tensor' object has no attribute 'heads' "
        "(tests/gate/test_conformance.py:"
    )
    assert "It takes what the model returned, a tensor of dtype torch.float32" in found.message


def test_a_list_that_has_lost_its_other_members_is_an_error():
    found = of(check_ensemble([LEFT]), "sharing")
    assert found.status == "error"
    assert "only one was given (0)" in found.message
