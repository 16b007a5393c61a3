"""Models whose attention keeps FP8: transformers with the same numbers rounded, how far the rounding carries, and
the same bits however a prompt is cut and whatever is beside it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from network_checks import DIVISIONS, RELAXED, check_bits, decoded
from small_model import LLAMA3, YARN, SmallModel, config_values, dense_values, write_checkpoint

from kernels import cpu_cache, reference
from kernels.cpu_cache import quantize_rows, read_slots, write_slots
from kernels.ops import Fp8Cache

FP8 = torch.float8_e4m3fn
HALF_STEP = 2**-4  # of a number with 3 bits behind its first; what is left of it below FP8's normals is 2^-10
# All tokens go to all experts: a choice that tips over would hide all else.
ALL = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
MODELS = {
    "mla": config_values(**ALL, rope_scaling=YARN),
    "llama": dense_values(rope_scaling=LLAMA3),
    "qwen2": dense_values("Qwen2ForCausalLM"),
    "qwen3": dense_values("Qwen3ForCausalLM"),
}


def rounded(x):
    q, scale = quantize_rows(x, FP8)
    return (q.double() * scale.double()[..., None]).to(x.dtype)


def oracle(folder, monkeypatch=None, rounded=rounded):
    """transformers' model in float64; with `monkeypatch`, what it would cache is rounded, as ours is."""
    import transformers
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = transformers.AutoConfig.from_pretrained(folder)
    options = {"attn_implementation": "eager", "dtype": torch.float64}
    if config.model_type == "deepseek_v3":
        options["experts_implementation"] = "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    if monkeypatch is None:
        return lambda tokens: model(tokens, use_cache=False).logits[0]
    if config.model_type != "deepseek_v3":

        class Rounding(transformers.DynamicCache):
            def update(self, keys, values, *rest, **more):
                return super().update(rounded(keys), rounded(values), *rest, **more)

        return lambda tokens: model(tokens, past_key_values=Rounding()).logits[0]
    for layer in model.model.layers:
        layer.self_attn.kv_a_layernorm.register_forward_hook(lambda module, given, out: rounded(out))
    for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"):
        rotate = getattr(deepseek, name)

        def rotate_and_round(q, k, *rest, rotate=rotate, **more):
            q, k = rotate(q, k, *rest, **more)
            return q, rounded(k)

        monkeypatch.setattr(deepseek, name, rotate_and_round)
    return lambda tokens: model(tokens, use_cache=False).logits[0]


