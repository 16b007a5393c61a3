"""The dispatcher of a device: what it hands to the mixture, and that padding goes nowhere."""

import pytest
import torch

from r1_cluster.comm.device_dispatch import DeviceDispatcher
from r1_cluster.comm.dispatch import StepTag

TAG = StepTag(1, 2, 3, 0)


class Mixture:
    """Twice x, and a note of what was asked."""

    def __call__(self, layer, x_TD, weights_TK, expert_ids_TK, num_tokens=None):
        self.layer, self.num_tokens = layer, num_tokens
        self.shapes = (x_TD.shape[0], weights_TK.shape[0], expert_ids_TK.shape[0])
        return 2 * x_TD


def run(dispatcher, num_tokens):
    x = torch.randn(8, 4)
    dispatcher.dispatch(TAG, x, torch.ones(8, 2), torch.zeros(8, 2, dtype=torch.int32), num_tokens)
    return x, dispatcher.combine()


def test_all_rows_go_as_they_are():
    mixture = Mixture()
    x, y = run(DeviceDispatcher(mixture, "cpu"), 8)
    assert torch.equal(y, 2 * x)
    assert (mixture.layer, mixture.num_tokens, mixture.shapes) == (3, None, (8, 8, 8))


def test_padding_goes_nowhere_and_is_zero():
    mixture = Mixture()
    x, y = run(DeviceDispatcher(mixture, "cpu"), 5)
    assert mixture.shapes == (5, 5, 5)
    assert torch.equal(y[:5], 2 * x[:5])
    assert (y[5:] == 0).all()


def test_a_graph_reads_the_number_of_rows_from_the_device():
    mixture = Mixture()
    dispatcher = DeviceDispatcher(mixture, "cpu")
    dispatcher.num_real = torch.tensor([5], dtype=torch.int32)
    run(dispatcher, 5)
    assert mixture.num_tokens is dispatcher.num_real
    assert mixture.shapes == (8, 8, 8)


def test_a_combine_follows_a_dispatch():
    dispatcher = DeviceDispatcher(Mixture(), "cpu")
    with pytest.raises(RuntimeError, match="without a dispatch"):
        dispatcher.combine()
    run(dispatcher, 8)
    with pytest.raises(RuntimeError, match="without a dispatch"):
        dispatcher.combine()
