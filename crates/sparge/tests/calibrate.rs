//! Calibration against the operator: what the survey says a setting does is what running it does.

use sparge::calibrate::{
    Bounds, CalibratedModel, Calibration, CalibrationData, Grid, HeadRun, HeadSettings,
    LayerSettings, Measured, Ranking, Shared, rerun, survey,
};
use sparge::testing::{Rng, structured};
use sparge::*;

struct Call {
    shape: AttentionShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    options: AttentionOptions<'static>,
}

impl Call {
    fn new(seed: u64, heads: [usize; 2], lens: [usize; 2], causal: bool, layout: Layout) -> Self {
        let ([num_qo_heads, num_kv_heads], [qo_len, kv_len]) = (heads, lens);
        let (head_dim, head_dim_v) = (32, 24);
        Self {
            shape: AttentionShape {
                batch: 1,
                num_qo_heads,
                num_kv_heads,
                qo_len,
                kv_len,
                head_dim,
                head_dim_v,
            },
            q: structured(seed, num_qo_heads, qo_len, head_dim),
            k: structured(seed + 1, num_kv_heads, kv_len, head_dim),
            v: structured(seed + 2, num_kv_heads, kv_len, head_dim_v),
            options: AttentionOptions {
                causal: causal.then_some(Alignment::BottomRight),
                layout,
                ..Default::default()
            },
        }
    }

    fn views(&self) -> [TensorView<'_, f32>; 3] {
        let s = &self.shape;
        [
            TensorView::hnd(&self.q, [1, s.num_qo_heads, s.qo_len, s.head_dim])
                .expect("a valid call"),
            TensorView::hnd(&self.k, [1, s.num_kv_heads, s.kv_len, s.head_dim])
                .expect("a valid call"),
            TensorView::hnd(&self.v, [1, s.num_kv_heads, s.kv_len, s.head_dim_v])
                .expect("a valid call"),
        ]
    }

    fn dense(&self) -> Vec<f32> {
        let [q, k, v] = self.views();
        attention(&q, &k, &v, &self.options, &SpargeConfig::dense()).expect("a valid call").o
    }
}

fn calls() -> Vec<Call> {
    vec![
        Call::new(1, [4, 2], [700, 700], true, Layout::Hnd),
        Call::new(2, [2, 1], [200, 611], true, Layout::Nhd),
        Call::new(3, [2, 2], [130, 515], false, Layout::Hnd),
    ]
}

#[test]
fn the_survey_says_what_the_operator_does() {
    let grid = Grid {
        rankings: [0.0, 0.3]
            .map(|theta| Ranking::Predicted { pooling: Pooling::SECOND_ORDER, theta })
            .to_vec(),
        selections: vec![
            Selection::TopCdf(0.7),
            Selection::TopCdf(0.95),
            Selection::TopK(0.3),
            Selection::Union { cdf: 0.5, top_k: 0.4 },
        ],
        lambdas: vec![1.0, 4.0],
    };
    let mut skipped = 0;
    for call in calls() {
        let [q, k, v] = call.views();
        let mut out = vec![0.0; call.dense().len()];
        let config = SpargeConfig::default();
        let tallies = survey(&q, &k, &v, &call.options, &config, &grid, &mut out).unwrap();
        let dense = call.dense();
        for (i, (a, b)) in out.iter().zip(&dense).enumerate() {
            assert!((a - b).abs() < 2e-5, "element {i}: {a}, dense {b}");
        }
        for (r, ranking) in grid.rankings.iter().enumerate() {
            let Ranking::Predicted { pooling, theta } = *ranking else { unreachable!() };
            for (s, &selection) in grid.selections.iter().enumerate() {
                for (l, &lambda) in grid.lambdas.iter().chain(&[f64::INFINITY]).enumerate() {
                    let config = SpargeConfig {
                        selection: selection.into(),
                        theta: theta.into(),
                        lambda: lambda.into(),
                        pooling,
                        ..SpargeConfig::default()
                    };
                    let runs = rerun(&q, &k, &v, &call.options, &config, &dense).unwrap();
                    for (head, (run, tally)) in runs.iter().zip(&tallies).enumerate() {
                        let cell = &tally.cells[r * grid.selections.len() + s];
                        let what = format!("{:?} head {head}: {config:?}", call.shape);
                        assert_eq!(tally.reachable_blocks, run.stats.reachable_blocks, "{what}");
                        assert_eq!(tally.reachable_groups, run.stats.reachable_groups, "{what}");
                        assert_eq!(cell.qk_blocks, run.stats.qk_blocks, "{what}");
                        let groups = cell.pv_groups[l].abs_diff(run.stats.pv_groups);
                        assert!(groups <= 1, "{what}: {groups} groups");
                        let (said, is) = (tally.measured(cell, l).rel_l1, run.measured().rel_l1);
                        assert!((said - is).abs() < 1e-4 + 1e-2 * is, "{what}: {said}, is {is}");
                        skipped += usize::from(is > 0.01 && run.measured().qk_sparsity > 0.1);
                    }
                }
            }
        }
    }
    assert!(skipped > 20, "only {skipped} settings skipped anything that mattered");
}

