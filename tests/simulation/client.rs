//! A client: authenticated at the door, admitted by the ledger, served by the engine, as the API does it.

use std::{
    collections::BTreeMap,
    future::Future,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll},
};

use candela::{
    admission::{Denied, Door},
    clock::Clock,
    engine::{
        EngineHandle, GenerateRequest, RequestError, RequestUsage, StopParams, StreamEvent,
        SubmitError,
    },
    ledger::{Bill, EndCause, Ledger, LedgerError, Opening, Refusal},
    types::{FinishReason, ModelId, NanoUsd, RequestId, TokenId},
};

/// Where a client finds the server it talks to.
#[derive(Clone)]
pub struct Front {
    pub door: Rc<Door>,
    pub ledger: Ledger,
    pub engine: EngineHandle,
}

/// What a client does.
#[derive(Clone, Debug)]
pub struct Plan {
    pub id: RequestId,
    pub arrives_ns: u64,
    pub server: usize,
    pub secret: &'static str,
    pub model: &'static str,
    pub prompt: Vec<TokenId>,
    pub choices: u32,
    pub stop: StopParams,
    pub cap: Option<NanoUsd>,
    pub device_bound_ns: u64,
    pub idempotency: Option<(String, [u8; 32])>,
    /// Leaves when its answer does not begin for so long.
    pub patience_ns: Option<u64>,
    /// Leaves once it has read so many tokens.
    pub leaves_after: Option<u32>,
    /// Between two reads.
    pub pause_ns: u64,
    /// Reads nothing for long from so many tokens on, and stays.
    pub stalls_after: Option<u32>,
}

/// What it has read.
#[derive(Clone, Debug, Default)]
pub struct Read {
    pub texts: BTreeMap<u32, String>,
    pub finishes: BTreeMap<u32, (FinishReason, Option<EndCause>)>,
    /// As the last piece said.
    pub tokens: u32,
}

#[derive(Clone, Debug)]
pub enum End {
    Denied,
    Refused(Refusal),
    Unavailable,
    /// The engine's queue was full, or the engine ended.
    NotSubmitted(SubmitError),
    Left,
    Done(RequestUsage, Option<Bill>),
    Failed(RequestError),
    /// The stream broke off: the server died.
    Died,
}

#[derive(Clone, Debug)]
pub struct Seen {
    pub plan: Plan,
    pub read: Read,
    pub end: End,
}

/// Waits for a moment, or with `None` for ever.
struct Until(Clock, Option<u64>);

impl Future for Until {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        match self.1 {
            Some(at_ns) if self.0.now_ns() >= at_ns => Poll::Ready(()),
            _ => Poll::Pending,
        }
    }
}

/// `work`, unless `limit` comes first.
async fn before<T>(limit: Until, work: impl Future<Output = T>) -> Option<T> {
    let (mut limit, mut work) = (pin!(limit), pin!(work));
    std::future::poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => limit.as_mut().poll(context).map(|()| None),
    })
    .await
}

/// From its arrival until it has its answer, or leaves.
pub async fn client(plan: Plan, clock: Clock, front: impl Fn(usize) -> Front + 'static) -> Seen {
    Until(clock.clone(), Some(plan.arrives_ns)).await;
    let front = front(plan.server);
    let mut read = Read::default();
    let end = ask(&plan, &clock, &front, &mut read).await;
    Seen { plan, read, end }
}

async fn ask(plan: &Plan, clock: &Clock, front: &Front, read: &mut Read) -> End {
    let gives_up_ns = plan.patience_ns.map(|patience_ns| plan.arrives_ns + patience_ns);
    let patience = || Until(clock.clone(), gives_up_ns);
    let caller = match before(patience(), front.door.identify(Some(plan.secret))).await {
        None => return End::Left,
        Some(Err(Denied::Key)) => return End::Denied,
        Some(Err(Denied::Ledger(_))) => return End::Unavailable,
        Some(Ok(caller)) => caller,
    };
    let opening = Opening {
        request: plan.id.clone(),
        payer: caller.payer,
        model: ModelId::new(plan.model),
        user_label: String::new(),
        metadata: "{}".into(),
        input_tokens: plan.prompt.len() as u64,
        choices: plan.choices,
        device_bound_ns: plan.device_bound_ns,
        cap: plan.cap,
        parts: 1,
        idempotency: plan.idempotency.clone(),
    };
    // One that leaves here may be admitted all the same; nobody takes its lease then.
    let lease = match before(patience(), front.ledger.open(opening)).await {
        None => return End::Left,
        Some(Err(LedgerError::Refused(refusal))) => return End::Refused(refusal),
        Some(Err(_)) => return End::Unavailable,
        Some(Ok(lease)) => lease,
    };
    let request = GenerateRequest {
        id: plan.id.clone(),
        prompt: plan.prompt.clone().into(),
        choices: plan.choices,
        sampling: Default::default(),
        stop: plan.stop.clone(),
        prompt_logprobs: None,
    };
    let mut stream = match front.engine.submit(request, lease) {
        Ok(stream) => stream,
        Err(error) => return End::NotSubmitted(error),
    };
    let mut stalls_after = plan.stalls_after;
    loop {
        if plan.leaves_after.is_some_and(|tokens| read.tokens >= tokens) {
            return End::Left;
        }
        if stalls_after.take_if(|tokens| read.tokens >= *tokens).is_some() {
            // Longer than any server waits for it.
            Until(clock.clone(), Some(clock.now_ns() + 60_000_000_000)).await;
        }
        let limit = if read.tokens == 0 { patience() } else { Until(clock.clone(), None) };
        match before(limit, stream.next()).await {
            None => return End::Left,
            Some(None) => return End::Died,
            Some(Some(event)) => {
                if let Some(end) = read.take(event) {
                    return end;
                }
            }
        }
        Until(clock.clone(), Some(clock.now_ns() + plan.pause_ns)).await;
    }
}

impl Read {
    fn take(&mut self, event: StreamEvent) -> Option<End> {
        match event {
            StreamEvent::Delta { choice, text, so_far, .. } => {
                assert!(!self.finishes.contains_key(&choice), "text after the end");
                self.texts.entry(choice).or_default().push_str(&text);
                assert!(so_far.completion_tokens >= self.tokens);
                self.tokens = so_far.completion_tokens;
                None
            }
            StreamEvent::Finish { choice, reason, cause } => {
                let twice = self.finishes.insert(choice, (reason, cause));
                assert_eq!(twice, None, "choice {choice} ends twice");
                None
            }
            StreamEvent::PromptLogprobs(_) => panic!("nobody asked"),
            StreamEvent::Done(usage, bill) => Some(End::Done(usage, bill)),
            StreamEvent::Error(error) => Some(End::Failed(error)),
        }
    }
}
