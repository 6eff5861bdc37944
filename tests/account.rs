//! Accounts of device time and energy: whatever they are told, in whatever order, every nanosecond
//! and microjoule has one row. `PROPTEST_CASES` makes it longer.

use std::sync::Arc;

use candela::{
    meter::{
        Account, AccountLimits, By, DeviceStep, Energy, EnergyClaim, EnergyReading, Overhead,
        Owner, Report, Tokens, Usage,
    },
    types::{ModelId, NanoUsd},
};
use proptest::prelude::*;

const MS: u64 = 1_000_000;
const S: u64 = 1_000 * MS;

fn owner(tenant: u8) -> Owner {
    let (key, model) =
        (Arc::from(format!("key-{tenant}")), ModelId::new(format!("m{}", tenant % 2)));
    Owner { tenant: Arc::from(format!("t{}", tenant / 2)), key, model }
}

fn step(end_ns: u64, owned: &[(u8, u64)], overhead_ns: [u64; 4]) -> DeviceStep {
    let owned_ns = owned.iter().map(|(tenant, ns)| (owner(*tenant), *ns)).collect();
    DeviceStep { end_ns, owned_ns, overhead_ns }
}

fn limits(windows_max: usize, owners_max: usize) -> AccountLimits {
    AccountLimits { window_ns: S, windows_max, owners_max }
}

fn account() -> Account {
    Account::new(0, limits(100, 8))
}

fn row(report: &Report, name: &str) -> Usage {
    report
        .rows
        .iter()
        .find(|(known, _)| **known == *name)
        .map(|(_, usage)| *usage)
        .unwrap_or_default()
}

/// Device time by row, in milliseconds: named rows, other, overhead, foreign, idle.
fn times_ms(report: &Report) -> (Vec<(String, u64)>, u64, [u64; 4], u64, u64) {
    assert_eq!(report.total().device_ns, report.to_ns - report.from_ns, "all of it: {report:#?}");
    let ms = |usage: &Usage| usage.device_ns / MS;
    let rows = report.rows.iter().map(|(name, usage)| (name.to_string(), ms(usage))).collect();
    let overhead = std::array::from_fn(|i| ms(&report.overhead[i]));
    (rows, ms(&report.other), overhead, ms(&report.foreign), ms(&report.idle))
}

#[test]
fn time_has_an_owner_a_reason_or_is_idle() {
    let mut account = account();
    account.record_step(&step(300 * MS, &[(0, 100 * MS), (1, 50 * MS)], [10 * MS, 5 * MS, 0, 0]));
    account.record_step(&step(700 * MS, &[(0, 200 * MS), (2, 100 * MS)], [0, 0, 20 * MS, 15 * MS]));
    account.record_foreign(0, S, 300_000);
    let check = |by: By, rows: &[(&str, u64)]| {
        let rows = rows.iter().map(|(name, ms)| ((*name).to_owned(), *ms)).collect();
        let expected = (rows, 0, [10, 5, 20, 15], 300, 200);
        assert_eq!(times_ms(&account.utilization(S, S, by)), expected, "by {by:?}");
    };
    check(By::Tenant, &[("t0", 350), ("t1", 100)]);
    check(By::Key, &[("key-0", 300), ("key-2", 100), ("key-1", 50)]);
    check(By::Model, &[("m0", 400), ("m1", 50)]);
    assert_eq!(
        Overhead::ALL.map(Overhead::as_str),
        ["recompute", "discarded", "warm_up", "padding"]
    );
}

