"""Makes tests/data/golden.json: what two models should answer, by implementations that share no code with the crate.

    pip install numpy gguf llama-cpp-python
    python scripts/golden.py SMOLLM2.gguf QWEN2.gguf EMMA.txt > tests/data/golden.json

Logits: an fp32 forward pass in numpy over weights dequantised by the `gguf` package. Tokens: llama.cpp's
tokenizer. Nothing is random; the input is the beginning of Emma (`sparge_candle::hub`).
"""

import json
import sys

import gguf
import numpy as np
from llama_cpp import Llama

TRICKY = (
    "Hello, world! It's 12345 o'clock;  don't\tWE'LL see...\n\n\n  naïve café — “quotes” 你好，世界 🎉👩‍👩‍👧 ½ ①\r\n"
    "fn main() { println!(\"{}\", 0x1F); }   \n<|im_start|>user\nHi<|im_end|>\n"
)


def load(path):
    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: t for t in reader.tensors}
    return meta, lambda name: gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32), tensors


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight


def rope(x, base, half_split):
    n, _, d = x.shape
    angle = np.arange(n)[:, None] * base ** (-np.arange(0, d, 2) / d)[None, :]
    cos, sin = (f(angle).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))
    a, b = (x[..., : d // 2], x[..., d // 2 :]) if half_split else (x[..., 0::2], x[..., 1::2])
    a, b = a * cos - b * sin, a * sin + b * cos
    return np.concatenate([a, b], -1) if half_split else np.stack([a, b], -1).reshape(x.shape)


def forward(path, tokens):
    meta, get, tensors = load(path)
    arch = meta["general.architecture"]
    key = lambda name: meta[f"{arch}.{name}"]
    heads, kv_heads = key("attention.head_count"), key("attention.head_count_kv")
    eps, base = key("attention.layer_norm_rms_epsilon"), key("rope.freq_base")
    d = key("embedding_length") // heads
    n = len(tokens)
    embedding = get("token_embd.weight")
    x = embedding[tokens]
    mask = np.triu(np.full((n, n), -np.inf, np.float32), 1)
    for i in range(key("block_count")):
        name = lambda part: f"blk.{i}.{part}"

        def project(part, y):
            y = y @ get(name(f"{part}.weight")).T
            return y + get(name(f"{part}.bias")) if name(f"{part}.bias") in tensors else y

        y = norm(x, get(name("attn_norm.weight")), eps)
        q = rope(project("attn_q", y).reshape(n, heads, d), base, arch == "qwen2")
        k = rope(project("attn_k", y).reshape(n, kv_heads, d), base, arch == "qwen2")
        v = project("attn_v", y).reshape(n, kv_heads, d)
        k, v = (np.repeat(t, heads // kv_heads, 1) for t in (k, v))
        s = np.einsum("ihd,jhd->hij", q, k) / np.float32(np.sqrt(d)) + mask
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + project("attn_output", np.einsum("hij,jhd->ihd", p, v).reshape(n, -1))
        y = norm(x, get(name("ffn_norm.weight")), eps)
        gate = project("ffn_gate", y)
        x = x + project("ffn_down", gate / (1 + np.exp(-gate)) * project("ffn_up", y))
    head = get("output.weight") if "output.weight" in tensors else embedding
    return norm(x, get("output_norm.weight"), eps) @ head.T


def golden(name, path, emma, count, perplexity):
    tokenizer = Llama(path, vocab_only=True, verbose=False)
    tokenize = lambda text: tokenizer.tokenize(text.encode(), add_bos=False, special=True)
    long = tokenize(emma[:8000])[:perplexity]
    tokens = long[:count]
    logits = forward(path, long)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    mean = -log_p[np.arange(len(long) - 1), long[1:]].mean()
    logits = logits[:count]
    ids = list(range(0, logits.shape[1], logits.shape[1] // 40))
    return {
        "model": name,
        "tokens": tokens,
        "nll": [round(float(-log_p[i, t]), 4) for i, t in enumerate(tokens[1:])],
        "argmax": [int(i) for i in logits.argmax(-1)],
        "ids": ids,
        "last_logits": [round(float(x), 4) for x in logits[-1, ids]],
        "perplexity": [len(long), round(float(np.exp(mean)), 3)],
        "tricky": TRICKY,
        "tricky_tokens": tokenize(TRICKY),
    }


smollm2, qwen2, emma = sys.argv[1:]
text = open(emma, encoding="utf-8").read()
json.dump([golden("smollm2-135m", smollm2, text, 64, 1024), golden("qwen2.5-coder-0.5b", qwen2, text, 24, 24)], sys.stdout)
print()
