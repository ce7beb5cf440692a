//! The tensors of a call, read from a safetensors file.

use crate::error::{Error, Result};
use crate::safetensor::{Reader, Stored, Tensor};
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use sparge::{
    AttentionShape, BLOCK_KV, BLOCK_Q, BlockMask, Dims, Element, ElementMask, Layout, Lengths,
    Strides, TensorView,
};
use std::ops::Range;

/// q, k and v.
#[derive(Debug)]
pub(crate) struct Qkv<T> {
    q: Tensor<T>,
    k: Tensor<T>,
    v: Tensor<T>,
    layout: Layout,
}

impl<T: Stored + Element> Qkv<T> {
    /// Reads the three tensors.
    pub(crate) fn read(file: &mut Reader, layout: Layout) -> Result<Self> {
        let [q, k, v] = [file.read("q")?, file.read("k")?, file.read("v")?];
        Ok(Self { q, k, v, layout })
    }

    /// Views for the operator.
    pub(crate) fn views(&self) -> Result<[TensorView<'_, T>; 3]> {
        let view = |name: &str, tensor: &'_ Tensor<T>| -> Result<Dims> {
            dims(name, &tensor.shape, self.layout)
        };
        let (q, k, v) = (view("q", &self.q)?, view("k", &self.k)?, view("v", &self.v)?);
        Ok([
            TensorView::contiguous(&self.q.data, q, self.layout)?,
            TensorView::contiguous(&self.k.data, k, self.layout)?,
            TensorView::contiguous(&self.v.data, v, self.layout)?,
        ])
    }

    /// The shape of the output tensor: q's with v's head dimension.
    pub(crate) fn output_shape(&self) -> Vec<usize> {
        let mut shape = self.q.shape.clone();
        if let (Some(last), Some(&dim)) = (shape.last_mut(), self.v.shape.last()) {
            *last = dim;
        }
        shape
    }
}

impl Qkv<f32> {
    /// Reads the tensors of one layer of a recording, `{prefix}q` and so on, of any element type.
    pub(crate) fn widened(file: &mut Reader, layout: Layout, prefix: &str) -> Result<Self> {
        fn wide<T: Stored + Element>(file: &mut Reader, name: &str) -> Result<Tensor<f32>> {
            let Tensor { data, shape } = file.read::<T>(name)?;
            let mut wide = vec![0.0; data.len()];
            T::widen(&data, &mut wide);
            Ok(Tensor { data: wide, shape })
        }
        let dtype = element_type(file, prefix)?;
        let mut read = |name: &str| match dtype {
            Dtype::F16 => wide::<f16>(file, &format!("{prefix}{name}")),
            Dtype::BF16 => wide::<bf16>(file, &format!("{prefix}{name}")),
            _ => file.read(&format!("{prefix}{name}")),
        };
        let [q, k, v] = [read("q")?, read("k")?, read("v")?];
        Ok(Self { q, k, v, layout })
    }
}

/// The shape of one layer of a recording, from the file's header.
pub(crate) fn recorded_shape(
    file: &Reader,
    layout: Layout,
    prefix: &str,
) -> Result<AttentionShape> {
    let of = |name: &str| {
        let name = format!("{prefix}{name}");
        dims(&name, &file.require(&name)?.shape, layout)
    };
    let (q, k, v) = (of("q")?, of("k")?, of("v")?);
    for (name, a, b) in [
        ("batch entries", q.batch, k.batch),
        ("batch entries", k.batch, v.batch),
        ("heads", k.heads, v.heads),
        ("keys", k.len, v.len),
        ("elements per head", q.dim, k.dim),
    ] {
        if a != b {
            return Err(Error::input(format!(
                "{prefix}q, k and v do not belong together: {a} and {b} {name}"
            )));
        }
    }
    Ok(AttentionShape {
        batch: q.batch,
        num_qo_heads: q.heads,
        num_kv_heads: k.heads,
        qo_len: q.len,
        kv_len: k.len,
        head_dim: q.dim,
        head_dim_v: v.dim,
    })
}

/// One head of one sequence of a call, as a call of its own.
#[derive(Debug)]
pub(crate) struct Head<'a, T> {
    pub(crate) q: TensorView<'a, T>,
    pub(crate) k: TensorView<'a, T>,
    pub(crate) element_mask: Option<ElementMask<'a>>,
    pub(crate) block_mask: Option<BlockMask>,
}

