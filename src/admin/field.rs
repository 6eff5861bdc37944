//! Fields of operations: one declaration is the check, the message and the schema.

use serde_json::{Map, Value, json};

use crate::{
    ledger::{Span, Zone},
    price::usd,
    types::NanoUsd,
};

use super::AdminError;

const ID_PATTERN: &str = "^[a-z0-9][a-z0-9._-]{0,63}$";
const SCOPE_PATTERN: &str = "^(global|(org|tenant|key):[a-z0-9][a-z0-9._-]{0,63})$";
const USD_PATTERN: &str = "^[0-9]{1,9}(\\.[0-9]{1,9})?$";
const ID_BYTES_MAX: usize = 64;
const LABEL_BYTES_MAX: usize = 256;
const LIST_MAX: usize = 100;
/// The bits that a window keeps for thresholds that were passed.
const PERCENTS_MAX: usize = 62;
/// Later times do not fit nanoseconds in 64 bits.
const TIME_S_MAX: i64 = 9_000_000_000;

/// What a field holds.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Of an organisation, tenant or key.
    Id,
    /// `global`, `org:ID`, `tenant:ID` or `key:ID`.
    Scope,
    /// Text for people, on one line, of so many bytes at most.
    Text(usize),
    /// The name of a model, a request or a label: one line that is not empty.
    Label,
    Labels,
    OneOf(&'static [&'static str]),
    SomeOf(&'static [&'static str]),
    /// A decimal string.
    Usd,
    Int(i64, i64),
    /// Seconds since 1970.
    Time,
    Percents,
    Bool,
    /// Of the IANA database.
    Zone,
    Span,
}

/// One field of an operation, in its path, query or body.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub name: &'static str,
    pub kind: Kind,
    pub needed: bool,
    pub about: &'static str,
}

impl Field {
    pub const fn needed(name: &'static str, kind: Kind, about: &'static str) -> Self {
        Self { name, kind, needed: true, about }
    }

    pub const fn optional(name: &'static str, kind: Kind, about: &'static str) -> Self {
        Self { name, kind, needed: false, about }
    }

    /// JSON schema of the value; an optional one may be null.
    pub fn schema(&self) -> Value {
        let mut schema = self.kind.schema();
        schema["description"] = self.about.into();
        if !self.needed {
            if let Some(kind) = schema.get("type").cloned() {
                schema["type"] = json!([kind, "null"]);
            }
            if let Some(members) = schema.get_mut("enum").and_then(Value::as_array_mut) {
                members.push(Value::Null);
            }
        }
        schema
    }
}

/// Whether `text` may be the id of an organisation, tenant or key.
fn is_id(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    text.len() <= ID_BYTES_MAX
        && text.bytes().next().is_some_and(plain)
        && text.bytes().all(|b| plain(b) || b"._-".contains(&b))
}

fn is_scope(text: &str) -> bool {
    match text.split_once(':') {
        Some((kind, id)) => ["org", "tenant", "key"].contains(&kind) && is_id(id),
        None => text == "global",
    }
}

fn is_label(text: &str) -> bool {
    (1..=LABEL_BYTES_MAX).contains(&text.len()) && !text.contains(char::is_control)
}

