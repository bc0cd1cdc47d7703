"""Networks whose test errors are published, on the real images: the evaluation measures them."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ensembles.experiments.data.cifar10 import CLASSES
from ensembles.experiments.data.sources import CLASS_NAMES, SETS, load_images
from ensembles.experiments.evaluation.counts import clopper_pearson
from ensembles.experiments.evaluation.pretrained import (
    PRETRAINED,
    CifarResNet,
    PretrainedNetwork,
    load_pretrained,
)
from ensembles.experiments.evaluation.scores import evaluate

DATA = Path(os.environ.get("ENSEMBLES_DATA", Path(__file__).parents[4] / "shared" / "data"))
FILES = (
    "cifar10_raw_prefix.npz",
    "cifar10_jpeg.npz",
    *(f"pretrained/{weights.file}" for weights in PRETRAINED.values()),
)
needs_data = pytest.mark.skipif(
    not all((DATA / file).is_file() for file in FILES),
    reason=f"CIFAR-10 images and pretrained ResNets are not in {DATA} (set ENSEMBLES_DATA)",
)


@pytest.fixture(scope="module")
def all_four():
    # With the channels last, a CPU takes two thirds of the time.
    return load_pretrained(PRETRAINED, DATA / "pretrained").to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def lossless(all_four):
    images = load_images("cifar10_lossless", "test", root=DATA)
    return evaluate(all_four, images, batch_size=64)


@pytest.fixture(scope="module")
def jpeg(all_four, lossless):
    """The same 846 images as JPEG."""
    images = load_images("cifar10_jpeg", "test", root=DATA).select(lossless.images.indices)
    assert torch.equal(images.labels, lossless.images.labels)
    return evaluate(all_four, images, batch_size=64)


def wrong(scores):
    return {name: found.n - found.correct for name, found in scores.items()}


@needs_data
def test_the_networks_make_as_many_errors_as_were_counted_before(lossless, jpeg):
    """Counted when the images were collected, by other code."""
    assert wrong(lossless.members) == {
        "resnet20": 70,
        "resnet32": 59,
        "resnet44": 53,
        "resnet56": 57,
    }
    assert wrong(jpeg.members) == {
        "resnet20": 162,
        "resnet32": 132,
        "resnet44": 146,
        "resnet56": 143,
    }


@needs_data
def test_published_errors_are_within_the_intervals_of_the_lossless_images(lossless):
    for name, found in lossless.members.items():
        low, high = clopper_pearson(found.n - found.correct, found.n)
        assert 100 * low <= PRETRAINED[name].test_error <= 100 * high, name


@needs_data
def test_published_errors_are_far_below_the_intervals_of_the_jpeg_images(jpeg):
    for name, found in jpeg.members.items():
        low, _ = clopper_pearson(found.n - found.correct, found.n)
        assert 100 * low > PRETRAINED[name].test_error + 4, name


@needs_data
@pytest.mark.parametrize("images", ["lossless", "jpeg"])
def test_every_reduction_is_better_than_every_member(images, request):
    found = request.getfixturevalue(images)
    assert max(wrong(found.reductions).values()) < min(wrong(found.members).values())
    # A mean of distributions is no less likely than its members on average (facts of convexity).
    mean = sum(scores.nll for scores in found.members.values()) / len(found.members)
    assert found.reductions["arithmetic"].nll <= mean
    assert found.reductions["geometric"].nll <= mean


@needs_data
def test_the_shift_costs_the_ensemble_less_than_its_members(lossless, jpeg):
    """Measured: 8 points for the arithmetic mean, 8.6 to 11 for the members."""
    losses = {name: wrong(jpeg.members)[name] - n for name, n in wrong(lossless.members).items()}
    ensemble = wrong(jpeg.reductions)["arithmetic"] - wrong(lossless.reductions)["arithmetic"]
    assert ensemble < min(losses.values())


@needs_data
def test_the_normalisation_of_the_set_would_give_other_errors(lossless):
    """The networks were trained with ImageNet's figures, which they bring along."""
    network = load_pretrained("resnet20", DATA / "pretrained")
    given = load_images("cifar10_lossless", "test", root=DATA)
    images = given.select(slice(0, 200))
    network.normalisation = (given.mean, (0.5,) * 3)
    other = evaluate(network, images).members["resnet20"]
    same = lossless.members["resnet20"].predictions[:200]
    assert not torch.equal(other.predictions, same)


@needs_data
def test_loaded_networks_are_in_evaluation_mode_and_named():
    network = load_pretrained(["resnet32", "resnet20"], DATA / "pretrained")
    assert network.member_names == ("resnet32", "resnet20")
    assert not any(module.training for module in network.modules())
    x = torch.randn(2, 3, 32, 32)
    assert list(network(x, ["resnet20"])) == ["resnet20"]
    assert torch.equal(network(x)["resnet20"], network.networks["resnet20"](x))
    with pytest.raises(ValueError, match=r"members must be some of .*, got \['resnet56'\]"):
        network(x, ["resnet56"])


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)]
)
def test_the_networks_have_the_published_number_of_parameters(depth, parameters):
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == parameters


@pytest.mark.parametrize("depth", [7, 18, 2, 21])
def test_there_is_no_network_of_another_depth(depth):
    with pytest.raises(ValueError, match=f"depth must be 6n \\+ 2 .*, got {depth}"):
        CifarResNet(depth)


def test_networks_of_cifar10_are_refused_digits_and_take_every_set_of_their_classes():
    network = PretrainedNetwork({"a": CifarResNet(8)})
    digits = load_images("digits", "test")
    told = "classifies airplane, automobile, bird and 7 more, and digits is of 0, 1, 2 and 7 more: "
    with pytest.raises(ValueError, match=told):
        evaluate(network, digits)
    assert evaluate(network, replace(digits, classes=CLASSES)).members["a"].n == 797
    assert {CLASS_NAMES[name] for name in SETS if name != "digits"} == {CLASSES}


def test_the_shortcut_without_parameters_is_that_of_option_a():
    """Every second pixel, between zero channels: with the main path at zero it is all there is."""
    block = CifarResNet(8).layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 4, 4)
    y = block(x)
    assert y.shape == (1, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_weights_of_another_content_are_refused(tmp_path):
    (tmp_path / "resnet20-12fca82f.th").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"resnet20-12fca82f\.th is not the published file") as e:
        load_pretrained("resnet20", tmp_path)
    assert PRETRAINED["resnet20"].sha256 in str(e.value)
    assert "(7 bytes were read)" in str(e.value)


def test_missing_weights_say_where_they_are_published(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resnet20-12fca82f\.th\. They are published as h"):
        load_pretrained("resnet20", tmp_path)


def test_unknown_and_repeated_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no pretrained 'resnet18'; there are resnet20,"):
        load_pretrained("resnet18", tmp_path)
    with pytest.raises(ValueError, match="resnet20 is there 2 times: one network is no ensemble"):
        load_pretrained(["resnet20", "resnet20"], tmp_path)
    with pytest.raises(ValueError, match="at least 1 member"):
        PretrainedNetwork({})


def test_files_are_named_by_the_beginning_of_their_digest():
    for name, weights in PRETRAINED.items():
        assert weights.file == f"{name}-{weights.sha256[:8]}.th"
        assert replace(weights, depth=int(name.removeprefix("resnet"))) == weights
