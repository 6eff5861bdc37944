//! What a tenant or key is allowed, as flags.

use clap::Args;
use serde_json::Value;

use crate::admin::Given;

#[derive(Args, Debug)]
pub struct PolicyArgs {
    /// Model that may be used; may be repeated [default: all]
    #[arg(long = "model", value_name = "MODEL", help_heading = "Policy")]
    models: Vec<String>,
    /// Highest QoS class
    #[arg(long, value_name = "CLASS", help_heading = "Policy")]
    class_max: Option<String>,
    /// Cap of each request in USD
    #[arg(long, value_name = "USD", help_heading = "Policy")]
    max_cost_usd: Option<String>,
    /// Added, unbilled, to an output that money ended
    #[arg(long, value_name = "TEXT", help_heading = "Policy")]
    closing_text: Option<String>,
    /// End at a sentence once an output is long enough
    #[arg(long, value_name = "BOOL", help_heading = "Policy")]
    natural_stop: Option<bool>,
    /// Within this share of its cap an output ends at the next sentence
    #[arg(long, value_name = "PERCENT", help_heading = "Policy")]
    soft_landing_percent: Option<u8>,
}

impl PolicyArgs {
    pub fn add(self, given: Given) -> Given {
        given
            .with("models", (!self.models.is_empty()).then(|| self.models.into()))
            .with("class_max", self.class_max.map(Value::from))
            .with("max_cost_usd", self.max_cost_usd.map(Value::from))
            .with("closing_text", self.closing_text.map(Value::from))
            .with("natural_stop", self.natural_stop.map(Value::from))
            .with("soft_landing_percent", self.soft_landing_percent.map(Value::from))
    }
}

/// Parts of a policy that are to be taken away.
#[derive(Args, Debug)]
pub struct UnsetArgs {
    /// Take this part of the policy away; may be repeated
    #[arg(long, value_name = "PART", help_heading = "Policy", value_parser = [
        "models", "class-max", "max-cost-usd", "closing-text", "natural-stop", "soft-landing-percent",
    ])]
    unset: Vec<String>,
}

impl UnsetArgs {
    pub fn add(&self, given: Given) -> Given {
        let parts = [
            ("models", "models"),
            ("class-max", "class_max"),
            ("max-cost-usd", "max_cost_usd"),
            ("closing-text", "closing_text"),
            ("natural-stop", "natural_stop"),
            ("soft-landing-percent", "soft_landing_percent"),
        ];
        parts.into_iter().fold(given, |given, (part, field)| {
            let named = self.unset.iter().any(|unset| unset == part);
            given.with(field, named.then_some(Value::Null))
        })
    }
}
