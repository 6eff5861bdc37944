//! The engine's side of a hold: what a request may still use, counted without waiting for anyone.
//!
//! A lease is renewed before it runs out. The ledger's thread answers by raising `granted`; until
//! then the request goes on with what it has, and sits out once that is used up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    job::Outbox,
    rows::{Bill, Denial, EndCause, Extension, Opened},
};
use crate::{
    clock::Clock,
    price::{Billing, Tally, Terms},
    types::{NanoUsd, RequestId},
};

/// Output tokens of a fresh lease, for each sequence of a request.
const LEASE_TOKENS_FIRST: u64 = 32;
/// Leases grow until they last so long, because each renewal is a commit.
const RENEWAL_MIN: Duration = Duration::from_millis(500);
/// How long a request that got nothing, of a budget or of a database, waits before it asks again.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Bounds that the configuration sets.
#[derive(Clone, Copy, Debug)]
pub struct LeaseLimits {
    /// Output tokens that may be delivered and not yet on record, for each live sequence: what a
    /// crash may cost the operator.
    pub outstanding_tokens_max: u64,
    /// How long a request without money sits out before it ends.
    pub wait_max: Duration,
}

/// What the ledger's thread changes and the engine reads.
#[derive(Debug)]
pub(super) struct Shared {
    granted: AtomicI64,
    /// Output tokens on record.
    recorded: AtomicU64,
    denial: AtomicU8,
    /// An extension is on its way.
    pending: AtomicBool,
    /// The last extension could not be written.
    silent: AtomicBool,
    /// Monotonic time until which this server may use its leases.
    valid_until_ns: Arc<AtomicU64>,
}

const NOT_DENIED: u8 = 0;

impl Shared {
    pub(super) fn new(granted: NanoUsd, valid_until_ns: Arc<AtomicU64>) -> Self {
        Self {
            granted: AtomicI64::new(saturate(granted)),
            recorded: AtomicU64::new(0),
            denial: AtomicU8::new(NOT_DENIED),
            pending: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            valid_until_ns,
        }
    }

    /// The answer to an extension.
    pub(super) fn answer(&self, granted: NanoUsd, denied: Option<Denial>, recorded: u64) {
        if denied != Some(Denial::Lost) {
            self.granted.store(saturate(granted), Ordering::Release);
            self.recorded.store(recorded, Ordering::Release);
        }
        self.deny(denied);
        self.silent.store(false, Ordering::Release);
        self.pending.store(false, Ordering::Release);
    }

    /// The ledger gave the request up: others may hold its money by now.
    pub(super) fn lose(&self) {
        self.granted.store(0, Ordering::Release);
        self.deny(Some(Denial::Lost));
    }

    /// There was no answer; it is asked for again.
    pub(super) fn unanswered(&self) {
        self.silent.store(true, Ordering::Release);
        self.pending.store(false, Ordering::Release);
    }

    pub(super) fn revoke(&self) {
        self.deny(Some(Denial::Revoked));
    }

    fn deny(&self, denied: Option<Denial>) {
        let code = match denied {
            None => NOT_DENIED,
            Some(Denial::BudgetForNow) => 1,
            Some(Denial::BudgetForGood) => 2,
            Some(Denial::Revoked) => 3,
            Some(Denial::Lost) => 4,
        };
        // Revoked and lost are for good, whatever a later answer says.
        let keep = |old: u8| (old < 3 || code > old).then_some(code);
        let _ = self.denial.fetch_update(Ordering::AcqRel, Ordering::Acquire, keep);
    }

    fn denied(&self) -> Option<Denial> {
        match self.denial.load(Ordering::Acquire) {
            1 => Some(Denial::BudgetForNow),
            2 => Some(Denial::BudgetForGood),
            3 => Some(Denial::Revoked),
            4 => Some(Denial::Lost),
            _ => None,
        }
    }
}

/// Why a request cannot go on.
pub type LeaseEnd = EndCause;

