"""Every combination of architecture, dtype and layout that there is: a checkpoint of each architecture and dtype, and
what transformers says to it."""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from make_checkpoint import make_checkpoint
from safetensors.torch import load_file, save_file
from small_model import quantize

from r1_cluster.models.family import load_config, tensor_table
from r1_cluster.weights.cast import cast
from r1_cluster.weights.tensors import INT4, INT8

ARCHITECTURES = {
    "deepseek_v3": {},
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}
"""By `model_type`: what its checkpoint's config.json says beside what `make_checkpoint` writes."""
DTYPES = ("float32", "bfloat16", "fp8", "int8", "int4")
"""What weights are stored in. BF16 is computed in BF16, all others in float32: so few bits are dequantized exactly."""
LAYOUTS = {
    "one process": {"kind": "colocated", "cpus_per_worker": 0.2},
    "two stages": {"kind": "disaggregated", "stages": 2, "cpus_per_worker": 0.2},
    "expert shards": {"kind": "disaggregated", "expert_shards": 3, "cpus_per_worker": 0.2},
    "two ranks": {"kind": "colocated", "tensor_parallel": 2, "cpus_per_worker": 0.2},
    "data ranks": {"kind": "expert-parallel", "data_parallel": 2, "cpus_per_worker": 0.2},
}
ALL = [
    (architecture, dtype, layout)
    for architecture, dtype, layout in itertools.product(ARCHITECTURES, DTYPES, LAYOUTS)
    if layout not in ("expert shards", "data ranks") or architecture == "deepseek_v3"
]
"""A dense model has no experts to divide."""
ATOL = 1e-4
"""How far float32 logits may be from transformers' own."""
MAX_TRIED = 200
MIN_DISTINCT = 3
NUM_TOKENS = {"float32": 16, "bfloat16": 8}
LEAST_MARGIN = {"float32": 1e-3, "bfloat16": 0.05}
"""By what is computed in: the length of an answer, and by how much the best logit of each of its tokens exceeds the
second at least. Of random prompts most have such an answer in float32, and one in ten in BF16."""


def computed_in(dtype):
    return "bfloat16" if dtype == "bfloat16" else "float32"


def write_checkpoint(folder, architecture, dtype):
    """A checkpoint of the architecture with weights in `dtype` and a tokenizer, in the new folder `folder`."""
    floats = folder if dtype in ("float32", "bfloat16") else folder.with_name(f"{folder.name}-floats")
    make_checkpoint(
        floats,
        seed=3,
        model_type=architecture,
        torch_dtype="float32" if dtype == "float32" else "bfloat16",
        max_position_embeddings=2048,
        **ARCHITECTURES[architecture],
        # BF16 and float32 choose other experts for some tokens; these should not be what decides.
        **({"routed_scaling_factor": 0.25} if (architecture, dtype) == ("deepseek_v3", "bfloat16") else {}),
    )
    _shape_head(floats, spread=1.5 if dtype == "bfloat16" else 0.0)
    if dtype == "fp8":
        cast(floats, folder, "fp8", tensor_table(load_config(floats)), fp8_block=None)
    elif dtype in ("int8", "int4"):
        quantize(floats, folder, {"int8": INT8, "int4": INT4}[dtype])
    return folder


