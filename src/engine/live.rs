//! A request while any of its choices lives: its stream, its lease, its outputs.

use tokio::sync::mpsc::Sender;

use super::{
    Submission,
    device_bound::DeviceBound,
    metering::Share,
    output::{ChoiceOutput, Piece},
    request::{GenerateRequest, OutputToken, RequestError, RequestUsage, SoFar, StreamEvent},
};
use crate::{
    ledger::{Demand, EndCause, Lease},
    meter::{Owner, Tokens},
    price::Tally,
    sampling::TokenLogprobs,
    scheduler::Scheduler,
    text::Tokenizer,
    types::{FinishReason, ModelId, NanoUsd, SeqId, TokenId},
};

/// Output tokens from which a natural stop ends an output, where its tenant wants that and the
/// request says nothing.
pub const ENOUGH_TOKENS: u32 = 100;

/// What ended a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    ByItself(FinishReason),
    Cut(EndCause),
}

pub(super) struct Live {
    pub request: GenerateRequest,
    pub choices: Vec<Choice>,
    /// Whether it has left the queue.
    pub admitted: bool,
    pub lease: Lease,
    /// Tokens that launched steps draw and that are not committed yet.
    pub in_flight: u64,
    /// Of its input: that of its admission, so that what is held for it stays enough.
    bound: DeviceBound,
    /// Whom its device time is booked to.
    pub owner: Owner,
    /// What the books know of already.
    booked: Tally,
    booked_cost: NanoUsd,
    events: Sender<StreamEvent>,
    usage: RequestUsage,
    /// Prompt tokens whose computation was committed, and charged.
    prompt_computed: usize,
    scores: Vec<Option<TokenLogprobs>>,
    scores_sent: bool,
    /// When its send buffer was first seen full.
    full_since_ns: Option<u64>,
    /// Of the choices that ended, the first cause beyond an ordinary finish.
    cause: EndCause,
}

pub(super) struct Choice {
    pub seq: SeqId,
    pub done: bool,
    output: ChoiceOutput,
}

impl Live {
    /// `seqs` has one sequence for each choice.
    pub fn new(
        submission: Submission,
        seqs: &[SeqId],
        tokenizer: &Tokenizer,
        model: &ModelId,
        bound: DeviceBound,
    ) -> Self {
        let Submission { request, lease, events } = submission;
        let chain = lease.opened().map(|opened| &opened.chain);
        let owner = Owner {
            tenant: chain.map_or_else(|| "".into(), |chain| chain.tenant.0.clone()),
            key: chain
                .and_then(|chain| chain.key.as_ref())
                .map_or_else(|| "".into(), |key| key.0.clone()),
            model: model.clone(),
        };
        let choices = seqs.iter().map(|seq| Choice {
            seq: *seq,
            done: false,
            output: ChoiceOutput::new(tokenizer, &request.prompt, request.stop.clone()),
        });
        Self {
            choices: choices.collect(),
            admitted: false,
            lease,
            in_flight: 0,
            bound,
            owner,
            booked: Tally::default(),
            booked_cost: NanoUsd(0),
            events,
            usage: RequestUsage {
                prompt_tokens: request.prompt.len() as u32,
                ..RequestUsage::default()
            },
            prompt_computed: 0,
            // Nothing precedes the first token, so it has no probability.
            scores: vec![None],
            scores_sent: false,
            full_since_ns: None,
            cause: EndCause::Finished,
            request,
        }
    }

    /// Tokens used since the last call, and what they cost.
    pub fn take_unbooked(&mut self) -> Option<(Owner, Tokens)> {
        let (used, cost) = (self.lease.counted().used, self.lease.cost());
        let (before, cost_before) = (
            std::mem::replace(&mut self.booked, used),
            std::mem::replace(&mut self.booked_cost, cost),
        );
        let tokens = Tokens {
            input: used.uncached_input - before.uncached_input,
            cached_input: used.cached_input - before.cached_input,
            output: used.output - before.output,
            cost: NanoUsd(cost.0 - cost_before.0),
        };
        (tokens != Tokens::default()).then(|| (self.owner.clone(), tokens))
    }