/// What a lease has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meterage {
    pub used: Tally,
    pub steps: u64,
}

/// What a request still wants of its lease.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Live ones.
    pub sequences: u64,
    /// Output tokens that are launched and not yet counted.
    pub in_flight: u64,
    /// Output tokens that can still come, those in flight included.
    pub left: u64,
}

/// A request's hold. Dropping it closes the request as aborted.
pub struct Lease {
    account: Option<Account>,
    counted: Meterage,
}

/// None for a lease that nothing is charged to.
struct Account {
    request: RequestId,
    opened: Opened,
    shared: Arc<Shared>,
    outbox: Outbox,
    clock: Clock,
    limits: LeaseLimits,
    /// Output tokens asked for at a time, for each live sequence.
    size_tokens: u64,
    /// Live when last seen.
    sequences: u64,
    /// When it was first without money for its next token.
    broke_since_ns: Option<u64>,
    /// When it last asked, or was admitted.
    asked_ns: u64,
    /// Bounds on the device time of the input that is not computed yet, and of one more token, where
    /// that is billed.
    input_bound_ns: u64,
    token_bound_ns: u64,
}

impl Lease {
    /// Counts and never ends: for engines without a ledger.
    pub fn unlimited() -> Self {
        Self { account: None, counted: Meterage::default() }
    }

    pub(super) fn new(
        request: RequestId,
        opened: Opened,
        shared: Arc<Shared>,
        outbox: Outbox,
        clock: Clock,
        limits: LeaseLimits,
    ) -> Self {
        let account = Account {
            asked_ns: clock.now_ns(),
            request,
            opened,
            shared,
            outbox,
            clock,
            limits,
            size_tokens: LEASE_TOKENS_FIRST.min(limits.outstanding_tokens_max).max(1),
            sequences: 1,
            broke_since_ns: None,
            input_bound_ns: 0,
            token_bound_ns: 0,
        };
        Self { account: Some(account), counted: Meterage::default() }
    }

    /// What the request was admitted with.
    pub fn opened(&self) -> Option<&Opened> {
        self.account.as_ref().map(|account| &account.opened)
    }

    pub fn counted(&self) -> Meterage {
        self.counted
    }

    /// What the request owes so far.
    pub fn cost(&self) -> NanoUsd {
        self.account.as_ref().map_or(NanoUsd(0), |a| a.opened.terms.charge(&self.counted.used))
    }

    /// Input that was computed, or found in a cache.
    pub fn use_input(&mut self, uncached: u64, cached: u64) {
        self.counted.used.uncached_input += uncached;
        self.counted.used.cached_input += cached;
    }

    /// Output tokens that were delivered.
    pub fn use_output(&mut self, tokens: u64) {
        self.counted.used.output += tokens;
    }

    /// This request's part of a step's device time, and the bound that was held for it. What is
    /// charged never passes what is held, whatever was measured: the rest is the operator's loss,
    /// and is returned where time is what is charged.
    pub fn use_device(&mut self, device_ns: u64, bound_ns: u64) -> u64 {
        let used = self.counted.used;
        let bills = self.bills_device();
        let account = self.account.as_ref().filter(|_| bills);
        let left_ns = account.map_or(u64::MAX, |account| {
            let one_ns = Tally { billable_device_ns: 1, ..Tally::default() };
            account.opened.terms.fitting(&used, &one_ns, account.limit())
        });
        let billable_ns = device_ns.min(bound_ns).min(left_ns);
        self.counted.used.device_ns += device_ns;
        self.counted.used.billable_device_ns += billable_ns;
        self.counted.steps += 1;
        if bills { device_ns - billable_ns } else { 0 }
    }

    /// Whether device time is what is charged.
    pub fn bills_device(&self) -> bool {
        self.opened().is_some_and(|opened| opened.terms.billing == Billing::Device)
    }

