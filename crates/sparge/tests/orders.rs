//! Orders of tokens: permutations, unit steps, and attention that does not notice.

use proptest::prelude::*;
use sparge::permute::{Grid, Order, Permutation};
use sparge::testing::structured;
use sparge::*;

fn grid() -> impl Strategy<Value = Grid> {
    (0..40usize, 1..20usize, 1..40usize, 1..40usize, 0..40usize).prop_map(
        |(prefix, time, height, width, suffix)| Grid { prefix, time, height, width, suffix },
    )
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        Just(Order::RowMajor),
        Just(Order::ColumnMajor),
        Just(Order::TimeMajor),
        Just(Order::Hilbert),
        any::<u64>().prop_map(|seed| Order::Random { seed }),
    ]
}

proptest! {
    #[test]
    fn every_hilbert_step_has_length_one(grid in grid()) {
        let p = Permutation::new(Order::Hilbert, &grid).expect("a permutation");
        let end = p.indices().len() - grid.suffix;
        let place = |i: u32| {
            let cell = i as usize - grid.prefix;
            let (row, x) = (cell / grid.width, cell % grid.width);
            [row / grid.height, row % grid.height, x]
        };
        for w in p.indices()[grid.prefix..end].windows(2) {
            let (a, b) = (place(w[0]), place(w[1]));
            let step: usize = (0..3).map(|i| a[i].abs_diff(b[i])).sum();
            prop_assert_eq!(step, 1, "{:?} to {:?}", a, b);
        }
    }

    #[test]
    fn permutations_invert_and_leave_text_alone(grid in grid(), order in order(), width in 1..5usize) {
        let p = Permutation::new(order, &grid).expect("a permutation");
        let n = p.indices().len();
        for (i, &token) in p.indices().iter().enumerate() {
            prop_assert_eq!(p.inverse()[token as usize] as usize, i);
            if i < grid.prefix || i >= n - grid.suffix {
                prop_assert_eq!(token as usize, i);
            }
        }
        let x: Vec<u32> = (0..(3 * n * width) as u32).collect();
        let y = p.apply(&x, width).expect("whole sequences");
        prop_assert_eq!(p.invert(&y, width).expect("whole sequences"), x);
        prop_assert_eq!(p.apply(&p.invert(&y, width).expect("whole"), width).expect("whole"), y);
    }

    #[test]
    fn names_round_trip(order in order()) {
        prop_assert_eq!(order.to_string().parse::<Order>(), Ok(order));
    }
}

#[test]
fn orders_of_a_small_box() {
    let of = |order| {
        let grid = Grid { prefix: 1, time: 2, height: 2, width: 3, suffix: 1 };
        Permutation::new(order, &grid).expect("a permutation").indices().to_vec()
    };
    assert_eq!(of(Order::RowMajor), (0..14).collect::<Vec<_>>());
    assert_eq!(of(Order::ColumnMajor), [0, 1, 4, 2, 5, 3, 6, 7, 10, 8, 11, 9, 12, 13]);
    assert_eq!(of(Order::TimeMajor), [0, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11, 6, 12, 13]);
    assert_ne!(of(Order::Random { seed: 0 }), of(Order::Random { seed: 1 }));
}

#[test]
fn attention_does_not_notice_the_order() {
    let grid = Grid { prefix: 17, time: 3, height: 7, width: 9, suffix: 4 };
    let n = 17 + 3 * 7 * 9 + 4;
    let [q, k, v] = [1, 2, 3].map(|seed| structured(seed, 2, n, 16));
    let attend = |q: &[f32], k: &[f32], v: &[f32]| {
        let view = |x| TensorView::hnd(x, [1, 2, n, 16]);
        let (q, k, v) = (view(q)?, view(k)?, view(v)?);
        attention(&q, &k, &v, &AttentionOptions::default(), &SpargeConfig::dense()).map(|out| out.o)
    };
    let expected = attend(&q, &k, &v).expect("a call");
    for order in [Order::Hilbert, Order::ColumnMajor, Order::TimeMajor, Order::Random { seed: 3 }] {
        let p = Permutation::new(order, &grid).expect("a permutation");
        let [q, k, v] = [&q, &k, &v].map(|x| p.apply(x, 16).expect("whole sequences"));
        let o = p.invert(&attend(&q, &k, &v).expect("a call"), 16).expect("whole sequences");
        let worst = o.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-5, "{order}: {worst}");
    }
}

#[test]
fn bad_boxes_and_lengths_are_refused() {
    let empty = Permutation::new(Order::Hilbert, &Grid::of(1, 0, 4));
    assert!(matches!(empty, Err(Error::Dimension { name: "height", .. })));
    let huge = Grid::of(1 << 20, 1 << 20, 1 << 20);
    assert!(matches!(Permutation::new(Order::Hilbert, &huge), Err(Error::Overflow { .. })));
    let wraps = Grid { prefix: usize::MAX, ..Grid::of(1, 1, 2) };
    assert!(matches!(Permutation::new(Order::RowMajor, &wraps), Err(Error::Overflow { .. })));
    let p = Permutation::new(Order::Hilbert, &Grid::of(1, 2, 2)).expect("a permutation");
    assert!(matches!(p.apply(&[0.0; 7], 2), Err(Error::BufferTooShort { .. })));
    assert!(matches!(p.apply(&[0.0; 8], 0), Err(Error::Dimension { .. })));
    assert!("zigzag".parse::<Order>().is_err());
}
