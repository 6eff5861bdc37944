//! The real scheduler and block pool over a fake model whose KV cache remembers which token was
//! written where: any wrong block table, lost copy or stale block shows as a wrong read.

use std::collections::{HashMap, VecDeque};

use candela::{
    cache::BlockKey,
    scheduler::{Limits, Scheduler, SeqSpec, StepPlan},
    types::SeqId,
};
use proptest::prelude::*;

const BLOCK_TOKENS: usize = 4;

#[derive(Clone, Debug)]
struct Job {
    arrives_at_step: usize,
    prompt_len: usize,
    choices: usize,
    max_tokens: usize,
    /// Ends by itself after this many tokens.
    ends_after: usize,
    /// The client leaves at this step.
    leaves_at_step: Option<usize>,
    score: bool,
}

/// The token a sequence draws at a position: depends on nothing else, as a seeded sample does.
fn drawn(seq: SeqId, position: usize) -> u32 {
    (seq.0 as u32).wrapping_mul(2_654_435_761) ^ (position as u32).wrapping_mul(40_503) | 1
}

fn prompt(job: usize, len: usize) -> Vec<u32> {
    (0..len).map(|position| (job * 1_000 + position) as u32).collect()
}

/// The device: what each KV slot holds, and the token last drawn in each seat.
struct FakeModel {
    kv: Vec<u32>,
    last: Vec<u32>,
}

impl FakeModel {
    fn run(&mut self, plan: &StepPlan, scheduler: &Scheduler) -> Vec<(SeqId, u32)> {
        for (from, to) in &plan.copies {
            let (from, to) = (from.0 as usize * BLOCK_TOKENS, to.0 as usize * BLOCK_TOKENS);
            self.kv.copy_within(from..from + BLOCK_TOKENS, to);
        }
        let mut sampled = Vec::new();
        for planned in &plan.seqs {
            let sequence = scheduler.get(planned.seq).expect("a planned sequence lives");
            let slot = sequence.slot.expect("a planned sequence has a seat").0 as usize;
            let end = planned.first + planned.new_tokens;
            let token_at =
                |position: usize| sequence.tokens.get(position).copied().unwrap_or(self.last[slot]);
            let at = |position: usize| {
                sequence.blocks[position / BLOCK_TOKENS].0 as usize * BLOCK_TOKENS
                    + position % BLOCK_TOKENS
            };
            for position in planned.first..end {
                let block = sequence.blocks[position / BLOCK_TOKENS];
                assert!(!scheduler.pool().is_shared(block) || planned.samples.len() > 1);
                let token = token_at(position);
                self.kv[at(position)] = token;
            }
            for position in 0..end {
                assert_eq!(self.kv[at(position)], token_at(position), "stale KV at {position}");
            }
            for target in &planned.samples {
                assert_eq!(target.position, end);
                sampled.push((target.seq, drawn(target.seq, target.position)));
            }
        }
        for planned in &plan.seqs {
            for target in &planned.samples {
                self.last[target.slot.0 as usize] = drawn(target.seq, target.position);
            }
        }
        sampled
    }
}

fn check(jobs: &[Job], blocks: usize, limits: Limits, depth: usize) -> Result<(), TestCaseError> {
    let mut scheduler = Scheduler::new(limits, blocks);
    let mut model =
        FakeModel { kv: vec![0; blocks * BLOCK_TOKENS], last: vec![0; limits.running_seqs_max] };
    let mut outputs: HashMap<SeqId, Vec<u32>> = HashMap::new();
    let mut specs: HashMap<SeqId, usize> = HashMap::new();
    let mut in_flight = VecDeque::new();
    let mut left = 0;
    for step in 0..20_000 {
        for (index, job) in jobs.iter().enumerate().filter(|(_, job)| job.arrives_at_step == step) {
            let choices: Vec<SeqId> =
                (0..job.choices).map(|choice| SeqId((index * 100 + choice) as u64)).collect();
            for choice in &choices {
                specs.insert(*choice, index);
                outputs.insert(*choice, Vec::new());
                left += 1;
            }
            scheduler.add(SeqSpec {
                choices,
                prompt: prompt(index, job.prompt_len).into(),
                max_tokens: job.max_tokens,
                score_prompt: job.score,
                root: BlockKey::root("fake", 0, b""),
            });
        }
        for (seq, index) in &specs {
            if jobs[*index].leaves_at_step == Some(step) && scheduler.finish(*seq) {
                left -= 1;
            }
        }
        let plan = scheduler.plan(&|_| 1);
        prop_assert!(plan.tokens() <= limits.step_tokens_max);
        prop_assert!(scheduler.running_len() <= limits.running_seqs_max);
        let launched = !plan.is_empty();
        if launched {
            in_flight.push_back(model.run(&plan, &scheduler));
        }
        if in_flight.len() >= depth || !launched {
            for (seq, token) in in_flight.pop_front().unwrap_or_default() {
                let Some(sequence) = scheduler.commit(seq, token) else { continue };
                let job = &jobs[specs[&seq]];
                prop_assert_eq!(sequence.output().last(), Some(&token));
                let output = outputs.get_mut(&seq).expect("known");
                output.push(token);
                if output.len() == job.ends_after.min(job.max_tokens) {
                    scheduler.finish(seq);
                    left -= 1;
                }
            }
        }
        if left == 0 && in_flight.is_empty() && jobs.iter().all(|job| job.arrives_at_step < step) {
            break;
        }
    }
    prop_assert_eq!(left, 0, "something hangs");
    prop_assert_eq!(scheduler.pool().used(), 0, "leaked blocks");
    prop_assert_eq!(scheduler.live_len() + scheduler.running_len() + scheduler.waiting_len(), 0);
    for (seq, output) in outputs {
        let job = &jobs[specs[&seq]];
        if job.leaves_at_step.is_none() {
            let expected: Vec<u32> = (0..job.ends_after.min(job.max_tokens))
                .map(|index| drawn(seq, job.prompt_len + index))
                .collect();
            prop_assert_eq!(output, expected);
        }
    }
    Ok(())
}

fn job() -> impl Strategy<Value = Job> {
    (
        0..30usize,
        1..25usize,
        1..4usize,
        1..20usize,
        1..25usize,
        prop::option::of(0..60usize),
        any::<bool>(),
    )
        .prop_map(
            |(arrives_at_step, prompt_len, choices, max_tokens, ends_after, leaves, score)| {
                let leaves_at_step =
                    leaves.filter(|leaves| leaves % 3 == 0 && *leaves > arrives_at_step);
                Job {
                    arrives_at_step,
                    prompt_len,
                    choices,
                    max_tokens,
                    ends_after,
                    leaves_at_step,
                    score,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn every_sequence_runs_exactly_as_if_alone(
        jobs in prop::collection::vec(job(), 1..12),
        blocks in 12..40usize,
        step_tokens_max in 1..40usize,
        running_seqs_max in 3..9usize,
        logits_rows_max in 3..12usize,
        depth in 1..3usize,
    ) {
        let limits =
            Limits { step_tokens_max, running_seqs_max, logits_rows_max, block_tokens: BLOCK_TOKENS };
        check(&jobs, blocks, limits, depth)?;
    }
}
