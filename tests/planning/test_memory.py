import pytest
from small_model import config_values

from r1_cluster.models.config import ModelConfig
from r1_cluster.planning.memory import OutOfDeviceMemory, check_room, stage_bytes

CONFIG = ModelConfig.from_dict(config_values())
LIMITS = {"page_size": 16, "max_num_seqs": 8, "max_batch_tokens": 64, "max_context_len": 512}


def test_pages_are_what_the_caches_take():
    parts = stage_bytes(CONFIG, 3, num_pages=10, num_links=1, **LIMITS)
    assert parts["pages"] == 3 * 10 * 16 * (16 + 8) * 2
    assert all(size > 0 for size in parts.values())


def test_more_of_anything_needs_more():
    base = sum(stage_bytes(CONFIG, 3, num_pages=10, **LIMITS).values())
    more = {"max_num_seqs": 500, "max_batch_tokens": 5000, "max_context_len": 50000, "num_links": 2}
    for key, value in more.items():
        assert sum(stage_bytes(CONFIG, 3, num_pages=10, **LIMITS | {key: value}).values()) > base


def test_what_does_not_fit_is_said_with_numbers():
    parts = {"pages": 3 << 30, "logits": 1 << 29}
    check_room(parts, 7 << 29)
    with pytest.raises(OutOfDeviceMemory, match=r"has 3\.00 GiB .* 3\.50 GiB .*pages 3\.00, logits 0\.50"):
        check_room(parts, 3 << 30)
