"""Checks and times sparge-cuda against FlashAttention-3 and cuDNN on one GPU.

    cargo build --release -p sparge-cuda --example capi
    python benchmarks/gpu/bench.py --lib target/release/examples/libcapi.so

Needs PyTorch; `fa3-fwd` is used where it is installed. Inputs are smooth along the tokens, as
those of image and language models are. Every round times every method once (medians by device
events over the rounds), so that ratios are of neighbours in time. Errors are relative L1 against
float64 on sampled rows: `l1` over all keys, `l1m` over the keys of the kept blocks.
"""

import argparse
import ctypes
import json
import math
import statistics
import sys

import torch

SHAPES = {  # batch, query heads, key heads, tokens, dim, causal
    "mochi": (1, 24, 24, 22528, 128, False),
    "cogvideox": (2, 30, 30, 17776, 64, False),
    "flux": (1, 24, 24, 4608, 128, False),
    "sd35": (1, 38, 38, 4429, 64, False),
    "llama8k": (1, 32, 8, 8192, 128, True),
    "llama32k": (1, 32, 8, 32768, 128, True),
    "llama128k": (1, 32, 8, 131072, 128, True),
}


class Call(ctypes.Structure):
    """As in crates/sparge-cuda/examples/capi.rs."""

    _fields_ = [(n, ctypes.c_int32) for n in (
        "batch", "num_qo_heads", "num_kv_heads", "qo_len", "kv_len", "head_dim", "dtype",
        "causal", "selection", "pooling", "layout")] + [("amount", ctypes.c_float)]


