"""Random checkpoints of any architecture and size, and a model over them without engine, actors or links."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from r1_cluster.models.batch import AttentionBatch
from r1_cluster.models.family import load_config, mtp_table, parse_config, tensor_table
from r1_cluster.models.loader import Loader, Shard
from r1_cluster.models.moe import ExpertModel, RouterModel
from r1_cluster.models.network import StageModel
from r1_cluster.records import SampleSpec, SamplingParams, StepPlan, pack_int32
from r1_cluster.weights import blocks
from r1_cluster.weights.checkpoint import Checkpoint
from r1_cluster.weights.quantize import quantize_checkpoint

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0)
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


# The smallest shapes that the kernels take.
KERNEL_SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 24,
}
# The smallest whose FP8 products divide into groups of 128.
FP8_SHAPE = KERNEL_SHAPE | {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "v_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


# The same of dense models.
DENSE_KERNEL_SHAPE = {"num_hidden_layers": 2, "head_dim": 16}
DENSE_FP8_SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def config_values(**changes):
    """A small model's config.json, in the published form."""
    values = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    return values | changes


def dense_values(architecture="LlamaForCausalLM", **changes):
    """A small dense model's config.json, in the published form; Qwen3's heads are wider than its hidden size."""
    values = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_act": "silu",
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    own = {"head_dim": 16, "attention_bias": False} if architecture == "Qwen3ForCausalLM" else {}
    return values | own | changes


