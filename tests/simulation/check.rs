//! What has to hold at the end of every story.

use std::collections::{BTreeMap, HashMap};

use candela::{
    engine::{RequestError, SubmitError},
    ledger::{
        Refusal,
        book::inspect,
        db::{Db, Sqlite},
    },
    price::{Billing, Rates},
    types::{FinishReason, NanoUsd},
};

use super::{
    client::{End, Seen},
    model::alone,
    server::Setting,
    story::Came,
};

/// A request in the ledger.
#[derive(Debug)]
struct Row {
    tenant: String,
    state: String,
    cause: String,
    posted: i128,
    granted: i128,
    input: u64,
    output: u64,
    billable_ns: u64,
    rates: Rates,
    billing: Billing,
}

impl Row {
    /// Whether more output costs no more.
    fn is_free(&self) -> bool {
        match self.billing {
            Billing::Tokens => self.rates.output.0 == 0,
            Billing::Device => self.rates.device_second.0 == 0,
        }
    }

    /// What the price says, written a second time.
    fn charge(&self, input: u64, output: u64, billable_ns: u64) -> i128 {
        let ceil = |value: i128, by: i128| value / by + i128::from(value % by > 0);
        let tokens =
            i128::from(input) * self.rates.input.0 + i128::from(output) * self.rates.output.0;
        let time = i128::from(billable_ns) * self.rates.device_second.0;
        let used = match self.billing {
            Billing::Tokens => ceil(tokens, 1_000_000),
            Billing::Device => ceil(time, 1_000_000_000),
        };
        let anything = input + output + billable_ns > 0;
        if anything { self.rates.request.0 + used } else { 0 }
    }
}

pub fn all(db: &mut Sqlite, seen: &[Seen], setting: &Setting, came: &mut Came) {
    let problems = inspect(db, |book| book.verify()).expect("reads");
    assert!(problems.is_empty(), "{problems:#?} {setting:?} {:#?}", rows(db));
    for sql in [
        "SELECT COUNT(*) FROM request WHERE state = 'open'",
        "SELECT COUNT(*) FROM lease",
        "SELECT COUNT(*) FROM replica",
        "SELECT CAST(COALESCE(SUM(held), 0) AS BIGINT) FROM window_total",
        "SELECT CAST(COALESCE(SUM(sequences), 0) AS BIGINT) FROM rate_limit",
    ] {
        assert_eq!(number(db, sql), 0, "{sql}");
    }
    let rows = rows(db);
    let mut sum = 0;
    for (id, row) in &rows {
        let charge = row.charge(row.input, row.output, row.billable_ns);
        assert_eq!(row.posted, charge, "tokens times price of {id}: {row:?}");
        sum += charge;
        came.count(&row.cause, 1);
    }
    let charged =
        "SELECT CAST(COALESCE(SUM(amount), 0) AS BIGINT) FROM transfer WHERE kind = 'charge'";
    assert_eq!(i128::from(number(db, charged)), sum);
    for one in seen {
        let row = rows.get(one.plan.id.as_str());
        of_one(one, row, setting);
        came.count(name(&one.end), 1);
    }
    charged_once(seen, &rows);
    let windows = "SELECT COUNT(*) FROM (SELECT 1 FROM window_total WHERE posted > 0
        GROUP BY scope, span HAVING COUNT(*) > 1) AS rolled";
    came.count("windows", number(db, windows) as u64);
    let text = format!("{rows:?}");
    let digest = text.bytes().fold(7u32, |hash, byte| hash.wrapping_mul(31) ^ u32::from(byte));
    came.count("digest", digest.into());
}

fn name(end: &End) -> &'static str {
    match end {
        End::Denied => "denied",
        End::Refused(Refusal::Budget { .. }) => "refused by a budget",
        End::Refused(Refusal::CapTooLow { .. }) => "refused by a cap",
        End::Refused(Refusal::UnknownPrice(_)) => "refused without a price",
        End::Refused(Refusal::Sequences { .. }) => "refused for its sequences",
        End::Refused(Refusal::IdempotencyRunning(_)) => "refused while it runs",
        End::Refused(Refusal::IdempotencyDone(_)) => "refused when done",
        End::Refused(_) => "refused",
        End::Unavailable => "unavailable",
        End::NotSubmitted(SubmitError::QueueFull { .. }) => "queue full",
        End::NotSubmitted(_) => "not submitted",
        End::Left => "left",
        End::Done(..) => "done",
        End::Failed(RequestError::ReaderStalled(_)) => "stalled",
        End::Failed(_) => "ended by the server",
        End::Died => "died",
    }
}