impl<T: Stored + Element> Qkv<T> {
    /// Head `head` of sequence `sequence`; both must exist and the call must be valid.
    pub(crate) fn head<'a>(
        &'a self,
        extras: &'a Extras,
        sequence: usize,
        head: usize,
    ) -> Result<Head<'a, T>> {
        let (dq, dk) =
            (dims("q", &self.q.shape, self.layout)?, dims("k", &self.k.shape, self.layout)?);
        let (batch, q_range, k_range) = match (&extras.packed, &extras.kv_lens) {
            (Some([q, k]), _) => (0, q[sequence]..q[sequence + 1], k[sequence]..k[sequence + 1]),
            (None, Some(lens)) => (sequence, 0..dq.len, 0..lens[sequence]),
            (None, None) => (sequence, 0..dq.len, 0..dk.len),
        };
        let (q_len, kv_len) = (q_range.len(), k_range.len());
        if q_len == 0 || kv_len == 0 {
            return Err(Error::input(format!(
                "sequence {sequence} has {q_len} queries and {kv_len} keys; there is nothing to draw"
            )));
        }
        let kv_head = head / (dq.heads / dk.heads).max(1);
        let one = |data, dims, head, range| slice(data, dims, self.layout, (batch, head), range);
        Ok(Head {
            q: one(&self.q.data, dq, head, q_range)?,
            k: one(&self.k.data, dk, kv_head, k_range)?,
            element_mask: extras.head_element_mask(sequence, head, [q_len, kv_len])?,
            block_mask: extras.head_block_mask(sequence, head, [q_len, kv_len])?,
        })
    }
}

/// The tokens `range` of one head, as a tensor of one batch entry and one head.
fn slice<T: Copy>(
    data: &[T],
    dims: Dims,
    layout: Layout,
    (batch, head): (usize, usize),
    range: Range<usize>,
) -> Result<TensorView<'_, T>> {
    let strides = Strides::contiguous(dims, layout);
    let start = batch * strides.batch + head * strides.head + range.start * strides.token;
    let one = Dims { batch: 1, heads: 1, len: range.len(), dim: dims.dim };
    Ok(TensorView::strided(data.get(start..).unwrap_or_default(), one, strides)?)
}

/// The dtype of `{prefix}q`, which k and v must share.
pub(crate) fn element_type(file: &Reader, prefix: &str) -> Result<Dtype> {
    let q = file.require(&format!("{prefix}q"))?.dtype;
    for name in ["k", "v"] {
        let dtype = file.require(&format!("{prefix}{name}"))?.dtype;
        if dtype != q {
            return Err(Error::input(format!(
                "'{name}' is {dtype:?} but 'q' is {q:?}; q, k and v must have one type"
            )));
        }
    }
    match q {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(q),
        other => Err(Error::input(format!(
            "q, k and v are {other:?}, expected F32, F16 or BF16; convert them first"
        ))),
    }
}

/// Sizes of q, k or v. Three dimensions are a batch of one.
fn dims(name: &str, shape: &[usize], layout: Layout) -> Result<Dims> {
    let (batch, a, b, dim) = match *shape {
        [batch, a, b, dim] => (batch, a, b, dim),
        [a, b, dim] => (1, a, b, dim),
        _ => {
            let expected = match layout {
                Layout::Hnd => "[batch, heads, tokens, head_dim]",
                Layout::Nhd => "[batch, tokens, heads, head_dim]",
            };
            return Err(Error::input(format!(
                "'{name}' has shape {shape:?}, expected {expected} (or the same without batch)"
            )));
        }
    };
    let (heads, len) = match layout {
        Layout::Hnd => (a, b),
        Layout::Nhd => (b, a),
    };
    Ok(Dims { batch, heads, len, dim })
}

/// The optional tensors.
#[derive(Debug, Default)]
pub(crate) struct Extras {
    pub(crate) block_mask: Option<BlockMask>,
    element_mask: Option<MaskData>,
    kv_lens: Option<Vec<usize>>,
    packed: Option<[Vec<usize>; 2]>,
}

/// An element mask's values and sizes.
#[derive(Debug)]
enum MaskData {
    Bool(Vec<bool>, Vec<usize>),
    Additive(Vec<f32>, Vec<usize>),
}

