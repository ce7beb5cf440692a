//! Random calls: one description, from which tensors, options and settings are made.
#![expect(unreachable_pub, reason = "a module shared by test binaries")]

use proptest::prelude::*;
use sparge::testing::Rng;
use sparge::*;

#[derive(Debug, Clone)]
pub struct Case {
    pub seed: u64,
    pub shape: AttentionShape,
    pub layout: Layout,
    /// Unused elements between tokens.
    pub gap: usize,
    /// Magnitude of q and k.
    pub scale: f32,
    pub causal: Option<Alignment>,
    pub window: Option<Window>,
    pub sink_blocks: usize,
    pub masks: Masks,
    pub ragged: Ragged,
    pub softmax_scale: Option<f64>,
    pub selection: Selection,
    pub theta: f64,
    pub pooling: Pooling,
    pub isa: Option<Isa>,
    pub qk: QkPrecision,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Masks {
    None,
    Block,
    Bool,
    Additive,
    BlockAndBool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Ragged {
    No,
    Keys,
    Packed,
}

/// The buffers a case's views and options borrow.
pub struct Data<T> {
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub block_mask: Option<BlockMask>,
    pub bools: Vec<bool>,
    pub biases: Vec<f32>,
    pub kv_lens: Vec<usize>,
    pub cu_q: Vec<usize>,
    pub cu_k: Vec<usize>,
    mask_dims: Dims,
}

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..20, 60usize..70, 120usize..140, 200usize..420]
}

pub fn case() -> impl Strategy<Value = Case> {
    let shape = (
        prop_oneof![3 => Just(1usize), 1 => Just(2)],
        prop_oneof![Just((1usize, 1usize)), Just((2, 2)), Just((4, 2)), Just((3, 1))],
        len(),
        len(),
        prop_oneof![Just(64usize), Just(1), 2usize..40, Just(96)],
        prop_oneof![Just(64usize), Just(1), 2usize..40, Just(80)],
    )
        .prop_map(|(batch, (hq, hkv), qo_len, kv_len, head_dim, head_dim_v)| AttentionShape {
            batch,
            num_qo_heads: hq,
            num_kv_heads: hkv,
            qo_len,
            kv_len,
            head_dim,
            head_dim_v,
        });
    let causal =
        prop_oneof![Just(None), Just(Some(Alignment::TopLeft)), Just(Some(Alignment::BottomRight))];
    let window = prop_oneof![
        3 => Just(None),
        1 => (0usize..200, prop_oneof![Just(None), (0usize..50).prop_map(Some)])
            .prop_map(|(l, right)| Some(Window { left: Some(l), right })),
    ];
    let masks = prop_oneof![
        3 => Just(Masks::None),
        1 => Just(Masks::Block),
        1 => Just(Masks::Bool),
        1 => Just(Masks::Additive),
        1 => Just(Masks::BlockAndBool)
    ];
    let ragged =
        prop_oneof![3 => Just(Ragged::No), 1 => Just(Ragged::Keys), 1 => Just(Ragged::Packed)];
    let selection = prop_oneof![
        (0.05f64..1.0).prop_map(Selection::TopCdf),
        (0.05f64..1.0).prop_map(Selection::TopK),
        (0.05f64..1.0, 0.05f64..1.0).prop_map(|(cdf, top_k)| Selection::Union { cdf, top_k }),
    ];
    let pooling = prop_oneof![
        Just(Pooling::BLOCK),
        Just(Pooling::SUB_BLOCK),
        Just(Pooling::SECOND_ORDER),
        Just(Pooling { q_rows: 32, kv_rows: 8, second_order: false, sampled_rows: 0 }),
        Just(Pooling::MIXED),
        Just(Pooling { q_rows: 64, kv_rows: 32, second_order: true, sampled_rows: 5 }),
    ];
    let isa = prop_oneof![3 => Just(None), 1 => Just(Some(Isa::Scalar))];
    (
        (any::<u64>(), shape, prop_oneof![Just(Layout::Hnd), Just(Layout::Nhd)], 0usize..3),
        (prop_oneof![Just(0.1f32), Just(1.0), Just(3.0)], causal, window, 0usize..2, masks, ragged),
        (
            prop_oneof![3 => Just(None), 1 => (0.01f64..1.0).prop_map(Some)],
            selection,
            prop_oneof![2 => Just(0.0f64), 1 => 0.0f64..0.9],
            pooling,
            isa,
            prop_oneof![3 => Just(QkPrecision::F32), 1 => Just(QkPrecision::Int8)],
        ),
    )
        .prop_map(
            |(
                (seed, mut shape, layout, gap),
                (scale, causal, mut window, sink_blocks, masks, ragged),
                (softmax_scale, selection, theta, pooling, isa, qk),
            )| {
                if ragged == Ragged::Packed {
                    shape.batch = 1;
                }
                if let (Some(_), Some(window)) = (causal, &mut window) {
                    window.right = None;
                }
                Case {
                    seed,
                    shape,
                    layout,
                    gap,
                    scale,
                    causal,
                    window,
                    sink_blocks,
                    masks,
                    ragged,
                    softmax_scale,
                    selection,
                    theta,
                    pooling,
                    isa,
                    qk,
                }
            },
        )
}

impl Case {
    pub fn config(&self) -> SpargeConfig {
        SpargeConfig {
            selection: self.selection.into(),
            theta: self.theta.into(),
            lambda: f64::INFINITY.into(),
            pooling: self.pooling,
            isa: self.isa,
            qk: self.qk,
            ..SpargeConfig::default()
        }
    }

