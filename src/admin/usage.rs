//! Usage and costs by time, in OpenAI's shape: a project is a tenant.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::ledger::{
    book::Role,
    db::{Db, Val},
};

use super::{
    AdminError, Call, Field, Kind, Route, Verb, Work,
    call::NS_PER_S,
    view::{amount, seconds},
};

const DIMENSIONS: [&str; 4] = ["project", "api_key", "model", "user"];
/// Rows of one answer; more are no longer a report.
const ROWS_MAX: i64 = 50_000;
const PAGE_PREFIX: &str = "page_";

const COMMON: &[Field] = &[
    Field::needed("start_time", Kind::Time, "start of the first bucket, seconds since 1970"),
    Field::optional("end_time", Kind::Time, "end of the last bucket; now unless given"),
    Field::optional("bucket_width", Kind::OneOf(&["1m", "1h", "1d"]), "1d unless given"),
    Field::optional("project_ids", Kind::Labels, "these tenants only"),
    Field::optional("api_key_ids", Kind::Labels, "these keys only"),
    Field::optional("models", Kind::Labels, "these models only"),
    Field::optional("user_ids", Kind::Labels, "these users only"),
    Field::optional("limit", Kind::Int(1, 1440), "buckets of one answer"),
    Field::optional("page", Kind::Text(32), "`next_page` of the answer before"),
];

pub const USAGE: Route = Route {
    name: "completionsUsage",
    summary: "Tokens and requests by time, as OpenAI's usage API has them. Days that were rolled up count at their start, in UTC. Keys of tenants see their tenant.",
    verb: Verb::Get,
    path: "/v1/organization/usage/completions",
    least: Role::Tenant,
    fields: &[
        COMMON,
        &[Field::optional(
            "group_by",
            Kind::SomeOf(&[
                "project_id",
                "api_key_id",
                "model",
                "user_id",
                "project",
                "api_key",
                "user",
                "batch",
            ]),
            "what to tell apart",
        )],
    ],
    work: Work::Read(usage),
};

pub const COSTS: Route = Route {
    name: "costs",
    summary: "What was charged less what was refunded, by time, as OpenAI's costs API has it. It agrees with the windows of budgets. Days that were rolled up count at their start, in UTC. Keys of tenants see their tenant.",
    verb: Verb::Get,
    path: "/v1/organization/costs",
    least: Role::Tenant,
    fields: &[
        COMMON,
        &[Field::optional(
            "group_by",
            Kind::SomeOf(&[
                "project_id",
                "api_key_id",
                "model",
                "user_id",
                "project",
                "api_key",
                "user",
                "line_item",
            ]),
            "what to tell apart",
        )],
    ],
    work: Work::Read(costs),
};

/// What is asked for.
struct Question {
    width_ns: i64,
    /// First bucket, and the one after the last.
    from: i64,
    to: i64,
    /// The bucket after the last of the whole question.
    end: i64,
    start_ns: i64,
    end_ns: i64,
    grouped: [bool; 4],
    by_line: bool,
    /// Allowed values by dimension; none is all.
    only: [Option<Vec<String>>; 4],
    tenant: String,
}

impl Question {
    fn of(call: &Call, now_ns: i64) -> Result<Self, AdminError> {
        let given = &call.given;
        let (width_s, buckets, buckets_max) = match given.text("bucket_width") {
            Some("1m") => (60, 60, 1440),
            Some("1h") => (3600, 24, 168),
            _ => (86_400, 7, 180),
        };
        let count = given.int("limit").unwrap_or(buckets);
        if count > buckets_max {
            let message = format!("`limit` must be at most {buckets_max} at this `bucket_width`");
            return Err(AdminError::field("limit", message));
        }
        let start_s = given.int("start_time").unwrap_or(0);
        let end_s = given.int("end_time").unwrap_or_else(|| seconds(now_ns).saturating_add(1));
        if end_s <= start_s {
            return Err(AdminError::field("end_time", "`end_time` must come after `start_time`"));
        }
        let mut from = start_s.div_euclid(width_s);
        if let Some(page) = given.text("page") {
            let next = page.strip_prefix(PAGE_PREFIX).and_then(|next| next.parse::<i64>().ok());
            let wrong = || AdminError::field("page", "`page` must be a `next_page` of an answer");
            from = next.filter(|next| *next >= from).ok_or_else(wrong)?;
        }
        let end = (end_s - 1).div_euclid(width_s) + 1;
        let groups = given.texts("group_by").unwrap_or_default();
        let grouped = DIMENSIONS.map(|dimension| {
            groups.iter().any(|group| group.strip_suffix("_id").unwrap_or(group) == dimension)
        });
        let only = ["project_ids", "api_key_ids", "models", "user_ids"];
        let only = only.map(|name| given.texts(name).filter(|list| !list.is_empty()));
        Ok(Self {
            width_ns: width_s * NS_PER_S,
            from: from.min(end),
            to: from.saturating_add(count).min(end).max(from.min(end)),
            end,
            start_ns: start_s.saturating_mul(NS_PER_S),
            end_ns: end_s.saturating_mul(NS_PER_S),
            grouped,
            by_line: groups.iter().any(|group| group == "line_item"),
            only,
            tenant: call.only.as_ref().map_or_else(String::new, |only| only.as_str().to_owned()),
        })
    }

