"""Every sample counts, every class is there, and the network is as it was before."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ensembles.experiments.data.images import ImageSet
from ensembles.experiments.data.sources import load_images
from ensembles.experiments.evaluation.scores import Scores, evaluate
from ensembles.experiments.training.networks import NetworkOptions, build_network


def images_of(labels, classes=3):
    """Images of one brightness each, which says which class a `Brightness` network sees."""
    labels = torch.tensor(labels)
    grey = (labels * 40 + 10).to(torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(
        "greys",
        "1",
        grey.expand(-1, 3, 4, 4).contiguous(),
        labels,
        torch.arange(len(labels)),
        tuple("abcde"[:classes]),
        (0.0,) * 3,
        (1 / 255,) * 3,
        split="test",
    )


class Brightness(nn.Module):
    """Reads the class from the brightness; each member adds its own number, modulo the classes."""

    def __init__(self, shifts, classes=3):
        super().__init__()
        self.shifts, self.classes = shifts, classes
        self.scale = nn.Parameter(torch.ones(()))
        self.batches = []

    @property
    def member_names(self):
        return tuple(self.shifts)

    def forward(self, x, members=None):
        self.batches.append((len(x), torch.is_grad_enabled(), self.training))
        seen = ((x[:, 0, 0, 0] - 10) / 40).round().long()
        return {
            name: self.scale * nn.functional.one_hot((seen + s) % self.classes, self.classes) * 9.0
            for name, s in self.shifts.items()
        }


def test_every_sample_counts_at_every_batch_size():
    labels = [0, 1, 2, 2, 1, 0, 2]
    for batch_size in (1, 2, 3, 7, 100):
        network = Brightness({"right": 0, "wrong": 1})
        found = evaluate(network, images_of(labels), batch_size=batch_size)
        assert sum(n for n, *_ in network.batches) == 7
        assert {(grad, training) for _, grad, training in network.batches} == {(False, False)}
        assert found.members["right"].predictions.tolist() == labels
        assert (found.members["right"].correct, found.members["wrong"].correct) == (7, 0)
        assert (found.members["right"].n, found.members["wrong"].n) == (7, 7)


def test_a_class_of_the_last_samples_is_not_lost():
    """CIFAR-10.1 v6 is stored by class: a dropped last batch of 256 leaves out its trucks."""
    labels = [0] * 4 + [1] * 4 + [2] * 2
    found = evaluate(Brightness({"a": 0}), images_of(labels), batch_size=4)
    assert found.members["a"].predictions[-2:].tolist() == [2, 2]


def test_reductions_are_of_the_members_and_never_of_a_parent():
    network = Brightness({"parent": 1, "subnet_0_0": 0, "subnet_0_1": 0, "subnet_1_0": 2})
    found = evaluate(network, images_of([0, 1, 2]))
    assert found.reduced == ("subnet_0_0", "subnet_0_1", "subnet_1_0")
    assert {name: s.correct for name, s in found.reductions.items()} == {
        "arithmetic": 3,
        "geometric": 3,
        "vote": 3,
    }
    assert found.members["parent"].correct == 0
    chosen = evaluate(network, images_of([0, 1, 2]), reduced=["parent", "subnet_1_0"])
    assert chosen.reduced == ("parent", "subnet_1_0")
    assert chosen.reductions["vote"].correct == 0


def test_the_reductions_of_a_member_alone_are_left_out():
    assert dict(evaluate(Brightness({"single": 0}), images_of([0, 1, 2])).reductions) == {}


def test_the_likelihoods_are_those_of_the_definitions():
    found = evaluate(Brightness({"a": 0, "b": 1}), images_of([0, 1, 2]))
    z = torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64)
    right, other = z.softmax(0)[0], z.softmax(0)[1]
    assert found.members["a"].nll == pytest.approx(-right.log().item(), abs=1e-6)
    mean = (right + other) / 2
    assert found.reductions["arithmetic"].nll == pytest.approx(-mean.log().item(), abs=1e-6)
    geometric = torch.tensor([4.5, 4.5, 0.0], dtype=torch.float64).softmax(0)[0]
    assert found.reductions["geometric"].nll == pytest.approx(-geometric.log().item(), abs=1e-6)
    half = torch.tensor(0.5, dtype=torch.float64)
    assert found.reductions["vote"].nll == pytest.approx(-half.log().item(), abs=1e-6)


def test_a_vote_without_the_label_is_infinitely_unlikely():
    found = evaluate(Brightness({"a": 1, "b": 1}), images_of([0, 1, 2]))
    assert found.reductions["vote"].nll == float("inf")


@pytest.mark.parametrize("kind", ["ensemble", "subnets", "mean_field", "streams", "single"])
def test_batches_of_another_size_change_no_prediction(kind):
    members = 2 if kind in ("ensemble", "mean_field", "streams") else 1
    width = 2 if kind == "subnets" else 1
    options = NetworkOptions(kind=kind, members=members, width=width, base_channels=2)
    network = build_network(options).double()
    images = load_images("digits", "test").select(slice(0, 100))
    one, other = (evaluate(network, images, batch_size=size) for size in (7, 100))
    for scores in ("members", "reductions"):
        assert list(getattr(one, scores)) == list(getattr(other, scores))
        for name, found in getattr(one, scores).items():
            there = getattr(other, scores)[name]
            assert torch.equal(found.predictions, there.predictions)
            # Sums in another order; the logits are of the size of 1.
            torch.testing.assert_close(
                found.log_probabilities, there.log_probabilities, rtol=0, atol=1e-10
            )


def test_the_network_is_as_it_was(monkeypatch):
    network = build_network(NetworkOptions(base_channels=2))
    network.train()
    frozen = network.network.layer1[0].bn1
    frozen.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    evaluate(network, load_images("digits", "test").select(slice(0, 50)))
    assert torch.backends.cudnn.allow_tf32
    assert [module.training for module in network.modules()] == modes
    assert not frozen.training
    assert network.training
    assert all(torch.equal(before[n], value) for n, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_modes_are_restored_when_the_network_raises():
    class Raises(Brightness):
        def forward(self, x, members=None):
            raise RuntimeError("out of memory")

    network = Raises({"a": 0}).train()
    precision = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(network, images_of([0, 1, 2]))
    assert network.training
    assert torch.get_float32_matmul_precision() == precision
    assert torch.is_grad_enabled()


def test_evaluation_ignores_autocast():
    network = build_network(NetworkOptions(base_channels=2))
    images = load_images("digits", "test").select(slice(0, 40))
    plain = evaluate(network, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = evaluate(network, images)
    a, b = (e.members["single"].log_probabilities for e in (plain, under))
    assert a.dtype == torch.float32
    assert torch.equal(a, b)


def test_the_network_says_how_its_images_are_normalised():
    images = images_of([0, 1, 2])
    network = Brightness({"a": 0})
    network.normalisation = (images.mean, images.std)
    other = replace(images, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert evaluate(network, other).members["a"].correct == 3
    del network.normalisation
    assert evaluate(network, other).members["a"].correct < 3


def test_a_missing_class_is_an_error_unless_it_is_allowed():
    images = images_of([0, 1, 1])
    with pytest.raises(ValueError, match="none of the 3 images is of class c"):
        evaluate(Brightness({"a": 0}), images)
    found = evaluate(Brightness({"a": 0}), images, allow_missing_classes=True)
    assert found.members["a"].correct == 3


def test_wrong_use_is_told():
    images = images_of([0, 1, 2])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(Brightness({"a": 0}), images, batch_size=0)
    with pytest.raises(ValueError, match="reduced names 'x', and the members are a"):
        evaluate(Brightness({"a": 0}), images, reduced=["x"])
    with pytest.raises(ValueError, match=r"the network computes in torch\.float16"):
        evaluate(Brightness({"a": 0}).half(), images)
    with pytest.raises(ValueError, match=r"logits of a have shape \(3, 5\), expected \(3, 3\)"):
        evaluate(Brightness({"a": 0}, classes=5), images)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module with member_names"):
        evaluate(lambda x: x, images)


def test_nan_names_member_and_row():
    class Diverged(Brightness):
        def forward(self, x, members=None):
            found = super().forward(x)
            found["b"][x[:, 0, 0, 0] > 80] = torch.nan
            return found

    with pytest.raises(FloatingPointError, match="logits of b are no distribution: NaN in row 2"):
        evaluate(Diverged({"a": 0, "b": 0}), images_of([0, 1, 2]), batch_size=1)


def test_scores_read_as_a_sentence():
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    scores = Scores(p.log(), p.argmax(1), torch.tensor([0, 1]))
    assert str(scores) == "1 of 2 correct, 0.6931 nats"
    assert scores.right.tolist() == [True, False]
