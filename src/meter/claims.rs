//! The energy of requests: kept by window until it is settled.

use std::collections::{HashMap, HashSet, VecDeque};

use super::{Account, Energy, EnergyClaim};
use crate::types::RequestId;

/// Ended requests whose energy waits for a reading. A device that is not read any more settles
/// nothing; beyond this the oldest are given up as estimates.
const ENDED_MAX: usize = 65_536;

/// The energy of an ended request, final.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settled {
    pub request: RequestId,
    pub energy: Energy,
}

/// Device time of requests in windows that are not settled, and of those that are until the request
/// has ended.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    held: HashMap<RequestId, EnergyClaim>,
    /// Oldest first.
    ended: VecDeque<RequestId>,
}

impl Claims {
    /// Adds a request's device time in a window, as [`Account::record_step`] reported it.
    pub fn add(&mut self, request: &RequestId, window: u64, device_ns: u64) {
        if device_ns == 0 {
            return;
        }
        match self.held.get_mut(request) {
            Some(claim) => claim.add(window, device_ns),
            None => {
                let mut claim = EnergyClaim::default();
                claim.add(window, device_ns);
                self.held.insert(request.clone(), claim);
            }
        }
    }

    /// No more will be added for this request.
    pub fn end(&mut self, request: RequestId) {
        if self.held.contains_key(&request) {
            self.ended.push_back(request);
        }
    }

    /// A request's energy so far, of `device_ns` in all: what no claim covers, and what is not
    /// settled, at the power the busy device drew lately. `None` while no power is known.
    pub fn estimate(
        &self,
        account: &Account,
        request: &RequestId,
        device_ns: u64,
    ) -> Option<Energy> {
        let nothing = EnergyClaim::default();
        let claim = self.held.get(request).unwrap_or(&nothing);
        let (mut energy, _) = account.energy_of(claim);
        energy += account.estimate(device_ns.saturating_sub(claim.device_ns()))?;
        Some(energy)
    }

    /// Requests that have ended and whose energy is settled; `all` takes those whose energy is not,
    /// as estimates.
    pub fn take_settled(&mut self, account: &Account, all: bool) -> Vec<Settled> {
        let mut taken = Vec::new();
        let mut surplus = self.ended.len().saturating_sub(ENDED_MAX);
        let mut waiting: HashSet<RequestId> = HashSet::new();
        for request in &self.ended {
            let Some(claim) = self.held.get(request) else { continue };
            let (energy, settled) = account.energy_of(claim);
            if settled || all || surplus > 0 {
                surplus = surplus.saturating_sub(1);
                self.held.remove(request);
                // Nought that only says that no power is known is not told.
                if energy.total_uj() > 0 || account.estimate(0).is_some() {
                    taken.push(Settled { request: request.clone(), energy });
                }
            } else {
                waiting.insert(request.clone());
            }
        }
        self.ended.retain(|request| waiting.contains(request));
        taken
    }

    /// Requests that wait for their energy, running ones included.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        meter::{AccountLimits, DeviceStep, EnergyReading, Owner},
        types::ModelId,
    };

    const S: u64 = 1_000_000_000;

    fn reading(second: u64, total_uj: u64) -> EnergyReading {
        EnergyReading { at_ns: second * S, total_uj, estimated_uj: 0 }
    }

    /// A second of work by two requests, three to one, that ends at a whole second.
    fn work(account: &mut Account, claims: &mut Claims, end_s: u64, requests: &[RequestId; 2]) {
        let owner = Owner { tenant: "t".into(), key: "k".into(), model: ModelId::new("m") };
        let owned_ns = vec![(owner.clone(), S / 4 * 3), (owner, S / 4)];
        let step = DeviceStep { end_ns: end_s * S, owned_ns, ..DeviceStep::default() };
        for piece in account.record_step(&step) {
            for (request, ns) in requests.iter().zip(&piece.owned_ns) {
                claims.add(request, piece.window, *ns);
            }
        }
    }

    #[test]
    fn requests_are_settled_once_their_windows_are() {
        let requests = [RequestId::new("a"), RequestId::new("b")];
        let mut account = Account::new(0, AccountLimits::default());
        let mut claims = Claims::default();
        assert_eq!(claims.estimate(&account, &requests[0], S), None, "no power is known");
        account.record_energy(reading(0, 0));
        work(&mut account, &mut claims, 1, &requests);
        work(&mut account, &mut claims, 2, &requests);
        claims.end(requests[0].clone());
        account.record_energy(reading(1, 400_000_000));
        account.settle(S);
        assert_eq!(claims.take_settled(&account, false), [], "its second window is not settled");
        let estimate = claims.estimate(&account, &requests[0], S / 2 * 3).expect("a power");
        assert_eq!(estimate, Energy { measured_uj: 300_000_000, estimated_uj: 300_000_000 });
        account.record_energy(reading(2, 1_400_000_000));
        account.settle(2 * S);
        let settled = claims.take_settled(&account, false);
        let energy = Energy::new(1_050_000_000, false);
        assert_eq!(settled, [Settled { request: requests[0].clone(), energy }]);
        assert_eq!(claims.take_settled(&account, true), [], "the other runs");
        claims.end(requests[1].clone());
        assert_eq!(claims.take_settled(&account, false)[0].energy, Energy::new(350_000_000, false));
        assert!(claims.is_empty());
        claims.end(requests[1].clone());
        assert_eq!(claims.take_settled(&account, true), [], "once");
    }

    #[test]
    fn what_will_never_be_settled_is_an_estimate() {
        let requests = [RequestId::new("a"), RequestId::new("b")];
        let mut account = Account::new(0, AccountLimits { windows_max: 4, ..Default::default() });
        let mut claims = Claims::default();
        account.record_energy(reading(0, 0));
        work(&mut account, &mut Claims::default(), 1, &requests);
        account.record_energy(reading(1, 400_000_000));
        account.settle(S);
        work(&mut account, &mut claims, 2, &requests);
        claims.end(requests[0].clone());
        assert_eq!(claims.take_settled(&account, false), []);
        // The device is lost, and its windows are forgotten.
        work(&mut account, &mut claims, 9, &[RequestId::new("c"), RequestId::new("d")]);
        let settled = claims.take_settled(&account, false);
        assert_eq!(settled.len(), 1);
        assert_eq!(settled[0].energy, Energy::new(300_000_000, true));
        // At the end everything that has ended is told.
        claims.end(requests[1].clone());
        claims.end(RequestId::new("c"));
        assert_eq!(claims.take_settled(&account, true).len(), 2);
        assert_eq!(claims.len(), 1, "one runs");
    }
}
