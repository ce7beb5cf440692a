//! The tensors of a call, read from a safetensors file.

use crate::error::{Error, Result};
use crate::safetensor::{Reader, Stored, Tensor};
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use sparge::{BlockMask, Dims, Element, ElementMask, Layout, Lengths, Strides, TensorView};

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

/// The dtype of q, which k and v must share.
pub(crate) fn element_type(file: &Reader) -> Result<Dtype> {
    let q = file.require("q")?.dtype;
    for name in ["k", "v"] {
        let dtype = file.require(name)?.dtype;
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
        let kv_lens = file.info("kv_lens").is_some().then(|| indices(file, "kv_lens")).transpose()?;
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

fn mask_view<'a, T: Copy>(
    data: &'a [T],
    shape: &[usize],
    q_len: usize,
) -> Result<TensorView<'a, T>> {
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
    let dims = Dims { batch, heads, len, dim };
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
            usize::try_from(x)
                .map_err(|_| Error::input(format!("'{name}' holds {x}, expected numbers from 0 up")))
        })
        .collect()
}