impl Kind {
    /// Whether a value is of this kind.
    fn holds(self, value: &Value) -> bool {
        let text = |test: fn(&str) -> bool| value.as_str().is_some_and(test);
        let list = |most: usize, test: &dyn Fn(&Value) -> bool| {
            value.as_array().is_some_and(|list| list.len() <= most && list.iter().all(test))
        };
        match self {
            Self::Id => text(is_id),
            Self::Scope => text(is_scope),
            Self::Text(most) => value
                .as_str()
                .is_some_and(|text| text.len() <= most && !text.contains(char::is_control)),
            Self::Label => text(is_label),
            Self::Labels => list(LIST_MAX, &|item| item.as_str().is_some_and(is_label)),
            Self::OneOf(words) => value.as_str().is_some_and(|text| words.contains(&text)),
            Self::SomeOf(words) => {
                list(words.len(), &|item| item.as_str().is_some_and(|text| words.contains(&text)))
            }
            Self::Usd => text(|text| usd::parse(text).is_ok()),
            Self::Int(least, most) => {
                value.as_i64().is_some_and(|number| (least..=most).contains(&number))
            }
            Self::Time => Self::Int(0, TIME_S_MAX).holds(value),
            Self::Percents => list(PERCENTS_MAX, &|item| Self::Int(1, 100).holds(item)),
            Self::Bool => value.is_boolean(),
            Self::Zone => text(|text| Zone::parse(text).is_some()),
            Self::Span => text(|text| Span::parse(text).is_some()),
        }
    }

    /// What a value must be, to be read after "must be".
    fn expected(self) -> String {
        match self {
            Self::Id => "a lower-case letter or digit and up to 63 more, or `.`, `_`, `-`".into(),
            Self::Scope => "global, org:ID, tenant:ID or key:ID".into(),
            Self::Text(most) => format!("one line of at most {most} bytes"),
            Self::Label => format!("one line of 1 to {LABEL_BYTES_MAX} bytes"),
            Self::Labels => format!("a list of up to {LIST_MAX} names"),
            Self::OneOf(words) => format!("one of {}", words.join(", ")),
            Self::SomeOf(words) => format!("a list of some of {}", words.join(", ")),
            Self::Usd => {
                "an amount in USD as a string with at most nine decimals, such as \"0.15\"".into()
            }
            Self::Int(least, most) => format!("a whole number from {least} to {most}"),
            Self::Time => format!("seconds since 1970, at most {TIME_S_MAX}"),
            Self::Percents => format!("a list of up to {PERCENTS_MAX} numbers from 1 to 100"),
            Self::Bool => "true or false".into(),
            Self::Zone => "a time zone of the IANA database, such as Europe/Berlin".into(),
            Self::Span => format!("one of {}", Span::ALL.map(Span::name).join(", ")),
        }
    }

    fn schema(self) -> Value {
        let label = json!({"type": "string", "minLength": 1, "maxLength": LABEL_BYTES_MAX});
        match self {
            Self::Id => json!({"type": "string", "pattern": ID_PATTERN}),
            Self::Scope => json!({"type": "string", "pattern": SCOPE_PATTERN}),
            Self::Text(most) => json!({"type": "string", "maxLength": most}),
            Self::Label => label,
            Self::Labels => json!({"type": "array", "maxItems": LIST_MAX, "items": label}),
            Self::OneOf(words) => json!({"type": "string", "enum": words}),
            Self::SomeOf(words) => json!({
                "type": "array", "maxItems": words.len(),
                "items": {"type": "string", "enum": words},
            }),
            Self::Usd => json!({"type": "string", "pattern": USD_PATTERN}),
            Self::Int(least, most) => {
                json!({"type": "integer", "minimum": least, "maximum": most})
            }
            Self::Time => Self::Int(0, TIME_S_MAX).schema(),
            Self::Percents => json!({
                "type": "array", "maxItems": PERCENTS_MAX, "items": Self::Int(1, 100).schema(),
            }),
            Self::Bool => json!({"type": "boolean"}),
            Self::Zone => json!({"type": "string"}),
            Self::Span => json!({"type": "string", "enum": Span::ALL.map(Span::name)}),
        }
    }

    fn is_list(self) -> bool {
        matches!(self, Self::Labels | Self::SomeOf(_) | Self::Percents)
    }

    /// The value that a text of a path or query stands for. One that is no number stays text, so
    /// that the check names its field.
    fn of_text(self, text: &str) -> Value {
        match self {
            Self::Int(..) | Self::Time | Self::Percents => {
                text.parse::<i64>().map_or_else(|_| text.into(), Value::from)
            }
            Self::Bool => text.parse::<bool>().map_or_else(|_| text.into(), Value::from),
            _ => text.into(),
        }
    }
}

