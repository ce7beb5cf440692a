"""Masks that live for several steps: when they are used, when they are made anew, and by what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import sparge
import sparge.diffusers
import test_diffusers as models
import torch
from common import alike, inputs
from sparge.diffusers import Reuse, _reuse
from sparge.diffusers._reuse import SAMPLE_EVERY, MaskCounts, Masks
from sparge.diffusers._steps import Passes, Steps
from test_diffusers import run

CONFIG = sparge.Config(topk=0.3, keep_first=0)


class Bench:
    """One attention module in a loop of steps."""

    def __init__(self, steps: int, drift: float = 1.0, config: sparge.Config = CONFIG) -> None:
        self.steps, self.counts, self.config = Steps(), MaskCounts(), config
        self.passes = Passes(self.steps)
        self.masks = Masks(Reuse(steps, drift), self.passes, self.counts)

    def __call__(self, step: int, *calls: Any, keep: Any = None) -> "list[torch.Tensor]":
        """A forward pass with these calls."""
        self.steps.step = step
        self.passes.begin()
        return [
            self.masks.attention(q, k, v, config=self.config, scale=0.2, keep_keys=keep)
            for q, k, v in calls
        ]

    def seen(self) -> "tuple[int, int, int]":
        return self.counts.predicted, self.counts.reused, self.counts.drifted


def with_mask_of(first: Any, then: Any, config: sparge.Config = CONFIG) -> torch.Tensor:
    """The second operands under the first ones' mask."""
    mask = sparge.predict(first[0], first[1], scale=0.2, config=config)
    out = sparge.block_sparse_attention(*then, mask, scale=0.2, pv_gap=config.pv_gap)
    return out  # type: ignore[no-any-return]


def operands(seed: int, length: int = 1300, device: str = "cpu", **options: Any) -> Any:
    return inputs(device, heads=2, kv_heads=2, q_len=length, dim=32, seed=seed, **options)


@pytest.mark.parametrize(
    "config",
    [CONFIG, sparge.Config(), sparge.Config(cdf=0.8, pv_gap=3.0, qk="int8"),
     sparge.Config(policy="paper", topk=(0.2, 0.5))],
)  # fmt: skip
def test_the_first_step_is_as_without(config: sparge.Config) -> None:
    q, k, v = operands(0, 2100)
    keep = ((0, 70), (2000, 2100))
    bench = Bench(3, config=config)
    (got,) = bench(0, (q, k, v), keep=keep)
    assert torch.equal(got, sparge.attention(q, k, v, config=config, scale=0.2, keep_keys=keep))
    assert bench.seen() == (1, 0, 0)


def test_a_mask_serves_its_steps_and_no_more(device: str) -> None:
    bench = Bench(3)
    calls = [operands(seed, device=device) for seed in range(5)]
    outs = [bench(step, calls[step])[0] for step in range(5)]
    for step, made in enumerate((0, 0, 0, 3, 3)):
        assert alike(outs[step], with_mask_of(calls[made], calls[step]))
    assert bench.seen() == (2, 3, 0)


def test_every_pass_and_call_has_its_own(device: str) -> None:
    bench = Bench(2)
    a, b, c, d = (operands(seed, device=device) for seed in range(4))
    for step in (0, 1):  # guided and unguided pass, two calls each (batch entries)
        for pair in ((a, b), (c, d)):
            for got, one in zip(bench(step, *pair), pair):
                assert alike(got, with_mask_of(one, one))
    assert bench.seen() == (4, 4, 0)


def test_what_ends_a_mask_early() -> None:
    a, b = operands(0), operands(1)
    bench = Bench(100)
    bench(5, a)
    bench(3, b)  # set back: another run
    bench.steps._begin()  # a schedule begins
    bench(3, a)
    bench(4, operands(2, 1400))
    bench(5, tuple(x.bfloat16() for x in operands(2, 1400)))
    bench.config = sparge.Config(topk=0.5)
    bench(6, tuple(x.bfloat16() for x in operands(2, 1400)))
    assert bench.seen() == (6, 0, 0)
    bench(7, tuple(x.bfloat16() for x in operands(2, 1400)))
    assert bench.seen() == (6, 1, 0)


def test_drift_makes_a_mask_anew() -> None:
    a, b = operands(0, 128 * 20), operands(1, 128 * 20)
    bench = Bench(100, drift=0.25)
    bench(0, a)
    for step in range(1, 2 * SAMPLE_EVERY):  # whatever rows are looked at
        q, k, v = (x + 0.01 * torch.randn(x.shape) for x in a)
        bench(step, (q, k, v))
    assert bench.seen() == (1, 2 * SAMPLE_EVERY - 1, 0)
    (got,) = bench(40, b)
    assert bench.seen() == (2, 2 * SAMPLE_EVERY - 1, 1)
    assert torch.equal(got, with_mask_of(b, b))
    # Rows that are looked at only in some steps: they are found within a round.
    q, k, v = (x.clone() for x in b)
    q[:, :, 128 * 7 : 128 * 8] = a[0][:, :, 128 * 7 : 128 * 8]
    for step in range(41, 41 + SAMPLE_EVERY):
        bench(step, (q, k, v))
    assert bench.counts.drifted == 2
    never = Bench(100, drift=1.0)
    never(0, a)
    never(1, b)
    assert never.seen() == (1, 1, 0)