def both(folder, truth, **options):
    """(our logits over an FP8 cache, the oracle's at the same places), prompts in chunks and then decoded."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 96, length) for length in (110, 3, 37)]
    answers = rng.integers(0, 96, (len(prompts), 6))
    model = SmallModel(folder, fp8_cache=True, **options)
    got = decoded(model, prompts, answers, [50])
    expected = []
    for rows, prompt, answer in zip(got, prompts, answers):
        ends = [50, len(prompt)] if len(prompt) > 50 else [len(prompt)]
        places = torch.tensor([*ends, *(len(prompt) + 1 + i for i in range(len(answer)))]) - 1
        with torch.no_grad():
            logits = truth(torch.from_numpy(np.concatenate((prompt, answer)))[None])
        expected.append(logits[places])
        assert len(rows) == len(places)
    return torch.cat(got).double(), torch.cat(expected)


def relative(got, expected):
    return (got - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_with_its_cache_rounded(monkeypatch, tmp_path, name, deterministic):
    """A number within float32's rounding of the edge between two of FP8 may fall to the other side, which moves
    it by 2^-4, and its sequence after it: seldom, and by a few per cent."""
    write_checkpoint(tmp_path, MODELS[name])
    errors = relative(*both(tmp_path, oracle(tmp_path, monkeypatch), deterministic=deterministic))
    assert errors.median() < 1e-4, errors
    assert errors.max() < 0.1, errors


@pytest.mark.parametrize("name", ["mla", "qwen2", "qwen3"])
def test_logits_are_off_by_as_much_more_than_a_bfloat16_caches_as_fp8_has_fewer_bits(
    monkeypatch, tmp_path, name
):
    """Against a cache that is not rounded, in float64. How far an error carries is the model's own: far in these
    random ones, whose attention is sharp (3 to 7 % of the logits, at worst 34 %). But it is no more than 2^4 times what
    a cache in BF16 makes there, as E4M3's half step, 2^-4, is 2^4 times BF16's. (Some 2^3.5: a row's largest number,
    which is its scale, is hardly off.)"""
    write_checkpoint(tmp_path, MODELS[name])
    exact, asked = oracle(tmp_path), []

    def watched(tokens):
        asked.append((tokens, exact(tokens)))
        return asked[-1][1]

    errors = relative(*both(tmp_path, watched, deterministic=True))
    coarse = oracle(tmp_path, monkeypatch, lambda x: x.to(torch.bfloat16).to(x.dtype))
    with torch.no_grad():
        smaller = torch.cat([relative(coarse(tokens), logits) for tokens, logits in asked])
    assert 2**2.5 < errors.median() / smaller[smaller > 0].median() < 2**4
    assert errors.max() < 0.5, errors


@pytest.mark.parametrize("latent", [True, False])
def test_attention_is_off_by_no_more_than_its_numbers_explain(latent):
    """A number of a key is off by 2^-4 of itself at most, or by 2^-10 of its scale; hence a score by d, a probability
    by a factor of e^2d, and the result by that and by what the values are off. Of latents keys are values too."""
    generator = torch.Generator().manual_seed(5)
    q, key, value = (torch.randn(n, 4, 96, generator=generator).double() for n in (20, 60, 60))
    key, value = key * torch.rand(60, 4, 1, generator=generator), value.exp()
    parts = key.split([64, 32], -1) if latent else (key,)
    q /= 10 * q.norm(dim=-1, keepdim=True) * HALF_STEP
    off = torch.cat([x.abs() * HALF_STEP + x.abs().amax(-1, keepdim=True) * 2**-10 / 448 for x in parts], -1)
    key_fp8 = torch.cat([rounded(part) for part in parts], -1)
    if latent:
        value, value_fp8, off_value = key[..., :64], key_fp8[..., :64], off[..., :64]
    else:
        value_fp8 = rounded(value)
        off_value = value.abs() * HALF_STEP + value.abs().amax(-1, keepdim=True) * 2**-10 / 448
    assert ((key_fp8 - key).abs() <= off * (1 + 1e-6)).all()
    exact = reference.causal_attention(q, key, value, 1.0)
    error = (reference.causal_attention(q, key_fp8, value_fp8, 1.0) - exact).abs()
    grown = torch.einsum("qhd,khd->qhk", q.abs(), off).amax(-1).mul(2).exp()[..., None]
    size, off_size = (reference.causal_attention(q, key, x, 1.0) for x in (value.abs(), off_value))
    assert (error <= (grown - 1) * size + grown * off_size * (1 + 1e-6)).all()
    assert error.max() > 2**-9 * size.max()


@pytest.mark.slow
@settings(max_examples=6, **RELAXED)
@given(values=st.sampled_from(list(MODELS.values())), **DIVISIONS)
def test_bits_depend_neither_on_chunks_nor_on_neighbours(**layout):
    check_bits(**layout, fp8_cache=True)


@pytest.mark.parametrize("name", ["mla", "qwen2"])
def test_a_step_can_be_done_again_and_leaves_the_same_cache(tmp_path, name):
    write_checkpoint(tmp_path, MODELS[name])
    tokens = np.random.default_rng(1).integers(0, 96, 70)
    model, other = (SmallModel(tmp_path, deterministic=True, fp8_cache=True) for _ in range(2))
    model.step([(0, tokens[:50])])
    first = model.step([(0, tokens[50:])])
    model.cached[0] = 50
    assert torch.equal(model.step([(0, tokens[50:])]), first)
    other.step([(1, tokens[:9]), (0, tokens[:3])])
    other.step([(0, tokens[3:])])
    held = model.pages[0][:4]  # 64 of the 70 tokens fill whole pages
    for mine, theirs in zip(model.caches[0], other.caches[0], strict=True):
        assert isinstance(mine, Fp8Cache)
        assert torch.equal(mine.values[held].view(torch.uint8), theirs.values[held].view(torch.uint8))
        assert torch.equal(mine.scale[held], theirs.scale[held])
        assert mine.scale[held].min() > 0


@pytest.mark.parametrize("name", ["mla", "qwen2"])
def test_a_poisoned_neighbour_harms_nobody(tmp_path, name):
    write_checkpoint(tmp_path, MODELS[name])
    tokens = np.random.default_rng(1).integers(0, 96, 20)
    clean, poisoned = (SmallModel(tmp_path, deterministic=True, fp8_cache=True) for _ in range(2))
    poisoned.step([(1, tokens)])
    poisoned.poison(poisoned.pages[1])
    expected = clean.step([(0, tokens)])[0]
    got = poisoned.step([(0, tokens), (1, [5])])
    assert torch.equal(got[0], expected)
    assert got[1].isnan().all()


@pytest.mark.parametrize("name", ["mla", "qwen2"])
def test_it_asks_nothing_of_the_host_on_other_devices(tmp_path, name):
    write_checkpoint(tmp_path, MODELS[name])
    model = SmallModel(tmp_path, deterministic=True, fp8_cache=True, device=torch.device("meta"))
    model.moe = lambda layer, x_TD, num_tokens: torch.zeros_like(x_TD)
    for chunks in ([(0, np.arange(40)), (1, np.arange(3))], [(0, [1]), (1, [2])]):
        assert model.step(chunks).shape == (2, 96)


def test_rows_that_are_hard_to_scale():
    """Zeros, denormals, the largest float32, one giant among dwarfs, infinity and NaN."""
    tiny = torch.finfo(torch.float32).tiny
    rows = torch.tensor(
        [[0.0, 0.0], [tiny / 4, 0.0], [3e38, -3e38], [1e30, 1.0], [torch.inf, 1.0], [torch.nan, 1.0]]
    )
    cache = Fp8Cache(torch.zeros(2, 4, 2, dtype=FP8), torch.full((2, 4, 1), torch.nan))
    slots = torch.tensor([7, 0, 3, 2, 5, 1])
    write_slots(cache, slots, rows, (2,))
    read = read_slots(cache, slots, (2,))
    assert torch.equal(read[0], rows[0])
    assert torch.equal(read[1], torch.zeros(2))  # nothing that a float32 sum would see
    torch.testing.assert_close(read[2], rows[2], rtol=2**-20, atol=0)
    torch.testing.assert_close(read[3, :1], rows[3, :1], rtol=2**-20, atol=0)
    assert read[3, 1] == 0
    assert read[4].isnan().any()
    assert read[5].isnan().any()
    assert read_slots(cache, torch.tensor([6]), (2,)).isnan().all()  # a slot that nobody wrote


def test_parts_of_a_row_are_scaled_apart():
    rows = torch.cat((torch.linspace(-1, 1, 8), 1000 * torch.linspace(-1, 1, 4)))[None]
    cache = Fp8Cache(torch.zeros(1, 2, 12, dtype=FP8), torch.zeros(1, 2, 2))
    write_slots(cache, torch.tensor([1]), rows, (8, 4))
    assert torch.equal(cache.scale[0, 1], torch.tensor([1.0, 1000.0]) / 448)
    error = (read_slots(cache, torch.tensor([1]), (8, 4)) - rows).abs()
    assert (error <= HALF_STEP * rows.abs() + 1e-6).all()
    assert cpu_cache.entry_of(cache) == (12,)
