"""Time llama.cpp (through llama-cpp-python) on the CPU: reading a prompt, and decoding.

One JSON line per measurement on stdout.

``measure: prompt``: seconds from the token ids to the first generated token
(evaluation in batches of ``n_batch``, argmax of the last logits). Loading the
model and tokenising are outside. ``measure: decode``: ``decode_tokens`` greedy
steps after a prompt of ``prompt_tokens``; a step is one evaluation and the argmax,
on the low-level interface, so that the wrapper's sampler is not timed.

The prompt is the first N tokens of the text. The KV cache is llama.cpp's default
(f16). One untimed evaluation of ``n_batch`` tokens comes first.

Usage::

    python llama_cpp.py MODEL.gguf TEXT.txt --threads 2 --flash-attn both
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# This file bears the name of the package that it imports: leave its folder out.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402


class Session:
    """A loaded model with one context."""

    def __init__(self, model: Path, context: int, batch: int, threads: int, flash: bool) -> None:
        self.llama = llama_cpp.Llama(
            str(model), n_ctx=context, n_batch=batch, n_ubatch=batch, n_threads=threads,
            n_threads_batch=threads, n_gpu_layers=0, flash_attn=flash, verbose=False,
        )

    def feed(self, tokens: Sequence[int]) -> int:
        """Evaluate ``tokens`` after what is in the cache; the likeliest next token."""
        self.llama.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.llama.n_vocab(),))))

    def prompt(self, tokens: Sequence[int]) -> tuple[float, int]:
        """Read a prompt from an empty cache; seconds and the first token."""
        self.llama.reset()
        start = time.perf_counter()
        token = self.feed(tokens)
        return time.perf_counter() - start, token

    def decode(self, token: int, count: int) -> float:
        """Greedy decoding of ``count`` tokens after the prompt; seconds."""
        start = time.perf_counter()
        for _ in range(count):
            token = self.feed([token])
        return time.perf_counter() - start


def emit(common: dict[str, object], seconds: Sequence[float], tokens: int, **fields: object) -> None:
    """Print one measurement."""
    median = statistics.median(seconds)
    print(json.dumps(common | fields | {
        "median_s": round(median, 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
        "tokens_per_s": round(tokens / median, 2),
        "version": llama_cpp.__version__,
    }), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("text", type=Path, help="UTF-8 text, long enough for the longest prompt")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8000],
                        help="prompt lengths to time")
    parser.add_argument("--decode-after", type=int, nargs="*", default=[128, 4096],
                        help="prompt lengths after which decoding is timed")
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash-attn", choices=["on", "off", "both"], default="both")
    parser.add_argument("--n-batch", type=int, default=512, help="llama.cpp's n_batch and n_ubatch")
    parser.add_argument("--reps", type=int, default=3)
    args = parser.parse_args()

    lengths = sorted(set(args.tokens) | set(args.decode_after))
    context = max(lengths) + args.decode_tokens
    text = args.text.read_text(encoding="utf-8").encode()
    for flash in {"on": [True], "off": [False], "both": [False, True]}[args.flash_attn]:
        session = Session(args.model, context, args.n_batch, args.threads, flash)
        ids = session.llama.tokenize(text[: 16 * context])
        if len(ids) < max(lengths):
            parser.error(f"{args.text} has {len(ids)} tokens, {max(lengths)} are needed")
        common = {"peer": "llama.cpp", "model": args.model.name, "threads": args.threads,
                  "n_batch": args.n_batch, "flash_attn": flash, "reps": args.reps}
        session.prompt(ids[: args.n_batch])
        for length in lengths:
            prompt_s, decode_s = [], []
            for _ in range(args.reps):
                seconds, token = session.prompt(ids[:length])
                prompt_s.append(seconds)
                if length in args.decode_after:
                    decode_s.append(session.decode(token, args.decode_tokens))
            if length in args.tokens:
                emit(common, prompt_s, length, measure="prompt", prompt_tokens=length, first_token=token)
            if decode_s:
                emit(common, decode_s, args.decode_tokens, measure="decode", prompt_tokens=length,
                     decode_tokens=args.decode_tokens)


if __name__ == "__main__":
    main()
