"""A tiny checkpoint as DeepSeek publishes R1: FP8 weights with block scales, BF16 for what is left, float32 for
the gates' biases, an MTP module as one more layer, several files with an index."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_model import config_values

from r1_cluster.models.family import mtp_table, parse_config, tensor_table
from r1_cluster.weights.headers import INDEX
from r1_cluster.weights.inventory import may_be_fp8

FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
# Nothing here is a multiple of 128, and every matrix has several blocks in at least one direction.
ODD = {
    "hidden_size": 300,
    "intermediate_size": 200,
    "moe_intermediate_size": 150,
    "q_lora_rank": 24,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
}


def quantize(weight):
    """A matrix and its scales, by the formula of DeepSeek-V3 inference/kernel.py, block by block."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[at].float().abs().max() / 448.0
            values[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def r1_tensors(config, *, fp8=True, seed=0):
    """Name → tensor, in the order of the forward pass, the MTP module last."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for spec in (*tensor_table(config), *mtp_table(config)):
        tensor = torch.randn(spec.shape, generator=generator)
        if fp8 and may_be_fp8(spec):
            found[spec.name], found[spec.name + "_scale_inv"] = quantize(tensor.bfloat16())
        else:
            is_bias = spec.part == "gate" and len(spec.shape) == 1
            found[spec.name] = tensor if is_bias else tensor.bfloat16()
    return found


def write_files(folder, tensors, num_files=3):
    """The tensors spread over files one after the other, so that scales lie in other files than their weights."""
    files = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{i % num_files + 1:05}-of-{num_files:05}.safetensors"
        files.setdefault(file, {})[name] = tensor.contiguous()
    for file, part in files.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return weight_map


def write_r1(folder, *, fp8=True, seed=0, num_files=3, **changes):
    """→ its config and tensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = config_values(**{**ODD, **changes}, **({"quantization_config": FP8_CONFIG} if fp8 else {}))
    config = parse_config(values)
    tensors = r1_tensors(config, fp8=fp8, seed=seed)
    write_files(folder, tensors, num_files)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return config, tensors