impl Extras {
    /// Reads those that are there.
    pub(crate) fn read(file: &mut Reader) -> Result<Self> {
        let cu_seqlens = ["cu_seqlens_q", "cu_seqlens_k"].map(|name| file.info(name).is_some());
        let packed = match cu_seqlens {
            [true, true] => Some([indices(file, "cu_seqlens_q")?, indices(file, "cu_seqlens_k")?]),
            [false, false] => None,
            [q, _] => {
                let (there, missing) = if q { ("q", "k") } else { ("k", "q") };
                return Err(Error::input(format!(
                    "there is cu_seqlens_{there} but no cu_seqlens_{missing}; packed sequences need both"
                )));
            }
        };
        let kv_lens =
            file.info("kv_lens").is_some().then(|| indices(file, "kv_lens")).transpose()?;
        if packed.is_some() && kv_lens.is_some() {
            return Err(Error::input(
                "there are both cu_seqlens and kv_lens; give cu_seqlens for packed sequences or \
                 kv_lens for padded ones",
            ));
        }
        Ok(Self {
            block_mask: block_mask(file)?,
            element_mask: element_mask(file)?,
            kv_lens,
            packed,
        })
    }

    /// Ragged batches.
    pub(crate) fn lengths(&self) -> Lengths<'_> {
        match (&self.packed, &self.kv_lens) {
            (Some([q, k]), _) => Lengths::Packed { cu_seqlens_q: q, cu_seqlens_k: k },
            (None, Some(lens)) => Lengths::Keys(lens),
            (None, None) => Lengths::Full,
        }
    }

    /// (queries, keys) of every sequence, given the tensors' lengths.
    pub(crate) fn sequence_lengths(&self, q_len: usize, kv_len: usize) -> Vec<(usize, usize)> {
        let span = |w: &[usize]| w[1].saturating_sub(w[0]);
        match (&self.packed, &self.kv_lens) {
            (Some([q, k]), _) => q.windows(2).map(span).zip(k.windows(2).map(span)).collect(),
            (None, Some(lens)) => lens.iter().map(|&len| (q_len, len)).collect(),
            (None, None) => vec![(q_len, kv_len)],
        }
    }

    fn head_element_mask(
        &self,
        sequence: usize,
        head: usize,
        lens: [usize; 2],
    ) -> Result<Option<ElementMask<'_>>> {
        let at = (sequence, head);
        Ok(match &self.element_mask {
            None => None,
            Some(MaskData::Bool(data, shape)) => {
                Some(ElementMask::Bool(mask_slice(data, shape, at, lens)?))
            }
            Some(MaskData::Additive(data, shape)) => {
                Some(ElementMask::Additive(mask_slice(data, shape, at, lens)?))
            }
        })
    }

    fn head_block_mask(
        &self,
        sequence: usize,
        head: usize,
        [q_len, kv_len]: [usize; 2],
    ) -> Result<Option<BlockMask>> {
        let Some(all) = &self.block_mask else { return Ok(None) };
        let [sequences, heads, _, _] = all.shape();
        let (q_blocks, kv_blocks) = (q_len.div_ceil(BLOCK_Q), kv_len.div_ceil(BLOCK_KV));
        let mut one = BlockMask::empty([1, 1, q_blocks, kv_blocks])?;
        for i in 0..q_blocks {
            let row = all.row(sequence % sequences, head % heads, i);
            row.take_while(|&j| j < kv_blocks).for_each(|j| one.set(0, 0, i, j));
        }
        Ok(Some(one))
    }

    /// The element mask, where a mask's single query row stands for all `q_len` rows.
    pub(crate) fn element_mask(&self, q_len: usize) -> Result<Option<ElementMask<'_>>> {
        Ok(match &self.element_mask {
            None => None,
            Some(MaskData::Bool(data, shape)) => {
                Some(ElementMask::Bool(mask_view(data, shape, q_len)?))
            }
            Some(MaskData::Additive(data, shape)) => {
                Some(ElementMask::Additive(mask_view(data, shape, q_len)?))
            }
        })
    }
}

fn mask_dims(shape: &[usize]) -> Result<Dims> {
    let (batch, heads, len, dim) = match *shape {
        [batch, heads, len, dim] => (batch, heads, len, dim),
        [len, dim] => (1, 1, len, dim),
        _ => {
            return Err(Error::input(format!(
                "'attn_mask' has shape {shape:?}, expected [batch or 1, heads or 1, queries or 1, \
                 keys] or [queries, keys]"
            )));
        }
    };
    Ok(Dims { batch, heads, len, dim })
}

