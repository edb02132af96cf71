"""VISTA in its original format: checkpoints made by recipe, and a slow, plain float64 version of the model."""

import json
import re
import zlib
from math import prod
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "vista_fixture.json").read_text())
NORMS = ("norm1", "norm2", "LayerNorm", "inner_attn_ln", "ffn_ln", "norm")
WORDS = "a an the red blue green dog cat bird runs sits flies on in grass house sky one two three".split()


def recipe_tensor(key, shape, seed=FIXTURE["seed"]):
    """The fixture's recipe: values that follow from key and seed."""
    drawn = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(prod(shape))
    values = torch.from_numpy(drawn.astype(np.float32).reshape(shape))
    if key.endswith("weight") and key.split(".")[-2] in NORMS:
        return 1 + 0.05 * values
    return (0.05 if key.endswith("bias") else 0.03) * values


def fixture_state():
    return {key: recipe_tensor(key, shape) for key, shape in FIXTURE["shapes"].items()}


def fixture_inputs():
    pixels = np.random.RandomState(7).standard_normal((2, 3, 224, 224)).astype(np.float32)
    return torch.from_numpy(pixels), torch.tensor(FIXTURE["input_ids"]), torch.tensor(FIXTURE["attention_mask"])


def tiny_state(variant):
    """A checkpoint of two heads and two layers in both towers, 32 px in 16 patches, for `tiny_tokenizer`."""
    sizes = {81: 25, 3072: 96, 2048: 80, 768: 128, 512: 40, 197: 17, 16: 8}
    shapes = {}
    for key, shape in FIXTURE["shapes"].items():
        if not re.search(r"blocks\.([2-9]|1\d)\.", key):
            shapes[key] = [sizes.get(size, size) for size in shape]
    if variant == "m3":
        shapes["bge_embeddings.token_type_embeddings.weight"][0] = 1
    state = {
        key: recipe_tensor(key, shape, seed=variant) * (3 if "proj" in key else 1) for key, shape in shapes.items()
    }
    if variant == "m3":
        state["bge_embeddings.position_embeddings.weight"][1] = 0  # XLM-RoBERTa's padding position
    return state


def tiny_tokenizer(variant, vocab_size=25):
    """A word tokenizer with BERT's or XLM-RoBERTa's special tokens at their usual places."""
    words = WORDS + [f"word{index}" for index in range(vocab_size - 25)]
    if variant == "base":
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
        return BertTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, model_max_length=40)
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *words]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=38,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