/// Values of fields as they were given, then checked.
#[derive(Clone, Debug, Default)]
pub struct Given(Map<String, Value>);

impl Given {
    /// Adds a value unless there is none.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Option<Value>>) -> Self {
        if let Some(value) = value.into() {
            self.0.insert(name.to_owned(), value);
        }
        self
    }

    pub fn of_body(body: Map<String, Value>) -> Self {
        Self(body)
    }

    /// Takes the values that belong in the path or query, as texts.
    pub fn take_text(&mut self, field: &Field) -> Vec<String> {
        let plain = |value: Value| match value {
            Value::String(text) => text,
            other => other.to_string(),
        };
        match self.0.remove(field.name) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => list.into_iter().map(plain).collect(),
            Some(value) => vec![plain(value)],
        }
    }

    /// Adds what a path or query says. `name[]` is `name`, as some clients write lists.
    pub fn add_text(
        &mut self,
        fields: &[&[Field]],
        name: &str,
        text: &str,
    ) -> Result<(), AdminError> {
        let name = name.strip_suffix("[]").unwrap_or(name);
        let field = fields.iter().copied().flatten().find(|field| field.name == name);
        let Some(field) = field else { return Err(unknown(fields, name)) };
        let value = field.kind.of_text(text);
        match self.0.get_mut(name) {
            Some(Value::Array(list)) if field.kind.is_list() => list.push(value),
            Some(_) => return Err(AdminError::field(name, format!("`{name}` is given twice"))),
            None => {
                let value = if field.kind.is_list() { json!([value]) } else { value };
                self.0.insert(name.to_owned(), value);
            }
        }
        Ok(())
    }

    /// Everything is a field, of its kind, and nothing that is needed is missing.
    pub fn check(&self, fields: &[&[Field]]) -> Result<(), AdminError> {
        let known = || fields.iter().copied().flatten();
        for (name, value) in &self.0 {
            let Some(field) = known().find(|field| field.name == name) else {
                return Err(unknown(fields, name));
            };
            let absent = value.is_null() && !field.needed;
            if !absent && !field.kind.holds(value) {
                let message = format!("`{name}` must be {}", field.kind.expected());
                return Err(AdminError::field(name, message));
            }
        }
        match known().find(|field| field.needed && !self.0.contains_key(field.name)) {
            Some(field) => {
                let message = format!("`{}` is missing: {}", field.name, field.about);
                Err(AdminError::field(field.name, message))
            }
            None => Ok(()),
        }
    }

    /// Whether the field is there, be it null.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(Value::as_str)
    }

    pub fn int(&self, name: &str) -> Option<i64> {
        self.0.get(name).and_then(Value::as_i64)
    }

    pub fn flag(&self, name: &str) -> Option<bool> {
        self.0.get(name).and_then(Value::as_bool)
    }

    pub fn usd(&self, name: &str) -> Option<NanoUsd> {
        self.text(name).and_then(|text| usd::parse(text).ok())
    }

    pub fn texts(&self, name: &str) -> Option<Vec<String>> {
        let list = self.0.get(name)?.as_array()?;
        Some(list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
    }

    pub fn percents(&self, name: &str) -> Option<Vec<u8>> {
        let list = self.0.get(name)?.as_array()?.iter();
        Some(list.filter_map(Value::as_i64).filter_map(|n| u8::try_from(n).ok()).collect())
    }

    pub fn into_body(self) -> Value {
        Value::Object(self.0)
    }
}

fn unknown(fields: &[&[Field]], name: &str) -> AdminError {
    let names: Vec<_> = fields.iter().copied().flatten().map(|field| field.name).collect();
    let message = match names.is_empty() {
        true => format!("`{name}` is no field of this operation, which has none"),
        false => format!("`{name}` is no field of this operation; it has {}", names.join(", ")),
    };
    AdminError::field(name, message)
}
