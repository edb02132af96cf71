"""State dicts in open_clip's format, their forward pass in plain float64, and a tokenizer, for tests."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import gelu, layer_norm
from transformers import PreTrainedTokenizerFast

from universal_gcl.conversion.open_clip import convert_open_clip

WORDS = "a an the red blue green dog cat bird runs sits flies on in grass house sky one two three four".split()
END = len(WORDS) + 2  # the highest id, as in CLIP


def clip_like_tokenizer(pad_token="<end>", end_first=False, words=WORDS):
    """One token a word; "<end>" has the highest id, unless `end_first`."""
    tokens = ["<end>", "<pad>", "<start>", *words] if end_first else ["<pad>", "<start>", *words, "<end>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", vocab["<start>"]), ("<end>", vocab["<end>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token=pad_token, unk_token="<end>"
    )


def random_state(
    *, width=64, text_width=64, heads=(1, 1), text_heads=(1, 1), mlps=(50, 70), text_mlps=(30, 40), head_dim=64,
    patch=8, grid=2, context=9, vocabulary=END + 1, dim=12, seed=0,
):  # fmt: skip
    """A CLIP under open_clip's names; a layer with 0 heads or 0 channels lacks that half, as in TinyCLIP's files."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=0.15):
        return scale * torch.randn(*shape, generator=generator)

    def norm(name, size):
        return {f"{name}.weight": 1 + draw(size, scale=0.3), f"{name}.bias": draw(size)}

    def blocks(prefix, size, all_heads, channels):
        state = {}
        for number, (count, mlp) in enumerate(zip(all_heads, channels)):
            layer, inner = f"{prefix}transformer.resblocks.{number}.", count * head_dim
            if count:
                state |= norm(f"{layer}ln_1", size)
                state[f"{layer}attn.in_proj_weight"] = draw(3 * inner, size)
                state[f"{layer}attn.in_proj_bias"] = draw(3 * inner)
                state[f"{layer}attn.out_proj.weight"] = draw(size, inner)
                state[f"{layer}attn.out_proj.bias"] = draw(size)
            if mlp:
                state |= norm(f"{layer}ln_2", size)
                state[f"{layer}mlp.c_fc.weight"], state[f"{layer}mlp.c_fc.bias"] = draw(mlp, size), draw(mlp)
                state[f"{layer}mlp.c_proj.weight"], state[f"{layer}mlp.c_proj.bias"] = draw(size, mlp), draw(size)
        return state

    state = {
        "positional_embedding": draw(context, text_width),
        "text_projection": draw(text_width, dim),
        "logit_scale": torch.tensor(2.5),
        "visual.class_embedding": draw(width),
        "visual.positional_embedding": draw(grid**2 + 1, width),
        "visual.proj": draw(width, dim),
        "visual.conv1.weight": draw(width, 3, patch, patch),
        "token_embedding.weight": draw(vocabulary, text_width),
    }
    state |= norm("visual.ln_pre", width) | norm("visual.ln_post", width) | norm("ln_final", text_width)
    return state | blocks("visual.", width, heads, mlps) | blocks("", text_width, text_heads, text_mlps)


def tinyclip_names(state, module=""):
    """The same state dict under TinyCLIP's names; `module="module."` as DistributedDataParallel saves it."""
    named = {}
    for key, tensor in state.items():
        part = {"visual": "_image_encoder.", "logit_scale": "_logit_scale."}.get(key.split(".")[0], "_text_encoder.")
        named[part + module + key] = tensor
    return named


def reference_features(state, pixels, input_ids, quick_gelu, head_dim=64, eps=1e-5):
    """open_clip's encode_image (N, D) and encode_text (N, D), written out in float64."""
    state = {key: tensor.double() for key, tensor in state.items()}

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attention(x, name, mask):
        rows = x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
        outputs = []
        for q, k, v in zip(*(part.split(head_dim, dim=-1) for part in rows.chunk(3, dim=-1))):
            outputs.append(torch.softmax(q @ k.mT / head_dim**0.5 + mask, dim=-1) @ v)
        return linear(torch.cat(outputs, dim=-1), f"{name}.out_proj")

    def transformer(x, prefix, mask):
        layers = {
            int(key.split("resblocks.")[1].split(".")[0]) for key in state if key.startswith(f"{prefix}transformer")
        }
        for number in sorted(layers):
            layer = f"{prefix}transformer.resblocks.{number}."
            if f"{layer}ln_1.weight" in state:
                x = x + attention(norm(x, f"{layer}ln_1"), f"{layer}attn", mask)
            if f"{layer}ln_2.weight" in state:
                hidden = linear(norm(x, f"{layer}ln_2"), f"{layer}mlp.c_fc")
                hidden = hidden * torch.sigmoid(1.702 * hidden) if quick_gelu else gelu(hidden)
                x = x + linear(hidden, f"{layer}mlp.c_proj")
        return x

    kernel = state["visual.conv1.weight"]
    patches = torch.nn.functional.conv2d(pixels.double(), kernel, stride=kernel.shape[-1]).flatten(2).mT
    image = torch.cat([state["visual.class_embedding"].expand(len(patches), 1, -1), patches], dim=1)
    image = norm(image + state["visual.positional_embedding"], "visual.ln_pre")
    image = norm(transformer(image, "visual.", 0.0), "visual.ln_post")[:, 0] @ state["visual.proj"]

    length = input_ids.shape[1]
    text = state["token_embedding.weight"][input_ids] + state["positional_embedding"][:length]
    causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    text = norm(transformer(text, "", causal), "ln_final")
    return image, text[torch.arange(len(text)), input_ids.argmax(1)] @ state["text_projection"]


def convert(state, folder, tokenizer, **options):
    torch.save(state, folder / "weights.pt")
    return convert_open_clip(folder / "weights.pt", folder / "clip", tokenizer=tokenizer, **options)


def model_config(state, quick_gelu, head_width=64, **vision):
    """The model_cfg that open_clip would have for `state`."""
    width, text_width = len(state["visual.class_embedding"]), len(state["ln_final.weight"])
    patch = state["visual.conv1.weight"].shape[-1]
    side = patch * round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    return {
        "embed_dim": state["visual.proj"].shape[1],
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": side, "layers": 2, "width": width, "patch_size": patch, "head_width": head_width, **vision
        },
        "text_cfg": {
            "context_length": len(state["positional_embedding"]), "vocab_size": len(state["token_embedding.weight"]),
            "width": text_width, "heads": text_width // head_width, "layers": 2,
        },
    }  # fmt: skip


def with_config(tmp_path, part, **settings):
    document = model_config(random_state(), True)
    document = document | settings if part is None else document | {part: document[part] | settings}
    (tmp_path / "config.json").write_text(json.dumps(document))
    return {"config": tmp_path / "config.json"}
