//! Whom a budget or limit binds, as flags.

use clap::Args;

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct Scope {
    /// This tenant
    #[arg(long, value_name = "ID")]
    tenant: Option<String>,
    /// This organisation: all its tenants together
    #[arg(long, value_name = "ID")]
    org: Option<String>,
    /// This key
    #[arg(long, value_name = "ID")]
    key: Option<String>,
    /// Everyone together: the operator's own limit
    #[arg(long)]
    global: bool,
}

impl Scope {
    pub fn name(&self) -> String {
        let named = [("tenant", &self.tenant), ("org", &self.org), ("key", &self.key)];
        let named = named.iter().find_map(|(kind, id)| Some(format!("{kind}:{}", id.as_ref()?)));
        // clap lets exactly one of them through.
        named.unwrap_or_else(|| "global".to_owned())
    }
}
