import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from ensembles.case import Case
from ensembles.checks.round_trips.claim import CONVERSIONS, parse
from ensembles.checks.round_trips.conversions import LOCAL
from ensembles.checks.round_trips.differences import Difference
from ensembles.checks.round_trips.distributed_conversions import DISTRIBUTED
from ensembles.checks.round_trips.judgement import assert_round_trips_kept, judge
from ensembles.checks.round_trips.measurement import measure_round_trips
from ensembles.claims import ClaimError
from ensembles.models import Ensemble, NStreams, subnet_resnet18

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8)
ROWS = torch.linspace(-1, 1, 5 * 8).sin().view(5, 8)
PLAIN = [name for name in LOCAL if name not in ("safetensors", "compile", "export")]


class Tied(nn.Module):
    """Two modules that register one weight, as a language model's embedding and head do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(x)).relu())


class Shared(Tied):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = self.embed


class Masked(nn.Linear):
    """A drawn mask that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__(8, 3)
        self.mask = torch.rand(3, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Patched(nn.Linear):
    """Computes with a weight that a closure holds."""

    def __init__(self) -> None:
        super().__init__(8, 3)
        weight = self.weight
        self.compute = lambda x: F.linear(x, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x)


def member() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))


class Pair(nn.Module):
    """Two members whose first layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.right = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.right[0].weight = self.left[0].weight

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"left": self.left(x), "right": self.right(x)}


class Finished(nn.Module):
    """Takes what was loaded for finished, and computes with it without gradients."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.cut, self.loaded = cut, False
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "loaded", True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.loaded and self.cut == "everything":
            with torch.no_grad():
                return self.last(self.first(x).relu())
        y = self.first(x).relu()
        return self.last(y.detach() if self.loaded and self.cut == "first" else y)


def by_name(trips):
    return {one.conversion: one for one in trips.outcomes}


# --- kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: subnet_resnet18(width=2, base_channels=2, stem="cifar", num_classes=3),
        lambda: Ensemble.of(member, 3),
        lambda: NStreams(member(), 2),
        lambda: [member(), member()],
        lambda: {"a": member(), "b": member()},
    ],
    ids=["subnets", "ensemble", "streams", "list", "dict"],
)
def test_our_models_survive_every_conversion_that_pytorch_does_not_break(make):
    found = measure_round_trips(make, IMAGES, conversions=PLAIN)
    assert_round_trips_kept(found)
    seen = by_name(found)
    for name in ("deepcopy", "pickle", "state_dict", "half", "double", "channels_last", "to_empty"):
        assert seen[name].reason == ""
        kept = {
            seen[name].status("function"),
            seen[name].status("ownership"),
            seen[name].status("parameters"),
        }
        assert kept == {"kept"}, seen[name]
        assert seen[name].status("ties") in ("kept", "-")
    assert by_name(found)["assign=True"].having("broken by PyTorch") == ("optimizer",)


def test_a_weight_under_two_names_is_tied_by_pytorchs_rules_only(golden):
    names = [name for name in PLAIN if name != "quantize_dynamic"]  # not in every PyTorch
    names += ["ddp", "fsdp2"]
    found = measure_round_trips(Tied, ROWS, conversions=names)
    assert_round_trips_kept(found)
    golden(str(found), "messages/round_trips_tied.txt")


def test_a_module_under_two_names_stays_tied():
    names = ["deepcopy", "pickle", "state_dict", "to_empty", "half"]
    found = measure_round_trips(Shared, ROWS, conversions=names)
    assert_round_trips_kept(found, names)
    assert [one.status("ties") for one in found.outcomes] == ["kept"] * 5


def test_functional_call_leaves_its_tensors_in_a_module_under_two_names():
    found = measure_round_trips(Shared, ROWS, conversions=["functional_call", "vmap"])
    assert [one.status("function") for one in found.outcomes] == ["broken by PyTorch"] * 2
    assert_round_trips_kept(found)
    with pytest.raises(AssertionError, match=r"Call it with\s+tie_weights=False"):
        assert_round_trips_kept(found, ["functional_call"])


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 unties weights in its export")
def test_compiled_and_exported_models_are_the_model():
    found = measure_round_trips(Tied, ROWS, conversions=["compile", "export"])
    assert_round_trips_kept(found, ["compile", "export"])
    assert [one.status("ties") for one in found.outcomes] == ["kept", "kept"]


