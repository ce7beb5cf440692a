"""What transformers' masks are understood as, and what becomes of them in compiled models."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import sparge
import sparge.transformers as ours
import torch
import transformers
from common import bound, exact, inputs, qkv, relative_l1
from language_models import llama, logits, tokens
from sparge import _traced
from sparge._padding import Pattern, pattern_of


@pytest.fixture(autouse=True)
def _registered() -> None:
    ours.register()


class Module(torch.nn.Module):
    """What the attention function sees of an attention layer."""

    num_key_value_groups = 2

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def _masked(mask: torch.Tensor, is_causal: bool, q_len: int) -> None:
    """Our attention function under a mask against float64."""
    q, k, v = inputs(mask.device.type, q_len=q_len, kv_len=mask.shape[3], batch=2)
    schedule = ours.Schedule(sparge.Config(topk=1.0, pv_gap=math.inf))
    got, _ = ours._attention_forward(schedule, Module(is_causal), q, k, v, mask)
    want, _ = exact(q, k, v, mask=mask)
    got = got.transpose(1, 2)
    if got.is_cuda:  # a mask without a pattern is SDPA's there, whose empty rows are its own affair
        got = torch.where(mask.any(-1, keepdim=True), got, 0.0)
    assert relative_l1(got, want) < bound(mask.device.type, 1e-5)


# On a GPU, one warning that some of them are.
@pytest.mark.filterwarnings("ignore:sparge. dense attention instead:UserWarning")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("offset", [0, 30, 80])
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_mean_what_they_say_wherever_the_queries_stand(
    is_causal: bool, offset: int, batch: int, device: str
) -> None:
    rows, columns = torch.arange(20, device=device)[:, None], torch.arange(100, device=device)
    mask = (columns <= rows + offset).expand(batch, 1, 20, 100).clone()
    _masked(mask, is_causal, 20)
    mask[-1, ..., :5] = False
    _masked(mask, is_causal, 20)
    mask[-1, ..., offset + 10 :] = False
    if batch == 1 or not is_causal:
        _masked(mask, False, 20)
    assert pattern_of(mask, 20, 100, False) is None


def test_padding_columns_of_one_mask_for_the_whole_batch(device: str) -> None:
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool, device=device)
    mask[..., 15:] = False
    _masked(mask, False, 20)
    mask = torch.ones(20, 20, dtype=torch.bool, device=device).tril()[None, None].clone()
    mask[..., :4] = False
    _masked(mask, True, 20)


def test_a_mask_that_is_written_to_is_looked_at_again(device: str) -> None:
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool, device=device).tril()
    assert pattern_of(mask, 20, 20, True) == Pattern(True, None, None, 0)
    mask[1, ..., :4] = False
    padded = Pattern(True, None, ((0, 20), (4, 20)), 0)
    assert pattern_of(mask, 20, 20, True) == padded
    with torch.inference_mode():
        mask = torch.ones(2, 1, 20, 20, dtype=torch.bool, device=device).tril()
        assert pattern_of(mask, 20, 20, True) == Pattern(True, None, None, 0)
        mask[1, ..., :4] = False
        assert pattern_of(mask, 20, 20, True) == padded


def test_decoding_with_sinks_is_dense(device: str) -> None:
    q, k, v = inputs(device, q_len=8, kv_len=900)
    sinks = torch.randn(4, device=device)
    mask = torch.ones(1, 1, 8, 900, dtype=torch.bool, device=device).tril(892)
    outs = [
        ours._attention_forward(ours.Schedule(config), Module(True), q, k, v, mask, s_aux=sinks)[0]
        for config in (sparge.Config(topk=0.1, keep_local=0), sparge.Config(policy="dense"))
    ]
    assert torch.equal(*outs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("is_old", [False, True])
def test_a_compiled_model_selects_as_the_eager_one(
    is_old: bool, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    model, ids = llama().to(device), tokens(1, 700, device)
    ours.configure(model, topk=0.3)
    want = logits(model, "sparge", ids)
    if is_old:  # as torch before 2.14 answers
        name = "is_torchdynamo_exporting"  # which versions with an older torch do not have
        monkeypatch.setattr(transformers.masking_utils, name, lambda: True, raising=False)
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
    assert relative_l1(got, want) < bound(device, 1e-5, 0.01)
    assert patterns and all(x is not None for x in patterns)
    assert relative_l1(got, logits(model, "sdpa", ids)) > 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_dense_instead_of_sparse_on_a_gpu_is_said_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "is_on_gpu", lambda query: True)
    monkeypatch.setattr(_traced, "_warned", set())
    q, k, v = qkv(4, 2, q_len=100, device=device)
    mask = torch.ones(1, 1, 100, 100, dtype=torch.bool, device=device).tril()
    mask[..., :30, :30] = True  # a prefix
    sparse, module = ours.Schedule(sparge.Config(topk=0.5)), Module(True)

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
    assert relative_l1(got, want) < bound(device, 1e-6, 1e-4)
