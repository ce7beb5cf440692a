//! What kernels look up per sequence and per head. It travels in the arguments of a launch.

use sparge::{
    Alignment, AttentionOptions, AttentionShape, BLOCK_KV, BLOCK_Q, Lengths, Plan, Selection,
    SpargeConfig,
};
use std::mem::size_of;

/// `Sequence` of kernels/sparge/call.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sequence {
    pub(crate) batch: i32,
    pub(crate) q_start: i32,
    pub(crate) q_len: i32,
    pub(crate) kv_start: i32,
    pub(crate) kv_len: i32,
    pub(crate) diagonal: i32,
    pub(crate) q_block0: i32,
    pub(crate) kv_block0: i32,
    pub(crate) is_short: i32,
    pub(crate) unused: i32,
    pub(crate) sample0: i64,
}

/// `Head` of kernels/sparge/call.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Head {
    pub(crate) cdf: f64,
    pub(crate) top_k: f64,
    pub(crate) theta: f32,
    /// log2 units.
    pub(crate) lambda: f32,
    pub(crate) keeps_all: i32,
    pub(crate) is_auto: i32,
}

const _: () = assert!(size_of::<Sequence>() == 48 && size_of::<Head>() == 32);

/// The tables of one kind of call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tables {
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) heads: Vec<Head>,
    /// Query and key blocks of all sequences.
    pub(crate) all: [usize; 2],
    /// Query and key blocks of the longest sequence (of the tensors, unless packed).
    pub(crate) longest: [usize; 2],
    /// Numbers that sampled queries of all sequences leave: one for each of them and key block.
    pub(crate) head_samples: usize,
}

impl Tables {
    /// The tables of the call that `plan` was made for.
    pub(crate) fn new(
        plan: &Plan<'_>,
        options: &AttentionOptions<'_>,
        config: &SpargeConfig,
    ) -> Self {
        let shape = plan.shape();
        let mut sequences: Vec<Sequence> = match options.lengths {
            Lengths::Full => (0..shape.batch).map(|b| whole(shape, b, shape.kv_len)).collect(),
            Lengths::Keys(lens) => {
                lens.iter().enumerate().map(|(b, &len)| whole(shape, b, len)).collect()
            }
            Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => cu_seqlens_q
                .windows(2)
                .zip(cu_seqlens_k.windows(2))
                .map(|(q, k)| Sequence {
                    q_start: q[0] as i32,
                    q_len: (q[1] - q[0]) as i32,
                    kv_start: k[0] as i32,
                    kv_len: (k[1] - k[0]) as i32,
                    ..Sequence::default()
                })
                .collect(),
        };
        let packed = matches!(options.lengths, Lengths::Packed { .. });
        let mut all = [0, 0];
        let mut head_samples = 0;
        let mut longest = if packed {
            [0, 0]
        } else {
            [shape.qo_len.div_ceil(BLOCK_Q), shape.kv_len.div_ceil(BLOCK_KV)]
        };
        for (i, s) in sequences.iter_mut().enumerate() {
            let (q_len, kv_len) = (s.q_len as usize, s.kv_len as usize);
            s.diagonal = match options.causal.unwrap_or(Alignment::BottomRight) {
                Alignment::TopLeft => 0,
                Alignment::BottomRight => s.kv_len - s.q_len,
            };
            s.is_short = i32::from(plan.is_short(i));
            (s.q_block0, s.kv_block0) = (all[0] as i32, all[1] as i32);
            let blocks = [q_len.div_ceil(BLOCK_Q), kv_len.div_ceil(BLOCK_KV)];
            s.sample0 = head_samples as i64;
            head_samples += blocks[0] * config.pooling.sampled_rows * blocks[1];
            for side in 0..2 {
                all[side] += blocks[side];
                longest[side] = longest[side].max(blocks[side]);
            }
        }
        let heads = (0..shape.num_qo_heads).map(|head| settings(config, head)).collect();
        Self { sequences, heads, all, longest, head_samples }
    }

    /// The tables as words: sequences, then heads.
    pub(crate) fn words(&self) -> Vec<u32> {
        let mut words = Vec::new();
        for s in &self.sequences {
            let fields = [
                s.batch,
                s.q_start,
                s.q_len,
                s.kv_start,
                s.kv_len,
                s.diagonal,
                s.q_block0,
                s.kv_block0,
                s.is_short,
                0,
                s.sample0 as i32,
                (s.sample0 >> 32) as i32,
            ];
            words.extend(fields.map(|x| x as u32));
        }
        for h in &self.heads {
            for x in [h.cdf.to_bits(), h.top_k.to_bits()] {
                words.extend([x as u32, (x >> 32) as u32]);
            }
            words.extend([h.theta.to_bits(), h.lambda.to_bits()]);
            words.extend([h.keeps_all as u32, h.is_auto as u32]);
        }
        words
    }