    /// Sets what the rest of the input and one more token may take of the device at most.
    pub fn bound_device(&mut self, input_ns: u64, token_ns: u64) {
        if let Some(account) = &mut self.account {
            (account.input_bound_ns, account.token_bound_ns) = (input_ns, token_ns);
        }
    }

    /// Output tokens that may be launched beyond those counted, in flight included.
    pub fn affordable(&self) -> u64 {
        let Some(account) = &self.account else { return u64::MAX };
        if account.clock.now_ns() >= account.shared.valid_until_ns.load(Ordering::Acquire) {
            return 0;
        }
        let used = &self.counted.used;
        account.paid(used).min(account.room(used))
    }

    /// Asks for more before it runs out.
    pub fn renew(&mut self, demand: Demand) {
        let used = self.counted.used;
        let Some(account) = &mut self.account else { return };
        account.sequences = demand.sequences.max(1);
        let in_flight = demand.in_flight;
        let half = account.size_tokens * account.sequences / 2;
        let (paid, room) = (account.paid(&used), account.room(&used));
        let runs_low = paid.saturating_sub(in_flight) <= half && paid < demand.left;
        let to_pay = runs_low && account.may_grow();
        let to_record = room.saturating_sub(in_flight) <= half && account.unrecorded(&used) > 0;
        let pending = account.shared.pending.load(Ordering::Acquire);
        let now_ns = account.clock.now_ns();
        if !(to_pay || to_record) || pending || !account.may_ask(now_ns, to_record) {
            return;
        }
        // It ran dry before the last answer came, or it will ask again soon.
        let since_ns = now_ns.saturating_sub(account.asked_ns);
        let short = since_ns < RENEWAL_MIN.as_nanos() as u64 && account.shared.denied().is_none();
        if short || paid.min(room) <= in_flight {
            account.size_tokens =
                (account.size_tokens * 2).min(account.limits.outstanding_tokens_max.max(1));
        }
        let capped = |amount: NanoUsd| account.opened.cap.map_or(amount, |cap| amount.min(cap));
        let after = |tokens: u64| capped(account.charge_after(&used, tokens));
        // Less than a token more than it has would be of no use.
        let least = after(paid.saturating_add(1));
        let size = account.size_tokens * account.sequences;
        let wanted = after((in_flight + size).min(demand.left));
        account.asked_ns = now_ns;
        account.shared.pending.store(true, Ordering::Release);
        let least = least.min(wanted);
        let asked = Extension { request: account.request.clone(), used, wanted, least };
        account.outbox.extend(asked, account.shared.clone());
    }

    /// Why the request has to end now, if it has to: nothing more can be paid with `in_flight` tokens
    /// still on their way, and nothing will come.
    pub fn end(&mut self, in_flight: u64) -> Option<EndCause> {
        let affordable = self.affordable();
        let used = self.counted.used;
        let account = self.account.as_mut()?;
        match account.shared.denied() {
            Some(Denial::Revoked) => return Some(EndCause::Revoked),
            Some(Denial::Lost) => return Some(EndCause::LedgerLost),
            _ => {}
        }
        if affordable > in_flight {
            account.broke_since_ns = None;
            return None;
        }
        if in_flight > 0 {
            return None;
        }
        if let Some(cap) = account.opened.cap
            && account.fitting(&used, cap) == 0
        {
            return Some(EndCause::CostCap);
        }
        if account.shared.pending.load(Ordering::Acquire) && !account.waited_too_long() {
            return None;
        }
        // Tokens that are paid for and not on record wait for the database alone.
        let denied = account.shared.denied().filter(|_| account.paid(&used) == 0);
        match denied {
            Some(Denial::BudgetForGood) => Some(EndCause::Budget),
            Some(Denial::BudgetForNow) => account.waited_too_long().then_some(EndCause::Budget),
            _ => account.waited_too_long().then_some(EndCause::LedgerLost),
        }
    }

