import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small have no work to share, and waiting for a busy second core costs more than all of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