FAMILY = {
    "deepseek": config_values(),
    "llama": dense_values("LlamaForCausalLM"),
    "qwen2": dense_values("Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen3": dense_values("Qwen3ForCausalLM"),
}


def fit_for(stored, model):
    """The values of one of the family for a checkpoint that is `stored` so."""
    fp8 = FP8_SHAPE if model == "deepseek" else DENSE_FP8_SHAPE
    return FAMILY[model] | (fp8 if stored == "fp8" else {})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def random_tensors(config, seed):
    """Every tensor of the model, scaled so that activations, gates and attention are far from trivial."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape, *_ in tensor_table(config):
        tensor = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor = 1 + 0.2 * tensor
        elif name.endswith("e_score_correction_bias"):
            tensor *= 0.1
        elif len(shape) == 1:
            tensor *= 0.5
        elif name != "model.embed_tokens.weight":
            tensor *= 1.5 / shape[1] ** 0.5
        found[name] = tensor
    return found


def write_checkpoint(folder, values, seed=0):
    """A checkpoint of one file with random weights → its config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = parse_config(values)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(random_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return config


def to_fp8(folder):
    """Rewrites a checkpoint's matrices but for gate, embedding and head in FP8 with block scales."""
    tensors = load_file(Path(folder) / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if "proj" in name and tensor.dim() == 2:
            tensors[name], tensors[name + "_scale_inv"] = blocks.quantize(tensor)
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def quantize(folder, target, how):
    """INT8 or INT4 of a checkpoint, in `target`; each tensor's error."""
    config = load_config(folder)
    table, module = tensor_table(config), mtp_table(config)
    return quantize_checkpoint(folder, target, table, how, fp8_block=config.fp8_block, module=module)[1]


def write_stored(folder, values, stored):
    """A checkpoint in "float", in "fp8", which `values` must be fit for, or in integers → its folder."""
    write_checkpoint(folder / "float", values)
    if stored == "fp8":
        to_fp8(folder / "float")
    elif stored != "float":
        quantize(folder / "float", folder / "int", stored)
        return folder / "int"
    return folder / "float"


def to_floats(folder, target):
    """What a checkpoint's weights stand for, in float32: of integers, whose scales are BF16, exactly."""
    config = load_config(folder)
    with Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
        tensors = {
            spec.name: checkpoint.get(spec.name, torch.float32, CPU).clone() for spec in tensor_table(config)
        }
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (target / "config.json").write_text(json.dumps(values))
    return target


class SmallModel:
    """Stages over `bounds` (layer numbers where a new one begins) and expert shards of equal size, in one
    process. Each sequence gets `pages_each` pages, spread over the cache."""

    def __init__(
        self,
        folder,
        *,
        deterministic,
        fp8_cache=False,
        dtype=torch.float32,
        device=CPU,
        bounds=(),
        num_shards=1,
        page_size=16,
        num_seqs=8,
        pages_each=24,
    ):
        self.config = config = load_config(folder)
        with Checkpoint(folder, tensor_table(config), config.fp8_block, config.int_format) as checkpoint:
            loader = Loader(checkpoint, Shard(device, dtype, deterministic, fp8_cache))
            edges = [0, *bounds, config.num_hidden_layers]
            self.stages = [StageModel(config, loader, range(a, b)) for a, b in pairwise(edges)]
            if config.moe is not None:
                self.router = RouterModel(config, loader, config.moe_layers)
                cuts = [round(i * config.moe.n_routed_experts / num_shards) for i in range(num_shards + 1)]
                self.shards = [
                    ExpertModel(config, loader, config.moe_layers, range(a, b)) for a, b in pairwise(cuts)
                ]
        self.page_size = page_size
        self.caches = [stage.new_cache(num_seqs * pages_each, page_size) for stage in self.stages]
        self.poison(slice(None))
        self.pages = np.random.default_rng(0).permutation(num_seqs * pages_each).reshape(num_seqs, -1)
        self.cached = [0] * num_seqs

    def poison(self, pages):
        """Fills pages of all layers with NaN, as what is left of others may be anything."""
        for cache in (cache for caches in self.caches for cache in caches):
            for part in (cache,) if isinstance(cache, torch.Tensor) else (cache.values, cache.scale):
                part[pages] = float("nan")

    def step(self, chunks):
        """`chunks`: (sequence, its next tokens) → float32 logits [len(chunks), V] of each one's last token."""
        batches = self.batches(chunks)
        x = self.stages[0].embed(batches[0].token_ids_T)
        for stage, batch, caches in zip(self.stages, batches, self.caches):
            x = stage.forward(x, batch, caches, self.moe)
        for sequence, tokens in chunks:
            self.cached[sequence] += len(tokens)
        return self.stages[-1].logits(x, batches[-1].sample_rows)

    def batches(self, chunks):
        ends = [self.cached[sequence] + len(tokens) for sequence, tokens in chunks]
        tables = [self.pages[s][: -(-end // self.page_size)] for (s, _), end in zip(chunks, ends)]
        plan = StepPlan(
            epoch=0,
            step=0,
            micro_batch=0,
            seq_ids=[sequence for sequence, _ in chunks],
            num_cached=[self.cached[sequence] for sequence, _ in chunks],
            num_new=[len(tokens) for _, tokens in chunks],
            tokens=pack_int32(np.concatenate([tokens for _, tokens in chunks])),
            num_pages=[len(table) for table in tables],
            pages=pack_int32(np.concatenate(tables)),
            samples=[SampleSpec(i, end, GREEDY) for i, end in enumerate(ends)],
        )
        return [AttentionBatch.from_plan(plan, self.page_size, stage.shard) for stage in self.stages]

    def moe(self, layer, x, num_tokens):
        weights, ids = self.router.gate(layer, x)
        top_k = ids.shape[1]
        flat = ids[:num_tokens].flatten()
        order = flat.argsort(stable=True)
        rows = x.index_select(0, order // top_k)
        counts = flat.bincount(minlength=self.config.moe.n_routed_experts).tolist()
        outs, first = [], 0
        for shard in self.shards:
            own = counts[shard.experts.start : shard.experts.stop]
            outs.append(shard.forward(layer, rows[first : first + sum(own)], own))
            first += sum(own)
        y = torch.empty_like(rows)
        y[order] = torch.cat(outs)
        y = y.view(num_tokens, top_k, -1) * weights[:num_tokens, :, None].to(y.dtype)
        out = self.router.shared(layer, x).clone()
        total = y[:, 0]
        for k in range(1, top_k):
            total = total + y[:, k]
        out[:num_tokens] += total
        return out