    /// Tells the lease what the rest of the input and one more token take of the device at most:
    /// that of the longest sequence, `now` being the bound of steps from here on.
    pub fn bound_device(&mut self, now: &DeviceBound, scheduler: &Scheduler) {
        let lens = self.choices.iter().filter(|choice| !choice.done);
        let lens = lens.filter_map(|choice| scheduler.get(choice.seq).map(|seq| seq.len()));
        let prompt = self.request.prompt.len();
        let context = lens.max().unwrap_or(0).max(prompt);
        let scored = self.request.prompt_logprobs.is_some();
        let input_ns = self.bound.input_ns(self.prompt_computed, prompt, scored);
        self.lease.bound_device(input_ns, now.token_ns(context));
    }

    /// Charges this request's part of a step. Returns what of it is not charged, though billed by
    /// time: what nobody held.
    pub fn use_device(&mut self, share: &Share, now: &DeviceBound) -> u64 {
        let is_input = share.work.useful.prefill_qk_pairs > 0;
        let bound = if is_input { &self.bound } else { now };
        self.lease.use_device(share.device_ns, bound.seq_ns(share.work))
    }

    pub fn prompt_tokens(&self) -> u64 {
        self.usage.prompt_tokens.into()
    }

    /// Room for all that the steps in flight and one more can send, with the closing events.
    pub fn has_room(&self, depth: usize) -> bool {
        self.events.capacity() >= self.choices.len() * 2 * (depth + 1) + 4
    }

    /// Whether the client went away, or has not read for `stall_max_ns`.
    pub fn is_lost(&mut self, depth: usize, now_ns: u64, stall_max_ns: u64) -> Option<Lost> {
        if self.events.is_closed() {
            return Some(Lost::Gone);
        }
        if self.has_room(depth) {
            self.full_since_ns = None;
            return None;
        }
        let since_ns = *self.full_since_ns.get_or_insert(now_ns);
        (now_ns - since_ns > stall_max_ns).then_some(Lost::Stalled)
    }

    /// Room was kept by `has_room`; a closed channel is found by `is_lost`.
    fn send(&self, event: StreamEvent) {
        let _ = self.events.try_send(event);
    }

    fn send_delta(&self, index: usize, text: String, tokens: Vec<OutputToken>) {
        let completion_tokens = self.usage.completion_tokens;
        let so_far = SoFar { completion_tokens, cost: self.lease.cost() };
        self.send(StreamEvent::Delta { choice: index as u32, text, tokens, so_far });
    }

    pub fn add_score(&mut self, score: TokenLogprobs) {
        self.scores.push(Some(score));
    }

    /// The prompt is computed up to `end`: that is charged, once. Sends its log-probabilities when
    /// they are complete. Returns whether nothing more is wanted.
    pub fn commit_prompt(&mut self, end: usize) -> bool {
        let end = end.min(self.request.prompt.len());
        if end > self.prompt_computed {
            self.lease.use_input((end - self.prompt_computed) as u64, 0);
            self.prompt_computed = end;
        }
        let complete = self.scores.len() == self.request.prompt.len();
        if self.request.prompt_logprobs.is_some() && !self.scores_sent && complete {
            self.scores_sent = true;
            let scores = std::mem::take(&mut self.scores);
            self.send(StreamEvent::PromptLogprobs(scores));
        }
        self.request.stop.max_tokens == 0 && end == self.request.prompt.len()
    }

    /// Delivers a drawn token; `Some` ends its choice.
    pub fn commit_token(
        &mut self,
        index: usize,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
        ends: bool,
        silent: bool,
    ) -> Option<Ended> {
        self.usage.completion_tokens += 1;
        self.lease.use_output(1);
        let piece = self.choices[index].output.push(token, logprobs, ends, silent);
        let finish = self.deliver(index, piece);
        finish.map(Ended::ByItself).or_else(|| self.rule(index).map(Ended::Cut))
    }