def _shape_head(folder, spread):
    """Gives the head's rows lengths between which there are factors of e^spread, so that the best of few long rows is
    far from the second: farther than BF16 rounds. Rows of a head that is the embedding are short beside what layers add
    to them, else every token's successor would be itself."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    length = torch.randn(len(head), 1, generator=torch.Generator().manual_seed(1)).mul(spread).exp()
    head *= (length / length.max()).to(head.dtype) * (1.0 if "lm_head.weight" in tensors else 0.1)
    save_file(tensors, file, metadata={"format": "pt"})


def dequantized(folder):
    """What the tensors of a checkpoint's files stand for, in float32: by the formats' descriptions alone."""
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    found = {}
    for name, tensor in stored.items():
        if name.endswith("_packed"):
            weight = name.removesuffix("_packed")
            found[weight] = _from_integers(tensor, stored[f"{weight}_scale"], stored[f"{weight}_shape"])
        elif f"{name}_scale_inv" in stored:
            scale = stored[f"{name}_scale_inv"].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
            found[name] = tensor.double() * scale[: len(tensor), : tensor.shape[1]]
        elif not name.endswith(("_scale_inv", "_scale", "_shape")):
            found[name] = tensor
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def _from_integers(words_NW, scale_NG, shape):
    """INT8 or INT4 as docs/weights-int.md describes it → float64 [N, K]."""
    num_rows, width = shape.tolist()
    bits = 4 if words_NW.shape[1] == -(-width // 8) else 8
    columns = words_NW.long()[..., None] >> torch.arange(0, 32, bits)
    numbers = (columns.flatten(1)[:, :width] & (2**bits - 1)) - 2 ** (bits - 1)
    group = width if scale_NG.shape[1] == 1 else 128
    assert numbers.shape == (num_rows, width)
    return numbers * scale_NG.double().repeat_interleave(group, 1)[:, :width]


class Answer(NamedTuple):
    """A greedy answer to the tokens of a prompt, whose `tokens` are the best of float32 `logits` [len(tokens), V] so
    clearly that no rounding makes another one of them. `rough` are the logits of transformers' own BF16 model where an
    engine is to compute in BF16, else None."""

    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor
    rough: torch.Tensor | None

    def check(self, logits):
        """AssertionError unless an engine's logits are as near as its dtype explains: 1e-4, or, in BF16, about as near
        as those of transformers' BF16 model."""
        if self.rough is None:
            torch.testing.assert_close(logits, self.logits, atol=ATOL, rtol=0)
        else:
            # Which of the two is nearer is chance where gates choose other experts.
            assert (logits - self.logits).norm() < 2 * (self.rough - self.logits).norm()

    @property
    def decided(self):
        """Whether the best logits are all farther ahead of the second than four times what BF16 was off anywhere, or
        twice what float32 may be; and whether more than a word is said."""
        off = ATOL if self.rough is None else 2 * float((self.rough - self.logits).abs().max())
        best = self.logits.topk(2).values
        return float((best[:, 0] - best[:, 1]).min()) > 2 * off and len(set(self.tokens)) >= MIN_DISTINCT


class Oracle:
    """transformers over what a checkpoint's weights stand for."""

    def __init__(self, checkpoint, folder):
        """`folder`: a new one, for the dequantized weights."""
        import transformers

        folder.mkdir()
        values = json.loads((checkpoint / "config.json").read_text())
        mtp = f"model.layers.{values['num_hidden_layers']}."  # which transformers does not compute
        tensors = {
            name: tensor for name, tensor in dequantized(checkpoint).items() if not name.startswith(mtp)
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        values.pop("quantization_config", None)
        scaling = values.get("rope_scaling")
        if scaling and "attn_factor" in scaling:  # which transformers does not read
            magnitude = 0.1 * math.log(scaling["factor"]) + 1
            values["rope_scaling"] = scaling | {"attention_factor": magnitude * scaling["attn_factor"]}
        (folder / "config.json").write_text(json.dumps(values))
        (name,) = values["architectures"]
        self._folder, self._class = Path(folder), getattr(transformers, name)
        self._models = {}

    def answer(self, prompts, dtype, barred=frozenset()):
        """The Answer to the first of `prompts` for which an engine that computes in `dtype` cannot but find the same
        tokens, none of them `barred`. Tokens that end an answer are no end."""
        for prompt in itertools.islice(prompts, MAX_TRIED):
            if (logits := self._greedy(prompt, dtype)) is None:
                continue
            tokens, rough = logits.argmax(1).tolist(), None
            if dtype == "bfloat16":
                ids = torch.tensor([[*prompt, *tokens[:-1]]])
                rough = self._run(dtype, ids).logits[0, len(prompt) - 1 :].float()
            answer = Answer(prompt, tokens, logits, rough)
            if answer.decided and barred.isdisjoint(tokens):
                return answer
        raise AssertionError(f"of {MAX_TRIED} prompts none has an answer that rounding cannot change")

    def _greedy(self, prompt, dtype):
        """float32 logits [NUM_TOKENS, V] of a greedy answer; None where two are so near that rounding may decide."""
        rows, past, ids = [], None, torch.tensor([prompt])
        while len(rows) < NUM_TOKENS[dtype]:
            out = self._run("float32", ids, past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits[0, -1])
            best = rows[-1].topk(2)
            if float(best.values[0] - best.values[1]) < LEAST_MARGIN[dtype]:
                return None
            ids = best.indices[None, :1]
        return torch.stack(rows)

    @torch.no_grad()
    def _run(self, dtype, ids, **options):
        return self._model(dtype)(ids, **options)

    def _model(self, dtype):
        if dtype not in self._models:
            model, report = self._class.from_pretrained(
                self._folder,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                attn_implementation="eager",
            )
            assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            self._models[dtype] = model
        return self._models[dtype]
