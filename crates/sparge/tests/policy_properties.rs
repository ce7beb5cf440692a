//! Every method over everything that combines: it is refused by name or stays within reach.

#[expect(dead_code, reason = "this binary uses a part")]
mod common;

use common::{Case, case};
use proptest::prelude::*;
use sparge::policy::{self, Policy};
use sparge::*;

fn any_policy() -> impl Strategy<Value = Policy> {
    let share = || prop_oneof![0.01f64..1.0, Just(1.0)];
    prop_oneof![
        Just(Policy::Dense),
        (1usize..500, 0usize..300).prop_map(|(tokens, sinks)| Policy::Window { tokens, sinks }),
        (share(), any::<u64>()).prop_map(|(density, seed)| Policy::Random { density, seed }),
        (any::<u8>(), any::<u16>())
            .prop_map(|(v, s)| Policy::VerticalSlash { vertical: v.into(), slash: s.into() }),
        (0usize..300, 1usize..300).prop_map(|(first, local)| Policy::AShape { first, local }),
        (1usize..8).prop_map(|blocks| Policy::BlockSparse { blocks }),
        (share(), 0.0f64..0.9, 0usize..400)
            .prop_map(|(gamma, tau, min_budget)| Policy::FlexPrefill { gamma, tau, min_budget }),
        (1u32..7, share())
            .prop_map(|(log, threshold)| Policy::XAttention { stride: 1 << log, threshold }),
        share().prop_map(|cdf| Policy::Oracle { cdf }),
    ]
}

fn chosen(case: &Case, policy: &Policy, spoil: Option<f32>) -> Result<[BlockMask; 2]> {
    let mut data = case.data::<f32>();
    if let Some(x) = spoil {
        let middle = data.q.len() / 2;
        data.q[middle] = x;
        data.k[0] = x;
    }
    let (q, k, _) = case.views(&data);
    let options = case.options(&data);
    let within = policy::mask(&q, &k, &options, &Policy::Dense)?;
    Ok([policy::mask(&q, &k, &options, policy)?, within])
}

proptest! {
    #[test]
    fn masks_stay_within_reach(
        case in case(),
        policy in any_policy(),
        spoil in prop_oneof![3 => Just(None), 1 => Just(Some(f32::NAN)), 1 => Just(Some(f32::INFINITY))],
    ) {
        match chosen(&case, &policy, spoil) {
            Err(Error::Conflict { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
            Ok([mask, within]) => {
                prop_assert_eq!(mask.shape(), within.shape());
                let outside = mask.to_bytes().iter().zip(within.to_bytes()).any(|(&a, b)| a > b);
                prop_assert!(!outside, "{} leaves what can be reached", policy);
            }
        }
    }

    #[test]
    fn names_round_trip(policy in any_policy()) {
        prop_assert_eq!(policy.to_string().parse::<Policy>(), Ok(policy));
    }
}