#[test]
fn true_masses_lose_the_least_mass() {
    let pooled = Ranking::Predicted { pooling: Pooling::BLOCK, theta: 0.0 };
    // Noise: a block's mean says little about its rows.
    let mut rng = Rng::new(9);
    let mut call = Call::new(1, [4, 2], [700, 700], true, Layout::Hnd);
    call.q.iter_mut().chain(&mut call.k).for_each(|x| *x = 2.0 * rng.normal());
    let [q, k, v] = call.views();
    let plan = Plan::new(call.shape, &call.options, &SpargeConfig::paper(Selection::All)).unwrap();
    let given =
        (0..4).map(|head| block_masses(&plan, &q, &k, 0, head).unwrap()).collect::<Vec<_>>();
    let grid = Grid {
        rankings: vec![pooled, Ranking::Exact, Ranking::Given(given)],
        selections: vec![Selection::TopK(0.3), Selection::TopK(0.6)],
        lambdas: vec![],
    };
    let mut out = call.dense();
    // Nothing forced but what must be: there is little to choose otherwise.
    let config = SpargeConfig { keep_local: 0, ..SpargeConfig::default() };
    let tallies = survey(&q, &k, &v, &call.options, &config, &grid, &mut out).unwrap();
    for tally in &tallies {
        for s in 0..2 {
            let (predicted, exact) = (&tally.cells[s], &tally.cells[2 + s]);
            assert_eq!(predicted.qk_blocks, exact.qk_blocks);
            assert!(exact.lost_mass <= predicted.lost_mass * 1.001, "{exact:?} {predicted:?}");
            // Stage 1's own masses, handed in, are stage 1. (Frontier blocks have none and are
            // forced either way.)
            assert_eq!(predicted, &tally.cells[4 + s]);
        }
        assert_eq!(tally.cells[6].l1, [0.0]);
        assert_eq!(tally.cells[6].qk_blocks, tally.reachable_blocks);
    }
    let ratios: Vec<f64> =
        tallies.iter().map(|t| t.cells[2].lost_mass / t.cells[0].lost_mass).collect();
    assert!(ratios.iter().all(|r| *r < 0.9995), "{ratios:?}");
}

#[test]
fn the_choice_is_within_the_bounds_when_it_is_run() {
    let grid = Grid::tuning(Pooling::SECOND_ORDER);
    let call = &calls()[0];
    let [q, k, v] = call.views();
    let mut out = call.dense();
    let tallies =
        survey(&q, &k, &v, &call.options, &SpargeConfig::default(), &grid, &mut out).unwrap();
    let mut sparsities = Vec::new();
    for bounds in [Bounds { l1: 0.02, l2: 0.03 }, Bounds { l1: 0.1, l2: 0.12 }] {
        let heads: Vec<HeadSettings> = tallies.iter().map(|t| t.choose(&grid, bounds)).collect();
        let calibration = file(heads.clone());
        let config = calibration.config(0).unwrap();
        let runs = rerun(&q, &k, &v, &call.options, &config, &out).unwrap();
        for (run, head) in runs.iter().zip(&heads) {
            let (is, said) = (run.measured(), head.measured);
            assert!(is.rel_l1 <= bounds.l2 * 1.01 + 1e-4, "{is:?} {head:?}");
            assert!((is.qk_sparsity - said.qk_sparsity).abs() < 1e-9, "{is:?} {said:?}");
        }
        sparsities.push(runs.iter().map(|r| r.measured().qk_sparsity).sum::<f64>());
    }
    assert!(sparsities[0] < sparsities[1] && sparsities[1] > 0.0, "{sparsities:?}");
    // No error allowed: dense, stage 2 off.
    for tally in &tallies {
        let head = tally.choose(&grid, Bounds { l1: 0.0, l2: 0.0 });
        assert!(head.is_dense() && head.lambda.is_none() && head.measured.rel_l1 == 0.0);
    }
}

#[test]
fn tallies_and_runs_add_up() {
    let grid = Grid::tuning(Pooling::SUB_BLOCK);
    let call = &calls()[1];
    let [q, k, v] = call.views();
    let mut out = call.dense();
    let tally = |out: &mut Vec<f32>| {
        survey(&q, &k, &v, &call.options, &SpargeConfig::default(), &grid, out).unwrap().remove(0)
    };
    let once = tally(&mut out);
    let mut twice = grid.tally();
    twice += &once;
    twice += &once;
    assert_eq!(twice.norm, 2.0 * once.norm);
    assert_eq!(twice.cells[3].qk_blocks, 2 * once.cells[3].qk_blocks);
    let bounds = Bounds { l1: 0.05, l2: 0.06 };
    assert_eq!(twice.choose(&grid, bounds), once.choose(&grid, bounds));
    let mut run = HeadRun::default();
    run += &HeadRun { l1: 1.0, norm: 10.0, ..run };
    run += &HeadRun { l1: 3.0, norm: 10.0, ..HeadRun::default() };
    assert_eq!(run.measured().rel_l1, 0.2);
}