/// What a client saw, against its row and what it would have seen alone.
fn of_one(seen: &Seen, row: Option<&Row>, setting: &Setting) {
    let Seen { plan, read, .. } = seen;
    let what = || format!("{seen:?} {row:?}");
    // Tokens of choices that ended by themselves, and characters of the others.
    let mut tokens = 0;
    for choice in 0..plan.choices {
        let alone = alone(&plan.prompt, choice, &plan.stop);
        let text = read.texts.get(&choice).map_or("", String::as_str);
        assert!(alone.raw.starts_with(text), "{alone:?} {}", what());
        match read.finishes.get(&choice) {
            Some((reason, None)) => {
                assert_eq!((text, *reason), (&*alone.text, alone.reason), "{}", what());
                tokens += u64::from(alone.tokens);
            }
            Some((reason, Some(_))) => {
                assert_eq!(*reason, FinishReason::Length, "{}", what());
                tokens += text.len() as u64;
            }
            None => tokens += text.len() as u64,
        }
    }
    let Some(row) = row else {
        let nothing = read.tokens == 0 && !matches!(seen.end, End::Done(..) | End::Failed(_));
        return assert!(nothing, "delivered without a hold: {}", what());
    };
    let choices = u64::from(plan.choices);
    let held = row.charge(row.input, tokens, row.billable_ns);
    assert!(row.granted >= held, "delivered without a durable hold: {}", what());
    assert!(plan.cap.is_none_or(|cap| NanoUsd(row.posted) <= cap), "over the cap: {}", what());
    assert!(row.output == 0 || row.input == plan.prompt.len() as u64, "{}", what());
    match &seen.end {
        End::Denied | End::Refused(_) => panic!("not let in, and in the ledger: {}", what()),
        End::Unavailable | End::NotSubmitted(_) => {
            assert_eq!((row.posted, row.output), (0, 0), "nothing ran: {}", what());
        }
        End::Done(usage, Some(bill)) => {
            assert_eq!(row.state, "done", "{}", what());
            assert_eq!((bill.cost.0, bill.used.output), (row.posted, row.output), "{}", what());
            assert_eq!(u64::from(usage.completion_tokens), row.output, "{}", what());
            assert_eq!(tokens, row.output, "{}", what());
            let causes = read.finishes.values().filter_map(|(_, cause)| *cause);
            let causes: Vec<&str> = causes.map(|cause| cause.name()).collect();
            let told = if causes.is_empty() {
                row.cause == "finished"
            } else {
                causes.contains(&&*row.cause)
            };
            assert!(told, "{}", what());
        }
        End::Done(usage, None) => {
            assert!(row.output <= u64::from(usage.completion_tokens), "{}", what());
        }
        End::Left | End::Failed(_) if row.state == "done" => {
            assert!(row.output >= tokens, "less than was read: {}", what());
        }
        End::Left | End::Failed(_) | End::Died => {
            // Tokens that cost nothing need not be on record.
            let lost = if row.is_free() { 0 } else { tokens.saturating_sub(row.output) };
            assert!(lost <= setting.outstanding_tokens_max * choices, "{lost} lost: {}", what());
        }
    }
    if matches!(seen.end, End::Died) {
        assert_eq!(row.state, "crashed", "{}", what());
        // What a stop string may hide, and an end token, were delivered and not seen.
        assert!(row.output <= tokens + 2 * choices, "charged for more: {}", what());
    }
}

/// Of requests with one Idempotency-Key only one costs anything.
fn charged_once(seen: &[Seen], rows: &BTreeMap<String, Row>) {
    let mut costly: HashMap<(&str, &str), &str> = HashMap::new();
    for one in seen {
        let (Some((name, _)), Some(row)) = (&one.plan.idempotency, rows.get(one.plan.id.as_str()))
        else {
            continue;
        };
        if row.posted > 0 {
            let other = costly.insert((&row.tenant, name), one.plan.id.as_str());
            assert_eq!(other, None, "and {} were charged for {name}", one.plan.id);
        }
    }
}

fn number(db: &mut Sqlite, sql: &'static str) -> i64 {
    db.query(sql, &[]).expect("reads")[0].int(0).expect("a number")
}

fn rows(db: &mut Sqlite) -> BTreeMap<String, Row> {
    let sql = "SELECT id, request.tenant_id, state, end_cause, posted, granted, uncached_input,
        request.output, billable_device_ns, price.input, price.output, price.request,
        price.device_second, billing
        FROM request JOIN price ON version = price_version ORDER BY id";
    let rows = db.query(sql, &[]).expect("reads");
    let row = |row: &candela::ledger::db::Row| {
        let text = |index| row.text(index).expect("text").to_owned();
        let number = |index| row.int(index).expect("a number");
        let nano = |index| NanoUsd(number(index).into());
        let found = Row {
            tenant: text(1),
            state: text(2),
            cause: text(3),
            posted: number(4).into(),
            granted: number(5).into(),
            input: number(6) as u64,
            output: number(7) as u64,
            billable_ns: number(8) as u64,
            rates: Rates {
                input: nano(9),
                output: nano(10),
                request: nano(11),
                device_second: nano(12),
                ..Rates::default()
            },
            billing: if text(13) == "device" { Billing::Device } else { Billing::Tokens },
        };
        (text(0), found)
    };
    rows.iter().map(row).collect()
}
