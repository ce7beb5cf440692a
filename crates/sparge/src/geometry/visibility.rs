//! Which keys a query row may see: causal diagonal, sliding window, sinks.

use super::Sequence;
use super::shape::BLOCK_KV;
use crate::config::{Alignment, AttentionOptions};
use std::ops::Range;

/// The visible keys of a row are `0..sink` and `lo..hi`, both cut at `hi` and `kv_len`.
/// `lo` and `hi` never fall from one row to the next; every method relies on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Visibility {
    /// Key index on the diagonal of row 0.
    offset: isize,
    left: Option<usize>,
    right: Option<usize>,
    /// Keys before this one ignore `left`. A multiple of `BLOCK_KV`.
    sink: usize,
    kv_len: usize,
}

/// How much of a tile is visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coverage {
    Empty,
    Partial,
    Full,
}

/// The keys one row sees: those before `hi` that are before `sink` or from `lo` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowKeys {
    sink: usize,
    lo: usize,
    hi: usize,
}

impl RowKeys {
    pub(crate) fn sees(&self, j: usize) -> bool {
        j < self.hi && (j >= self.lo || j < self.sink)
    }
}

impl Visibility {
    pub(crate) fn new(options: &AttentionOptions<'_>, sequence: &Sequence) -> Self {
        let window = options.window.unwrap_or_default();
        let alignment = options.causal.unwrap_or(Alignment::BottomRight);
        Self {
            offset: match alignment {
                Alignment::TopLeft => 0,
                Alignment::BottomRight => sequence.kv_len as isize - sequence.q_len as isize,
            },
            left: window.left,
            right: if options.causal.is_some() { Some(0) } else { window.right },
            sink: options.sink_blocks.saturating_mul(BLOCK_KV),
            kv_len: sequence.kv_len,
        }
    }

    /// One past the last key row `i` sees.
    pub(crate) fn hi(&self, i: usize) -> usize {
        match self.right {
            None => self.kv_len,
            Some(right) => clamp(
                (i as isize)
                    .saturating_add(self.offset)
                    .saturating_add_unsigned(right)
                    .saturating_add(1),
                self.kv_len,
            ),
        }
    }

    /// The first key inside row `i`'s window.
    fn lo(&self, i: usize) -> usize {
        match self.left {
            None => 0,
            Some(left) => clamp(
                (i as isize).saturating_add(self.offset).saturating_sub_unsigned(left),
                self.kv_len,
            ),
        }
    }

    /// The keys row `i` sees.
    pub(crate) fn row(&self, i: usize) -> RowKeys {
        RowKeys { sink: self.sink, lo: self.lo(i), hi: self.hi(i) }
    }

    /// An upper bound on the keys that any of the first `q_len` rows sees.
    pub(crate) fn reach(&self, q_len: usize) -> usize {
        let seen = q_len.checked_sub(1).map_or(0, |last| self.hi(last));
        match (self.left, self.right) {
            (Some(left), Some(right)) => {
                let window = left.saturating_add(right).saturating_add(1);
                seen.min(window.saturating_add(self.sink))
            }
            // The window's near end only moves away: the first row sees most.
            (Some(_), None) => self.kv_len - self.lo(0) + self.sink.min(self.lo(0)),
            (None, _) => seen,
        }
    }

    /// How much of `rows` × `keys` is visible. `keys` does not cross the end of the sinks.
    pub(crate) fn tile(&self, rows: &Range<usize>, keys: &Range<usize>) -> Coverage {
        if rows.is_empty() || keys.is_empty() {
            return Coverage::Empty;
        }
        let (first, last) = (rows.start, rows.end - 1);
        let in_sink = keys.end <= self.sink;
        if self.hi(first) >= keys.end && (in_sink || self.lo(last) <= keys.start) {
            return Coverage::Full;
        }
        // The first row whose `hi` passes keys.start has the smallest `lo` of those that do.
        let reaching = match self.right {
            None => first,
            Some(right) => {
                let row = (keys.start as isize)
                    .saturating_sub(self.offset)
                    .saturating_sub_unsigned(right);
                first.max(usize::try_from(row).unwrap_or(0))
            }
        };
        if reaching > last || self.hi(reaching) <= keys.start {
            return Coverage::Empty;
        }
        if in_sink || self.lo(reaching) < keys.end { Coverage::Partial } else { Coverage::Empty }
    }

    /// The key position that row `i` is aligned with; it may lie outside the keys.
    pub(crate) fn position(&self, i: usize) -> isize {
        self.offset.saturating_add_unsigned(i)
    }

    /// Whether no row sees keys after its position.
    pub(crate) fn is_causal(&self) -> bool {
        self.right == Some(0)
    }

    /// Whether any row is cut at a diagonal.
    pub(crate) fn has_diagonal(&self) -> bool {
        self.right.is_some()
    }

    /// The keys on the diagonal of `rows` (empty where there is none).
    pub(crate) fn diagonal(&self, rows: &Range<usize>) -> Range<usize> {
        if self.right.is_none() || rows.is_empty() {
            return 0..0;
        }
        let at = |i: usize| clamp((i as isize).saturating_add(self.offset), self.kv_len);
        let past = |i: usize| {
            clamp((i as isize).saturating_add(self.offset).saturating_add(1), self.kv_len)
        };
        at(rows.start)..past(rows.end - 1)
    }
}

fn clamp(x: isize, max: usize) -> usize {
    usize::try_from(x).unwrap_or(0).min(max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Window;

    #[test]
    fn tiles_agree_with_elements() {
        let kv_len = 200;
        for q_len in [1, 150, 200, 260] {
            let seq = Sequence { batch: 0, q_start: 0, q_len, kv_start: 0, kv_len };
            for causal in [None, Some(Alignment::TopLeft), Some(Alignment::BottomRight)] {
                for (left, right) in
                    [(None, None), (Some(0), None), (Some(70), Some(3)), (Some(90), Some(0))]
                {
                    for sink_blocks in [0, 1] {
                        let options = AttentionOptions {
                            causal,
                            window: Some(Window { left, right }),
                            sink_blocks,
                            ..Default::default()
                        };
                        let vis = Visibility::new(&options, &seq);
                        let seen = |i| (0..kv_len).filter(|&j| vis.row(i).sees(j)).count();
                        let widest = (0..q_len).map(seen).max().unwrap_or(0);
                        assert!(vis.reach(q_len) >= widest, "{vis:?}");
                        assert!(vis.reach(q_len) <= widest + BLOCK_KV, "{vis:?} {widest}");
                        for r0 in (0..q_len).step_by(16) {
                            let rows = r0..(r0 + 16).min(q_len);
                            for k0 in (0..kv_len).step_by(16) {
                                let keys = k0..(k0 + 16).min(kv_len);
                                let seen = rows
                                    .clone()
                                    .flat_map(|i| keys.clone().map(move |j| (i, j)))
                                    .filter(|&(i, j)| vis.row(i).sees(j))
                                    .count();
                                let expected = match seen {
                                    0 => Coverage::Empty,
                                    n if n == rows.len() * keys.len() => Coverage::Full,
                                    _ => Coverage::Partial,
                                };
                                assert_eq!(
                                    vis.tile(&rows, &keys),
                                    expected,
                                    "{vis:?} {rows:?} {keys:?}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}