def test_the_first_line_names_what_is_let_pass():
    """The gate shows no other: what PyTorch breaks, how to tie again, what was not looked at."""
    found = measure_round_trips(Tied, ROWS, conversions=["deepcopy", "assign=True", "ddp", "fsdp2"])
    assert str(found).splitlines()[0] == (
        "2 conversions, 1 tied tensor: 1 kept, 0 broken; "
        "1 broken by PyTorch: assign=True (tie again afterwards: b.weight = a.weight); "
        "2 not looked at: ddp, fsdp2 "
        '(two processes are needed: give factory="package.module:factory")'
    )
    kept = measure_round_trips(Tied, ROWS, conversions="deepcopy")
    assert str(kept).splitlines()[0] == "1 conversion, 1 tied tensor: 1 kept, 0 broken"


def test_a_broken_claim_of_all_names_what_is_let_pass():
    class Both(Tied):
        def __init__(self):
            super().__init__()
            weight = self.embed.weight
            self.compute = lambda x: F.linear(x, weight)

        def forward(self, x):
            return self.compute(x)

    found = measure_round_trips(Both, ROWS, conversions=["deepcopy", "assign=True", "ddp"])
    with pytest.raises(AssertionError) as broken:
        assert_round_trips_kept(found)
    told = " ".join(str(broken.value).split())
    assert "Let pass: 1 not looked at: ddp (two processes are needed" in told
    assert "looked at 2 of 3 conversions" in told
    with pytest.raises(AssertionError) as broken:
        assert_round_trips_kept(found, ["deepcopy"])
    assert "Let pass" not in str(broken.value)


def test_an_encoder_layer_that_pytorch_quantizes_and_cannot_call_is_named():
    def make():
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    (found,) = measure_round_trips(make, ROWS[None], conversions="quantize_dynamic").outcomes
    assert "cannot call a quantized nn.TransformerEncoderLayer" in found.reason


def test_why_a_result_cannot_be_called_is_told_by_its_cause():
    class Asks(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(self[0].weight.device))

    (found,) = measure_round_trips(
        lambda: Asks(nn.Linear(8, 3)), ROWS, conversions="quantize_dynamic"
    ).outcomes
    assert found.reason.startswith("what it makes cannot be called: AttributeError: ")


def test_what_torch_traces_is_in_no_captured_log(caplog):
    """pytest listens to loggers that do not propagate, as torch's own is."""
    trace = logging.getLogger("torch.__trace")
    listening = [*trace.handlers, caplog.handler]
    trace.addHandler(caplog.handler)
    try:
        measure_round_trips(Tied, ROWS, conversions=["compile", "export"])
        assert caplog.records == []
        assert caplog.handler in trace.handlers
    finally:
        trace.handlers[:] = [one for one in listening if one is not caplog.handler]