class Sparge:
    """One kind of call through the C interface; tensors are [batch, tokens, heads, dim]."""

    def __init__(self, lib, q, k, v, causal, selection, amount, pooling):
        b, n, h, d = q.shape
        self.lib, self.tensors = lib, (q, k, v)
        call = Call(b, h, k.shape[2], n, k.shape[1], d, 1, int(causal), selection, pooling, 1, amount)
        self.handle = lib.sparge_new(ctypes.byref(call))
        if not self.handle:
            raise RuntimeError("sparge_new failed")
        self.o = torch.full_like(q, math.nan)
        size = lib.sparge_workspace_bytes(ctypes.c_void_p(self.handle))
        self.workspace = torch.full((size,), 255, dtype=torch.uint8, device=q.device)
        tensors = (q, k, v, self.o)
        self.addresses = (ctypes.c_uint64 * 6)(
            *(t.data_ptr() for t in tensors), 0, self.workspace.data_ptr())
        self.kv_blocks, self.rows = -(-k.shape[1] // 64), b * h * -(-n // 128)
        self.selects = selection != 0

    def __call__(self, parts=7):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if self.lib.sparge_run(ctypes.c_void_p(self.handle), parts, self.addresses, stream):
            raise RuntimeError("sparge_run failed")
        return self.o

    def mask(self):
        """[batch * heads * q_blocks, kv_blocks] booleans, or None."""
        if not self.selects:
            return None
        words = ctypes.c_size_t()
        at = self.lib.sparge_mask(ctypes.c_void_p(self.handle), ctypes.byref(words))
        raw = self.workspace[at:at + self.rows * words.value * 4].view(self.rows, -1)
        bits = raw[:, :, None] >> torch.arange(8, device=raw.device, dtype=torch.uint8) & 1
        return bits.view(self.rows, -1)[:, :self.kv_blocks].bool()

    def close(self):
        self.lib.sparge_free(ctypes.c_void_p(self.handle))


def load(path):
    lib = ctypes.CDLL(path)
    lib.sparge_new.restype = ctypes.c_void_p
    lib.sparge_workspace_bytes.restype = ctypes.c_size_t
    lib.sparge_mask.restype = ctypes.c_size_t
    return lib


def smooth(b, n, h, d, gen):
    """A walk along the tokens: random knots every 32 tokens, linear between, unit variance."""
    knots = torch.randn(b * h, d, n // 32 + 2, generator=gen, device="cuda")
    x = torch.nn.functional.interpolate(knots, size=n, mode="linear", align_corners=True)
    x = x * (1.5 ** 0.5)
    return x.view(b, h, d, n).permute(0, 3, 1, 2)


def inputs(shape, seed):
    b, h, hk, n, d, _ = shape
    gen = torch.Generator("cuda").manual_seed(seed)
    noise = lambda h: torch.randn(b, n, h, d, generator=gen, device="cuda")
    walk = smooth(b, n, hk, d, gen)
    q = 1.0 * walk.repeat_interleave(h // hk, 2) + 0.6 * noise(h)
    k = 1.0 * walk + 0.6 * noise(hk) + 2.0 * torch.randn(1, 1, hk, d, generator=gen, device="cuda")
    v = smooth(b, n, hk, d, gen) + 0.5 * noise(hk)
    return [x.bfloat16().contiguous() for x in (q, k, v)]


def errors(o, q, k, v, causal, mask, seed=1):
    """Relative L1 over all keys and over kept keys, on 128 rows of 2 heads."""
    gen = torch.Generator().manual_seed(seed)
    b, n, h, d = q.shape
    group = h // k.shape[2]
    sums = [0.0] * 4
    bad = 0
    for head in (0, h - 1):
        rows = torch.cat([torch.randint(n, (126,), generator=gen), torch.tensor([0, n - 1])]).cuda()
        qq = q[b - 1, rows, head].double()
        kk, vv = (x[b - 1, :, head // group].double() for x in (k, v))
        s = qq @ kk.T / math.sqrt(d)
        if causal:
            s.masked_fill_(torch.arange(n, device="cuda")[None] > rows[:, None], -math.inf)
        got = o[b - 1, rows, head].double()
        bad += int((~got.isfinite()).sum())
        want = s.softmax(-1) @ vv
        sums[0] += (got - want).abs().sum().item()
        sums[1] += want.abs().sum().item()
        if mask is not None:
            at = ((b - 1) * h + head) * -(-n // 128) + rows // 128
            kept = mask[at].repeat_interleave(64, 1)[:, :n]
            want = s.masked_fill(~kept, -math.inf).softmax(-1) @ vv
        sums[2] += (got - want).abs().sum().item()
        sums[3] += want.abs().sum().item()
    return (sums[0] / sums[1], sums[2] / sums[3]) if bad == 0 else (math.nan, math.nan)


def density(run, shape):
    mask = run.mask()
    b, h, _, n, _, causal = shape
    blocks, kv = -(-n // 128), -(-n // 64)
    per_head = sum(min(kv, 2 * (i + 1)) for i in range(blocks)) if causal else blocks * kv
    return 1.0 if mask is None else mask.sum().item() / (b * h * per_head)


def time_all(methods, reps, warm=3):
    times = {name: [] for name in methods}
    for i in range(reps + warm):
        for name, f in methods.items():
            a, z = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200000)  # hides the host's part of the launch
            a.record()
            f()
            z.record()
            z.synchronize()
            if i >= warm:
                times[name].append(a.elapsed_time(z))
    return {name: statistics.median(x) for name, x in times.items()}


def fa3_methods(q, k, v, causal):
    try:
        import fa3_fwd_interface as fa3
    except ImportError:
        return {}
    hk = k.shape[2]
    q8, k8, v8 = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
    scale = torch.ones(q.shape[0], hk, device="cuda")
    return {
        "fa3_bf16": lambda: fa3.flash_attn_func(q, k, v, causal=causal),
        "fa3_fp8": lambda: fa3.flash_attn_func(
            q8, k8, v8, causal=causal, q_descale=scale, k_descale=scale, v_descale=scale),
    }


# Number in capi.rs and name by suffix.
POOLINGS = {"": (2, ""), "s": (0, " means"), "b": (1, " block")}


def bench(name, libs, keeps, args, rows):
    shape = SHAPES[name]
    b, h, hk, n, d, causal = shape
    q, k, v = inputs(shape, args.seed)
    work = 4 * b * h * n * n * d / (2 if causal else 1)
    methods, runs, result = {}, {}, {}
    for tag, lib in libs.items():
        for keep, suffix in keeps:
            run = Sparge(lib, q, k, v, causal, int(keep < 1), keep, POOLINGS[suffix][0])
            label = f"{tag} keep {keep:g}" + POOLINGS[suffix][1] if keep < 1 else f"{tag} dense"
            run()
            torch.cuda.synchronize()
            l1, l1m = errors(run.o, q, k, v, causal, run.mask())
            result[label] = {"l1": l1, "l1m": l1m, "density": density(run, shape)}
            runs[label] = run
            methods[label] = run
    peers = fa3_methods(q, k, v, causal)
    if args.cudnn:
        qt, kt, vt = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        backend = torch.nn.attention.SDPBackend.CUDNN_ATTENTION

        def cudnn():
            with torch.nn.attention.sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    qt, kt, vt, is_causal=causal, enable_gqa=h != hk)
        peers["cudnn"] = cudnn
    for label, f in peers.items():
        o = f()
        o = (o[0] if isinstance(o, tuple) else o)
        o = o.transpose(1, 2) if label == "cudnn" else o
        result[label] = {"l1": errors(o, q, k, v, causal, None)[0], "density": 1.0}
    reps = args.reps if n < 100000 else max(3, args.reps // 4)
    times = time_all({**methods, **peers}, reps)
    for label, run in runs.items():
        if args.parts:
            run(1)
            t = time_all({"quantize": lambda: run(1), "predict": lambda: run(2)}, 5)
            result[label].update(t)
            if not run.selects:
                result[label]["predict"] = 0.0
        run.close()
    for label, ms in times.items():
        r = result[label]
        r.update(shape=name, method=label, ms=ms, tops=work * r["density"] / ms / 1e9)
        for peer in ("fa3_fp8", "fa3_bf16", "cudnn"):
            if peer in times:
                r[peer] = times[peer] / ms
        rows.append(r)
        num = lambda key, f: format(r[key], f) if key in r else ""
        print(f"{name:10} {label:22} {ms:8.3f} ms {r['tops']:6.0f} TOPS dens {r['density']:.3f} "
              f"l1 {r['l1']:.4f} {num('l1m', '.4f')} | /fp8 {num('fa3_fp8', '.2f')} /bf16 "
              f"{num('fa3_bf16', '.2f')} /cudnn {num('cudnn', '.2f')} | q {num('quantize', '.3f')} "
              f"p {num('predict', '.3f')}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lib", action="append", required=True, help="[name=]path of libcapi.so")
    parser.add_argument("--shapes", default="mochi,cogvideox,flux,sd35,llama8k,llama32k,llama128k")
    parser.add_argument("--keep", default="1,0.5,0.15",
                        help="shares of blocks; suffix b: block pooling, s: 16x16 means alone")
    parser.add_argument("--reps", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cudnn", action="store_true")
    parser.add_argument("--parts", action="store_true", help="also time quantize and predict alone")
    parser.add_argument("--json", help="write all rows here")
    args = parser.parse_args()
    libs = {}
    for item in args.lib:
        name, _, path = item.rpartition("=")
        libs[name or "sparge"] = load(path)
    keeps = [(float(x.rstrip("bs")), x.lstrip("0.123456789")) for x in args.keep.split(",")]
    print(torch.cuda.get_device_name(), torch.__version__)
    rows = []
    for name in args.shapes.split(","):
        try:
            bench(name, libs, keeps, args, rows)
        except Exception as error:  # one shape must not lose the others
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                       "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
