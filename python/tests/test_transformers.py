"""`attn_implementation="sparge"`: small random models of several kinds, and a real one."""

from __future__ import annotations

import copy
import inspect
import math
import os
from pathlib import Path
from typing import Any

import pytest
import sparge
import sparge.transformers as ours
import torch
import transformers
from common import HALF, bound, relative_l1
from language_models import SIZES, llama, logits, mistral, tokens
from sparge._config import AUTO_CDF

# Of logits: SDPA by another kernel; 16-bit products, which dense attention has on a GPU where SDPA has
# no such mask.
SDPA, DENSE = 1e-3, HALF


@pytest.fixture(autouse=True)
def _registered() -> None:
    ours.register()


def test_dense_equals_sdpa(device: str) -> None:
    model, ids = llama().to(device), tokens(2, 300, device)
    want = logits(model, "sdpa", ids)
    ours.configure(model, policy="dense")
    assert relative_l1(logits(model, "sparge", ids), want) < bound(device, 1e-5, SDPA)
    ours.configure(model)  # the default: exact for short prompts
    assert relative_l1(logits(model, "sparge", ids), want) < bound(device, 1e-5, SDPA)
    ours.configure(model, topk=1.0, pv_gap=math.inf)
    assert relative_l1(logits(model, "sparge", ids), want) < bound(device, 1e-5)


def keep_all(device: str) -> "dict[str, Any]":
    """Settings that skip nothing, in arithmetic that leaves a random model's next token alone."""
    return {"policy": "dense"} if device == "cuda" else {"topk": 1.0, "pv_gap": math.inf}


def test_generation_equals_sdpa(device: str) -> None:
    model, ids = llama().to(device), tokens(1, 120, device)
    ours.configure(model, **keep_all(device))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    for cache in ("dynamic", "static"):
        model.set_attn_implementation("sdpa")
        want = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **options)
        model.set_attn_implementation("sparge")
        got = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **options)
        assert torch.equal(got, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_runs(side: str, device: str) -> None:
    model = llama().to(device)
    ours.configure(model, topk=0.4)
    lengths = [600, 350, 40]
    ids, mask = torch.zeros(2, 3, 600, dtype=torch.long, device=device)
    singles = [tokens(1, n, device) for n in lengths]
    places = [slice(600 - n, 600) if side == "left" else slice(0, n) for n in lengths]
    for at, (one, place) in enumerate(zip(singles, places)):
        ids[at, place], mask[at, place] = one[0], 1
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, "sparge", ids, attention_mask=mask, position_ids=position)
    dense = logits(model, "sdpa", ids, attention_mask=mask, position_ids=position)
    for at, (one, place) in enumerate(zip(singles, places)):
        want = logits(model, "sparge", one)
        # Sums of another order may round an 8-bit number the other way.
        assert relative_l1(got[at, place], want[0]) < bound(device, 1e-5, 0.02)
    assert relative_l1(got[0], dense[0]) > 1e-4  # it was sparse


def test_chunked_prefill_equals_one_piece(device: str) -> None:
    model, ids = llama().to(device), tokens(1, 512, device)
    ours.configure(model, policy="dense")
    want = logits(model, "sparge", ids)
    cache = transformers.DynamicCache(config=model.config)
    # The argument's name changed in transformers 5.20.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    parts = [model(x, use_cache=True, **{name: cache}).logits for x in ids.split(200, dim=1)]
    assert relative_l1(torch.cat(parts, 1), want) < bound(device, 1e-5, DENSE)


def test_sliding_windows_are_exact(device: str) -> None:
    model, ids = mistral(window=100).to(device), tokens(2, 400, device)
    near = bound(device, 1e-5, DENSE)
    want = logits(model, "sdpa", ids)
    ours.configure(model, policy="dense")
    assert relative_l1(logits(model, "sparge", ids), want) < near
    mask = torch.ones_like(ids)
    mask[1, :150] = 0
    want = logits(model, "sdpa", ids, attention_mask=mask)
    got = logits(model, "sparge", ids, attention_mask=mask)
    assert relative_l1(got[0], want[0]) < near and relative_l1(got[1, 150:], want[1, 150:]) < near


def test_an_arbitrary_mask_is_exact(device: str) -> None:
    model, ids = llama().to(device), tokens(1, 300, device)
    mask = torch.rand(1, 1, 300, 300, device=device) < 0.5
    mask |= torch.eye(300, dtype=torch.bool, device=device)
    mask &= torch.ones(300, 300, dtype=torch.bool, device=device).tril()
    want = logits(model, "sdpa", ids, attention_mask=mask)
    ours.configure(model, policy="dense")
    got = logits(model, "sparge", ids, attention_mask=mask)
    assert relative_l1(got, want) < bound(device, 1e-5, SDPA)