    /// Parameters 1 to 9 of both statements.
    fn values(&self) -> Vec<Val> {
        let told =
            |index: usize| i64::from(self.grouped[index] || self.only[index].is_some()).into();
        vec![
            self.width_ns.into(),
            told(0),
            told(1),
            told(2),
            told(3),
            self.from.saturating_mul(self.width_ns).max(self.start_ns).into(),
            self.to.saturating_mul(self.width_ns).min(self.end_ns).into(),
            self.tenant.as_str().into(),
            (ROWS_MAX + 1).into(),
        ]
    }

    fn allows(&self, labels: &[&str; 4]) -> bool {
        self.only.iter().zip(labels).all(|(only, label)| {
            only.as_ref().is_none_or(|only| only.iter().any(|allowed| allowed == label))
        })
    }

    /// What is told apart in the answer; the rest is one.
    fn group(&self, labels: [&str; 4]) -> [String; 4] {
        std::array::from_fn(|index| match self.grouped[index] {
            true => labels[index].to_owned(),
            false => String::new(),
        })
    }

    fn page(&self, mut results: BTreeMap<i64, Vec<Value>>) -> Value {
        let buckets = (self.from..self.to).map(|bucket| {
            json!({
                "object": "bucket", "start_time": bucket * (self.width_ns / NS_PER_S),
                "end_time": (bucket + 1) * (self.width_ns / NS_PER_S),
                "results": results.remove(&bucket).unwrap_or_default(),
            })
        });
        let buckets: Vec<_> = buckets.collect();
        let has_more = self.to < self.end;
        let next = has_more.then(|| format!("{PAGE_PREFIX}{}", self.to));
        json!({"object": "page", "data": buckets, "has_more": has_more, "next_page": next})
    }
}

fn check_size(rows: usize) -> Result<(), AdminError> {
    if rows as i64 <= ROWS_MAX {
        return Ok(());
    }
    let message = format!("more than {ROWS_MAX} rows: ask for less time or fewer groups");
    Err(AdminError::field("group_by", message))
}

fn or_null(label: &str) -> Option<&str> {
    (!label.is_empty()).then_some(label)
}