/// One head's part of a mask that fits the call.
fn mask_slice<'a, T: Copy>(
    data: &'a [T],
    shape: &[usize],
    (sequence, head): (usize, usize),
    [q_len, kv_len]: [usize; 2],
) -> Result<TensorView<'a, T>> {
    let dims = mask_dims(shape)?;
    let mut strides = Strides::contiguous(dims, Layout::Hnd);
    let start =
        (sequence % dims.batch.max(1)) * strides.batch + (head % dims.heads.max(1)) * strides.head;
    if dims.len == 1 {
        strides.token = 0;
    }
    let one = Dims { batch: 1, heads: 1, len: q_len, dim: kv_len };
    Ok(TensorView::strided(data.get(start..).unwrap_or_default(), one, strides)?)
}

fn mask_view<'a, T: Copy>(
    data: &'a [T],
    shape: &[usize],
    q_len: usize,
) -> Result<TensorView<'a, T>> {
    let dims = mask_dims(shape)?;
    let len = dims.len;
    let mut strides = Strides::contiguous(dims, Layout::Hnd);
    if len != 1 {
        return Ok(TensorView::strided(data, dims, strides)?);
    }
    strides.token = 0;
    Ok(TensorView::strided(data, Dims { len: q_len, ..dims }, strides)?)
}

fn element_mask(file: &mut Reader) -> Result<Option<MaskData>> {
    const NAME: &str = "attn_mask";
    let Some(info) = file.info(NAME) else { return Ok(None) };
    fn widened<T: Stored + Element>(file: &mut Reader) -> Result<MaskData> {
        let mask = file.read::<T>(NAME)?;
        Ok(MaskData::Additive(mask.data.iter().map(|x| x.to_f32()).collect(), mask.shape))
    }
    Ok(Some(match info.dtype {
        Dtype::BOOL | Dtype::U8 => {
            let mask = file.read_bytes(NAME)?;
            MaskData::Bool(mask.data.iter().map(|&b| b != 0).collect(), mask.shape)
        }
        Dtype::F32 => {
            let mask = file.read::<f32>(NAME)?;
            MaskData::Additive(mask.data, mask.shape)
        }
        Dtype::F16 => widened::<f16>(file)?,
        Dtype::BF16 => widened::<bf16>(file)?,
        other => {
            return Err(Error::input(format!(
                "'attn_mask' is {other:?}, expected BOOL or U8 (nonzero: may be attended) or F32, \
                 F16 or BF16 (added to the scaled scores)"
            )));
        }
    }))
}

fn block_mask(file: &mut Reader) -> Result<Option<BlockMask>> {
    if file.info("block_mask").is_none() {
        return Ok(None);
    }
    let mask = file.read_bytes("block_mask")?;
    let shape: [usize; 4] = mask.shape.as_slice().try_into().map_err(|_| {
        Error::input(format!(
            "'block_mask' has shape {:?}, expected [batch or 1, heads or 1, ⌈qo_len/128⌉, ⌈kv_len/64⌉]",
            mask.shape
        ))
    })?;
    Ok(Some(BlockMask::from_bytes(shape, &mask.data)?))
}

/// A vector of lengths or offsets.
fn indices(file: &mut Reader, name: &str) -> Result<Vec<usize>> {
    let info = file.require(name)?;
    let wide: Tensor<i64> = match info.dtype {
        Dtype::I64 => file.read(name)?,
        Dtype::I32 => {
            let narrow = file.read::<i32>(name)?;
            Tensor { data: narrow.data.iter().map(|&x| x.into()).collect(), shape: narrow.shape }
        }
        other => {
            return Err(Error::input(format!("'{name}' is {other:?}, expected I32 or I64")));
        }
    };
    if wide.shape.len() != 1 {
        return Err(Error::input(format!(
            "'{name}' has shape {:?}, expected one dimension",
            wide.shape
        )));
    }
    wide.data
        .iter()
        .map(|&x| {
            usize::try_from(x).map_err(|_| {
                Error::input(format!("'{name}' holds {x}, expected numbers from 0 up"))
            })
        })
        .collect()
}
