"""What the tests of the models share."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Runs on one thread: these networks are so small that threads mostly wait for each other.

    On two cores that others use as well, two threads took 15 times as long.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
