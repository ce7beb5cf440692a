"""`attn_implementation="sparge"`: small random models of several kinds, and a real one."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import sparge
import sparge.transformers as ours
import torch
import transformers
from common import exact, qkv, relative_l1
from sparge import _traced
from sparge._padding import Pattern, pattern_of

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    ours.register()


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options)).eval()


def mistral(window: int) -> Any:
    config = transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=window)
    return transformers.MistralForCausalLM(config).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 100, (batch, length))


def logits(model: Any, implementation: str, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    return model(ids, **options).logits  # type: ignore[no-any-return]


def test_dense_equals_sdpa() -> None:
    model, ids = llama(), tokens(2, 300)
    want = logits(model, "sdpa", ids)
    ours.configure(model, policy="dense")
    assert relative_l1(logits(model, "sparge", ids), want) < 1e-5
    ours.configure(model)  # the default: exact for short prompts
    assert relative_l1(logits(model, "sparge", ids), want) < 1e-5


def test_generation_equals_sdpa() -> None:
    model, ids = llama(), tokens(1, 120)
    ours.configure(model, topk=1.0, pv_gap=math.inf)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    for cache in ("dynamic", "static"):
        model.set_attn_implementation("sdpa")
        want = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **options)
        model.set_attn_implementation("sparge")
        got = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=cache, **options)
        assert torch.equal(got, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_runs(side: str) -> None:
    model = llama()
    ours.configure(model, topk=0.4)
    lengths = [600, 350, 40]
    ids, mask = torch.zeros(3, 600, dtype=torch.long), torch.zeros(3, 600, dtype=torch.long)
    singles = [tokens(1, n) for n in lengths]
    places = [slice(600 - n, 600) if side == "left" else slice(0, n) for n in lengths]
    for at, (one, place) in enumerate(zip(singles, places)):
        ids[at, place], mask[at, place] = one[0], 1
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, "sparge", ids, attention_mask=mask, position_ids=position)
    dense = logits(model, "sdpa", ids, attention_mask=mask, position_ids=position)
    for at, (one, place) in enumerate(zip(singles, places)):
        want = logits(model, "sparge", one)
        assert relative_l1(got[at, place], want[0]) < 1e-5
    assert relative_l1(got[0], dense[0]) > 1e-4  # it was sparse


def test_chunked_prefill_equals_one_piece() -> None:
    model, ids = llama(), tokens(1, 512)
    ours.configure(model, policy="dense")
    want = logits(model, "sparge", ids)
    cache = transformers.DynamicCache(config=model.config)
    # The argument's name changed in transformers 5.20.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    parts = [model(x, use_cache=True, **{name: cache}).logits for x in ids.split(200, dim=1)]
    assert relative_l1(torch.cat(parts, 1), want) < 1e-5


def test_sliding_windows_are_exact() -> None:
    model, ids = mistral(window=100), tokens(2, 400)
    want = logits(model, "sdpa", ids)
    ours.configure(model, policy="dense")
    assert relative_l1(logits(model, "sparge", ids), want) < 1e-5
    mask = torch.ones_like(ids)
    mask[1, :150] = 0
    want = logits(model, "sdpa", ids, attention_mask=mask)
    got = logits(model, "sparge", ids, attention_mask=mask)
    assert relative_l1(got[0], want[0]) < 1e-5 and relative_l1(got[1, 150:], want[1, 150:]) < 1e-5


def test_an_arbitrary_mask_is_exact() -> None:
    model, ids = llama(), tokens(1, 300)
    mask = torch.rand(1, 1, 300, 300) < 0.5
    mask |= torch.eye(300, dtype=torch.bool)
    mask &= torch.ones(300, 300, dtype=torch.bool).tril()
    want = logits(model, "sdpa", ids, attention_mask=mask)
    ours.configure(model, policy="dense")
    assert relative_l1(logits(model, "sparge", ids, attention_mask=mask), want) < 1e-5


def test_attention_sinks_are_exact() -> None:
    """gpt-oss: a learned logit per head in the denominator; every second layer has a window."""
    config = transformers.GptOssConfig(
        **{k: v for k, v in SIZES.items() if k != "pad_token_id"},
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=64,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    ids = tokens(2, 300)
    want = logits(model, "eager", ids)
    ours.configure(model, policy="dense")
    assert relative_l1(logits(model, "sparge", ids), want) < 1e-4


def test_softcap_is_refused_by_name() -> None:
    config = transformers.Gemma2Config(**SIZES, head_dim=16)
    model = transformers.Gemma2ForCausalLM(config).eval()
    with pytest.raises(sparge.SpargeError, match="softcap"):
        logits(model, "sparge", tokens(1, 100))


def test_encoders_are_not_causal() -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids = tokens(2, 200)
    mask = torch.ones_like(ids)
    mask[1, 120:] = 0
    model.set_attn_implementation("sdpa")
    want = model(ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("sparge")
    got = model(ids, attention_mask=mask).last_hidden_state
    assert relative_l1(got[0], want[0]) < 1e-5 and relative_l1(got[1, :120], want[1, :120]) < 1e-5


def test_dense_layers_and_calibration(tmp_path: Path) -> None:
    model, ids = llama(), tokens(1, 700)
    dense = logits(model, "sdpa", ids)
    ours.configure(model, topk=0.3, dense_layers=3)
    assert relative_l1(logits(model, "sparge", ids), dense) < 1e-5
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
    assert relative_l1(logits(model, "sparge", ids), dense) < 1e-5
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


CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparge"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """SmolLM2-135M from its GGUF file, as transformers loads it. `cargo test` fetches it."""
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
def test_smollm2_logits_generation_and_perplexity(smollm2: Any) -> None:
    path = CACHE / "models"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, gguf_file="smollm2-135m.gguf")
    ids = tokenizer(novel()[:12000], return_tensors="pt").input_ids[:, :2048]
    short = ids[:, :300]
    ours.configure(smollm2, topk=1.0, pv_gap=math.inf)
    assert relative_l1(logits(smollm2, "sparge", short), logits(smollm2, "sdpa", short)) < 1e-4
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    mask = torch.ones_like(short)
    want = smollm2.generate(short, attention_mask=mask, **options)  # still "sdpa"
    smollm2.set_attn_implementation("sparge")
    assert torch.equal(smollm2.generate(short, attention_mask=mask, **options), want)
    perplexity = {}
    ours.configure(smollm2)
    for implementation in ("sdpa", "sparge"):
        loss = torch.nn.functional.cross_entropy(
            logits(smollm2, implementation, ids)[0, :-1], ids[0, 1:]
        )
        perplexity[implementation] = math.exp(loss)
    assert 15 < perplexity["sdpa"] < 40
    assert perplexity["sparge"] < 1.01 * perplexity["sdpa"]
    assert perplexity["sparge"] != perplexity["sdpa"]  # it was sparse


def test_static_caches_with_padding_equal_sdpa() -> None:
    model = llama()
    ours.configure(model, topk=1.0, pv_gap=math.inf)
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    ids[1, :25], mask[1, :25] = 0, 0
    got = {}
    for implementation in ("sdpa", "sparge"):
        model.set_attn_implementation(implementation)
        got[implementation] = model.generate(
            ids, attention_mask=mask, cache_implementation="static", max_new_tokens=100,
            do_sample=False, disable_compile=True,
        )  # fmt: skip
    assert torch.equal(got["sparge"], got["sdpa"])


def test_padded_cross_attention_equals_sdpa() -> None:
    config = transformers.BartConfig(
        vocab_size=100, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, pad_token_id=0,
    )  # fmt: skip
    model = transformers.BartModel(config).eval()
    ids, mask = tokens(2, 200), torch.ones(2, 200, dtype=torch.long)
    mask[0, 60:], mask[1, 90:] = 0, 0
    got = {}
    for implementation in ("sdpa", "sparge"):
        model.set_attn_implementation(implementation)
        got[implementation] = model(
            ids, attention_mask=mask, decoder_input_ids=tokens_of(40)
        ).last_hidden_state
    assert relative_l1(got["sparge"], got["sdpa"]) < 1e-5


def tokens_of(length: int) -> torch.Tensor:
    """The same ones each time."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, 100, (2, length), generator=generator)