class SlowVista:
    """VISTA one row at a time, without padding, in float64, on the original keys."""

    def __init__(self, state, head_dim=64, rope_grid=16):
        self.state = {key: value.double() for key, value in state.items()}
        self.head_dim, self.rope_grid = head_dim, rope_grid
        self.is_m3 = len(state["bge_embeddings.token_type_embeddings.weight"]) == 1
        self.empty = [0, 2] if self.is_m3 else [2, 3]

    def layers(self, prefix):
        return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in self.state if key.startswith(prefix))

    def linear(self, states, name, bias=None):
        bias = self.state.get(f"{name}.bias") if bias is None else self.state[bias]
        return states @ self.state[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(self, states, name, eps):
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, query, key, value):
        heads = []
        for start in range(0, query.shape[-1], self.head_dim):
            part = slice(start, start + self.head_dim)
            scores = query[:, part] @ key[:, part].T / self.head_dim**0.5
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            heads.append(weights / weights.sum(-1, keepdim=True) @ value[:, part])
        return torch.cat(heads, dim=-1)

    def turn(self, states, patches):
        """Rotary positions by complex numbers: pairs of channels turn with the patch's row, then its column."""
        grid = int((self.state["model_visual.visual.pos_embed"].shape[1] - 1) ** 0.5)
        quarter = self.head_dim // 4
        speeds = torch.tensor([10000.0 ** (-index / quarter) for index in range(quarter)], dtype=torch.float64)
        turned = [states[0]]
        for patch, state in zip(patches, states[1:]):
            row, column = patch // grid / grid * self.rope_grid, patch % grid / grid * self.rope_grid
            angles = torch.cat([row * speeds, column * speeds]).repeat(len(state) // self.head_dim)
            pairs = torch.view_as_complex(state.reshape(-1, 2)) * torch.polar(torch.ones_like(angles), angles)
            turned.append(torch.view_as_real(pairs).flatten())
        return torch.stack(turned)

    def vision(self, pixels, kept=None):
        """`(3, H, W)` → `(1 + P, width)`: the last block's output; of the patches `kept` only, if given."""
        visual = "model_visual.visual"
        kernel, bias = (self.state[f"{visual}.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        side = kernel.shape[-1]
        patches = [
            (kernel * pixels.double()[:, top : top + side, left : left + side]).sum((1, 2, 3)) + bias
            for top in range(0, pixels.shape[1], side)
            for left in range(0, pixels.shape[2], side)
        ]
        states = torch.stack([self.state[f"{visual}.cls_token"][0, 0], *patches]) + self.state[f"{visual}.pos_embed"][0]
        kept = range(len(patches)) if kept is None else kept
        states = torch.cat([states[:1], states[1:][list(kept)]])
        for layer in range(self.layers(f"{visual}.blocks.")):
            block = f"{visual}.blocks.{layer}"
            normed = self.norm(states, f"{block}.norm1", 1e-6)
            query = self.turn(self.linear(normed, f"{block}.attn.q_proj", f"{block}.attn.q_bias"), kept)
            key = self.turn(self.linear(normed, f"{block}.attn.k_proj"), kept)
            value = self.linear(normed, f"{block}.attn.v_proj", f"{block}.attn.v_bias")
            attended = self.norm(self.attention(query, key, value), f"{block}.attn.inner_attn_ln", 1e-6)
            states = states + self.linear(attended, f"{block}.attn.proj")
            normed = self.norm(states, f"{block}.norm2", 1e-6)
            gate = self.linear(normed, f"{block}.mlp.w1")
            gated = gate / (1 + (-gate).exp()) * self.linear(normed, f"{block}.mlp.w2")
            states = states + self.linear(self.norm(gated, f"{block}.mlp.ffn_ln", 1e-6), f"{block}.mlp.w3")
        return states

    def words(self, ids, positions):
        names = ("word", "position", "token_type")
        words, places, types = (self.state[f"bge_embeddings.{name}_embeddings.weight"] for name in names)
        return words[list(ids)] + places[list(positions)] + types[0]

    def encode(self, states):
        """Embeddings before their LayerNorm → the last hidden states."""
        eps = 1e-5 if self.is_m3 else 1e-12
        states = self.norm(states, "bge_embeddings.LayerNorm", eps)
        for layer in range(self.layers("bge_encoder.layer.")):
            layer = f"bge_encoder.layer.{layer}"
            query, key, value = (
                self.linear(states, f"{layer}.attention.self.{part}") for part in ("query", "key", "value")
            )
            attended = self.linear(self.attention(query, key, value), f"{layer}.attention.output.dense")
            states = self.norm(states + attended, f"{layer}.attention.output.LayerNorm", eps)
            hidden = self.linear(states, f"{layer}.intermediate.dense")
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            states = self.norm(states + self.linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", eps)
        return states

    def text(self, ids):
        first = 2 if self.is_m3 else 0
        return self.encode(self.words(ids, range(first, first + len(ids))))

    def fused(self, ids, pixels):
        tokens = self.linear(self.vision(pixels)[1:], "visual_proj")
        count = len(tokens)
        tokens = tokens + self.state["bge_embeddings.position_embeddings.weight"][1 : 1 + count]
        text = self.words(ids, [0, *range(count + 1, count + len(ids))])
        return self.encode(torch.cat([text[:1], tokens, text[1:]]))

    def image(self, pixels):
        return self.fused(self.empty, pixels)


def real_tokens(input_ids, attention_mask):
    """Rows of ids without the padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask)]
