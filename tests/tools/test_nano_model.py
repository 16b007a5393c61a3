"""The network: cached generation, routing, export and the agreement with transformers."""

import json

import pytest
import torch
from nano_r1.export import config_json, load_model, save_model
from nano_r1.generate import draft_acceptance, generate, sample
from nano_r1.model import KVCache, MoE, NanoConfig, NanoR1, causal_mask
from nano_r1.muon import Muon, orthogonalize
from nano_r1.tokenizer import EOS_ID
from safetensors.torch import load_file

SMALL = NanoConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, q_lora_rank=16
)


@pytest.fixture
def model() -> NanoR1:
    torch.manual_seed(0)
    model = NanoR1(SMALL)
    for block in model.moe_layers():
        block.bias.normal_(0, 0.1)
    return model.eval()


@pytest.fixture
def exported(model: NanoR1, tmp_path):
    save_model(model, tmp_path)
    return tmp_path


def logits_of(model: NanoR1, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.head(model.trunk(ids, model.positions(causal_mask(ids.shape[1]))))


def test_export_uses_r1s_names_and_types(exported) -> None:
    tensors = load_file(exported / "model.safetensors")
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (48, 32)
    assert tensors["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (32, 16)
    assert tensors["model.layers.4.eh_proj.weight"].shape == (32, 64)
    assert torch.equal(tensors["model.layers.4.shared_head.head.weight"], tensors["lm_head.weight"])
    assert torch.equal(tensors["model.layers.4.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    for name, tensor in tensors.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16), name
    config = json.loads((exported / "config.json").read_text())
    assert config == config_json(SMALL)
    assert config["num_nextn_predict_layers"] == 1


def test_export_round_trips(model: NanoR1, exported) -> None:
    loaded = load_model(exported)
    for (name, ours), (_, read) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        expected = ours if name.endswith("bias") else ours.bfloat16().float()
        assert torch.equal(expected, read), name


@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_the_same_logits(exported) -> None:
    from transformers import DeepseekV3ForCausalLM

    reference = DeepseekV3ForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ids = torch.randint(0, SMALL.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        difference = (reference(ids).logits - logits_of(load_model(exported), ids)).abs().max()
    assert difference <= 1e-4


def test_cached_steps_equal_one_pass(model: NanoR1) -> None:
    ids = torch.randint(0, SMALL.vocab_size, (1, 12), generator=torch.Generator().manual_seed(2))
    cache, parts = KVCache(), []
    with torch.inference_mode():
        for start, end in ((0, 7), (7, 8), (8, 12)):
            mask = causal_mask(end)[:, :, start:]
            parts.append(model.head(model.trunk(ids[:, start:end], model.positions(mask, start, cache))))
    torch.testing.assert_close(torch.cat(parts, 1), logits_of(model, ids), rtol=1e-5, atol=1e-5)


def test_padding_a_batch_changes_no_greedy_output(model: NanoR1) -> None:
    prompts = [[5, 6, 7], [9] * 8, [11, 4]]
    together = generate(model, prompts, max_tokens=9)
    assert together == [generate(model, [prompt], max_tokens=9)[0] for prompt in prompts]
    assert all(len(output) == 9 or output[-1] == EOS_ID for output in together)


def test_sampling_keeps_to_the_nucleus() -> None:
    logits = torch.tensor([[0.50, 0.30, 0.15, 0.05]]).log().expand(2000, 4)
    tokens = sample(logits, 1.0, 0.75, torch.Generator().manual_seed(0))
    counts = torch.bincount(tokens, minlength=4)
    assert counts[2:].sum() == 0
    assert abs(counts[0] / 2000 - 0.625) < 0.04
    assert sample(logits, 0.0, 1.0, torch.Generator()).unique().tolist() == [0]


def test_router_keeps_to_the_best_groups() -> None:
    torch.manual_seed(0)
    block = MoE(SMALL)
    block.bias.copy_(torch.tensor([0.0, 0, 5, 5, 0, 0, 4, 4]))  # groups 1 and 3 win, within them the weight
    weights, experts = block.route(torch.randn(40, 32))
    assert set(experts.flatten().tolist()) <= {2, 3, 6, 7}
    torch.testing.assert_close(weights.sum(-1), torch.full((40,), SMALL.routed_scaling_factor))


def test_moe_equals_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    block = MoE(SMALL)
    x = torch.randn(3, 5, 32)
    weights, experts = block.route(x.view(-1, 32))
    expected = block.shared(x).view(-1, 32).clone()
    for token, (row, chosen) in enumerate(zip(weights, experts, strict=True)):
        for weight, e in zip(row, chosen, strict=True):
            v = x.view(-1, 32)[token]
            hidden = torch.nn.functional.silu(block.gate_EFD[e] @ v) * (block.up_EFD[e] @ v)
            expected[token] += weight * (block.down_EDF[e] @ hidden)
    torch.testing.assert_close(block(x).view(-1, 32), expected, rtol=1e-4, atol=1e-5)
    assert block.load.sum() == 15 * SMALL.num_experts_per_tok


def test_draft_acceptance_counts_the_mtp_heads_own_choices(model: NanoR1) -> None:
    """A trunk that repeats one token, and an MTP head shared with it, give full acceptance; another token none."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1.0
        for norm in (model.norm, model.mtp.norm):
            norm.weight.zero_()
    assert draft_acceptance(model, [3, 4], [0] * 6) == (5, 5)  # all logits 0: the best token is the first
    assert draft_acceptance(model, [3, 4], [9] * 6) == (0, 5)


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((8, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_muon_learns_a_linear_map() -> None:
    torch.manual_seed(0)
    target, x = torch.randn(6, 4), torch.randn(64, 4)
    weight = torch.zeros(6, 4, requires_grad=True)
    optimizer = Muon([weight], lr=0.1)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        loss = ((x @ (weight - target).T) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-2
