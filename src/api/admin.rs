//! `/admin/v1` and `/v1/organization`: every operation of [`crate::admin`], nothing else. The check
//! of the caller's role is here, once, before anything of a call is read.

use std::sync::Arc;

use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{
        Query, RawPathParams, State,
        rejection::{BytesRejection, QueryRejection, RawPathParamsRejection},
    },
    routing::{MethodFilter, on},
};
use serde_json::{Map, Value, json};

use crate::{
    admin::{Authority, Call, Field, Fresh, Given, ROUTES, Route, Verb, Work},
    admission::Caller,
    ledger::{Payer, book::Role},
};

use super::{ApiError, AppState, record::Record};

type Pairs = Vec<(String, String)>;

/// Path, query and body as they came.
struct Parts {
    path: Result<RawPathParams, RawPathParamsRejection>,
    query: Result<Query<Pairs>, QueryRejection>,
    body: Result<Bytes, BytesRejection>,
}

/// All operations, each behind the check of its role.
pub fn routes() -> Router<Arc<AppState>> {
    ROUTES.into_iter().fold(Router::new(), |router, route| {
        let handler = move |state, caller, record, path, query, body| {
            answer(route, state, caller, record, Parts { path, query, body })
        };
        router.route(route.path, on(filter(route.verb), handler))
    })
}

fn filter(verb: Verb) -> MethodFilter {
    match verb {
        Verb::Get => MethodFilter::GET,
        Verb::Post => MethodFilter::POST,
        Verb::Put => MethodFilter::PUT,
        Verb::Patch => MethodFilter::PATCH,
        Verb::Delete => MethodFilter::DELETE,
    }
}

async fn answer(
    route: &'static Route,
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    Extension(record): Extension<Arc<Record>>,
    parts: Parts,
) -> Result<Json<Value>, ApiError> {
    record.tenant(caller.tenant.as_str());
    if caller.role < route.least {
        return Err(ApiError::role(route.least));
    }
    let only = (caller.role == Role::Tenant).then(|| caller.tenant.clone());
    let authority = match caller.payer {
        Payer::Key(id) => Authority::Key(id),
        Payer::Tenant(_) if caller.role == Role::Admin => Authority::BeforeFirstKey,
        Payer::Tenant(_) => Authority::Anonymous,
    };
    let given = parts.given(route)?;
    let fresh = Fresh::draw().map_err(|error| ApiError::internal(error.to_string()))?;
    let call = Call { authority, only, given, fresh };
    let done = match route.work {
        Work::Change(work) => state.ledger.run(move |book| call.change(book, work)).await?,
        Work::Read(work) => state.reader.run(move |db| work(db, &call)).await?,
    };
    Ok(Json(done?))
}

impl Parts {
    fn given(self, route: &Route) -> Result<Given, ApiError> {
        let wrong = |text: String| ApiError::invalid(None, text);
        let path = self.path.map_err(|error| wrong(error.to_string()))?;
        let mut texts: Pairs =
            path.iter().map(|(name, text)| (name.to_owned(), text.to_owned())).collect();
        let Query(query) = self.query.map_err(|error| wrong(error.body_text()))?;
        let body = match (route.has_body(), &*self.body?) {
            (false, _) => {
                texts.extend(query);
                Map::new()
            }
            (true, _) if !query.is_empty() => {
                let message = "the fields of this operation belong in the body";
                return Err(ApiError::invalid(Some(&query[0].0), message));
            }
            (true, b"") => Map::new(),
            (true, bytes) => match serde_json::from_slice(bytes) {
                Ok(Value::Object(map)) => map,
                Ok(_) => return Err(wrong("the body must be a JSON object".into())),
                Err(error) => return Err(wrong(format!("the body is not JSON: {error}"))),
            },
        };
        Ok(route.given(texts, body)?)
    }
}

/// Adds the operations to the description of the API.
pub fn describe(document: &mut Value) {
    for route in ROUTES {
        let (mut parameters, mut properties, mut needed) = (Vec::new(), Map::new(), Vec::new());
        for field in route.all_fields() {
            match (route.in_path(field), route.has_body()) {
                (false, true) => {
                    properties.insert(field.name.to_owned(), field.schema());
                    if field.needed {
                        needed.push(field.name);
                    }
                }
                (in_path, _) => parameters.push(parameter(field, in_path)),
            }
        }
        let mut operation = json!({
            "operationId": route.name,
            "summary": format!("{} Role: {}.", route.summary, route.least.name()),
            "parameters": parameters,
            "responses": {
                "200": {
                    "description": "Done.",
                    "content": {"application/json": {"schema": {"type": "object"}}},
                },
                "default": {"$ref": "#/components/responses/Error"},
            },
        });
        if route.has_body() {
            let schema = json!({
                "type": "object", "properties": properties, "required": needed,
                "additionalProperties": false,
            });
            operation["requestBody"] = json!({
                "required": !needed.is_empty(), "content": {"application/json": {"schema": schema}},
            });
        }
        document["paths"][route.path][name(route.verb)] = operation;
    }
}

/// In a query nothing is null: what is not given is left out.
fn parameter(field: &Field, in_path: bool) -> Value {
    let mut schema = Field { needed: true, ..*field }.schema();
    if let Some(schema) = schema.as_object_mut() {
        schema.remove("description");
    }
    json!({
        "name": field.name, "in": if in_path { "path" } else { "query" },
        "required": in_path || field.needed, "description": field.about, "schema": schema,
    })
}

fn name(verb: Verb) -> &'static str {
    match verb {
        Verb::Get => "get",
        Verb::Post => "post",
        Verb::Put => "put",
        Verb::Patch => "patch",
        Verb::Delete => "delete",
    }
}