    /// Posts what was used and gives the rest back. `closed` gets the bill once that is durable, or
    /// `None` if the ledger had given the request up.
    pub fn close(mut self, cause: EndCause, closed: impl FnOnce(Option<Bill>) + Send + 'static) {
        match self.account.take() {
            Some(account) => account.close(self.counted, cause, Some(Box::new(closed))),
            None => closed(Some(Bill { used: self.counted.used, ..Bill::default() })),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(account) = self.account.take() {
            account.close(self.counted, EndCause::Aborted, None);
        }
    }
}

impl Account {
    /// The charge may reach this.
    fn limit(&self) -> NanoUsd {
        let granted = NanoUsd(self.shared.granted.load(Ordering::Acquire).into());
        self.opened.cap.map_or(granted, |cap| cap.min(granted))
    }

    /// Input that is still to be computed is owed before any token: the hold is for it.
    fn after(&self, used: &Tally, tokens: u64) -> Tally {
        let counted = used.uncached_input.saturating_add(used.cached_input);
        let coming = self.opened.input_tokens.saturating_sub(counted);
        Tally {
            uncached_input: used.uncached_input.saturating_add(coming),
            output: used.output.saturating_add(tokens),
            billable_device_ns: used
                .billable_device_ns
                .saturating_add(self.input_bound_ns)
                .saturating_add(tokens.saturating_mul(self.token_bound_ns)),
            ..*used
        }
    }

    fn charge_after(&self, used: &Tally, tokens: u64) -> NanoUsd {
        self.opened.terms.charge(&self.after(used, tokens))
    }

    /// The most further tokens whose charge stays within `limit`.
    fn fitting(&self, used: &Tally, limit: NanoUsd) -> u64 {
        let token =
            Tally { output: 1, billable_device_ns: self.token_bound_ns, ..Tally::default() };
        self.opened.terms.fitting(&self.after(used, 0), &token, limit)
    }

    /// Further tokens that what is held pays for.
    fn paid(&self, used: &Tally) -> u64 {
        self.fitting(used, self.limit())
    }

    /// Further tokens that may be delivered before any more are on record. Those that cost nothing
    /// are no loss.
    fn room(&self, used: &Tally) -> u64 {
        if tokens_are_free(&self.opened.terms) {
            return u64::MAX;
        }
        let most = self.limits.outstanding_tokens_max.max(1).saturating_mul(self.sequences);
        most.saturating_sub(self.unrecorded(used))
    }

    fn unrecorded(&self, used: &Tally) -> u64 {
        used.output.saturating_sub(self.shared.recorded.load(Ordering::Acquire))
    }

    /// Whether its cap leaves more to ask for.
    fn may_grow(&self) -> bool {
        let granted = self.shared.granted.load(Ordering::Acquire);
        self.opened.cap.is_none_or(|cap| cap.0 > i128::from(granted))
    }

    fn may_ask(&self, now_ns: u64, to_record: bool) -> bool {
        let waited = now_ns >= self.asked_ns + ASK_AGAIN.as_nanos() as u64;
        match self.shared.denied() {
            Some(Denial::Revoked | Denial::Lost) => false,
            Some(Denial::BudgetForNow | Denial::BudgetForGood) if !to_record => waited,
            _ => waited || !self.shared.silent.load(Ordering::Acquire),
        }
    }

    fn waited_too_long(&mut self) -> bool {
        let now_ns = self.clock.now_ns();
        let since_ns = *self.broke_since_ns.get_or_insert(now_ns);
        now_ns.saturating_sub(since_ns) >= self.limits.wait_max.as_nanos() as u64
    }

    fn close(self, counted: Meterage, cause: EndCause, closed: Option<super::job::Closed>) {
        self.outbox.close(self.request, counted, cause, closed);
    }
}

fn tokens_are_free(terms: &Terms) -> bool {
    match terms.billing {
        Billing::Tokens => terms.rates.output.0 == 0,
        Billing::Device => terms.rates.device_second.0 == 0,
    }
}

fn saturate(amount: NanoUsd) -> i64 {
    i64::try_from(amount.0).unwrap_or(i64::MAX)
}
