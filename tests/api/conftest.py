import pytest
from make_checkpoint import make_checkpoint

from r1_cluster.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("nano"), num_hidden_layers=1, n_routed_experts=8)


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return Tokenizer.from_folder(checkpoint)