def test_where_reading_waits_drift_counts_one_step_later(monkeypatch: Any) -> None:
    monkeypatch.setattr(_reuse, "_is_async", lambda x: True)
    a, b = operands(0, 128 * 20), operands(1, 128 * 20)
    bench = Bench(4, drift=0.25)
    outs = [bench(step, x)[0] for step, x in enumerate((a, a, b, b, b, b, b, b))]
    # Step 2 still runs under a's mask; b's is of step 3 and ends with step 6.
    for out, made, then in zip(outs, (a, a, a, b, b, b, b, b), (a, a, b, b, b, b, b, b)):
        assert torch.equal(out, with_mask_of(made, then))
    assert bench.seen() == (3, 5, 1)
    samples = []
    monkeypatch.setattr(_reuse, "_missing", lambda *x: samples.append(x[-1]) or SimpleNamespace(read=lambda: 0))
    bench = Bench(3, drift=0.25)
    for step in range(6):
        bench(step, a)
    assert samples == [1, 4]  # none that nobody would read


def test_exact_calls_are_left_alone() -> None:
    q, k, v = operands(0, 300)
    for config in (sparge.Config(), sparge.Config(topk=0.3, min_kv_len=500)):
        bench = Bench(2, config=config)
        for step in (0, 1):
            (got,) = bench(step, (q, k, v))
            assert torch.equal(got, sparge.attention(q, k, v, scale=0.2, config=config))
        assert bench.seen() == (0, 0, 0)
    bench = Bench(2)
    few = (q[:, :, :100], k, v)  # less than a query block
    assert torch.equal(bench(0, few)[0], sparge.attention(*few, scale=0.2, config=CONFIG))


def test_gradients_are_refused_with_reuse_too() -> None:
    model, inputs = models.wan()
    with torch.enable_grad(), sparge.diffusers.enable(model, topk=0.4, reuse_mask=2):
        with pytest.raises(sparge.SpargeError, match="requires gradients"):
            run(model, inputs)


def test_a_pipeline_reuses_within_a_run() -> None:
    model, inputs = models.flux()
    model.eval()
    modules = 4
    pipe = SimpleNamespace(
        transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
    )
    plain = {}
    for order in ("row", "hilbert"):
        with sparge.diffusers.enable(model, topk=0.3, order=order):
            plain[order] = run(model, inputs)
    for order in ("row", "hilbert"):
        with sparge.diffusers.enable(
            pipe, topk=0.3, order=order, dense_steps=1, reuse_mask=Reuse(3, drift=1.0)
        ) as handle:
            for _ in range(2):
                pipe.scheduler.set_timesteps(6)
                for step in range(6):
                    for _ in range(2):  # true CFG: two passes
                        out = run(model, inputs)
                        assert torch.equal(out, plain[order]) == (step > 0)
                    latent = torch.randn(1, 4)
                    pipe.scheduler.step(latent, pipe.scheduler.timesteps[step], latent)
            # Steps 1 and 4 predict, 2, 3 and 5 reuse; in both passes of both runs.
            assert handle.masks == MaskCounts(modules * 2 * 2 * 2, modules * 3 * 2 * 2, 0)
            kept = [x for undo in handle._undo if isinstance(x := getattr(undo, "__self__", 0), Masks)]
            assert len(kept) == modules and all(len(x._kept) == 2 for x in kept)
        assert not any(x._kept for x in kept)  # freed


# Mochi's own rotary code opens a float32 autocast region, which torch warns about on the CPU.
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_batch_entries_of_masked_text_are_apart() -> None:
    for case, calls in ((models.hunyuan_video, 2 * 2), (models.mochi, 2 * 2), (models.sd3, 4)):
        model, inputs = case()
        model.eval()
        with sparge.diffusers.enable(model, topk=0.3, reuse_mask=2) as handle:
            first = run(model, inputs)
            handle.step = 1
            assert torch.equal(run(model, inputs), first)
            assert handle.masks == MaskCounts(calls, calls, 0)


def test_changed_inputs_are_noticed_by_the_pipeline() -> None:
    model, inputs = models.wan()
    model.eval()
    models._sharpen(model)
    with sparge.diffusers.enable(model, topk=0.3, keep_first=0, reuse_mask=10) as handle:
        run(model, inputs)
        handle.step = 1
        run(model, {**inputs, "hidden_states": inputs["hidden_states"] * 1.001})
        assert handle.masks == MaskCounts(2, 2, 0)
        handle.step = 2
        run(model, {**inputs, "hidden_states": torch.randn(1, 4, 3, 24, 32)})
        assert handle.masks.drifted == 2


def test_refusals_by_name() -> None:
    model, inputs = models.flux()
    model.eval()
    for bad in (0, -2, 2.5, True):
        with pytest.raises(sparge.SpargeError, match="expected an integer from 1 on"):
            sparge.diffusers.enable(model, topk=0.3, reuse_mask=Reuse(bad))  # type: ignore[arg-type]
    with pytest.raises(sparge.SpargeError, match="drift is 1.5"):
        Reuse(2, drift=1.5)
    with pytest.raises(sparge.SpargeError, match="policy='minference'"):
        sparge.diffusers.enable(model, policy="minference", reuse_mask=2)
    with sparge.diffusers.enable(model, topk=0.3, reuse_mask=1) as handle:
        run(model, inputs)  # one step: nothing to reuse
        assert handle.masks == MaskCounts()
    with sparge.diffusers.enable(model, topk=0.3, reuse_mask=2) as handle:
        with pytest.raises(sparge.SpargeError, match="set handle.step"):
            for _ in range(20):
                run(model, inputs)