    /// Bytes of the sequences, which come first.
    pub(crate) fn sequence_bytes(&self) -> usize {
        self.sequences.len() * size_of::<Sequence>()
    }
}

fn whole(shape: &AttentionShape, batch: usize, kv_len: usize) -> Sequence {
    Sequence {
        batch: batch as i32,
        q_len: shape.qo_len as i32,
        kv_len: kv_len as i32,
        ..Sequence::default()
    }
}

/// The settings of a head, resolved as `sparge::Plan` does.
fn settings(config: &SpargeConfig, head: usize) -> Head {
    let selection = *config.selection.get(head);
    let (cdf, top_k) = match selection {
        Selection::All => (1.0, 1.0),
        Selection::Auto => (Selection::AUTO_CDF, 0.0),
        Selection::TopCdf(cdf) => (cdf, 0.0),
        Selection::TopK(top_k) => (0.0, top_k),
        Selection::Union { cdf, top_k } => (cdf, top_k),
    };
    let theta = *config.theta.get(head);
    Head {
        cdf,
        top_k,
        theta: theta as f32,
        lambda: (*config.lambda.get(head) * std::f64::consts::LOG2_E) as f32,
        // Every block, whatever its mass.
        keeps_all: i32::from(cdf == 1.0 || top_k == 1.0),
        is_auto: i32::from(selection == Selection::Auto && theta == 0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_sequences_get_their_blocks_and_diagonals() {
        let shape = AttentionShape {
            batch: 1,
            num_qo_heads: 2,
            num_kv_heads: 1,
            qo_len: 400,
            kv_len: 500,
            head_dim: 64,
            head_dim_v: 64,
        };
        let options = AttentionOptions {
            causal: Some(Alignment::BottomRight),
            lengths: Lengths::Packed {
                cu_seqlens_q: &[0, 130, 130, 400],
                cu_seqlens_k: &[0, 200, 210, 500],
            },
            ..Default::default()
        };
        let config = SpargeConfig::default();
        let plan = Plan::new(shape, &options, &config).expect("valid");
        let tables = Tables::new(&plan, &options, &config);
        let starts: Vec<_> = tables.sequences.iter().map(|s| (s.q_block0, s.kv_block0)).collect();
        assert_eq!(starts, [(0, 0), (2, 4), (2, 5)]);
        assert_eq!(tables.sequences[0].diagonal, 70);
        assert_eq!(tables.sequences[1].diagonal, 10);
        assert_eq!(tables.all, [5, 10]);
        let [sequences, heads, q_blocks, kv_blocks] = plan.mask_shape();
        assert_eq!((tables.sequences.len(), tables.heads.len()), (sequences, heads));
        assert_eq!(tables.longest, [q_blocks, kv_blocks]);
        assert_eq!(tables.words().len() * 4, tables.sequence_bytes() + 2 * size_of::<Head>());
    }

    #[test]
    fn auto_looks_at_what_rows_reach() {
        let n = Selection::AUTO_MIN_LEN * 2;
        let shape = AttentionShape {
            batch: 1,
            num_qo_heads: 1,
            num_kv_heads: 1,
            qo_len: n,
            kv_len: n,
            head_dim: 64,
            head_dim_v: 64,
        };
        let is_short = |window| {
            let causal = Some(Alignment::BottomRight);
            let options = AttentionOptions { causal, window, ..Default::default() };
            let config = SpargeConfig::default();
            let plan = Plan::new(shape, &options, &config).expect("valid");
            Tables::new(&plan, &options, &config).sequences[0].is_short
        };
        assert_eq!(is_short(None), 0);
        assert_eq!(is_short(Some(sparge::Window { left: Some(200), right: None })), 1);
    }

    #[test]
    fn settings_are_resolved_as_on_the_cpu() {
        let head = |selection: Selection| {
            settings(&SpargeConfig { selection: selection.into(), ..Default::default() }, 0)
        };
        assert_eq!(head(Selection::TopK(1.0)).keeps_all, 1);
        assert_eq!(head(Selection::Union { cdf: 1.0, top_k: 0.2 }).keeps_all, 1);
        assert_eq!(head(Selection::TopCdf(0.5)).keeps_all, 0);
        assert_eq!((head(Selection::Auto).is_auto, head(Selection::All).keeps_all), (1, 1));
    }
}
