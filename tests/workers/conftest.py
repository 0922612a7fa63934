"""One thread and no leaked settings: bits may depend on the number of threads, and the loop sets global modes."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