def test_attention_sinks_are_exact(device: str) -> None:
    """gpt-oss: a learned logit per head in the denominator; every second layer has a window."""
    config = transformers.GptOssConfig(
        **{k: v for k, v in SIZES.items() if k != "pad_token_id"},
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=64,
        pad_token_id=0, eos_token_id=1,
        experts_implementation="eager",  # grouped products want other types and sizes on a GPU
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval().to(device)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    ids = tokens(2, 300, device)
    want = logits(model, "eager", ids)
    ours.configure(model, policy="dense")
    assert relative_l1(logits(model, "sparge", ids), want) < bound(device, 1e-4, DENSE)


def test_softcap_is_refused_by_name(device: str) -> None:
    config = transformers.Gemma2Config(**SIZES, head_dim=16)
    model = transformers.Gemma2ForCausalLM(config).eval().to(device)
    with pytest.raises(sparge.SpargeError, match="softcap"):
        logits(model, "sparge", tokens(1, 100, device))


def test_encoders_are_not_causal(device: str) -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96,
    )  # fmt: skip
    model = transformers.BertModel(config).eval().to(device)
    ids = tokens(2, 200, device)
    near = bound(device, 1e-5, SDPA)
    mask = torch.ones_like(ids)
    mask[1, 120:] = 0
    model.set_attn_implementation("sdpa")
    want = model(ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("sparge")
    got = model(ids, attention_mask=mask).last_hidden_state
    assert relative_l1(got[0], want[0]) < near and relative_l1(got[1, :120], want[1, :120]) < near


def test_dense_layers_and_calibration(tmp_path: Path, device: str) -> None:
    model, ids = llama().to(device), tokens(1, 700, device)
    near = bound(device, 1e-5, SDPA)
    dense = logits(model, "sdpa", ids)
    ours.configure(model, topk=0.3, dense_layers=3)
    assert relative_l1(logits(model, "sparge", ids), dense) < near
    ours.configure(model, topk=0.3, dense_layers=[0, 2])
    assert relative_l1(logits(model, "sparge", ids), dense) > 1e-4
    path = tmp_path / "calibration.json"
    path.write_text(calibration_json(layers=3, cdf=0.3))
    ours.configure(model, calibration=str(path))
    one = logits(model, "sparge", ids)
    # A file that does not say how many local blocks are kept means none.
    ours.configure(
        model, cdf=[0.3, 1.0, 0.3, 1.0], theta=0.0, pv_gap=5.0, pooling="sub_block", keep_local=0
    )
    assert torch.equal(one, logits(model, "sparge", ids))
    ours.configure(model, calibration=str(path), policy="dense", dense_layers=3)
    assert relative_l1(logits(model, "sparge", ids), dense) < near
    path.write_text(calibration_json(layers=2, cdf=0.3))
    with pytest.raises(sparge.SpargeError, match="num_layers 2, this model 3"):
        ours.configure(model, calibration=str(path))


def test_calibration_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    text = calibration_json(layers=2, cdf=0.4)
    path.write_text(text)
    calibration = sparge.load_calibration(str(path))
    config = calibration.layer(1)
    assert config.cdf == (0.4, 1.0, 0.4, 1.0) and config.min_kv_len == 256
    assert config.pooling == "16x16"
    path.write_text(text.replace('"second_order": false', '"second_order": true, "sampled_rows": 3'))
    assert sparge.load_calibration(str(path)).layer(0).pooling == "16x16+var+3rows"
    path.write_text(text)
    with pytest.raises(sparge.SpargeError, match="layer 2"):
        calibration.layer(2)
    q = torch.randn(1, 4, 255, 64)
    dense = sparge.attention(q, q, q, policy="dense")
    assert relative_l1(sparge.attention(q, q, q, calibration=config), dense) < 1e-5
    long = torch.randn(1, 4, 400, 64)
    sparse = sparge.attention(long, long, long, calibration=config)
    assert torch.equal(sparse, sparge.attention(long, long, long, config=config))
    for change, words in (
        (("sparge-calibration", "other"), "format"),
        (('"version": 1', '"version": 9'), "version 9"),
        (('"keep_first": 1,', ""), "damaged"),
        (('"num_qo_heads": 4', '"num_qo_heads": 5'), "5 heads"),
    ):
        path.write_text(text.replace(*change))
        with pytest.raises(sparge.SpargeError, match=words):
            sparge.load_calibration(str(path))


def calibration_json(layers: int, cdf: float) -> str:
    measured = '"rel_l1": 0.04, "qk_sparsity": 0.6, "pv_sparsity": 0.65'
    head = f'{{"cdf": {cdf}, "top_k": null, "theta": 0.0, "lambda": 5.0, {measured}}}'
    dense = f'{{"cdf": null, "top_k": null, "theta": 0.0, "lambda": 5.0, {measured}}}'
    layer = f'{{"heads": [{head}, {dense}, {head}, {dense}]}}'
    return (
        '{"format": "sparge-calibration", "version": 1, "made_by": "a test",'
        f'"model": {{"id": "tiny", "sha256": null, "num_layers": {layers}, "num_qo_heads": 4,'
        '"num_kv_heads": 2, "head_dim": 16},'
        '"data": {"source": "a text", "samples": 1, "tokens": 700, "causal": true},'
        '"bounds": {"l1": 0.05, "l2": 0.06},'
        '"settings": {"pooling": {"q_rows": 16, "kv_rows": 16, "second_order": false},'
        '"keep_first": 1, "min_kv_len": 256},'
        f'"measured": {{{measured}}}, "layers": [{", ".join([layer] * layers)}]}}'
    )


def test_names_have_settings_of_their_own(device: str) -> None:
    model, ids = llama().to(device), tokens(1, 700, device)
    near = bound(device, 1e-5, SDPA)
    dense = logits(model, "sdpa", ids)
    ours.register("sparge_dense", policy="dense")
    ours.register("sparge_half", topk=0.3)
    assert relative_l1(logits(model, "sparge_dense", ids), dense) < near
    assert relative_l1(logits(model, "sparge_half", ids), dense) > 1e-4
    assert relative_l1(logits(model, "sparge_dense", ids), dense) < near


CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparge"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """SmolLM2-135M from its GGUF file, as transformers loads it. `cargo test` fetches it into the
    cache folder, which XDG_CACHE_HOME may move."""
    pytest.importorskip("gguf")
    path = CACHE / "models" / "smollm2-135m.gguf"
    if not path.exists():
        message = f"{path} is missing; `cargo run --release -p sparge-cli -- run` fetches it"
        if os.environ.get("SPARGE_REQUIRE_MODELS") == "1":
            pytest.fail(message)
        pytest.skip(message)
    options = {"gguf_file": path.name, "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


def novel() -> str:
    for path in sorted((CACHE / "texts").rglob("*")):
        if path.is_file() and "emma" in path.name.lower():
            return path.read_text(encoding="utf-8", errors="replace")
    pytest.skip(f"no novel under {CACHE / 'texts'}; `cargo test` fetches it")


@pytest.mark.filterwarnings("ignore")
def test_smollm2_logits_generation_and_perplexity(smollm2: Any, device: str) -> None:
    path = CACHE / "models"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, gguf_file="smollm2-135m.gguf")
    ids = tokenizer(novel()[:12000], return_tensors="pt").input_ids[:, :2048].to(device)
    model = smollm2 if device == "cpu" else copy.deepcopy(smollm2).to(device)
    short = ids[:, :300]
    everything: dict[str, Any] = {"topk": 1.0, "pv_gap": math.inf}
    if device == "cuda":
        ours.configure(model, **everything)
        assert relative_l1(logits(model, "sparge", short), logits(model, "sdpa", short)) < 0.05
        everything["qk"] = "half"
    ours.configure(model, **everything)
    got = logits(model, "sparge", short)
    assert relative_l1(got, logits(model, "sdpa", short)) < bound(device, 1e-4, 0.02)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    mask = torch.ones_like(short)
    want = model.generate(short, attention_mask=mask, **options)  # still "sdpa"
    model.set_attn_implementation("sparge")
    assert torch.equal(model.generate(short, attention_mask=mask, **options), want)
    perplexity = {}
    # On a GPU the default is dense here.
    ours.configure(model, cdf=AUTO_CDF if device == "cuda" else None)
    if device == "cuda":
        model.to(torch.bfloat16)  # the fast kernels
    for implementation in ("sdpa", "sparge"):
        loss = torch.nn.functional.cross_entropy(
            logits(model, implementation, ids)[0, :-1].float(), ids[0, 1:]
        )
        perplexity[implementation] = math.exp(loss)
    assert 15 < perplexity["sdpa"] < 40
    assert perplexity["sparge"] < 1.01 * perplexity["sdpa"]
    assert perplexity["sparge"] != perplexity["sdpa"]  # it was sparse


def test_static_caches_with_padding_equal_sdpa(device: str) -> None:
    model = llama().to(device)
    ours.configure(model, **keep_all(device))
    ids, mask = tokens(2, 60, device), torch.ones(2, 60, dtype=torch.long, device=device)
    ids[1, :25], mask[1, :25] = 0, 0
    got = {}
    for implementation in ("sdpa", "sparge"):
        model.set_attn_implementation(implementation)
        got[implementation] = model.generate(
            ids, attention_mask=mask, cache_implementation="static", max_new_tokens=100,
            do_sample=False, disable_compile=True,
        )  # fmt: skip
    assert torch.equal(got["sparge"], got["sdpa"])


def test_padded_cross_attention_equals_sdpa(device: str) -> None:
    config = transformers.BartConfig(
        vocab_size=100, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, pad_token_id=0,
    )  # fmt: skip
    model = transformers.BartModel(config).eval().to(device)
    ids, mask = tokens(2, 200, device), torch.ones(2, 200, dtype=torch.long, device=device)
    decoder_ids = tokens(2, 40, device)
    mask[0, 60:], mask[1, 90:] = 0, 0
    got = {}
    for implementation in ("sdpa", "sparge"):
        model.set_attn_implementation(implementation)
        got[implementation] = model(
            ids, attention_mask=mask, decoder_input_ids=decoder_ids
        ).last_hidden_state
    assert relative_l1(got["sparge"], got["sdpa"]) < bound(device, 1e-5, SDPA)
