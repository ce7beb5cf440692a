//! The custom op against candle's own matmul and softmax.

use candle_core::{D, DType, Device, Result, Tensor};
use sparge::{Alignment, Selection, SpargeConfig, Window};
use sparge_candle::op::{Options, attention, attention_with_stats};

fn randn(shape: (usize, usize, usize, usize)) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)
}

/// softmax(q·kᵀ/√d + bias)·v with candle's operations.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let s = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * scale)?.broadcast_add(bias)?;
    let p = s.broadcast_sub(&s.max_keepdim(D::Minus1)?)?.exp()?;
    p.broadcast_div(&p.sum_keepdim(D::Minus1)?)?.matmul(&v.contiguous()?)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

#[test]
fn equals_candle_on_every_type_and_on_views() -> Result<()> {
    // Transposed and narrowed: strided views with an offset.
    let q = randn((2, 150, 4, 40))?.transpose(1, 2)?;
    let k = randn((2, 4, 200, 40))?.narrow(2, 17, 150)?;
    let v = randn((2, 4, 150, 24))?;
    let zero = Tensor::zeros((1, 1, 150, 150), DType::F32, &Device::Cpu)?;
    let expected = plain(&q.contiguous()?, &k, &v, &zero)?;
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        let cast = |x: &Tensor| x.to_dtype(dtype);
        let o = attention(
            &cast(&q)?,
            &cast(&k)?,
            &cast(&v)?,
            &Options::default(),
            &SpargeConfig::dense(),
        )?;
        assert_eq!((o.dtype(), o.dims()), (dtype, &[2, 4, 150, 24][..]));
        let difference = largest_difference(&o, &expected)?;
        assert!(difference < tolerance, "{dtype:?}: {difference}");
    }
    // A view is passed on as it is.
    let direct = attention(&q, &k, &v, &Options::default(), &SpargeConfig::dense())?;
    assert!(largest_difference(&direct, &expected)? < 1e-5);
    Ok(())
}

#[test]
fn masks_layouts_and_lengths() -> Result<()> {
    let (q, k, v) = (randn((1, 2, 90, 16))?, randn((1, 2, 90, 16))?, randn((1, 2, 90, 16))?);
    let causal: Vec<f32> =
        (0..90 * 90).map(|i| if i % 90 <= i / 90 { 0.0 } else { f32::NEG_INFINITY }).collect();
    let bias = Tensor::from_vec(causal, (1, 1, 90, 90), &Device::Cpu)?;
    let expected = plain(&q, &k, &v, &bias)?;
    let dense = SpargeConfig::dense();
    let by_flag = Options { causal: Some(Alignment::TopLeft), ..Options::default() };
    let by_mask = Options { attn_mask: Some(bias.clone()), ..Options::default() };
    let visible = bias.ge(0f32)?;
    let by_bool = Options { attn_mask: Some(visible), ..Options::default() };
    let by_window =
        Options { window: Some(Window { left: None, right: Some(0) }), ..Options::default() };
    for options in [by_flag, by_mask, by_bool, by_window] {
        assert!(largest_difference(&attention(&q, &k, &v, &options, &dense)?, &expected)? < 1e-5);
    }

    let nhd = |x: &Tensor| x.transpose(1, 2);
    let options = Options {
        layout: sparge::Layout::Nhd,
        causal: Some(Alignment::TopLeft),
        ..Options::default()
    };
    let o = attention(&nhd(&q)?, &nhd(&k)?, &nhd(&v)?, &options, &dense)?;
    assert!(largest_difference(&o.transpose(1, 2)?, &expected)? < 1e-5);

    let short = Options { kv_lens: Some(vec![33]), ..Options::default() };
    let zero = Tensor::zeros((1, 1, 90, 33), DType::F32, &Device::Cpu)?;
    let expected = plain(&q, &k.narrow(2, 0, 33)?, &v.narrow(2, 0, 33)?, &zero)?;
    assert!(largest_difference(&attention(&q, &k, &v, &short, &dense)?, &expected)? < 1e-5);
    Ok(())
}

#[test]
fn sparse_reports_what_it_skipped_and_errors_are_clear() -> Result<()> {
    let q = randn((1, 2, 1024, 32))?;
    let config = SpargeConfig { selection: Selection::TopK(0.5).into(), ..SpargeConfig::default() };
    let (_, stats) = attention_with_stats(&q, &q, &q, &Options::default(), &config)?;
    assert!(stats.qk_sparsity() > 0.3);

    let error = |r: Result<Tensor>| r.expect_err("refused").to_string();
    let half = q.to_dtype(DType::F16)?;
    assert!(error(attention(&q, &half, &q, &Options::default(), &config)).contains("to_dtype"));
    let double = q.to_dtype(DType::F64)?;
    assert!(
        error(attention(&double, &double, &double, &Options::default(), &config))
            .contains("F32, F16 or BF16")
    );
    let swapped = q.transpose(2, 3)?;
    assert!(
        error(attention(&swapped, &swapped, &swapped, &Options::default(), &config))
            .contains("contiguous")
    );
    let three = q.squeeze(0)?;
    assert!(
        error(attention(&three, &three, &three, &Options::default(), &config))
            .contains("4 dimensions")
    );
    let mask = Options { attn_mask: Some(double.narrow(3, 0, 1)?), ..Options::default() };
    assert!(error(attention(&q, &q, &q, &mask, &config)).contains("attn_mask"));
    Ok(())
}
