"""The ten published models, and their sizes by arithmetic alone."""

from fractions import Fraction

import pytest

from r1_cluster.models.config import UnsupportedModel
from r1_cluster.models.family import ARCHITECTURES, mtp_table, parse_config, tensor_table
from r1_cluster.models.presets import presets
from r1_cluster.weights.inventory import active_parameters, as_published, by_part, total

DEEPSEEK = ["DeepSeek-R1", "DeepSeek-R1-Zero", "DeepSeek-R1-0528"]
# Of the safetensors metadata that the hub shows for each.
DENSE = {
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
    "DeepSeek-R1-0528-Qwen3-8B": 8_190_735_360,
}


def lines(name, table=tensor_table):
    config = parse_config(presets()[name])
    return config, by_part(as_published(table(config), config.dtype, config.fp8_block))


def test_there_are_ten():
    assert sorted(presets()) == sorted([*DEEPSEEK, *DENSE])


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEPSEEK)
def test_r1(name):
    """As published: 671B, of which 37B active, and an MTP module of 14B (arXiv:2412.19437; the model card);
    the files have 688.6 GB in 91,991 tensors (model.safetensors.index.json)."""
    config, main = lines(name)
    _, module = lines(name, mtp_table)
    whole, mtp = total(main.values()), total(module.values())
    assert round(whole.parameters / 1e9, 1) == 671.0
    assert round(mtp.parameters / 1e9, 1) == 13.5
    at_work = Fraction(config.moe.num_experts_per_tok, config.moe.n_routed_experts)
    assert round(active_parameters(main, at_work) / 1e9, 1) == 36.6
    assert round((whole.num_bytes + mtp.num_bytes) / 1e9, 1) == 688.6
    assert whole.tensors + mtp.tensors == 91_991
    assert [part for part, line in main.items() if "F8_E4M3" in line.dtypes] == [
        "attention",
        "mlp",
        "shared_experts",
        "experts",
    ]


@pytest.mark.parametrize("name", DENSE)
def test_the_distilled_models(name):
    architecture = presets()[name]["architectures"][0]
    if architecture not in ARCHITECTURES:
        with pytest.raises(UnsupportedModel, match=f"{architecture} is not supported"):
            lines(name)
        return
    config, main = lines(name)
    whole = total(main.values())
    assert (whole.parameters, whole.num_bytes) == (DENSE[name], 2 * DENSE[name])
    assert list(whole.dtypes) == ["BF16"]
    assert config.moe is None
