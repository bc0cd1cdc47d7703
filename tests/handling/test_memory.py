"""Tensors that are made of others, freed or fake: what they share, and that nobody reads at 0."""

import pytest
import torch
from torch import distributed, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

from ensembles import Subject, check_ensemble
from ensembles.checks.cost.meter import Meter
from ensembles.checks.hygiene.hidden_state import memory_of
from ensembles.handling.memory import checked_present, inner_tensors, memory_in, numbers_in
from ensembles.handling.state import Snapshot, preserved
from ensembles.instruments.recording import digest


class Opaque(torch.Tensor):
    """Made of another tensor, and does not say so."""

    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"{type(self).__name__}({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map_only(Opaque, lambda x: x.inner, (args, kwargs or {}))
        return pytree.tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


class Wrapped(Opaque):
    """Made of another tensor, and computes as that does."""

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return return_and_correct_aliasing(func, args, kwargs or {}, out)


class Quantized(torch.Tensor):
    """Integers and a scale, which can be kept, copied and multiplied with, and nothing else."""

    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def of(cls, values):
        scale = values.abs().max() / 127
        return cls((values / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, w, *rest = args
            return func(x, w.numbers.to(w.scale.dtype) * w.scale, *rest)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aten, x = torch.ops.aten, args[0]
        if func is aten.copy_.default:
            x.numbers.copy_(args[1].numbers)
            x.scale.copy_(args[1].scale)
            return x
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            out = cls(func(x.numbers), func(x.scale))
            return return_and_correct_aliasing(func, args, kwargs or {}, out)
        raise NotImplementedError(f"{func} of quantized weights")


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def linear(wrap, *, trained: bool = True) -> nn.Linear:
    """A layer whose parameters are of another class."""
    layer = nn.Linear(6, 3)
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(wrap(parameter.detach().clone()), trained))
    return layer


class Adapted(nn.Module):
    """A frozen, quantized layer, and what is trained beside it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 3)
        quantized = Quantized.of(self.base.weight.detach())
        self.base.weight = nn.Parameter(quantized, requires_grad=False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


CLAIMS = {
    "sharing": "independent",
    "ownership": "independent",
    "coupling": "independent",
    "coverage": "complete",
    "determinism": "bitwise",
    "diversity": "independent",
    "hygiene": "clean",
}


def verdicts(make, batch=lambda: torch.randn(4, 6), claims=CLAIMS):
    results = check_ensemble(Subject(make=make, batch=batch, claims=claims))
    return {r.check: (r.status, r.message or "") for r in results if r.claim is not None}


# --- what every check says -----------------------------------------------------------------------


MEMBERS = {
    "two": lambda: linear(lambda x: TwoTensor(x, x.clone())),
    "wrapped": lambda: linear(Wrapped),
    "quantized": Adapted,
}


def spread(mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    return lambda x: distribute_tensor(x, mesh, [Replicate()])


@pytest.mark.parametrize("kind", MEMBERS)
def test_members_made_of_other_tensors_hold(kind):
    found = verdicts(lambda: [MEMBERS[kind](), MEMBERS[kind]()])
    assert {check: status for check, (status, _) in found.items()} == dict.fromkeys(CLAIMS, "held")


@pytest.mark.filterwarnings("ignore:DTensor random operators")
def test_distributed_members_hold(mesh):
    found = verdicts(
        lambda: [linear(spread(mesh)) for _ in range(2)],
        batch=lambda: spread(mesh)(torch.randn(4, 6)),
    )
    assert {check: status for check, (status, _) in found.items()} == dict.fromkeys(CLAIMS, "held")


@pytest.mark.filterwarnings("ignore:DTensor random operators")
@pytest.mark.parametrize("kind", ["distributed", "two", "wrapped", "quantized"])
def test_one_member_twice_is_broken_in_every_class(kind, mesh):
    make = {"distributed": lambda: linear(spread(mesh)), **MEMBERS}[kind]
    batch = spread(mesh) if kind == "distributed" else lambda x: x
    found = verdicts(lambda: [make()] * 2, batch=lambda: batch(torch.randn(4, 6)))
    broken = ("sharing", "ownership", "coupling", "diversity")
    assert {check: status for check, (status, _) in found.items()} == {
        **dict.fromkeys(CLAIMS, "held"),
        **dict.fromkeys(broken, "broken"),
    }
    assert "one tensor in members 0, 1" in found["sharing"][1]


def test_what_a_class_cannot_do_is_told_in_words(mesh):
    def penalised(outputs):
        return sum((y - torch.ones(4, 3)).square().sum() for y in outputs.values())

    subject = Subject(
        make=lambda: [linear(spread(mesh)) for _ in range(2)],
        batch=lambda: spread(mesh)(torch.randn(4, 6)),
        loss=penalised,
        claims={"coverage": "complete", "batch": "rows"},
    )
    found = {r.check: (r.status, r.message) for r in check_ensemble(subject) if r.claim is not None}
    assert found["coverage"][0] == found["batch"][0] == "error"
    assert "got mixed torch.Tensor and DTensor" in found["coverage"][1]
    assert found["coverage"][1].startswith("loss=penalised raised RuntimeError:")
    assert found["batch"][1].startswith(
        "parameter 0.weight is of type DTensor, and an operation on it raised RuntimeError:"
    )
    assert found["batch"][1].endswith(
        "This check computes with plain tensors. Check the model before it is sharded or quantized "
        "(fully_shard, parallelize_module, quantize_); sharing opens such tensors."
    )


def test_what_hides_its_memory_is_told_in_words():
    found = verdicts(lambda: [linear(Opaque), linear(Opaque)])
    for status, message in found.values():
        assert status == "error"
        assert "weight is of type Opaque, and PyTorch does not show its memory." in message


def test_fake_tensors_are_shared_or_not_and_have_no_numbers():
    def fake():
        with FakeTensorMode():
            return nn.Linear(6, 3)

    found = verdicts(lambda: [fake(), fake()])
    assert found.pop("sharing")[0] == "held"
    for status, message in found.values():
        assert status == "error"
        assert "weight is of type FakeTensor, and has no numbers." in message
    twice = verdicts(lambda: [fake()] * 2, claims={"sharing": "independent"})
    assert twice["sharing"][0] == "broken"


def test_freed_memory_is_not_read():
    """As FSDP frees what it has sharded: views at offsets point to where nothing is."""

    def freed():
        layer, flat = nn.Linear(6, 3), torch.randn(21)
        layer.weight.data, layer.bias.data = flat[:18].view(3, 6), flat[18:]
        flat.untyped_storage().resize_(0)
        return layer

    for status, message in verdicts(lambda: [freed(), freed()]).values():
        assert status == "error"
        assert "weight has no memory at present: its storage of 0 bytes is too small" in message


# --- the parts -----------------------------------------------------------------------------------


def test_views_in_shells_share_what_their_inner_tensors_share():
    memory = torch.randn(2, 6)

    def shared(row):
        claims = {"sharing": "independent"}
        modules = [nn.ParameterList([nn.Parameter(Wrapped(memory[i]))]) for i in (0, row)]
        return verdicts(lambda: modules, claims=claims)["sharing"][0]

    assert (shared(0), shared(1)) == ("broken", "held")


LAYOUTS = {
    "dense": (lambda: torch.eye(4), 1),
    "coo": (lambda: torch.eye(4).to_sparse(), 2),
    "csr": (lambda: torch.eye(4).to_sparse_csr(), 3),
    "csc": (lambda: torch.eye(4).to_sparse_csc(), 3),
    "bsr": (lambda: torch.eye(4).to_sparse_bsr((2, 2)), 3),
    "bsc": (lambda: torch.eye(4).to_sparse_bsc((2, 2)), 3),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), 1),
    "wrapped twice": (lambda: Wrapped(Wrapped(torch.eye(4))), 1),
    "two": (lambda: TwoTensor(torch.eye(4), torch.eye(4)), 2),
}


@pytest.mark.filterwarnings("ignore:Sparse .* beta state", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_memory_of_every_layout_is_found(layout):
    make, parts = LAYOUTS[layout]
    tensor = make()
    found = list(memory_in(tensor))
    assert len(found) == parts == len(memory_of(tensor))
    for part, (_, address) in zip(found, memory_of(tensor), strict=True):
        assert (type(part), part.layout) == (torch.Tensor, torch.strided)
        assert part.untyped_storage().data_ptr() == address > 0
    assert bool(numbers_in(tensor).any())
    assert digest(tensor) == digest(make())


def test_numbers_and_bits_of_a_shell_are_those_inside():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert numbers_in(TwoTensor(one, two)).tolist() == [1.0, 2.0, 1.0, 2.5]
    assert numbers_in(Wrapped(one)).tolist() == [1.0, 2.0]
    kinds = [one, Wrapped(one), Wrapped(two), TwoTensor(one, two), TwoTensor(two, one)]
    assert len({digest(kind) for kind in kinds}) == len(kinds)
    assert digest(Wrapped(one)) == digest(Wrapped(one.clone()))


@pytest.mark.parametrize(
    "hidden",
    [Opaque(torch.ones(2)), torch.ones(2, 2).to_mkldnn(), torch._efficientzerotensor((2,))],
    ids=["opaque", "mkldnn", "zero"],
)
def test_hidden_memory_is_refused(hidden):
    with pytest.raises(ValueError, match=r"weight is of type .*, and PyTorch does not"):
        inner_tensors(hidden, "weight")


def test_a_freed_storage_in_a_shell_is_refused():
    inner = torch.ones(4)
    shell = Wrapped(inner[2:])
    checked_present(shell)
    inner.untyped_storage().resize_(8)
    for look in (checked_present, digest, numbers_in, lambda x: list(memory_in(x))):
        with pytest.raises(ValueError, match="no memory at present: its storage of 8 bytes"):
            look(shell)


def test_only_what_fails_on_a_shell_is_told_as_that():
    plain, shell = nn.Linear(2, 2), linear(Wrapped)
    with pytest.raises(RuntimeError, match=r"^mine$"), preserved(plain):
        raise RuntimeError("mine")
    with pytest.raises(ValueError, match=r"^mine$"), preserved(shell):
        raise ValueError("mine")
    with (
        pytest.raises(ValueError, match="weight is of type Wrapped, and an operation on it raised"),
        preserved(shell),
    ):
        raise RuntimeError("mine")


def test_shells_are_restored():
    layer = linear(Wrapped)
    start, before = Snapshot(layer), layer.weight.inner.clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert start.changed()
    start.restore()
    assert not start.changed()
    assert torch.equal(layer.weight.inner, before)


def test_bytes_that_are_kept_for_backward_are_those_inside():
    """An int8 weight, a scale and 24 floats of the batch, of which the half are zeros."""
    x = torch.cat([torch.ones(2, 6), torch.zeros(2, 6)])
    shell = Quantized.of(torch.ones(3, 6))
    meter = Meter({"model": nn.Linear(1, 1)}, None, zeros=True)
    with meter.watching():
        kept = [meter._pack(shell), meter._pack(x)]
    assert [piece.bytes for piece in meter.kept()] == [3 * 6 + 4, 4 * 24]
    assert [piece.zeros for piece in meter.kept()] == [0, 4 * 12]
    assert len(kept) == 2