fn usage(db: &mut dyn Db, call: &Call) -> Result<Value, AdminError> {
    let asked = Question::of(call, db.now_ns()?)?;
    let rows = db.query(
        "SELECT at_ns / $1,
        CASE WHEN CAST($2 AS BIGINT) = 1 THEN tenant_id ELSE '' END,
        CASE WHEN CAST($3 AS BIGINT) = 1 THEN key_id ELSE '' END,
        CASE WHEN CAST($4 AS BIGINT) = 1 THEN model ELSE '' END,
        CASE WHEN CAST($5 AS BIGINT) = 1 THEN user_label ELSE '' END,
        CAST(SUM(requests) AS BIGINT), CAST(SUM(uncached_input) AS BIGINT),
        CAST(SUM(cached_input) AS BIGINT), CAST(SUM(output) AS BIGINT),
        CAST(SUM(device_ns) AS BIGINT), CAST(SUM(posted) AS BIGINT),
        CAST(SUM(energy_uj) AS BIGINT)
        FROM (
            SELECT closed_ns AS at_ns, tenant_id, key_id, model, user_label, 1 AS requests,
            uncached_input, cached_input, output, device_ns, posted,
            COALESCE(energy_uj, 0) AS energy_uj
            FROM request WHERE closed_ns >= $6 AND closed_ns < $7 AND ($8 = '' OR tenant_id = $8)
            UNION ALL
            SELECT day_ns, tenant_id, key_id, model, user_label, requests, uncached_input,
            cached_input, output, device_ns, posted, energy_uj
            FROM usage_day WHERE day_ns >= $6 AND day_ns < $7 AND ($8 = '' OR tenant_id = $8)
        ) AS used
        GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5 LIMIT $9",
        &asked.values(),
    )?;
    check_size(rows.len())?;
    let mut sums: BTreeMap<(i64, [String; 4]), [i64; 7]> = BTreeMap::new();
    for row in &rows {
        let labels = [row.text(1)?, row.text(2)?, row.text(3)?, row.text(4)?];
        if !asked.allows(&labels) {
            continue;
        }
        let sum = sums.entry((row.int(0)?, asked.group(labels))).or_default();
        for (index, total) in sum.iter_mut().enumerate() {
            *total = total.saturating_add(row.int(5 + index)?);
        }
    }
    let mut results: BTreeMap<i64, Vec<Value>> = BTreeMap::new();
    for ((bucket, [project, key, model, user]), sum) in sums {
        let [requests, uncached, cached, output, device_ns, posted, energy_uj] = sum;
        results.entry(bucket).or_default().push(json!({
            "object": "organization.usage.completions.result",
            "input_tokens": uncached + cached, "output_tokens": output,
            "input_cached_tokens": cached, "input_audio_tokens": 0, "output_audio_tokens": 0,
            "num_model_requests": requests, "project_id": or_null(&project),
            "user_id": or_null(&user), "api_key_id": or_null(&key), "model": or_null(&model),
            "batch": null, "gpu_ns": device_ns, "energy_uj": energy_uj, "cost_usd": amount(posted),
        }));
    }
    Ok(asked.page(results))
}

fn costs(db: &mut dyn Db, call: &Call) -> Result<Value, AdminError> {
    let asked = Question::of(call, db.now_ns()?)?;
    let rows = db.query(
        "SELECT at_ns / $1,
        CASE WHEN CAST($2 AS BIGINT) = 1 THEN tenant_id ELSE '' END,
        CASE WHEN CAST($3 AS BIGINT) = 1 THEN key_id ELSE '' END,
        CASE WHEN CAST($4 AS BIGINT) = 1 THEN model ELSE '' END,
        CASE WHEN CAST($5 AS BIGINT) = 1 THEN user_label ELSE '' END,
        kind, CAST(SUM(amount) AS BIGINT)
        FROM (
            SELECT window_ns AS at_ns, transfer.tenant_id, transfer.key_id,
            COALESCE(request.model, '') AS model, COALESCE(request.user_label, '') AS user_label,
            kind, amount
            FROM transfer LEFT JOIN request ON request.id = transfer.request_id
            WHERE window_ns >= $6 AND window_ns < $7 AND ($8 = '' OR transfer.tenant_id = $8)
            UNION ALL
            SELECT day_ns, tenant_id, key_id, model, user_label, kind, amount FROM transfer_day
            WHERE day_ns >= $6 AND day_ns < $7 AND ($8 = '' OR tenant_id = $8)
        ) AS moved
        WHERE kind IN ('charge', 'refund')
        GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 3, 4, 5, 6 LIMIT $9",
        &asked.values(),
    )?;
    check_size(rows.len())?;
    let mut sums: BTreeMap<(i64, [String; 4], String), i64> = BTreeMap::new();
    for row in &rows {
        let labels = [row.text(1)?, row.text(2)?, row.text(3)?, row.text(4)?];
        if !asked.allows(&labels) {
            continue;
        }
        let kind = row.text(5)?;
        let line = if asked.by_line { kind.to_owned() } else { String::new() };
        let signed = if kind == "refund" { -row.int(6)? } else { row.int(6)? };
        let sum = sums.entry((row.int(0)?, asked.group(labels), line)).or_default();
        *sum = sum.saturating_add(signed);
    }
    let mut results: BTreeMap<i64, Vec<Value>> = BTreeMap::new();
    for ((bucket, [project, key, model, user], line), nano) in sums {
        let exact = amount(nano);
        // OpenAI has a number here. It is made from the exact decimal, which stands beside it, and
        // nothing is computed with it.
        let value: Value = serde_json::from_str(&exact).unwrap_or_default();
        results.entry(bucket).or_default().push(json!({
            "object": "organization.costs.result",
            "amount": {"value": value, "currency": "usd", "decimal": exact},
            "line_item": or_null(&line), "project_id": or_null(&project),
            "api_key_id": or_null(&key), "model": or_null(&model), "user_id": or_null(&user),
        }));
    }
    Ok(asked.page(results))
}
