//! Every way out of the engine: each frees the blocks and resolves the hold, once.

use std::sync::atomic::Ordering;

use super::{
    device::Device,
    live::{Live, Lost},
    request::RequestError,
    run::Engine,
};
use crate::{
    ledger::EndCause,
    types::{FinishReason, SeqId},
};

impl<D: Device> Engine<D> {
    /// Ends one choice; the last one closes the request.
    pub(super) fn finish(&mut self, seq: SeqId, reason: FinishReason) {
        self.scheduler.finish(seq);
        let Some((owner, index)) = self.owners.remove(&seq) else { return };
        *self.counters.finished(reason) += 1;
        let Some(live) = self.live.get_mut(&owner) else { return };
        live.finish(index, reason);
        self.close_if_done(owner);
    }

    pub(super) fn close_if_done(&mut self, owner: SeqId) {
        if self.live.get(&owner).is_some_and(Live::is_done)
            && let Some(live) = self.take(owner)
        {
            live.close();
        }
    }

    /// Takes a request out of the books of the living; one that never ran leaves the queue as well.
    fn take(&mut self, owner: SeqId) -> Option<Live> {
        let mut live = self.live.remove(&owner)?;
        self.used.extend(live.take_unbooked());
        self.ended.push(live.request.id.clone());
        if !live.admitted {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        }
        self.counters.prompt_tokens += live.prompt_tokens();
        Some(live)
    }

    /// Renews leases that run low, and ends requests whose money has ended.
    pub(super) fn settle_leases(&mut self) {
        let mut ended = Vec::new();
        let bound = self.metering.bound(&self.options.limits);
        for (owner, live) in &mut self.live {
            if live.lease.bills_device() {
                live.bound_device(&bound, &self.scheduler);
            }
            live.renew();
            if let Some(cause) = live.lease.end(live.in_flight) {
                ended.push((*owner, cause));
            }
        }
        for (owner, cause) in ended {
            let Some(live) = self.live.get(&owner) else { continue };
            let choices = live.choices.iter().enumerate().filter(|(_, choice)| !choice.done);
            let seqs: Vec<(usize, SeqId)> = choices.map(|(index, one)| (index, one.seq)).collect();
            // From the last choice, so that no sibling inherits the prompt only to be dropped next.
            for (index, seq) in seqs.into_iter().rev() {
                self.cut(owner, index, seq, cause);
            }
            self.close_if_done(owner);
        }
    }

    /// Ends one choice because of money or a rule.
    pub(super) fn cut(&mut self, owner: SeqId, index: usize, seq: SeqId, cause: EndCause) {
        let Some(live) = self.live.get_mut(&owner) else { return };
        let reason = live.cut(index, cause);
        self.scheduler.finish(seq);
        self.owners.remove(&seq);
        *self.counters.finished(reason) += 1;
    }

    /// Ends a whole request early.
    pub(super) fn abort(
        &mut self,
        owner: SeqId,
        reason: FinishReason,
        error: Option<RequestError>,
    ) {
        let Some(live) = self.take(owner) else { return };
        // From the last choice, so that no sibling inherits the prompt only to be dropped next.
        for choice in live.choices.iter().rev().filter(|choice| !choice.done) {
            self.scheduler.finish(choice.seq);
            self.owners.remove(&choice.seq);
            *self.counters.finished(reason) += 1;
        }
        let cause = match reason {
            FinishReason::Error => EndCause::Failed,
            _ => EndCause::Aborted,
        };
        live.abort(cause, error);
    }

    pub(super) fn abort_all(&mut self, error: &RequestError, reason: FinishReason) {
        for owner in self.live.keys().copied().collect::<Vec<_>>() {
            self.abort(owner, reason, Some(error.clone()));
        }
    }

    /// Ends requests whose client went away or stopped reading.
    pub(super) fn reap(&mut self) {
        let now_ns = self.clock.now_ns();
        let stall_max_ns = self.options.client_stall_max.as_nanos() as u64;
        let mut ended = Vec::new();
        let depth = self.options.pipeline_depth;
        for (owner, live) in &mut self.live {
            match live.is_lost(depth, now_ns, stall_max_ns) {
                Some(Lost::Gone) => ended.push((*owner, None)),
                Some(Lost::Stalled) => {
                    let stall_s = self.options.client_stall_max.as_secs();
                    ended.push((*owner, Some(RequestError::ReaderStalled(stall_s))));
                }
                None => {}
            }
        }
        for (owner, error) in ended {
            self.abort(owner, FinishReason::Abort, error);
        }
    }
}
