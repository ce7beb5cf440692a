//! The compared methods against their definitions, in plain f64.

use sparge::policy;
use sparge::testing::structured;
use sparge::*;

const LEN: usize = 1024;
const DIM: usize = 32;

fn head(seed: u64) -> [Vec<f32>; 2] {
    [structured(seed, 1, LEN, DIM), structured(seed + 1, 1, LEN, DIM)]
}

fn chosen([q, k]: &[Vec<f32>; 2], name: &str) -> BlockMask {
    let view = |x| TensorView::hnd(x, [1, 1, LEN, DIM]).expect("a view");
    let options = AttentionOptions { causal: Some(Alignment::TopLeft), ..Default::default() };
    policy::mask(&view(q), &view(k), &options, &name.parse().expect(name)).expect(name)
}

/// It is the expected mask, and one that skips something.
#[track_caller]
fn is(got: &BlockMask, expected: &BlockMask, name: &str) {
    let all = (0..LEN / 128).map(|i| 2 * i + 2).sum::<usize>();
    assert!(expected.count() < all, "{name} skips nothing");
    assert_eq!(got, expected, "{name}");
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn row(x: &[f32], i: usize) -> &[f32] {
    &x[i * DIM..(i + 1) * DIM]
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = p.iter().sum();
    p.iter().map(|p| p / sum).collect()
}

/// Causal attention of the last `n` queries: `[query][key]`.
fn last([q, k]: &[Vec<f32>; 2], n: usize) -> Vec<Vec<f64>> {
    let scores = |i: usize| -> Vec<f64> {
        (0..=i).map(|j| dot(row(q, i), row(k, j)) / (DIM as f64).sqrt()).collect()
    };
    (LEN - n..LEN).map(|i| softmax(&scores(i))).collect()
}

/// Sums of the columns and of the diagonals (query − key).
fn lines(attention: &[Vec<f64>]) -> [Vec<f64>; 2] {
    let (mut columns, mut diagonals) = (vec![0.0; LEN], vec![0.0; LEN]);
    for p in attention {
        let i = p.len() - 1;
        for (j, p) in p.iter().enumerate() {
            columns[j] += p;
            diagonals[i - j] += p;
        }
    }
    [columns, diagonals]
}

/// Indices by falling value.
fn sorted(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order
}

fn mean(x: &[f32]) -> Vec<f32> {
    let n = (x.len() / DIM) as f32;
    (0..DIM).map(|d| x.iter().skip(d).step_by(DIM).sum::<f32>() / n).collect()
}

fn empty() -> BlockMask {
    BlockMask::empty([1, 1, LEN / 128, LEN / 64]).expect("small")
}

fn set_wide(mask: &mut BlockMask, i: usize, j: usize) {
    mask.set(0, 0, i, 2 * j);
    mask.set(0, 0, i, 2 * j + 1);
}

#[test]
fn minference_is_its_definition() {
    for (seed, v, s) in [(1, 32, 110), (3, 36, 160), (5, 60, 103)] {
        let x = head(seed);
        let [mut columns, mut diagonals] = lines(&last(&x, 64));
        columns[..30].fill(f64::INFINITY);
        diagonals[..100].fill(f64::INFINITY);
        let (columns, diagonals) = (&sorted(&columns)[..v], &sorted(&diagonals)[..s]);
        let mut expected = empty();
        for i in 0..LEN {
            let on_lines = columns.iter().filter(|&&j| j <= i).copied();
            let on_diagonals = diagonals.iter().filter_map(|&o| i.checked_sub(o));
            on_lines.chain(on_diagonals).for_each(|j| expected.set(0, 0, i / 128, j / 64));
        }
        let name = format!("minference:v={v},s={s}");
        is(&chosen(&x, &name), &expected, &name);
    }
}

/// FlexPrefill's blocks, and whether the head was query-aware.
fn flexprefill(x: &[Vec<f32>; 2], gamma: f64, tau: f64, min: usize) -> (BlockMask, bool) {
    let [q, k] = x;
    let wide = LEN / 128;
    let attention = last(x, 128);
    let [columns, diagonals] =
        lines(&attention).map(|x| x.iter().map(|x| x / 128.0).collect::<Vec<_>>());
    let count = |x: &[f64]| {
        let mut sum = 0.0;
        let within = sorted(x)
            .iter()
            .filter(|&&i| {
                sum += x[i];
                sum <= gamma
            })
            .count();
        ((within + 1) / 128 + 1).clamp(min / 128, wide)
    };
    let (mut n_columns, mut n_diagonals) = (count(&columns), count(&diagonals));
    let sums = |x: &[f64]| x.chunks(128).map(|x| x.iter().sum()).collect::<Vec<f64>>();
    let (mut columns, mut diagonals) = (sums(&columns), sums(&diagonals));
    let keys: Vec<Vec<f32>> = k.chunks(128 * DIM).map(mean).collect();
    let score = |q: &[f32], j: usize| dot(q, &keys[j]) / (DIM as f64).sqrt();
    let query = mean(&q[(LEN - 128) * DIM..]);
    let pooled = softmax(&(0..wide).map(|j| score(&query, j)).collect::<Vec<_>>());
    let js: f64 = pooled
        .iter()
        .zip(&columns)
        .map(|(a, b)| {
            let m = (a + b) / 2.0;
            0.5 * a * (a / m).ln() + 0.5 * b * (b / m).ln()
        })
        .sum();
    let query_aware = js.sqrt() < tau;
    if query_aware {
        (n_columns, n_diagonals) = (min / 128, min / 128);
    }
    (columns[0], diagonals[0]) = (f64::INFINITY, f64::INFINITY);
    let mut mask = empty();
    for i in 0..wide {
        sorted(&columns)[..n_columns]
            .iter()
            .filter(|&&j| j <= i)
            .for_each(|&j| set_wide(&mut mask, i, j));
        let on_diagonals = sorted(&diagonals)[..n_diagonals].to_vec();
        on_diagonals
            .iter()
            .filter_map(|&s| i.checked_sub(s))
            .for_each(|j| set_wide(&mut mask, i, j));
    }
    if query_aware {
        let mut entries = Vec::new();
        for i in 0..wide {
            let query = mean(&q[i * 128 * DIM..(i + 1) * 128 * DIM]);
            let p = softmax(&(0..=i).map(|j| score(&query, j)).collect::<Vec<_>>());
            entries.extend(p.into_iter().enumerate().map(|(j, p)| (p, i, j)));
        }
        entries.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut sum = 0.0;
        for (p, i, j) in entries {
            sum += p;
            if sum <= gamma * wide as f64 {
                set_wide(&mut mask, i, j);
            }
        }
    }
    (mask, query_aware)
}

#[test]
fn flexprefill_is_its_definition() {
    let mut seen = [false; 2];
    for (seed, gamma, tau, min) in
        [(1, 0.8, 0.0, 128), (3, 0.5, 0.2, 128), (5, 0.6, 0.83, 128), (7, 0.4, 0.8, 256)]
    {
        let x = head(seed);
        let (expected, query_aware) = flexprefill(&x, gamma, tau, min);
        seen[usize::from(query_aware)] = true;
        let name = format!("flexprefill:{gamma},tau={tau},min={min}");
        is(&chosen(&x, &name), &expected, &name);
    }
    assert_eq!(seen, [true; 2], "both kinds of heads");
}

fn xattention([q, k]: &[Vec<f32>; 2], s: usize, threshold: f64) -> BlockMask {
    let (n, wide) = (LEN / s, LEN / 128);
    let mut mass = vec![vec![0.0; wide]; wide];
    for i in 0..n {
        let antidiagonals = |j: usize| -> f64 {
            (0..s).map(|t| dot(row(q, i * s + s - 1 - t), row(k, j * s + t))).sum()
        };
        let scale = 1.0 / ((DIM as f64).sqrt() * s as f64);
        let z = softmax(&(0..=i).map(|j| antidiagonals(j) * scale).collect::<Vec<_>>());
        z.iter().enumerate().for_each(|(j, z)| mass[i * s / 128][j * s / 128] += z);
    }
    let mut mask = empty();
    for (i, mass) in mass.iter().enumerate() {
        let total: f64 = mass.iter().sum();
        let forced = [0, i];
        let mut before = mass[0] + if i > 0 { mass[i] } else { 0.0 };
        let mut keep = forced.to_vec();
        for j in sorted(mass).into_iter().filter(|j| !forced.contains(j) && *j < i) {
            if before < threshold * total {
                keep.push(j);
            }
            before += mass[j];
        }
        keep.into_iter().for_each(|j| set_wide(&mut mask, i, j));
    }
    mask
}

#[test]
fn xattention_is_its_definition() {
    for (seed, stride, threshold) in [(1, 8, 0.9), (3, 16, 0.5), (5, 4, 0.7), (7, 64, 0.6)] {
        let x = head(seed);
        let name = format!("xattention:{threshold},stride={stride}");
        is(&chosen(&x, &name), &xattention(&x, stride, threshold), &name);
    }
}

#[test]
fn oracle_is_its_definition() {
    for (seed, cdf) in [(1, 0.9), (3, 0.6), (5, 0.3)] {
        let x = head(seed);
        let attention = last(&x, LEN);
        let mut expected = empty();
        for (i, rows) in attention.chunks(128).enumerate() {
            let mut mass = vec![0.0; 2 * i + 2];
            for p in rows {
                p.iter().enumerate().for_each(|(j, p)| mass[j / 64] += p / 128.0);
            }
            // The first block and the diagonal, as a dense configuration keeps them.
            let forced = [0, 2 * i, 2 * i + 1];
            let mut sum: f64 =
                (0..mass.len()).filter(|j| forced.contains(j)).map(|j| mass[j]).sum();
            forced.iter().for_each(|&j| expected.set(0, 0, i, j));
            for j in sorted(&mass).into_iter().filter(|j| !forced.contains(j)) {
                if sum < cdf {
                    expected.set(0, 0, i, j);
                }
                sum += mass[j];
            }
        }
        let name = format!("oracle:{cdf}");
        is(&chosen(&x, &name), &expected, &name);
    }
}
