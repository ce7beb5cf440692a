"""transformers and diffusers on a GPU, where their own suites do not say all: the fast kernels, order and
reuse together, drift that is read a step later, tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import relative_l1

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:In CPU autocast")]


def test_transformers_llama_with_padding() -> None:
    pytest.importorskip("transformers")
    import sparge.transformers as ours
    from language_models import llama, logits, tokens

    ours.register()
    model = llama(head_dim=64).to("cuda", torch.bfloat16)
    ids = tokens(2, 1500).cuda()
    mask = torch.ones_like(ids)
    mask[1, :400] = 0
    ours.configure(model, topk=1.0)
    for options in ({}, {"attention_mask": mask}):
        want = logits(model, "sdpa", ids, **options)
        got = logits(model, "sparge", ids, **options)
        assert relative_l1(got[0].float(), want[0].float()) < 0.05
        assert relative_l1(got[1, 400:].float(), want[1, 400:].float()) < 0.05
    ours.configure(model, topk=0.3, dense_layers=1)
    sparse = logits(model, "sparge", ids)
    assert torch.isfinite(sparse).all() and not torch.equal(sparse, want)
    out = model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=8, do_sample=False)
    assert out.shape == (1, 1508)


@pytest.mark.parametrize("name", ["cogvideox", "mochi", "sd3", "flux", "wan", "hunyuan_video", "ltx"])
def test_diffusers_in_another_order(name: str) -> None:
    pytest.importorskip("diffusers")
    import sparge.diffusers
    import test_diffusers as cases

    model, inputs = cases.made(getattr(cases, name), "cuda")
    native = cases.run(model, inputs)
    with sparge.diffusers.enable(model, policy="dense", order="hilbert"):
        assert relative_l1(cases.run(model, inputs).cpu(), native.cpu()) < 0.03
    with sparge.diffusers.enable(model, topk=0.4, order="hilbert", reuse_mask=3) as handle:
        first = cases.run(model, inputs)
        for handle.step in (1, 2, 3):
            assert torch.equal(cases.run(model, inputs), first)
        made, reused = handle.masks.predicted, handle.masks.reused
        assert made == reused > 0 and handle.masks.drifted == 0  # steps 0 and 3, 1 and 2
        assert torch.isfinite(first).all()
    assert torch.equal(cases.run(model, inputs), native)


def test_drift_is_noticed_one_step_later(monkeypatch: Any) -> None:
    from common import qkv
    from sparge.diffusers._reuse import MaskCounts, Masks, Reuse
    from sparge.diffusers._steps import Passes, Steps

    import sparge

    steps, counts = Steps(), MaskCounts()
    passes = Passes(steps)
    masks = Masks(Reuse(10, drift=0.2), passes, counts)
    config = sparge.Config(topk=0.3, keep_first=0)
    a, b = (qkv(2, 2, q_len=4096, dtype=torch.bfloat16, device="cuda", seed=s) for s in (0, 1))
    seen = []
    for steps.step, (q, k, v) in enumerate((a, a, b, b, b)):
        passes.begin()
        masks.attention(q, k, v, config=config, scale=None, keep_keys=None)
        seen.append((counts.predicted, counts.reused, counts.drifted))
    assert seen == [(1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 2, 1), (2, 3, 1)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(sparge.SpargeError, match="CUDA graph"):
        masks.attention(*b, config=config, scale=None, keep_keys=None)


def test_tuning_on_the_gpu(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    import sparge
    import sparge.transformers as ours
    from common import exact
    from language_models import llama, logits, tokens
    from test_tune import HEADS, recorded

    calls = {0: [tuple(x.cuda().bfloat16() for x in recorded(at)) for at in range(2)]}
    loose, tuned = (sparge.tune(calls, l1=l1, is_causal=True) for l1 in (0.2, 0.06))
    assert loose.measured["qk_sparsity"] > tuned.measured["qk_sparsity"] > 0
    heads, options = tuned.contents["layers"][0]["heads"], {"is_causal": True, "enable_gqa": True}
    for q, k, v in calls[0]:
        out = sparge.attention(q, k, v, config=tuned.layer(0), **options)
        want, _ = exact(q, k, v, causal="top_left")
        for head in range(HEADS):
            error = relative_l1(out[0, head].cpu(), want[0, head].cpu())
            assert error <= heads[head]["worst_l1"] + 0.004  # against SDPA in bf16 there
            assert heads[head]["cdf"] is None or error <= 0.076
    ours.register()
    model = llama(head_dim=64).to("cuda", torch.bfloat16)
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.mul_(8)
    ids = tokens(1, 1500)
    path = tmp_path / "tuned.json"
    ours.tune(model, [ids, ids[:, :1200]], l1=0.15).save(path)
    dense = logits(model, "sdpa", ids.cuda())
    ours.configure(model, calibration=str(path))
    sparse = logits(model, "sparge", ids.cuda())
    assert torch.isfinite(sparse).all() and relative_l1(sparse.cpu(), dense.cpu()) < 0.5
