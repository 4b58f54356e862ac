import pytest
import torch

from tests.ops.backends import DEVICE

# Here, before the test modules are imported: their tables hold tensors, and models are made where the tensors are.
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small have no work to share, and waiting for a busy second core costs more than all of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
