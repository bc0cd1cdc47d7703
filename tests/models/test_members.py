"""Ensembles are independent; N streams are one network, with all that follows from it."""

import copy
import re

import pytest
import torch
from torch import nn

from ensembles.models.members import Ensemble, NStreams


def network():
    # A bias before BatchNorm would have no gradient but roundings.
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 4, generator=generator)
    return images, torch.randint(0, 3, (16,), generator=generator)


class TestEnsemble:
    def test_outputs_are_those_of_the_members_in_their_order(self):
        torch.manual_seed(0)
        members = [network().eval() for _ in range(3)]
        images, _ = batch(1)
        outputs = Ensemble(members)(images)
        assert len(outputs) == 3
        for member, output in zip(members, outputs, strict=True):
            assert torch.equal(output, member(images))
        assert not torch.equal(outputs[0], outputs[1])

    def test_all_inputs_are_given_to_every_member(self):
        torch.manual_seed(0)
        left, right = torch.randn(5, 2), torch.randn(5, 3)
        ensemble = Ensemble.of(lambda: nn.Bilinear(2, 3, 4), 2)
        for member, output in zip(ensemble.members, ensemble(left, right), strict=True):
            assert torch.equal(output, member(left, right))

    def test_members_may_come_from_a_generator_or_a_module_list(self):
        assert len(Ensemble(network() for _ in range(2)).members) == 2
        assert len(Ensemble(nn.ModuleList([network(), network()])).members) == 2

    def test_the_factory_is_called_once_for_every_member(self):
        torch.manual_seed(0)
        made = []

        def factory():
            made.append(network())
            return made[-1]

        ensemble = Ensemble.of(factory, 3)
        assert len(made) == 3
        assert all(mine is other for mine, other in zip(ensemble.members, made, strict=True))
        storages = {parameter.data_ptr() for parameter in ensemble.parameters()}
        assert len(storages) == 3 * len(list(made[0].parameters()))

    def test_a_step_on_one_member_leaves_the_others_as_they_were(self):
        torch.manual_seed(0)
        ensemble = Ensemble.of(network, 3)
        before = [copy.deepcopy(member.state_dict()) for member in ensemble.members]
        images, labels = batch(1)
        optimizer = torch.optim.SGD(ensemble.members[1].parameters(), lr=0.1)
        nn.functional.cross_entropy(ensemble.members[1](images), labels).backward()
        optimizer.step()
        unchanged = [
            [torch.equal(tensor, old[name]) for name, tensor in member.state_dict().items()]
            for member, old in zip(ensemble.members, before, strict=True)
        ]
        assert unchanged == [[True] * 8, [False] * 8, [True] * 8]

    def test_one_module_in_two_places_is_refused(self):
        one, two = network(), network()
        message = (
            "members 0, 2 are one module: build each member anew, or use NStreams(network, 2) "
            "where one network is to be run 2 times"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Ensemble([one, two, one])

    def test_a_factory_that_returns_one_module_is_refused(self):
        one = network()
        with pytest.raises(
            ValueError,
            match=r"^members 0, 1, 2 are one module: build each member anew, or use NStr",
        ):
            Ensemble.of(lambda: one, 3)

    def test_an_ensemble_without_members_is_refused(self):
        message = "^an ensemble has at least 1 member, got none$"
        with pytest.raises(ValueError, match=message):
            Ensemble([])
        with pytest.raises(ValueError, match=message):
            Ensemble.of(network, 0)

    def test_what_is_not_a_module_is_refused(self):
        with pytest.raises(TypeError, match=r"^member 1 is not a torch\.nn\.Module: function$"):
            Ensemble([network(), batch])

    def test_the_layers_of_one_network_are_not_taken_for_members(self):
        with pytest.raises(
            TypeError, match=r"^members must be a list of modules, got one Sequential$"
        ):
            Ensemble(network())


def trained(model, reduce, steps=5):
    """Trains on the reduced losses of the outputs; returns the gradients of the first step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    first = None
    for step in range(steps):
        images, labels = batch(step)
        outputs = model(images)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        losses = [nn.functional.cross_entropy(output, labels) for output in outputs]
        optimizer.zero_grad()
        reduce(torch.stack(losses)).backward()
        if first is None:
            first = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
    return first


def twins(count):
    torch.manual_seed(6)
    single = network()
    return single, NStreams(copy.deepcopy(single), count)


def running(network_):
    norm = network_[1]
    return norm.running_mean, norm.running_var


class TestNStreams:
    def test_every_stream_is_the_network_itself(self):
        single, streams = twins(3)
        images, _ = batch(1)
        outputs = streams.eval()(images)
        assert len(outputs) == 3
        assert all(torch.equal(output, single.eval()(images)) for output in outputs)

    def test_parameters_are_listed_once(self):
        single, streams = twins(4)
        names = [f"network.{name}" for name, _ in single.named_parameters()]
        assert [name for name, _ in streams.named_parameters()] == names

    @pytest.mark.parametrize("count", [2, 3, 4, 5])
    def test_the_summed_loss_has_n_times_the_gradient_bit_by_bit(self, count):
        single, streams = twins(count)
        expected = trained(single, torch.sum, steps=1)
        gradients = trained(streams, torch.sum, steps=1)
        for mine, gradient in zip(gradients, expected, strict=True):
            # Up to 5 the roundings of g + g + ... end at the rounding of N g; at 8 they do not.
            assert gradient.count_nonzero() > 0
            assert torch.equal(mine, count * gradient)

    @pytest.mark.parametrize("count", [2, 3, 5, 8])
    def test_the_mean_loss_has_the_gradient_of_one_stream(self, count):
        single, streams = twins(count)
        expected = trained(single, torch.mean, steps=1)
        gradients = trained(streams, torch.mean, steps=1)
        for mine, gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, gradient, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("count", [2, 4])
    def test_the_mean_loss_trains_the_weights_of_the_single_network_bit_by_bit(self, count):
        single, streams = twins(count)
        trained(single, torch.mean)
        trained(streams, torch.mean)
        for mine, parameter in zip(streams.parameters(), single.parameters(), strict=True):
            assert torch.equal(mine, parameter)

    @pytest.mark.parametrize("count", [2, 4])
    def test_evaluation_differs_even_where_the_weights_are_the_same(self, count):
        single, streams = twins(count)
        trained(single, torch.mean)
        trained(streams, torch.mean)
        images, _ = batch(99)
        output = streams.eval()(images)[0]
        assert (output - single.eval()(images)).abs().max() > 1e-3

    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    @pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
    def test_batches_are_counted_n_times_a_step_whatever_the_loss(self, count, reduce):
        single, streams = twins(count)
        trained(single, reduce, steps=5)
        trained(streams, reduce, steps=5)
        assert single[1].num_batches_tracked == 5
        assert streams.network[1].num_batches_tracked == 5 * count

    def test_four_updates_of_momentum_one_tenth_are_one_of_0_3439(self):
        single, streams = twins(4)
        single[1].momentum = 1 - 0.9**4
        assert single[1].momentum == pytest.approx(0.3439)
        images, _ = batch(1)
        single(images)
        streams(images)
        for mine, expected in zip(running(streams.network), running(single), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("count", [2, 4])
    def test_the_smaller_momentum_repairs_the_statistics(self, count):
        single, streams = twins(count)
        streams.network[1].momentum = 1 - 0.9 ** (1 / count)
        trained(single, torch.mean)
        trained(streams, torch.mean)
        for mine, expected in zip(running(streams.network), running(single), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)

    def test_it_shows_the_number_of_streams(self):
        assert repr(NStreams(nn.ReLU(), 3)) == "NStreams(\n  streams=3\n  (network): ReLU()\n)"

    def test_less_than_one_stream_is_refused(self):
        with pytest.raises(ValueError, match=r"^streams must be at least 1, got 0$"):
            NStreams(network(), 0)
