//! A generalised Hilbert curve: every box, every step of length 1.
//!
//! A *path* here starts at a corner of a box and ends at the corner at the other end of one axis, the
//! path's direction. Colour the cells like a chessboard: a path alternates, so one of length n along
//! its direction can exist only where n is even, or where all three lengths are odd. [`feasible`] is
//! that condition, with the one small exception of a direction of length 1. Conversely each feasible
//! box splits into smaller boxes, each with a feasible path that begins next to where the one before
//! ends:
//!
//! ```text
//! long     a is much longer than b and c: two halves along a
//! bend     b × a: up b, along a, down b                   (and the same with c for b)
//! cube     up b, out c, along a, back c, down b: the Hilbert curve's own step
//! ```
//!
//! The cut of each axis is the one nearest the middle for which all parts are feasible. [`walk`]
//! takes an even axis as the direction where there is one (else all are odd), so it never gets stuck
//! and every step has length 1, whatever the box.

/// A signed axis: steps of ±1 along `axis`, `length` cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Along {
    axis: usize,
    forward: bool,
    length: usize,
}

impl Along {
    fn cut(self, length: usize) -> Self {
        Self { length, ..self }
    }

    fn back(self) -> Self {
        Self { forward: !self.forward, ..self }
    }
}

/// A box at its first corner: the path leads along the first of its axes.
#[derive(Debug, Clone, Copy)]
struct Path {
    start: [usize; 3],
    axes: [Along; 3],
}

/// `start` moved by `steps` cells.
fn moved(mut start: [usize; 3], along: Along, steps: usize) -> [usize; 3] {
    let x = &mut start[along.axis];
    *x = if along.forward { *x + steps } else { *x - steps };
    start
}

/// Whether a path along the first of these lengths exists (see the module's text).
fn feasible([a, b, c]: [usize; 3]) -> bool {
    match a {
        0 => false,
        1 => b == 1 && c == 1,
        _ => a % 2 == 0 || (b % 2 == 1 && c % 2 == 1),
    }
}

/// Visits every cell of the box `size` once, each next to the one before.
pub(super) fn walk(size: [usize; 3], mut visit: impl FnMut([usize; 3])) {
    // Even axes first, then the longest.
    let direction = (0..3).filter(|&i| size[i] > 1);
    let direction = direction.max_by_key(|&i| (size[i].is_multiple_of(2), size[i])).unwrap_or(0);
    let along = |axis: usize| Along { axis, forward: true, length: size[axis] };
    let [b, c] = match direction {
        0 => [1, 2],
        1 => [0, 2],
        _ => [0, 1],
    };
    let path = Path { start: [0; 3], axes: [along(direction), along(b), along(c)] };
    follow(path, &mut visit);
}

fn follow(path: Path, visit: &mut impl FnMut([usize; 3])) {
    let [a, b, c] = path.axes;
    if b.length == 1 && c.length == 1 {
        (0..a.length).for_each(|i| visit(moved(path.start, a, i)));
        return;
    }
    for part in split(path) {
        follow(part, visit);
    }
}

/// The parts of a box that is no line, in order.
fn split(path: Path) -> Vec<Path> {
    let [a, b, c] = path.axes;
    let swapped = Path { axes: [a, c, b], ..path };
    let (w, h, d) = (a.length, b.length, c.length);
    let long = || long(path);
    let (flat, deep) = (|| bend(path), || bend(swapped));
    let cube = || cube(path).or_else(|| cube(swapped));
    // As even-sided as the box allows.
    let found = if 2 * w > 3 * h && 2 * w > 3 * d {
        long().or_else(cube).or_else(flat).or_else(deep)
    } else if 3 * h > 4 * d {
        flat().or_else(cube).or_else(deep).or_else(long)
    } else if 3 * d > 4 * h {
        deep().or_else(cube).or_else(flat).or_else(long)
    } else {
        cube().or_else(flat).or_else(deep).or_else(long)
    };
    // The module's argument is that one of them exists; the tests walk every small box.
    debug_assert!(found.is_some(), "{path:?} has no feasible parts");
    found.unwrap_or_else(|| cells(path))
}

/// Cuts of a length into two, nearest the middle first.
fn cuts(length: usize) -> impl Iterator<Item = usize> {
    let middle = length / 2;
    (0..length)
        .flat_map(move |i| [middle.checked_sub(i), (i > 0).then_some(middle + i)])
        .flatten()
        .filter(move |&cut| cut > 0 && cut < length)
}

/// Two halves along the direction.
fn long(path: Path) -> Option<Vec<Path>> {
    let [a, b, c] = path.axes;
    let parts = |cut: usize| {
        vec![
            Path { axes: [a.cut(cut), b, c], ..path },
            Path { start: moved(path.start, a, cut), axes: [a.cut(a.length - cut), b, c] },
        ]
    };
    cuts(a.length).map(parts).find(|parts| all_feasible(parts))
}