    /// Whether the tenant's rules end a choice at the end of this sentence.
    fn rule(&self, index: usize) -> Option<EndCause> {
        let output = &self.choices[index].output;
        let opened = self.lease.opened();
        let natural = opened.and_then(|opened| opened.policy.natural_stop).unwrap_or(false);
        let default = if natural { ENOUGH_TOKENS } else { 0 };
        let enough = self.request.stop.enough_tokens.unwrap_or(default);
        let near_cap = || {
            let opened = opened?;
            let (cap, percent) = (opened.cap?, opened.policy.soft_landing_percent?);
            let from = cap.0 * i128::from(100 - percent.min(100)) / 100;
            (self.lease.cost().0 >= from).then_some(())
        };
        let cause = if enough > 0 && output.tokens() >= enough {
            EndCause::NaturalStop
        } else {
            near_cap().map(|()| EndCause::SoftLanding)?
        };
        let early = output.tokens() < self.request.stop.min_tokens;
        (!early && output.at_sentence_end()).then_some(cause)
    }

    fn deliver(&self, index: usize, piece: Piece) -> Option<FinishReason> {
        let wants_tokens = self.request.sampling.logprobs.is_some() && !piece.tokens.is_empty();
        if !piece.text.is_empty() || wants_tokens {
            self.send_delta(index, piece.text, piece.tokens);
        }
        piece.finish
    }

    /// Ends a choice that ended by itself.
    pub fn finish(&mut self, index: usize, reason: FinishReason) {
        self.choices[index].done = true;
        self.send(StreamEvent::Finish { choice: index as u32, reason, cause: None });
    }

    /// Ends a choice because of money or a rule, with what was withheld and the tenant's closing text.
    pub fn cut(&mut self, index: usize, cause: EndCause) -> FinishReason {
        let rest = self.choices[index].output.finish(FinishReason::Length);
        let reason = self.deliver(index, rest).unwrap_or(FinishReason::Length);
        let cause = (reason == FinishReason::Length).then_some(cause);
        let truncated = matches!(cause, Some(EndCause::CostCap | EndCause::Budget));
        let closing = self.lease.opened().and_then(|opened| opened.policy.closing_text.clone());
        if let Some(text) = closing.filter(|_| truncated) {
            self.send_delta(index, text, Vec::new());
        }
        self.choices[index].done = true;
        if self.cause == EndCause::Finished {
            self.cause = cause.unwrap_or(EndCause::Finished);
        }
        self.send(StreamEvent::Finish { choice: index as u32, reason, cause });
        reason
    }

    pub fn is_done(&self) -> bool {
        self.choices.iter().all(|choice| choice.done)
    }

    /// Has the lease ask for more where it runs low.
    pub fn renew(&mut self) {
        let outputs = self.choices.iter().filter(|choice| !choice.done);
        let left: Vec<u64> = outputs.map(|choice| choice.output.tokens_left()).collect();
        self.lease.renew(Demand {
            sequences: left.len() as u64,
            in_flight: self.in_flight,
            left: left.iter().sum(),
        });
    }

    /// Settles a request whose choices have all ended; its last event leaves once that is durable.
    pub fn close(self) {
        let Self { events, usage, lease, cause, .. } = self;
        // A reader that went away needs no last event.
        lease.close(cause, move |bill| drop(events.try_send(StreamEvent::Done(usage, bill))));
    }

    /// Settles a request that ends early, with an error for its client if there is one.
    pub fn abort(self, cause: EndCause, error: Option<RequestError>) {
        if let Some(error) = error {
            self.send(StreamEvent::Error(error));
        }
        self.lease.close(cause, |_| {});
    }
}

/// Why a client cannot be served any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    Gone,
    Stalled,
}