    pub fn data<T: Element>(&self) -> Data<T> {
        let s = &self.shape;
        let mut rng = Rng::new(self.seed);
        let mut tensor = |heads: usize, len: usize, dim: usize, scale: f32| -> Vec<T> {
            // Rows drift, so that blocks are self-similar to a varying degree.
            let n = s.batch * heads * len * (dim + self.gap);
            let mut drift = vec![0.0f32; dim + self.gap];
            (0..n)
                .map(|i| {
                    let drift = &mut drift[i % (dim + self.gap)];
                    *drift = 0.95 * *drift + 0.3 * rng.unit();
                    T::from_f32(scale * (*drift + 0.5 * rng.unit()))
                })
                .collect()
        };
        let q = tensor(s.num_qo_heads, s.qo_len, s.head_dim, self.scale);
        let k = tensor(s.num_kv_heads, s.kv_len, s.head_dim, self.scale);
        let v = tensor(s.num_kv_heads, s.kv_len, s.head_dim_v, 1.0);

        let mut cuts = |len: usize| {
            let mut cuts = vec![0, rng.below(len + 1), rng.below(len + 1), len];
            cuts.sort_unstable();
            cuts
        };
        let (cu_q, cu_k) = (cuts(s.qo_len), cuts(s.kv_len));
        let kv_lens = (0..s.batch).map(|_| rng.below(s.kv_len + 1)).collect();
        let longest = |cu: &[usize]| cu.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
        let (sequences, q_len, kv_len) = match self.ragged {
            Ragged::Packed => (3, longest(&cu_q), longest(&cu_k)),
            _ => (s.batch, s.qo_len, s.kv_len),
        };
        let broadcast = rng.below(2) == 0;
        let (mask_b, mask_h) = if broadcast { (1, 1) } else { (sequences, s.num_qo_heads) };
        let blocks = [mask_b, mask_h, q_len.div_ceil(BLOCK_Q), kv_len.div_ceil(BLOCK_KV)];
        let mut block_mask = BlockMask::empty(blocks).expect("small");
        for i in 0..blocks.iter().product() {
            if rng.below(3) > 0 {
                let (j, rest) = (i % blocks[3], i / blocks[3]);
                let (q, rest) = (rest % blocks[2], rest / blocks[2]);
                block_mask.set(rest / blocks[1], rest % blocks[1], q, j);
            }
        }
        let mask_dims = Dims { batch: mask_b, heads: mask_h, len: q_len, dim: kv_len };
        let pairs = mask_b * mask_h * q_len * kv_len;
        // Runs, so that whole blocks can be masked too.
        let mut on = true;
        let bools: Vec<bool> = (0..pairs)
            .map(|_| {
                if rng.below(80) == 0 {
                    on = !on;
                }
                on
            })
            .collect();
        let biases =
            bools.iter().map(|&on| if on { rng.unit() } else { f32::NEG_INFINITY }).collect();
        let block_mask =
            matches!(self.masks, Masks::Block | Masks::BlockAndBool).then_some(block_mask);
        Data { q, k, v, block_mask, bools, biases, kv_lens, cu_q, cu_k, mask_dims }
    }

    pub fn view<'a, T: Element>(
        &self,
        x: &'a [T],
        heads: usize,
        len: usize,
        dim: usize,
    ) -> TensorView<'a, T> {
        let padded = dim + self.gap;
        let dims = Dims { batch: self.shape.batch, heads, len, dim };
        let strides = Strides::contiguous(Dims { dim: padded, ..dims }, self.layout);
        TensorView::strided(x, dims, strides).expect("fits")
    }

    pub fn views<'a, T: Element>(
        &self,
        data: &'a Data<T>,
    ) -> (TensorView<'a, T>, TensorView<'a, T>, TensorView<'a, T>) {
        let s = &self.shape;
        (
            self.view(&data.q, s.num_qo_heads, s.qo_len, s.head_dim),
            self.view(&data.k, s.num_kv_heads, s.kv_len, s.head_dim),
            self.view(&data.v, s.num_kv_heads, s.kv_len, s.head_dim_v),
        )
    }

    pub fn options<'a, T>(&self, data: &'a Data<T>) -> AttentionOptions<'a> {
        AttentionOptions {
            softmax_scale: self.softmax_scale,
            causal: self.causal,
            window: self.window,
            sink_blocks: self.sink_blocks,
            block_mask: data.block_mask.as_ref(),
            element_mask: match self.masks {
                Masks::None | Masks::Block => None,
                Masks::Bool | Masks::BlockAndBool => Some(ElementMask::Bool(
                    TensorView::contiguous(&data.bools, data.mask_dims, Layout::Hnd).expect("fits"),
                )),
                Masks::Additive => Some(ElementMask::Additive(
                    TensorView::contiguous(&data.biases, data.mask_dims, Layout::Hnd)
                        .expect("fits"),
                )),
            },
            lengths: match self.ragged {
                Ragged::No => Lengths::Full,
                Ragged::Keys => Lengths::Keys(&data.kv_lens),
                Ragged::Packed => {
                    Lengths::Packed { cu_seqlens_q: &data.cu_q, cu_seqlens_k: &data.cu_k }
                }
            },
            return_lse: true,
            return_mask: true,
            layout: self.layout,
        }
    }
}

/// Largest |scaled score| and |v|, for tolerances.
pub fn magnitudes<T: Element>(case: &Case, data: &Data<T>) -> (f64, f64) {
    let most = |x: &[T]| x.iter().fold(0.0f64, |m, x| m.max(f64::from(x.to_f32()).abs()));
    let scale = case.softmax_scale.unwrap_or(1.0 / (case.shape.head_dim as f64).sqrt());
    let dim = case.shape.head_dim as f64;
    (scale * dim * most(&data.q) * most(&data.k) + 1.0, most(&data.v))
}