#[test]
fn data_that_is_not_finite_is_refused() {
    let mut call = Call::new(4, [1, 1], [130, 130], false, Layout::Hnd);
    call.v[77] = f32::INFINITY;
    let [q, k, v] = call.views();
    let mut out = vec![0.0; 130 * 24];
    let grid = Grid::tuning(Pooling::BLOCK);
    let config = SpargeConfig::default();
    let error = survey(&q, &k, &v, &call.options, &config, &grid, &mut out).unwrap_err();
    assert!(error.to_string().contains("not finite"), "{error}");
    for bad in [
        Grid { selections: vec![], ..grid.clone() },
        Grid { lambdas: vec![3.0, 2.0], ..grid.clone() },
        Grid { lambdas: vec![f64::NAN], ..grid.clone() },
        Grid { selections: vec![Selection::TopCdf(1.5)], ..grid.clone() },
        Grid { rankings: vec![Ranking::Given(vec![])], ..grid.clone() },
    ] {
        assert!(survey(&q, &k, &v, &call.options, &config, &bad, &mut out).is_err(), "{bad:?}");
    }
}

fn file(heads: Vec<HeadSettings>) -> Calibration {
    let (format, version) = Calibration::header();
    Calibration {
        format,
        version,
        made_by: "a test".into(),
        model: CalibratedModel {
            id: "tiny \"model\"".into(),
            sha256: Some("ab".repeat(32)),
            num_layers: 1,
            num_qo_heads: heads.len(),
            num_kv_heads: 1,
            head_dim: 32,
        },
        data: CalibrationData { source: "noise".into(), samples: 1, tokens: 700, causal: true },
        bounds: Bounds { l1: 0.05, l2: 0.06 },
        settings: Shared {
            pooling: Pooling::SECOND_ORDER,
            keep_first: 1,
            keep_local: 2,
            min_kv_len: 1024,
        },
        measured: Measured { rel_l1: 0.01, qk_sparsity: 0.25, pv_sparsity: 0.5 },
        layers: vec![LayerSettings { heads }],
    }
}

fn heads() -> Vec<HeadSettings> {
    let measured = Measured { rel_l1: 0.01, qk_sparsity: 0.25, pv_sparsity: 0.5 };
    let head = HeadSettings { cdf: None, top_k: None, theta: 0.0, lambda: None, measured };
    vec![
        head,
        HeadSettings { cdf: Some(0.95), lambda: Some(5.0), ..head },
        HeadSettings { top_k: Some(0.5), theta: 0.3, ..head },
        HeadSettings { cdf: Some(0.9), top_k: Some(0.25), ..head },
    ]
}

#[test]
fn files_come_back_as_they_went() {
    let calibration = file(heads());
    let json = calibration.to_json();
    assert_eq!(Calibration::from_json(&json).unwrap(), calibration);
    // A line per head, and not many more.
    assert!(json.lines().count() < 20, "{json}");
    let config = calibration.config(0).unwrap();
    let selections: Vec<_> = (0..4).map(|h| *config.selection.get(h)).collect();
    assert_eq!(
        selections,
        [
            Selection::All,
            Selection::TopCdf(0.95),
            Selection::TopK(0.5),
            Selection::Union { cdf: 0.9, top_k: 0.25 }
        ]
    );
    assert_eq!([*config.lambda.get(0), *config.lambda.get(1)], [f64::INFINITY, 5.0]);
    assert!(calibration.config(1).is_err());
}

#[test]
fn wrong_files_are_refused_by_name() {
    let json = file(heads()).to_json();
    for (from, to, part) in [
        ("sparge-calibration", "other", "its format is \"other\""),
        ("\"version\": 1", "\"version\": 2", "its version is 2"),
        ("\"num_layers\":1", "\"num_layers\":2", "it has 1 layers and says 2"),
        ("\"num_qo_heads\":4", "\"num_qo_heads\":5", "layer 0 has 4 heads, expected 5"),
        ("\"num_kv_heads\":1", "\"num_kv_heads\":3", "expected a multiple"),
        ("\"cdf\":0.95", "\"cdf\":1.5", "layer 0: cdf is 1.5"),
        ("\"lambda\":5.0", "\"lambda\":-5.0", "layer 0: lambda is -5"),
        ("\"theta\":0.3", "\"theta\":true", "expected f64"),
        ("\"q_rows\":16", "\"q_rows\":17", "layer 0: pooling.q_rows is 17"),
        ("{", "", "not a calibration file"),
    ] {
        let broken = json.replacen(from, to, 1);
        assert_ne!(broken, json, "{from}");
        let error = Calibration::from_json(&broken).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let calibration = file(heads());
    let (shape, sha) = (calibration.model.shape(), "ab".repeat(32));
    assert_eq!(calibration.check(shape, Some(&sha)), Ok(()));
    assert_eq!(calibration.check(shape, None), Ok(()));
    let error = calibration.check([2, 4, 1, 32], None).unwrap_err().to_string();
    assert!(error.contains("with 1 layers, this model has 2"), "{error}");
    let error = calibration.check(shape, Some(&"cd".repeat(32))).unwrap_err().to_string();
    assert!(error.contains("sha256 abab"), "{error}");
}
