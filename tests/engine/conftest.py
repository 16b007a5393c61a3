import functools

import pytest
from make_checkpoint import make_checkpoint
from thread_cluster import GROUPS, LAYOUTS, Cluster


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, size="nano", seed=3)
    return folder


@pytest.fixture(params=[*LAYOUTS, *GROUPS])
def cluster(request, checkpoint):
    if request.param in LAYOUTS:
        running = Cluster(checkpoint, LAYOUTS[request.param])
    else:
        running = Cluster(checkpoint, LAYOUTS["disaggregated"], transport=request.param)
    yield running
    running.close()


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """dense(model_type) → a checkpoint of a dense architecture; Qwen2's head is its embedding."""

    @functools.cache
    def make(model_type):
        options = {"max_position_embeddings": 2048, "tie_word_embeddings": model_type == "qwen2"}
        return make_checkpoint(tmp_path_factory.mktemp(model_type), seed=3, model_type=model_type, **options)

    return make