#[test]
fn a_step_is_cut_at_the_edges_of_windows() {
    let mut account = account();
    // Two seconds and a half, from 0.7 s to 3.2 s; a prime to make rounding matter.
    let odd = step(3_200 * MS, &[(0, 1_000_000_007), (1, 499_999_993)], [S, 0, 0, 0]);
    let pieces = account.record_step(&odd);
    assert_eq!(pieces.iter().map(|piece| piece.window).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for (index, wall_ms) in [(0, 300), (1, 1000), (2, 1000), (3, 200)] {
        let report = account.utilization((index + 1) * S, S, By::Key);
        assert_eq!(report.idle.device_ns, S - wall_ms * MS, "window {index}");
        let piece = &pieces[index as usize];
        assert_eq!(piece.owned_ns[0], row(&report, "key-0").device_ns);
        assert_eq!(piece.owned_ns[1], row(&report, "key-1").device_ns);
        let share = row(&report, "key-0").device_ns as f64 / (wall_ms * MS) as f64;
        assert!((share - 0.4).abs() < 1e-6, "in proportion in every window: {share}");
    }
    let all = account.utilization(4 * S, 4 * S, By::Key);
    assert_eq!(row(&all, "key-0").device_ns, 1_000_000_007);
    assert_eq!(row(&all, "key-1").device_ns, 499_999_993);
    assert_eq!(all.overhead[0].device_ns, S);
}

#[test]
fn foreign_use_takes_from_idle_alone() {
    let check = |own_ms: u64, foreign_ppm: u32, expected_ms: (u64, u64)| {
        let mut account = account();
        account.record_foreign(0, S, foreign_ppm);
        account.record_step(&step(own_ms * MS, &[(0, own_ms * MS)], [0; 4]));
        let (rows, _, _, foreign, idle) = times_ms(&account.utilization(S, S, By::Tenant));
        assert_eq!(rows, [("t0".to_owned(), own_ms)]);
        assert_eq!((foreign, idle), expected_ms, "{own_ms} ms of ours, {foreign_ppm} ppm");
    };
    check(400, 0, (0, 600));
    check(400, 250_000, (250, 350));
    check(400, 900_000, (600, 0));
    check(1000, 1_000_000, (0, 0));
    check(400, u32::MAX, (600, 0));
}

#[test]
fn steps_that_overlap_share_the_time_there_is() {
    let mut account = account();
    // Two models on one device, each busy all the time by its own clock.
    account.record_step(&step(S, &[(0, S)], [0; 4]));
    account.record_step(&step(S, &[(1, S / 2)], [S / 2, 0, 0, 0]));
    let (rows, _, overhead, foreign, idle) = times_ms(&account.utilization(S, S, By::Key));
    assert_eq!(rows, [("key-0".to_owned(), 500), ("key-1".to_owned(), 250)]);
    assert_eq!((overhead, foreign, idle), ([250, 0, 0, 0], 0, 0));
}

#[test]
fn owners_beyond_the_bound_share_a_row() {
    let mut account = Account::new(0, limits(100, 3));
    for tenant in 0..=255 {
        // All short but for three, which come when the window is long full.
        let ns = if tenant >= 253 { 50 * MS } else { MS };
        account.record_step(&step(u64::from(tenant) * 2 * MS + ns, &[(tenant, ns)], [0; 4]));
        account.record_tokens(MS, &owner(tenant), Tokens { output: 1, ..Tokens::default() });
    }
    // Windows are cut down to the bound for good once later ones are written.
    for later in [2, 3, 4] {
        account.record_step(&step(later * S, &[(0, MS)], [0; 4]));
    }
    let report = account.utilization(S, S, By::Key);
    let names: Vec<_> = report.rows.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(names, ["key-253", "key-254", "key-255"]);
    assert_eq!(report.other.device_ns, 253 * MS);
    assert_eq!(report.other.tokens.output, 253);
    assert_eq!(report.total().tokens.output, 256);
    assert_eq!(report.total().device_ns, S);
}

#[test]
fn tokens_and_blocks_are_counted_where_they_belong() {
    let mut account = account();
    let tokens = Tokens { input: 7, cached_input: 5, output: 3, cost: NanoUsd(11) };
    account.record_tokens(S - 1, &owner(0), tokens);
    account.record_tokens(S, &owner(0), tokens);
    account.record_blocks(500 * MS, 1_250 * MS, &owner(0), 8);
    account.record_blocks(5, 5, &owner(0), 1000);
    account.record_blocks(6, 5, &owner(0), 1000);
    let check = |until: u64, window: u64, tokens_times: u64, kv_block_ns: u128| {
        let usage = row(&account.utilization(until, window, By::Tenant), "t0");
        assert_eq!(usage.tokens.output, 3 * tokens_times);
        assert_eq!(usage.tokens.cost, NanoUsd(11 * i128::from(tokens_times)));
        assert_eq!(usage.kv_block_ns, kv_block_ns);
    };
    check(S, S, 1, 4_000_000_000);
    check(2 * S, S, 1, 2_000_000_000);
    check(2 * S, 2 * S, 2, 6_000_000_000);
    check(2 * S, u64::MAX, 2, 6_000_000_000);
}

#[test]
fn a_window_is_what_is_remembered_and_told() {
    let account = account();
    let check = |account: &Account, until: u64, window: u64, from: u64, to: u64| {
        let report = account.utilization(until, window, By::Tenant);
        assert_eq!((report.from_ns, report.to_ns), (from, to), "{window} until {until}");
        assert_eq!(report.total().device_ns, to - from);
    };
    check(&account, 0, 60 * S, 0, 0);
    check(&account, S - 1, 60 * S, 0, 0);
    check(&account, 5 * S, 0, 5 * S, 5 * S);
    check(&account, 5 * S + 1, 2 * S, 3 * S, 5 * S);
    check(&account, 5 * S, 1, 4 * S, 5 * S);
    // A ring of 100 windows, and a device that was idle for longer.
    check(&account, 5_000 * S, 600 * S, 4_900 * S, 5_000 * S);
    let mut later = Account::new(3 * S + 7, limits(10, 8));
    later.record_step(&step(4 * S, &[(0, S / 2)], [0; 4]));
    check(&later, 5 * S, 60 * S, 3 * S + 7, 4 * S + 7);
    later.record_step(&step(1_000 * S, &[(0, 1_500 * MS)], [0; 4]));
    check(&later, 1_001 * S, 60 * S, 990 * S + 7, 1_000 * S + 7);
    assert_eq!(row(&later.utilization(1_001 * S, 60 * S, By::Tenant), "t0").device_ns, 1_500 * MS);
}

#[test]
fn what_is_told_too_late_is_counted_as_late() {
    let mut account = Account::new(0, limits(10, 8));
    account.record_step(&step(50 * S, &[(0, S)], [0; 4]));
    assert!(account.record_step(&step(5 * S, &[(0, S)], [0; 4])).is_empty());
    assert_eq!(account.late_ns(), S);
    // A step longer than all that is remembered, and one that began before the account.
    account.record_step(&step(100 * S, &[(0, 30 * S)], [0; 4]));
    assert_eq!(account.late_ns(), 21 * S);
    let report = account.utilization(100 * S, 60 * S, By::Tenant);
    assert_eq!(row(&report, "t0").device_ns, 10 * S);
    let mut fresh = Account::new(5 * S, limits(10, 8));
    fresh.record_step(&step(6 * S, &[(0, 100 * S)], [0; 4]));
    let report = fresh.utilization(6 * S, S, By::Tenant);
    assert_eq!((row(&report, "t0").device_ns, report.total().device_ns), (S, S));
}

fn reading(at_ns: u64, total_uj: u64) -> EnergyReading {
    EnergyReading { at_ns, total_uj, estimated_uj: 0 }
}

/// Half a second of work in each of `0..seconds`, by owners in turn.
fn half_busy(seconds: u64) -> Account {
    let mut account = account();
    for second in 0..seconds {
        let end_ns = second * S + S / 2;
        account.record_step(&step(end_ns, &[((second % 2) as u8, S / 2)], [0; 4]));
    }
    account
}

#[test]
fn energy_is_settled_by_window() {
    let mut account = half_busy(4);
    account.set_idle_power_mw(100_000);
    // 300 J a second, read at odd times.
    for at_ms in [0, 700, 1_400, 2_100, 2_800] {
        account.record_energy(reading(at_ms * MS, 5 + at_ms * 300_000));
    }
    account.settle(10 * S);
    let report = account.utilization(2 * S, 2 * S, By::Key);
    assert_eq!(report.total().energy, Energy { measured_uj: 600_000_000, estimated_uj: 0 });
    assert_eq!(report.idle.energy.measured_uj, 100_000_000, "100 W of idle for a second");
    assert_eq!(row(&report, "key-0").energy.measured_uj, 250_000_000);
    // What no reading covers yet is estimated at what was seen: 500 W busy, 100 W idle.
    let report = account.utilization(4 * S, 2 * S, By::Key);
    assert_eq!(report.total().energy, Energy { measured_uj: 0, estimated_uj: 600_000_000 });
    assert_eq!(report.idle.energy.estimated_uj, 100_000_000);
    // And settled once one does; but not where a step may still be told.
    account.record_energy(reading(4 * S, 5 + 1_200_000_000));
    account.settle(3 * S + 1);
    let report = account.utilization(4 * S, 2 * S, By::Key);
    assert_eq!(report.total().energy.measured_uj, 300_000_000);
    assert!(report.total().energy.estimated_uj > 0);
    account.settle(4 * S);
    let report = account.utilization(4 * S, 4 * S, By::Key);
    assert_eq!(report.total().energy, Energy { measured_uj: 1_200_000_000, estimated_uj: 0 });
}

#[test]
fn resets_and_gaps_are_estimates() {
    let check = |readings: &[EnergyReading], measured_uj: u64, estimated_uj: u64| {
        let mut account = half_busy(20);
        readings.iter().for_each(|reading| account.record_energy(*reading));
        account.settle(20 * S);
        let total = account.utilization(20 * S, 20 * S, By::Key).total().energy;
        assert_eq!(total, Energy { measured_uj, estimated_uj }, "{readings:?}");
    };
    check(&[], 0, 0);
    check(&[reading(0, 7)], 0, 0);
    // 1 J/s for ten seconds; the ten after are guessed at the same.
    let steady: Vec<_> = (0..=10).map(|second| reading(second * S, second * 1_000_000)).collect();
    check(&steady, 10_000_000, 10_000_000);
    // A counter that starts anew at 5 s: that second is bridged.
    let fresh = |second| if second < 5 { second } else { second - 5 };
    let reset = (0..=20).map(|second| reading(second * S, fresh(second) * 1_000_000));
    check(&reset.collect::<Vec<_>>(), 19_000_000, 1_000_000);
    // No reading from 4 s to 16 s: all of it is known, but not how it went.
    let gap = (0..=20).filter(|second| !(5..16).contains(second));
    let gap: Vec<_> = gap.map(|second| reading(second * S, second * 1_000_000)).collect();
    check(&gap, 8_000_000, 12_000_000);
    // The first window that readings cover whole is the second: the first is guessed.
    let late: Vec<_> = steady.iter().map(|r| reading(r.at_ns + S / 2, r.total_uj)).collect();
    check(&late, 9_000_000, 11_000_000);
    let guessed = |r: &EnergyReading| EnergyReading { estimated_uj: r.total_uj, ..*r };
    check(&steady.iter().map(guessed).collect::<Vec<_>>(), 0, 10_000_000);
}

#[test]
fn time_told_after_its_energy_was_settled_has_none() {
    let mut account = half_busy(2);
    (0..=2).for_each(|second| account.record_energy(reading(second * S, second * 1_000_000)));
    account.settle(2 * S);
    assert!(account.record_step(&step(900 * MS, &[(7, S / 4)], [0; 4])).is_empty());
    let report = account.utilization(2 * S, 2 * S, By::Key);
    assert_eq!(row(&report, "key-7").energy, Energy::default());
    assert_eq!(row(&report, "key-7").device_ns, S / 4);
    assert_eq!(report.total().energy.total_uj(), 2_000_000);
    assert_eq!(report.total().device_ns, 2 * S);
}

#[test]
fn a_request_is_estimated_and_then_settled() {
    let mut account = account();
    let mut claims = [EnergyClaim::default(), EnergyClaim::default()];
    for end_ms in [400, 1_200, 1_900] {
        let both = step(end_ms * MS, &[(0, 300 * MS), (1, 100 * MS)], [0; 4]);
        for piece in account.record_step(&both) {
            let of_request = claims.iter_mut().zip(&piece.owned_ns);
            of_request.for_each(|(claim, ns)| claim.add(piece.window, *ns));
        }
    }
    assert_eq!(account.energy_of(&claims[0]), (Energy::default(), false), "nothing is known");
    account.record_energy(reading(0, 0));
    account.record_energy(reading(S, 100_000_000));
    account.settle(S);
    let (energy, settled) = account.energy_of(&claims[0]);
    assert!(!settled && energy.measured_uj > 0 && energy.estimated_uj > 0, "{energy:?}");
    account.record_energy(reading(2 * S, 300_000_000));
    account.settle(2 * S);
    let settled = claims.each_ref().map(|claim| account.energy_of(claim));
    let report = account.utilization(2 * S, 2 * S, By::Key);
    for (index, (energy, settled)) in settled.into_iter().enumerate() {
        let row = row(&report, &format!("key-{index}")).energy;
        assert!(settled && energy.estimated_uj == 0);
        assert!(energy.measured_uj <= row.measured_uj, "{energy:?} {row:?}");
        assert!(energy.measured_uj + 2 >= row.measured_uj, "{energy:?} {row:?}");
    }
    assert_eq!(account.energy_of(&EnergyClaim::default()), (Energy::default(), true));
}

#[test]
fn an_estimate_needs_two_readings() {
    let mut account = account();
    assert_eq!((account.is_read(), account.estimate(S)), (false, None));
    account.record_energy(reading(0, 7));
    assert_eq!((account.is_read(), account.estimate(S)), (true, None));
    // Neither idle nor busy for a whole window yet: what was drawn between the two.
    account.record_energy(reading(S / 2, 7 + 25_000_000));
    assert_eq!(account.estimate(2 * S), Some(Energy { measured_uj: 0, estimated_uj: 100_000_000 }));
}

#[test]
fn idle_power_is_learned_from_idle_windows() {
    let mut account = account();
    let mut total_uj = 0;
    for second in 0..60u64 {
        // Busy in one second of ten, at 400 W; 60 W otherwise, but 200 W right after work.
        let (busy, after) = (second % 10 == 9, second % 10 == 0);
        if busy {
            account.record_step(&step((second + 1) * S, &[(0, S / 2)], [0; 4]));
        }
        account.record_energy(reading(second * S, total_uj));
        total_uj += if busy {
            230_000_000
        } else if after {
            200_000_000
        } else {
            60_000_000
        };
    }
    account.record_energy(reading(60 * S, total_uj));
    account.settle(60 * S);
    let report = account.utilization(60 * S, S, By::Tenant);
    assert_eq!(report.idle.energy.measured_uj, 30_000_000, "60 W for half a second");
    assert_eq!(row(&report, "t0").energy.measured_uj, 200_000_000);
}

/// What an account may be told.
#[derive(Clone, Debug)]
enum Told {
    Step(DeviceStep),
    Tokens(u64, u8, u64),
    Blocks(u64, u64, u8, u64),
    Foreign(u64, u64, u32),
}

fn tell(account: &mut Account, told: &Told) {
    match told {
        Told::Step(step) => drop(account.record_step(step)),
        Told::Tokens(at_ns, tenant, output) => {
            let tokens = Tokens { output: *output, ..Tokens::default() };
            account.record_tokens(*at_ns, &owner(*tenant), tokens);
        }
        Told::Blocks(from_ns, to_ns, tenant, blocks) => {
            account.record_blocks(*from_ns, *to_ns, &owner(*tenant), *blocks);
        }
        Told::Foreign(from_ns, to_ns, ppm) => account.record_foreign(*from_ns, *to_ns, *ppm),
    }
}

const SECONDS: u64 = 12;

/// A device that works and rests in turn, and what is sampled beside it.
fn any_story(tenants: u8) -> impl Strategy<Value = Vec<Told>> {
    let share = || prop_oneof![Just(0u64), 1u64..1000, 1u64..700 * MS];
    let owned = prop::collection::vec((0..tenants, share()), 0..6);
    let work = (0u64..300 * MS, owned, prop::array::uniform4(share()));
    let tokens =
        (0..SECONDS * S, 0..tenants, 0u64..100).prop_map(|(at, who, n)| Told::Tokens(at, who, n));
    let moments = || (0..SECONDS * S, 0..SECONDS * S);
    let blocks = (moments(), 0..tenants, 0u64..10_000)
        .prop_map(|((from, to), who, n)| Told::Blocks(from, to, who, n));
    let foreign =
        (moments(), 0u32..=1_000_000).prop_map(|((from, to), ppm)| Told::Foreign(from, to, ppm));
    let beside = prop::collection::vec(prop_oneof![tokens, blocks, foreign], 0..20);
    (prop::collection::vec(work, 0..12), beside).prop_map(|(work, mut story)| {
        let mut now_ns = 0;
        for (rest_ns, owned, overhead_ns) in work {
            let mut next = step(0, &owned, overhead_ns);
            let device_ns: u64 = owned.iter().map(|(_, ns)| ns).chain(&overhead_ns).sum();
            now_ns += rest_ns + device_ns;
            next.end_ns = now_ns;
            story.push(Told::Step(next));
        }
        story
    })
}

fn useful_ns(story: &[Told]) -> u64 {
    let steps = story.iter().filter_map(|told| match told {
        Told::Step(step) => Some(step),
        _ => None,
    });
    steps.flat_map(|step| &step.owned_ns).map(|(_, ns)| ns).sum()
}

proptest! {
    #[test]
    fn every_nanosecond_has_one_row(
        story in any_story(10),
        owners_max in 1usize..12,
        until_ns in 0..40 * S,
        window_ns in 0..40 * S,
    ) {
        let mut account = Account::new(0, limits(100, owners_max));
        story.iter().for_each(|told| tell(&mut account, told));
        for by in [By::Tenant, By::Key, By::Model] {
            let report = account.utilization(until_ns, window_ns, by);
            prop_assert_eq!(report.total().device_ns, report.to_ns - report.from_ns);
            prop_assert!(report.rows.len() <= owners_max);
            // Over all of it: no tenant's nanosecond is lost either.
            let all = account.utilization(90 * S, 90 * S, by);
            let owned = all.rows.iter().map(|(_, usage)| usage.device_ns).sum::<u64>();
            prop_assert_eq!(owned + all.other.device_ns, useful_ns(&story));
        }
        prop_assert_eq!(account.late_ns(), 0);
    }

    #[test]
    fn the_order_of_telling_does_not_matter(
        story in any_story(6),
        order in prop::collection::vec(any::<prop::sample::Index>(), 40),
    ) {
        let (mut straight, mut mixed) = (account(), account());
        story.iter().for_each(|told| tell(&mut straight, told));
        let mut left = story.clone();
        for at in order.iter().cycle() {
            if left.is_empty() {
                break;
            }
            tell(&mut mixed, &left.swap_remove(at.index(left.len())));
        }
        for by in [By::Tenant, By::Key, By::Model] {
            let report = |account: &Account| account.utilization(90 * S, 90 * S, by);
            prop_assert_eq!(report(&straight), report(&mixed));
        }
    }

    #[test]
    fn every_microjoule_of_settled_windows_has_one_row(
        story in any_story(6),
        readings in prop::collection::vec((1u64..1_500 * MS, 0u64..2_000_000_000), 0..40),
        idle_mw in prop::option::of(0u64..1_000_000),
        settle_at in prop::collection::vec(0usize..40, 0..4),
    ) {
        let mut account = account();
        if let Some(idle_mw) = idle_mw {
            account.set_idle_power_mw(idle_mw);
        }
        story.iter().for_each(|told| tell(&mut account, told));
        let (mut at_ns, mut total_uj) = (0, 0);
        account.record_energy(reading(0, 0));
        for (index, (after_ns, uj)) in readings.iter().enumerate() {
            at_ns += after_ns;
            total_uj += uj;
            account.record_energy(reading(at_ns, total_uj));
            if settle_at.contains(&index) {
                account.settle(at_ns);
            }
        }
        // Up to the next edge nothing more is drawn, so that the sum is known.
        let edge_ns = at_ns.next_multiple_of(S);
        account.record_energy(reading(edge_ns, total_uj));
        account.settle(edge_ns);
        let report = account.utilization(edge_ns, edge_ns, By::Key);
        prop_assert_eq!(report.total().energy, Energy { measured_uj: total_uj, estimated_uj: 0 });
        prop_assert_eq!(report.total().device_ns, edge_ns);
    }

    #[test]
    fn claims_never_exceed_what_was_drawn(
        steps in prop::collection::vec(prop::collection::vec(1u64..200 * MS, 1..5), 1..20),
        uj in prop::collection::vec(0u64..1_000_000_000, 30),
    ) {
        let mut account = account();
        let mut claims = Vec::new();
        let mut now_ns = 0;
        for shares in &steps {
            now_ns += shares.iter().sum::<u64>() + 50 * MS;
            let owned: Vec<_> = shares.iter().map(|ns| (0, *ns)).collect();
            let mut of_step = vec![EnergyClaim::default(); shares.len()];
            for piece in account.record_step(&step(now_ns, &owned, [0; 4])) {
                let each = of_step.iter_mut().zip(&piece.owned_ns);
                each.for_each(|(claim, ns)| claim.add(piece.window, *ns));
            }
            claims.extend(of_step);
        }
        let mut total_uj = 0;
        for (second, uj) in (0u64..).zip(&uj) {
            account.record_energy(reading(second * S, total_uj));
            total_uj += uj;
        }
        account.settle(29 * S);
        let settled: Vec<_> = claims.iter().map(|claim| account.energy_of(claim)).collect();
        prop_assert!(settled.iter().all(|(_, settled)| *settled));
        let claimed: u64 = settled.iter().map(|(energy, _)| energy.total_uj()).sum();
        let drawn = row(&account.utilization(29 * S, 29 * S, By::Tenant), "t0").energy.total_uj();
        // Each claim is rounded down once in each window it reaches into.
        prop_assert!(claimed <= drawn, "{claimed} of {drawn}");
        prop_assert!(claimed + 2 * claims.len() as u64 >= drawn, "{claimed} of {drawn}");
    }
}
