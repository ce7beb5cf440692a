"""transformers and diffusers on a GPU: small random models, keep-all near native, sparse runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from common import relative_l1

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:In CPU autocast")]


def test_transformers_llama_with_padding() -> None:
    pytest.importorskip("transformers")
    import sparge.transformers as ours
    from test_transformers import llama, logits, tokens

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


def _on_gpu(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.cuda()
    return type(x)(_on_gpu(y) for y in x) if isinstance(x, (tuple, list)) else x


@pytest.mark.parametrize(
    "name",
    ["cogvideox", "mochi", "sd3", "flux", "wan", "hunyuan_video", "ltx", "qwen_image"],
)
def test_diffusers(name: str) -> None:
    pytest.importorskip("diffusers")
    import sparge.diffusers
    import test_diffusers as cases

    model, inputs = getattr(cases, name)()
    model = model.eval().cuda()
    inputs = {key: _on_gpu(value) for key, value in inputs.items()}
    native = cases.run(model, inputs)
    with sparge.diffusers.enable(model, topk=1.0, pv_gap=math.inf):
        assert relative_l1(cases.run(model, inputs).cpu(), native.cpu()) < 0.03
    with sparge.diffusers.enable(model, topk=0.4):
        assert torch.isfinite(cases.run(model, inputs)).all()
    assert torch.equal(cases.run(model, inputs), native)