/// Up b, along a, down b.
fn bend(path: Path) -> Option<Vec<Path>> {
    let [a, b, c] = path.axes;
    if b.length < 2 {
        return None;
    }
    let parts = |(h, w): (usize, usize)| {
        let top = moved(moved(path.start, a, a.length - 1), b, h - 1);
        vec![
            Path { start: path.start, axes: [b.cut(h), c, a.cut(w)] },
            Path { start: moved(path.start, b, h), axes: [a, b.cut(b.length - h), c] },
            Path { start: top, axes: [b.cut(h).back(), c, a.cut(a.length - w).back()] },
        ]
    };
    near(b.length, a.length).map(parts).find(|parts| all_feasible(parts))
}

/// Up b, out c, along a, back c, down b.
fn cube(path: Path) -> Option<Vec<Path>> {
    let [a, b, c] = path.axes;
    if b.length < 2 || c.length < 2 {
        return None;
    }
    let parts = |h: usize, d: usize, w: usize| {
        let far = |p| moved(p, a, a.length - 1);
        let deep = |p| moved(p, c, c.length - 1);
        let (b1, b2) = (b.cut(h), b.cut(b.length - h));
        let (a1, a2) = (a.cut(w), a.cut(a.length - w).back());
        let (c1, c2) = (c.cut(d), c.cut(c.length - d).back());
        vec![
            Path { start: path.start, axes: [b1, c1, a1] },
            Path { start: moved(path.start, b, h), axes: [c, a1, b2] },
            Path { start: deep(moved(path.start, b, h - 1)), axes: [a, b1.back(), c2] },
            Path { start: far(deep(moved(path.start, b, h))), axes: [c.back(), a2, b2] },
            Path { start: far(moved(path.start, b, h - 1)), axes: [b1.back(), c1, a2] },
        ]
    };
    // Only the parity of a cut matters: the two cuts nearest the middle of each axis are enough.
    let two = |n: usize| cuts(n).take(2).collect::<Vec<_>>();
    for h in two(b.length) {
        for d in two(c.length) {
            for w in two(a.length) {
                let parts = parts(h, d, w);
                if all_feasible(&parts) {
                    return Some(parts);
                }
            }
        }
    }
    None
}

/// Pairs of cuts, each axis' two nearest the middle.
fn near(first: usize, second: usize) -> impl Iterator<Item = (usize, usize)> {
    cuts(first).take(2).flat_map(move |x| cuts(second).take(2).map(move |y| (x, y)))
}

fn all_feasible(parts: &[Path]) -> bool {
    parts.iter().all(|p| feasible(p.axes.map(|a| a.length)))
}

/// Every cell by itself, row by row.
fn cells(path: Path) -> Vec<Path> {
    let [a, b, c] = path.axes;
    let one = path.axes.map(|x| x.cut(1));
    let places = (0..c.length)
        .flat_map(|k| (0..b.length).flat_map(move |j| (0..a.length).map(move |i| [i, j, k])));
    places
        .map(|[i, j, k]| Path {
            start: moved(moved(moved(path.start, a, i), b, j), c, k),
            axes: one,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(size: [usize; 3]) -> Vec<[usize; 3]> {
        let mut cells = Vec::new();
        walk(size, |cell| cells.push(cell));
        cells
    }

    fn check(size: [usize; 3]) {
        let cells = path(size);
        let steps = cells.windows(2).map(|w| (0..3).map(|i| w[0][i].abs_diff(w[1][i])).sum());
        assert!(steps.into_iter().all(|step: usize| step == 1), "{size:?}: {cells:?}");
        let mut sorted = cells;
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), size.iter().product::<usize>(), "{size:?}");
        assert!(sorted.iter().all(|cell| (0..3).all(|i| cell[i] < size[i])), "{size:?}");
    }

    #[test]
    fn every_small_box_has_unit_steps() {
        for t in 1..12 {
            for h in 1..12 {
                for w in 1..12 {
                    check([t, h, w]);
                }
            }
        }
    }

    #[test]
    fn boxes_of_video_models() {
        // CogVideoX, Mochi, Flux at 1024², and a long thin one.
        for size in [[13, 30, 45], [28, 30, 53], [1, 64, 64], [2, 3, 997]] {
            check(size);
        }
    }

    #[test]
    fn a_power_of_two_square_is_hilberts() {
        // Each quadrant of a Hilbert curve is walked before the next is entered.
        let cells = path([1, 16, 16]);
        for size in [2, 4, 8] {
            for block in cells.chunks(size * size) {
                let of = |cell: &[usize; 3]| [cell[1] / size, cell[2] / size];
                assert!(block.iter().all(|cell| of(cell) == of(&block[0])), "{size}");
            }
        }
    }
}