def test_two_processes_keep_the_model(tmp_path, monkeypatch):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    (tmp_path / "tied_factory.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))\n"
        "    net[2].weight = net[0].weight\n    return net\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names, factory = ["ddp", "fsdp2"], "tied_factory:build"
    found = measure_round_trips(Tied, ROWS, conversions=names, factory=factory)
    ddp, fsdp2 = found.outcomes
    cells = (
        ddp.status("ties"),
        ddp.status("function"),
        ddp.status("ownership"),
        ddp.status("parameters"),
        ddp.status("optimizer"),
    )
    assert cells == ("kept",) * 5
    if torch.__version__ < "2.7":
        assert fsdp2.reason.startswith("this PyTorch shards on GPUs only")
        return
    assert (fsdp2.status("ties"), fsdp2.status("function"), fsdp2.status("parameters")) == (
        "kept",
    ) * 3
    assert fsdp2.status("ownership") == "-"  # each process holds a shard
    assert fsdp2.status("optimizer") == "broken by PyTorch"
    with pytest.raises(ValueError, match=r'"factory": "package\.module:factory"'):
        measure_round_trips(Tied, ROWS, conversions=["ddp"], factory="tied_factory")


# --- broken ---------------------------------------------------------------------------------------


def test_a_mask_that_is_not_saved_breaks_files_and_not_copies(golden):
    names = ["deepcopy", "pickle", "state_dict"]
    found = measure_round_trips(Masked, ROWS, conversions=names)
    assert [one.status("function") for one in found.outcomes] == ["kept", "kept", "broken"]
    with pytest.raises(AssertionError) as broken:
        assert_round_trips_kept(found)
    golden(str(broken.value), "messages/round_trips_mask.txt")


def test_a_copy_that_computes_with_the_original_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_round_trips_kept(measure_round_trips(Patched, ROWS, conversions=["deepcopy"]))
    golden(str(broken.value), "messages/round_trips_closure.txt")


def test_what_pytorch_breaks_is_broken_where_it_is_claimed(golden):
    names = ["state_dict", "assign=True", "weight_norm"]
    with pytest.raises(AssertionError) as broken:
        assert_round_trips_kept(measure_round_trips(Tied, ROWS, conversions=names), names)
    golden(str(broken.value), "messages/round_trips_by_pytorch.txt")


@pytest.mark.parametrize(
    ("cut", "difference"),
    [
        (
            "first",
            Difference(
                "ownership",
                "other owners",
                ("first.weight", "first.bias"),
                amount=72,
                limit=72,
                before=("model",),
            ),
        ),
        ("everything", Difference("ownership", "no owners")),
    ],
)
def test_the_same_function_that_gradients_do_not_pass_is_broken(cut, difference):
    found = measure_round_trips(
        lambda: Finished(cut), ROWS, conversions=["deepcopy", "state_dict", "strict=False"]
    )
    assert [one.having("broken") for one in found.outcomes] == [(), ("ownership",), ("ownership",)]
    assert found.outcomes[1].differences == (difference,)
    assert_round_trips_kept(found, ["deepcopy"])


def test_the_message_of_a_loaded_weight_without_gradients(golden):
    with pytest.raises(AssertionError) as broken:
        assert_round_trips_kept(
            measure_round_trips(lambda: Finished("first"), ROWS, conversions="state_dict")
        )
    golden(str(broken.value), "messages/round_trips_ownership.txt")


class ByHand(nn.Sequential):
    """Copies itself as one would by hand, and not quite."""

    def __init__(self, defect: str) -> None:
        super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.defect = defect
        self[1].momentum = 0.3

    def __deepcopy__(self, memo):
        new = ByHand(self.defect).train(self.training)
        new.load_state_dict(self.state_dict())
        if self.defect == "statistics":
            new[1].running_mean = self[1].running_mean
        elif self.defect == "momentum":
            new[1].momentum = 0.1
        elif self.defect == "dropout":
            new[2].p = 0.0
        return new


@pytest.mark.parametrize(
    ("defect", "told"),
    [
        ("statistics", "training the copy moves the original's 1.running_mean"),
        ("momentum", "in train mode outputs or statistics differ by"),
        ("dropout", "in train mode outputs or statistics differ by"),
    ],
)
def test_a_copy_that_is_the_same_in_eval_mode_only_is_broken(defect, told):
    found = measure_round_trips(lambda: ByHand(defect), ROWS, conversions=["deepcopy"])
    assert found.outcomes[0].having("broken") == ("function",)
    with pytest.raises(AssertionError, match=told):
        assert_round_trips_kept(found)


def test_a_copy_that_is_the_same_in_both_modes_is_kept():
    names = ["deepcopy", "pickle", "state_dict", "double", "averaged_model"]
    found = measure_round_trips(lambda: ByHand("none"), ROWS, conversions=names)
    assert_round_trips_kept(found, names)


def test_what_does_not_repeat_in_train_mode_is_compared_in_eval_mode():
    class Noisy(nn.Linear):
        generator = torch.Generator()

        def forward(self, x):
            noise = torch.rand(x.shape, generator=self.generator) if self.training else 0.0
            return super().forward(x + noise)

    found = measure_round_trips(lambda: Noisy(8, 3), ROWS, conversions=["deepcopy", "state_dict"])
    assert_round_trips_kept(found, ["deepcopy", "state_dict"])


def test_a_batch_of_one_row_has_no_train_mode():
    found = measure_round_trips(Tied, ROWS[:1], conversions=["deepcopy"])
    assert_round_trips_kept(found, ["deepcopy"])


def test_memory_without_values_is_pytorchs_and_what_is_not_saved_is_named():
    class Causal(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.register_buffer("mask", torch.ones(8, 8).tril(), persistent=False)

        def forward(self, x):
            return F.linear(x, self.weight * self.mask, self.bias)

    found = measure_round_trips(Causal, ROWS, conversions=["state_dict", "to_empty"])
    assert_round_trips_kept(found)
    assert found.outcomes[1].status("function") == "broken by PyTorch"
    assert found.outcomes[1].differences[1] == Difference("function", "not saved", ("mask",))
    with pytest.raises(AssertionError, match="fill what state_dict does not hold"):
        assert_round_trips_kept(found, ["to_empty"])


@pytest.mark.parametrize("name", ["assign=True", "to_empty"])
def test_weights_that_pytorch_unties_have_other_owners(name):
    (found,) = measure_round_trips(Pair, ROWS, conversions=name).outcomes
    assert found.status("ties") == found.status("ownership") == "broken by PyTorch"
    assert (
        Difference(
            "ownership",
            "other owners",
            ("left.0.weight",),
            64,
            64,
            now=("left",),
            before=("left", "right"),
        )
        in found.differences
    )


def test_members_stacked_in_one_output_are_told_apart():
    grouped = measure_round_trips(
        lambda: nn.Conv1d(4, 2, 1, groups=2),
        torch.linspace(-1, 1, 24).sin().view(2, 4, 3),
        outputs=lambda y: [y[:, 0], y[:, 1]],
        conversions=["deepcopy"],
    )
    assert grouped.outcomes[0].status("ownership") == "kept"


def test_what_detaches_all_the_time_has_no_owners_to_lose():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    found = measure_round_trips(lambda: Detached(8, 3), ROWS, conversions=["deepcopy"])
    assert (found.outcomes[0].status("function"), found.outcomes[0].status("ownership")) == (
        "kept",
        "-",
    )


def test_a_copy_that_is_the_model_itself_is_broken():
    class Itself(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    found = measure_round_trips(lambda: Itself(8, 3), ROWS, conversions=["deepcopy"])
    with pytest.raises(AssertionError, match="a change of the copy changes the original"):
        assert_round_trips_kept(found)


def test_a_freeze_that_a_copy_loses_is_broken():
    class Thawing(nn.Linear):
        def __deepcopy__(self, memo):
            copied = nn.Linear(8, 3)
            copied.load_state_dict(self.state_dict())
            return copied

    def frozen():
        net = Thawing(8, 3)
        net.bias.requires_grad_(False)
        return net

    found = measure_round_trips(frozen, ROWS, conversions=["deepcopy"])
    assert found.outcomes[0].differences == (Difference("parameters", "not frozen", ("bias",)),)
    with pytest.raises(AssertionError, match="deepcopy   trained, but was frozen: bias"):
        assert_round_trips_kept(found)


def test_a_load_that_raises_is_a_broken_claim():
    class Grown(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.extra = nn.Linear(int(torch.randint(1, 1000, ())), 1)

    found = measure_round_trips(lambda: Grown(), ROWS, conversions=["state_dict"])
    with pytest.raises(
        AssertionError,
        match=r"state_dict   raised RuntimeError: .* size mismatch for extra\.weight",
    ):
        assert_round_trips_kept(found)


# --- findings -------------------------------------------------------------------------------------


def test_findings_are_data_and_what_the_model_breaks_comes_first(golden):
    class Both(Tied):
        def __init__(self):
            super().__init__()
            self.mask = torch.rand(8)

        def forward(self, x):
            return super().forward(x) * self.mask

    names = ["assign=True", "state_dict"]
    with pytest.raises(AssertionError) as broken:
        assert_round_trips_kept(measure_round_trips(Both, ROWS, conversions=names), names)
    findings = broken.value.findings
    told = [(one.kind, one.place, one.members) for one in findings]
    assert told == [
        ("function", "state_dict", ()),
        ("broken by PyTorch", "assign=True", ()),
        ("broken by PyTorch", "assign=True", ()),
    ]
    assert findings[0].amount > 0.1
    assert [str(count) for count in findings.affected] == ["2 of 2 conversions"]
    golden(str(broken.value), "messages/round_trips_several.txt")


def test_members_that_a_weight_no_longer_moves_are_data():
    trips = measure_round_trips(Pair, ROWS, conversions="assign=True")
    findings = judge(trips, parse("assign=True"))
    assert ("left", "right") in {one.members for one in findings}
    assert judge(trips, parse("all")).held


def test_a_copy_that_ties_and_freezes_is_broken():
    class Careless(Pair):
        def __deepcopy__(self, memo):
            copied = Careless()
            copied.load_state_dict(self.state_dict())
            copied.right[2].bias = copied.left[2].bias
            copied.left[2].weight.requires_grad_(False)
            return copied

    found = measure_round_trips(Careless, ROWS, conversions="deepcopy")
    kinds = [(one.kind, one.names) for one in found.outcomes[0].differences]
    assert ("became one", ("left.2.bias", "right.2.bias")) in kinds
    assert ("frozen", ("left.2.weight",)) in kinds
    findings = judge(found, parse("deepcopy"))
    assert {"ties", "function", "parameters"} <= set(findings.kinds)
    told = [one.found for one in findings]
    assert "left.2.bias, right.2.bias became one" in told
    assert "frozen, but was trained: left.2.weight" in told


def test_what_does_not_apply_is_not_left_out():
    found = measure_round_trips(Tied, ROWS, conversions=["deepcopy", "channels_last", "ddp"])
    first = str(found).splitlines()[0]
    assert "; 1 not looked at: ddp (two processes are needed" in first
    assert first.endswith("; 1 not applicable: channels_last (no parameter has four dimensions)")
    findings = judge(found, parse("all"))
    assert findings.held
    assert [str(count) for count in findings.looked_at] == ["1 of 2 conversions"]


# --- wrong use, and what was not looked at --------------------------------------------------------


def test_safetensors_keep_what_is_tied_by_a_module():
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    found = measure_round_trips(Tied, ROWS, conversions="safetensors")
    assert_round_trips_kept(found, "safetensors")
    assert found.outcomes[0].status("ties") == found.outcomes[0].status("ownership") == "kept"
    with pytest.raises(AssertionError, match="safetensors   outputs differ"):
        assert_round_trips_kept(
            measure_round_trips(Masked, ROWS, conversions="safetensors"), "safetensors"
        )


def test_a_claim_that_could_not_be_looked_at_is_an_error(monkeypatch):
    monkeypatch.setattr("ensembles.checks.round_trips.conversions.find_spec", lambda name: None)
    found = measure_round_trips(Tied, ROWS, conversions=["deepcopy", "safetensors"])
    assert_round_trips_kept(found)
    with pytest.raises(ValueError, match="not looked at: safetensors \\(safetensors is not inst"):
        assert_round_trips_kept(found, ["deepcopy", "safetensors"])


def strided(channels: int, broken: bool = False) -> nn.Module:
    """A network whose training, channels last, may run a kernel that writes past its buffer."""
    downsample = nn.Conv2d(channels, 8, 1, stride=2, bias=False)
    first = nn.Conv2d(3, channels, 3, padding=1)
    flat = View() if broken else nn.Flatten()
    return nn.Sequential(first, downsample, flat, nn.Linear(8 * 4 * 4, 3))


class View(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def test_owners_are_not_looked_at_where_pytorch_cannot_train_a_layout_on_every_cpu(golden):
    found = measure_round_trips(
        lambda: strided(4), IMAGES, conversions=["deepcopy", "channels_last"]
    )
    assert_round_trips_kept(found, ["deepcopy", "channels_last"])
    assert [found.outcomes[1].status(a) for a in ("function", "ownership")] == ["kept", "-"]
    golden(str(found), "messages/round_trips_overrun.txt")


def test_a_layout_that_it_can_train_is_looked_at():
    for make in (lambda: strided(16), lambda: strided(4).double()):
        batch = IMAGES.to(make()[0].weight.dtype)
        found = measure_round_trips(make, batch, conversions="channels_last")
        assert_round_trips_kept(found, "channels_last")
        assert found.outcomes[0].status("ownership") == "kept"


def test_what_the_layout_breaks_is_broken_without_a_look_at_owners():
    class Asks(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y if self[1].weight.stride(-1) == 1 else 2 * y

    for make in (lambda: strided(4, broken=True), lambda: Asks(*strided(4))):
        found = measure_round_trips(make, IMAGES, conversions="channels_last")
        with pytest.raises(AssertionError, match=r"last   (raised|outputs differ)") as broken:
            assert_round_trips_kept(found)
    assert "Let pass: 1 not looked at: ownership after channels_last" in " ".join(
        str(broken.value).split()
    )


def test_a_row_of_pixels_that_stays_channels_last_is_told_too():
    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Conv1d(4, 8, 1, stride=2))

    (found,) = measure_round_trips(make, IMAGES, conversions="channels_last").outcomes
    assert found.unowned.endswith("of a 1 conv of stride 2 with 4 channels")


def test_nothing_looked_at_is_an_error():
    found = measure_round_trips(Tied, ROWS, conversions=["ddp"])
    with pytest.raises(ValueError, match="two processes are needed: give factory="):
        assert_round_trips_kept(found)


@pytest.mark.parametrize("names", ["deepcopies", ["deepcopy", "pickled"], [], {"factory": "build"}])
def test_a_conversion_that_does_not_exist_is_refused(names):
    with pytest.raises(ClaimError, match="It can be: all, deepcopy, pickle, state_dict"):
        parse(names)


def test_a_conversion_that_is_misspelt_is_told_before_anything_is_built():
    def never():
        raise AssertionError("built")

    with pytest.raises(ClaimError, match=r"Did you mean 'deepcopy'\?"):
        measure_round_trips(never, ROWS, conversions="deepcpy")


def test_names_of_conversions_and_their_functions_are_one_list():
    assert [*LOCAL, *DISTRIBUTED] == list(CONVERSIONS)


def test_what_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="pickle was not measured"):
        assert_round_trips_kept(measure_round_trips(Tied, ROWS, conversions="deepcopy"), ["pickle"])


def test_a_model_instead_of_a_factory_is_refused_where_a_new_one_is_needed():
    net = Tied()
    for name in ("state_dict", "half", "all"):
        with pytest.raises(ValueError, match="got an object of type Tied"):
            measure_round_trips(net, ROWS, conversions=name)
        with pytest.raises(ValueError, match="make returns the same module at each call"):
            measure_round_trips(lambda: net, ROWS, conversions=name)
    copies = ["deepcopy", "pickle", "averaged_model"]
    assert_round_trips_kept(measure_round_trips(net, ROWS, conversions=copies), copies)


# --- how many models are built --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conversions", "builds"),
    [
        (["deepcopy", "pickle", "functional_call", "averaged_model"], 1),
        (["deepcopy", "state_dict", "strict=False", "assign=True", "half", "double"], 2),
        (["state_dict", "to_empty"], 3),  # one more on meta
        (["half", "weight_norm"], 2),
        (["weight_norm", "compile", "export"], 4),  # what the first two do cannot be undone
    ],
)
def test_models_are_built_as_few_times_as_possible(conversions, builds):
    built = []

    def make():
        built.append(Tied())
        return built[-1]

    case = Case.of(make, ROWS)
    before = case.digest()
    found = measure_round_trips(case, conversions=conversions)
    assert_round_trips_kept(found)
    assert len(built) == builds
    assert case.is_as(before)


def test_what_a_conversion_leaves_behind_does_not_reach_the_next():
    """A copy that spoils its original in what cannot be put back: the next gets a new model."""

    class Spoiled(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.settings = SimpleNamespace(factor=1)

        def forward(self, x):
            return self.settings.factor * super().forward(x)

        def __deepcopy__(self, memo):
            copied = Spoiled()
            copied.load_state_dict(self.state_dict())
            self.settings.factor = 2
            return copied

    names = ["deepcopy", "functional_call"]
    found = measure_round_trips(Spoiled, ROWS, conversions=names)
    spoiled, kept = found.outcomes
    assert spoiled.differences == (Difference("function", "moves the original"),)
    assert kept.differences == ()


def test_looking_leaves_the_generators_as_they_were():
    before = torch.get_rng_state()
    first = measure_round_trips(Tied, ROWS, conversions=["deepcopy", "state_dict", "half"])
    assert torch.equal(torch.get_rng_state(), before)
    assert first == measure_round_trips(Tied, ROWS, conversions=["deepcopy", "state_dict", "half"])


def test_the_fixture_does_the_same(round_trip):
    round_trip.assert_kept(Shared, ROWS, ["deepcopy", "state_dict"])
    with pytest.raises(AssertionError, match="claimed to survive state_dict, but does not"):
        round_trip.assert_kept(Masked, ROWS, ["state_dict"])
