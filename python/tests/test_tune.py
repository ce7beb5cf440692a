"""Calibration by trying: bounds are kept, looser ones skip more, models come back as they were."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import pytest
import sparge
import sparge.diffusers
import sparge.transformers as ours
import torch
from common import exact, qkv, relative_l1
from sparge._tune import Study
from test_diffusers import _sharpen, cogvideox, run, sd3, wan
from language_models import llama, logits, mistral, tokens

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
HEADS = 4


def recorded(seed: int, **options: Any) -> Call:
    """Heads of four kinds: one that attends evenly (its queries are zero), three more and more sharply."""
    q, k, v = qkv(HEADS, 2, q_len=1100, seed=seed, **options)
    return q * torch.tensor([0.0, 0.2, 0.4, 1.0]).view(1, HEADS, 1, 1), k, v


@pytest.fixture(scope="module")
def calls() -> dict[int, list[Call]]:
    return {layer: [recorded(10 * layer + at) for at in range(2)] for layer in range(2)}


def shares(calibration: sparge.Calibration) -> list[list[float]]:
    return [[head["qk_sparsity"] for head in layer["heads"]] for layer in calibration.contents["layers"]]


@pytest.mark.parametrize("is_causal", [False, True])
def test_errors_are_within_the_bounds(calls: dict[int, list[Call]], is_causal: bool) -> None:
    tuned = sparge.tune(calls, l1=0.05, l2=0.07, is_causal=is_causal)
    for layer, found in calls.items():
        config = tuned.layer(layer)
        heads = tuned.contents["layers"][layer]["heads"]
        worst, counts = [0.0] * HEADS, torch.zeros(HEADS, 4)
        for q, k, v in found:
            want, _ = exact(q, k, v, causal="top_left" if is_causal else None)
            alone = sparge.attention(
                q, k, v, is_causal=is_causal, enable_gqa=True, config=config, pv_gap=math.inf
            )
            out, stats = sparge.attention(
                q, k, v, is_causal=is_causal, enable_gqa=True, config=config, return_stats=True
            )
            counts += stats.counts[0]
            for head in range(HEADS):
                assert relative_l1(alone[0, head], want[0, head]) <= 0.05
                worst[head] = max(worst[head], relative_l1(out[0, head], want[0, head]))
        for head, said in enumerate(heads):
            assert worst[head] <= 0.07 and abs(worst[head] - said["worst_l1"]) < 1e-4
            assert said["rel_l1"] <= said["worst_l1"] + 1e-5
            reachable, computed, groups, done = counts[head].tolist()
            assert abs(said["qk_sparsity"] - (1 - computed / reachable)) < 1e-4
            assert abs(said["pv_sparsity"] - (1 - done / groups)) < 1e-4
        # Where everything counts alike next to nothing can go; where little does, much can.
        if not is_causal:
            assert heads[0]["cdf"] is None and config.cdf[0] == 1.0 and heads[0]["qk_sparsity"] == 0
        assert heads[0]["qk_sparsity"] < 0.1 < 0.5 < heads[3]["qk_sparsity"]
        assert heads[3]["pv_sparsity"] > heads[3]["qk_sparsity"] and heads[3]["lambda"] is not None


def test_a_looser_bound_skips_more(calls: dict[int, list[Call]]) -> None:
    found = [shares(sparge.tune(calls, l1=l1)) for l1 in (0.01, 0.05, 0.2)]
    for tighter, looser in zip(found, found[1:]):
        assert all(a <= b for x, y in zip(tighter, looser) for a, b in zip(x, y))
        assert sum(map(sum, tighter)) < sum(map(sum, looser))


def test_batch_entries_are_samples(calls: dict[int, list[Call]]) -> None:
    together = {
        layer: [tuple(torch.cat(x) for x in zip(*found))] for layer, found in calls.items()
    }
    a, b = sparge.tune(calls), sparge.tune(together)
    assert a.contents == b.contents and a.contents["data"]["samples"] == 2


def test_no_lambda_where_stage_2_changes_nothing(calls: dict[int, list[Call]]) -> None:
    """Such kernels permit every λ, and the CPU would skip by it."""
    study = Study(0.1, None, "error", None, {}, False)
    q, k, v = calls[0][0]

    def attend(config: sparge.Config) -> Any:
        return sparge.attention(q, k, v, enable_gqa=True, config=config, pv_gap=math.inf, return_stats=True)

    study.run(lambda _: study.call(0, q, k, attend, exact(q, k, v)[0].float()))
    heads = study.calibration("", "", 2, False).contents["layers"][0]["heads"]
    assert [head["lambda"] for head in heads] == [None] * HEADS and heads[3]["cdf"] < 1


def test_heads_that_are_not_finite_are_dense(tmp_path: Path) -> None:
    q, k, v = recorded(0)
    v[:, 1] = math.inf  # of the second half of the heads
    tuned = sparge.tune({0: [(q, k, v)]}, l1=0.2)
    assert [x == 1 for x in tuned.layer(0).cdf] == [False, False, True, True]
    tuned.save(tmp_path / "tuned.json")
    assert "NaN" not in (tmp_path / "tuned.json").read_text()


def test_files_make_the_round_trip(calls: dict[int, list[Call]], tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    tuned = sparge.tune(calls, name="a model", pooling="second_order", keep_local=0, min_kv_len=512, theta=0.3)
    tuned.save(path)
    assert sparge.load_calibration(path) == tuned
    assert [x.name for x in tmp_path.iterdir()] == ["tuned.json"]
    data = json.loads(path.read_text())
    assert data["bounds"] == {"l1": 0.05, "l2": pytest.approx(0.06)}
    assert data["settings"] == {
        "pooling": {"q_rows": 16, "kv_rows": 16, "second_order": True, "sampled_rows": 0},
        "keep_first": 1, "keep_local": 0, "min_kv_len": 512,
    }  # fmt: skip
    assert data["model"]["id"] == "a model" and data["layers"][0]["heads"][1]["theta"] == 0.3
    assert len(path.read_text().splitlines()) == 12 + 2 * (HEADS + 2)  # one a head


def test_the_command_reads_the_file(calls: dict[int, list[Call]], tmp_path: Path) -> None:
    target = Path(__file__).parents[2] / "target"
    commands = [x for kind in ("release", "debug") if (x := target / kind / "sparge").exists()]
    if not commands:
        pytest.skip("the command is not built: cargo build --release -p sparge-cli")
    sparge.tune(calls).save(tmp_path / "tuned.json")
    given = ["inspect", "--calibration", tmp_path / "tuned.json", "-o", tmp_path / "tuned.html"]
    subprocess.run([commands[0], *given], check=True)
    assert (tmp_path / "tuned.html").stat().st_size > 0


def test_what_does_not_fit_is_refused(calls: dict[int, list[Call]]) -> None:
    q, k, v = recorded(0)
    bad: list[tuple[Any, dict[str, Any], str]] = [
        ({}, {}, "without a gap"),
        ({1: calls[0]}, {}, r"layers \[1\]"),
        ({0: []}, {}, "no attention call"),
        ({0: [(q, k, v[:, :1])]}, {}, "as many values as keys"),
        ({0: [(q[0], k, v)]}, {}, "query is 3 dimensions"),
        ({0: [(q, k.numpy(), v)]}, {}, "key is ndarray, expected a torch tensor"),
        ({0: calls[0], 1: [(q[:, :2], k, v)]}, {}, "layer 1 has 2 query heads.* earlier call 4"),
        (calls, {"l1": 0.0}, "l1 is 0.0 and l2"),
        (calls, {"l1": 0.1, "l2": 0.05}, "l1 <= l2"),
        (calls, {"topk": 0.5}, "topk cannot be given"),
        (calls, {"policy": "window:64"}, "policy cannot be given"),
        (calls, {"pooling": "7"}, "pooling"),
    ]
    for given, knobs, words in bad:
        with pytest.raises(sparge.SpargeError, match=words):
            sparge.tune(given, **knobs)
    with pytest.raises(sparge.SpargeError, match="'error' or 'effect'"):
        ours.tune(llama(), [tokens(1, 300)], by="luck")


def sharp_llama(**options: Any) -> Any:
    """Random weights attend almost evenly: larger projections make some heads skip."""
    model = llama(**options)
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.mul_(8)
    return model


@pytest.mark.parametrize("by", ["error", "effect"])
def test_a_transformers_model(by: str, tmp_path: Path) -> None:
    ours.register()
    model, samples = sharp_llama(), [tokens(1, 900), {"input_ids": tokens(1, 700)}]
    before = model.config._attn_implementation
    lines: list[str] = []
    tuned = ours.tune(model, samples, l1=0.15, by=by, name="tiny", progress=lines.append)
    assert model.config._attn_implementation == before
    assert lines[0] == "τ, 1 calls" and lines[-1] == "λ, 6 of 6 calls"
    said = tuned.contents
    assert said["model"] == {
        "id": "tiny", "sha256": None, "num_layers": 3, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    }  # fmt: skip
    assert said["data"]["causal"] and said["data"]["samples"] == 2 and said["data"]["tokens"] == 900
    assert said["settings"]["min_kv_len"] == 700
    assert 0 < said["measured"]["qk_sparsity"] < 1
    for layer in said["layers"]:
        l2 = layer.get("bounds", said["bounds"])["l2"]
        assert all(head["worst_l1"] <= l2 + 1e-5 for head in layer["heads"])
    if by == "effect":
        ratios = [layer["bounds"]["l1"] / 0.15 for layer in said["layers"] if "bounds" in layer]
        assert len(ratios) > 1 and min(ratios) < 1 < max(ratios) <= 8.01
    tuned.save(tmp_path / "tiny.json")
    ids = tokens(1, 900)
    dense = logits(model, "sdpa", ids)
    ours.configure(model, calibration=str(tmp_path / "tiny.json"))
    sparse = logits(model, "sparge", ids)
    assert 1e-5 < relative_l1(sparse, dense) < 0.3


def test_windows_are_tuned_and_padding_is_refused() -> None:
    tuned = ours.tune(mistral(window=300), [tokens(2, 600)], l1=0.3)
    assert tuned.contents["data"]["samples"] == 2 and len(tuned.layers) == 3
    model, ids = llama(), tokens(2, 300)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    with pytest.raises(sparge.SpargeError, match="without padding"):
        ours.tune(model, [{"input_ids": ids, "attention_mask": mask}])
    assert model.config._attn_implementation == "sdpa"
    for samples, words in (([], "samples is empty"), ([torch.rand(3)], "sample 0 is torch.float32")):
        with pytest.raises(sparge.SpargeError, match=words):
            ours.tune(model, samples)


@pytest.mark.parametrize("case", [cogvideox, sd3, wan])
def test_a_diffusion_transformer(case: Any) -> None:
    model, inputs = case()
    model.eval()
    _sharpen(model)
    native = run(model, inputs)
    seen: list[torch.Tensor] = []

    def sample() -> torch.Tensor:
        seen.append(run(model, inputs))
        run(model, inputs)  # left out by every=2
        return seen[-1]

    tuned = sparge.diffusers.tune(model, sample, l1=0.2, every=2, keep_first=0)
    assert len(seen) == 2 and all(torch.equal(x, native) for x in seen)
    batch = inputs["hidden_states"].shape[0]
    modules = 2 if case is sd3 else 1  # two attentions in one block share its settings
    assert tuned.contents["data"]["samples"] == batch * modules
    assert tuned.model["id"] == type(model).__name__ and not tuned.contents["data"]["causal"]
    assert 0 < tuned.measured["qk_sparsity"] < 1
    assert torch.equal(run(model, inputs), native)
    with sparge.diffusers.enable(model, calibration=tuned):
        assert 0 < relative_l1(run(model, inputs), native) < 0.5
    with pytest.raises(sparge.SpargeError, match="every is 0"):
        sparge.diffusers.tune(model, sample, every=0)


def test_a_diffusion_transformer_by_effect() -> None:
    model, inputs = wan()
    model.eval()
    _sharpen(model)
    count = 0

    def sample() -> Any:
        nonlocal count
        count += 1
        return {"frames": [run(model, inputs)]}

    tuned = sparge.diffusers.tune(model, sample, l1=0.2, by="effect", order="hilbert", keep_first=0)
    measured = [layer for layer in tuned.contents["layers"] if "bounds" in layer]
    assert count == 2 + len(measured) and measured
    with pytest.raises(sparge.SpargeError, match="compares what the model returns"):
        sparge.diffusers.tune(model, lambda: (sample(), None)[1], l1=0.2, by="effect", keep_first=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(model, diffusers.ModelMixin)