class Module(torch.nn.Module):
    """What the attention function sees of an attention layer."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def _masked(mask: torch.Tensor, is_causal: bool, q_len: int) -> None:
    """Our attention function under a mask against float64."""
    q, k, v = qkv(4, 2, q_len=q_len, kv_len=mask.shape[3], batch=2)
    schedule = ours.Schedule(sparge.Config(topk=1.0, pv_gap=math.inf))
    got, _ = ours._attention_forward(schedule, Module(is_causal), q, k, v, mask)
    want, _ = exact(q, k, v, mask=mask)
    assert relative_l1(got.transpose(1, 2), want) < 1e-5


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("offset", [0, 30, 80])
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_mean_what_they_say_wherever_the_queries_stand(
    is_causal: bool, offset: int, batch: int
) -> None:
    rows, columns = torch.arange(20)[:, None], torch.arange(100)
    mask = (columns <= rows + offset).expand(batch, 1, 20, 100).clone()
    _masked(mask, is_causal, 20)
    mask[-1, ..., :5] = False
    _masked(mask, is_causal, 20)
    mask[-1, ..., offset + 10 :] = False
    if batch == 1 or not is_causal:
        _masked(mask, False, 20)
    assert pattern_of(mask, 20, 100, False) is None


def test_padding_columns_of_one_mask_for_the_whole_batch() -> None:
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    mask[..., 15:] = False
    _masked(mask, False, 20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].clone()
    mask[..., :4] = False
    _masked(mask, True, 20)


def test_a_mask_that_is_written_to_is_looked_at_again() -> None:
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    assert pattern_of(mask, 20, 20, True) == Pattern(True, None, None, 0)
    mask[1, ..., :4] = False
    padded = Pattern(True, None, ((0, 20), (4, 20)), 0)
    assert pattern_of(mask, 20, 20, True) == padded
    with torch.inference_mode():
        mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
        assert pattern_of(mask, 20, 20, True) == Pattern(True, None, None, 0)
        mask[1, ..., :4] = False
        assert pattern_of(mask, 20, 20, True) == padded


def test_names_have_settings_of_their_own() -> None:
    model, ids = llama(), tokens(1, 700)
    dense = logits(model, "sdpa", ids)
    ours.register("sparge_dense", policy="dense")
    ours.register("sparge_half", topk=0.3)
    assert relative_l1(logits(model, "sparge_dense", ids), dense) < 1e-5
    assert relative_l1(logits(model, "sparge_half", ids), dense) > 1e-4
    assert relative_l1(logits(model, "sparge_dense", ids), dense) < 1e-5


def test_decoding_with_sinks_is_dense() -> None:
    q, k, v = qkv(4, 2, q_len=8, kv_len=900)
    sinks, mask = torch.randn(4), torch.ones(1, 1, 8, 900, dtype=torch.bool).tril(892)
    outs = [
        ours._attention_forward(ours.Schedule(config), Module(True), q, k, v, mask, s_aux=sinks)[0]
        for config in (sparge.Config(topk=0.1, keep_local=0), sparge.Config(policy="dense"))
    ]
    assert torch.equal(*outs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("is_old", [False, True])
def test_a_compiled_model_selects_as_the_eager_one(
    is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = llama(), tokens(1, 700)
    ours.configure(model, topk=0.3)
    want = logits(model, "sparge", ids)
    if is_old:  # as torch before 2.14 answers
        monkeypatch.setattr(transformers.masking_utils, "is_torchdynamo_exporting", lambda: True)
    patterns = []

    def seen(*arguments: Any) -> Any:
        result = pattern(*arguments)
        patterns.append(result[2])
        return result

    pattern = ours._pattern
    monkeypatch.setattr(ours, "_pattern", seen)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    got = compiled(ids).logits
    assert relative_l1(got, want) < 1e-5
    assert patterns and all(x is not None for x in patterns)
    assert relative_l1(got, logits(model, "sdpa", ids)) > 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_dense_instead_of_sparse_on_a_gpu_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "is_on_gpu", lambda query: True)
    monkeypatch.setattr(_traced, "_warned", set())
    q, k, v = qkv(4, 2, q_len=100)
    mask = torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()
    mask[..., :30, :30] = True  # a prefix
    sparse, module = ours.Schedule(sparge.Config(topk=0.5)), Module(True)
    module.num_key_value_groups = 2  # type: ignore[assignment]

    def call(schedule: ours.Schedule) -> torch.Tensor:
        return ours._attention_forward(schedule, module, q, k, v, mask)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(ours.Schedule())
        call(ours.Schedule(sparge.Config(policy="dense")))
    with pytest.warns(UserWarning, match="the mask is not causal"):
        want = call(sparse)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(sparse)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="under torch.compile"):
        got = torch.compile(call, backend="eager", fullgraph=True)(sparse)
    assert relative_l1(got, want) < 1e-6
