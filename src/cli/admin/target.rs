//! Where a command works: on the ledger of a data directory, or on a server over REST.

use std::{io::Write, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Map, Value};

use crate::{
    admin::{Authority, Call, Field, Fresh, Given, Route, Verb, Work},
    cli::open_ledger::{self, open_db},
    config::{LedgerPlace, Secret, Settings},
    ledger::{book::transact, db::Db, schema::migrate},
};

use super::table::{Column, print_table};

/// The key of an administrator; a flag would show it to other users.
const KEY_VARIABLE: &str = "CANDELA_ADMIN_KEY";
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(60);
/// Entries asked for at once.
const PAGE: i64 = 1000;

#[derive(Args, Debug)]
pub struct Place {
    /// Where the ledger is [default: as `candela serve`]
    #[arg(long, env = "CANDELA_DATA_DIR", value_name = "DIR", help_heading = "Ledger")]
    data_dir: Option<PathBuf>,
    /// PostgreSQL URL of the ledger, in place of a directory (better given in the environment)
    #[arg(
        long,
        env = "CANDELA_LEDGER",
        hide_env_values = true,
        value_name = "URL",
        help_heading = "Ledger"
    )]
    ledger: Option<Secret>,
    /// Configuration file [default: candela.toml in the working directory, where there is one]
    #[arg(long, env = "CANDELA_CONFIG", value_name = "FILE", help_heading = "Ledger")]
    config: Option<PathBuf>,
    /// Ask this server instead, with the key in CANDELA_ADMIN_KEY
    #[arg(long, env = "CANDELA_SERVER", value_name = "URL", help_heading = "Ledger")]
    server: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

enum Way {
    Ledger(LedgerPlace),
    Server { url: String, key: Option<Secret>, http: reqwest::Client },
}

/// A ledger or a server, and how to print what it says.
pub struct Target {
    way: Way,
    pub json: bool,
}

impl Place {
    pub fn target(self) -> Result<Target> {
        let json = self.json;
        if let Some(url) = self.server {
            let key = std::env::var(KEY_VARIABLE).ok().filter(|key| !key.is_empty());
            let http = reqwest::Client::builder().timeout(ANSWER_WAIT_MAX).build()?;
            let url = url.trim_end_matches('/').to_owned();
            let key = key.and_then(|key| key.parse().ok());
            return Ok(Target { way: Way::Server { url, key, http }, json });
        }
        let settings = Settings {
            config: self.config,
            data_dir: self.data_dir,
            ledger: self.ledger,
            ..Settings::default()
        };
        Ok(Target { way: Way::Ledger(LedgerPlace::load(settings)?), json })
    }
}

impl Target {
    /// Does one operation.
    pub fn call(&self, route: &'static Route, given: Given) -> Result<Value> {
        match &self.way {
            Way::Ledger(place) => on_ledger(place, route, given),
            Way::Server { url, key, http } => {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(on_server(http, url, key.as_ref(), route, given))
            }
        }
    }

    /// Every entry of a list, page by page; `next` says after what the next page begins.
    pub fn all(
        &self,
        route: &'static Route,
        given: &Given,
        next: (&'static str, &str),
        mut each: impl FnMut(Value) -> Result<()>,
    ) -> Result<()> {
        let mut after: Option<Value> = None;
        loop {
            let page = given.clone().with("limit", Value::from(PAGE)).with(next.0, after.take());
            let mut answer = self.call(route, page)?;
            let more = answer["has_more"] == true;
            let Some(Value::Array(rows)) = answer.get_mut("data").map(Value::take) else {
                bail!("the server's answer is no list");
            };
            after = rows.last().map(|last| last[next.1].clone());
            rows.into_iter().try_for_each(&mut each)?;
            if !more || after.is_none() {
                return Ok(());
            }
        }
    }

    /// Prints every entry of a list.
    pub fn list(
        &self,
        route: &'static Route,
        given: &Given,
        next: (&'static str, &str),
        columns: &[Column],
    ) -> Result<()> {
        let mut rows = Vec::new();
        self.all(route, given, next, |row| {
            rows.push(row);
            Ok(())
        })?;
        self.print_rows(&rows, columns)
    }

    pub fn print_rows(&self, rows: &[Value], columns: &[Column]) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{}", serde_json::to_string_pretty(rows)?)?;
            return Ok(());
        }
        print_table(&mut out, columns, rows)?;
        Ok(())
    }

    /// Prints one object: as JSON, or as `line` says it.
    pub fn say(&self, answer: &Value, line: impl FnOnce(&Value) -> String) -> Result<()> {
        let mut out = std::io::stdout().lock();
        match self.json {
            true => writeln!(out, "{}", serde_json::to_string_pretty(answer)?)?,
            false => writeln!(out, "{}", line(answer))?,
        }
        Ok(())
    }
}

fn on_ledger(place: &LedgerPlace, route: &'static Route, given: Given) -> Result<Value> {
    given.check(route.fields)?;
    // A mistyped directory must not look like an empty ledger. A database has to be made first.
    if let LedgerPlace::Directory(dir) = place
        && route.verb == Verb::Get
        && !dir.join(open_ledger::FILE).exists()
    {
        bail!("there is no ledger in {}: name its --data-dir, or --server", dir.display());
    }
    let mut db: Box<dyn Db> = open_db(place)?;
    migrate(&mut *db)?;
    let user = ["USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok());
    let call = Call {
        authority: Authority::Owner(user.unwrap_or_else(|| "unknown".to_owned())),
        only: None,
        given,
        fresh: Fresh::draw()?,
    };
    Ok(match route.work {
        Work::Change(work) => transact(&mut *db, |book| call.change(book, work))?.0?,
        Work::Read(work) => work(&mut *db, &call)?,
    })
}

async fn on_server(
    http: &reqwest::Client,
    url: &str,
    key: Option<&Secret>,
    route: &'static Route,
    mut given: Given,
) -> Result<Value> {
    given.check(route.fields)?;
    let mut path = route.path.to_owned();
    let mut query = Vec::new();
    let (in_path, others): (Vec<&Field>, Vec<&Field>) =
        route.all_fields().partition(|field| route.in_path(field));
    for field in in_path {
        let text = given.take_text(field).pop().unwrap_or_default();
        path = path.replace(&format!("{{{}}}", field.name), &escaped(&text));
    }
    if !route.has_body() {
        for field in others {
            let texts = given.take_text(field).into_iter();
            query.extend(texts.map(|text| format!("{}={}", field.name, escaped(&text))));
        }
    }
    let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
    let method = match route.verb {
        Verb::Get => reqwest::Method::GET,
        Verb::Post => reqwest::Method::POST,
        Verb::Put => reqwest::Method::PUT,
        Verb::Patch => reqwest::Method::PATCH,
        Verb::Delete => reqwest::Method::DELETE,
    };
    let mut request = http.request(method, format!("{url}{path}{query}"));
    if let Some(key) = key {
        request = request.bearer_auth(key.reveal());
    }
    if route.has_body() {
        request = request.json(&given.into_body());
    }
    let response = request.send().await.with_context(|| format!("asking {url}"))?;
    let status = response.status();
    let text = response.text().await.with_context(|| format!("reading the answer of {url}"))?;
    let answer: Value = serde_json::from_str(&text).unwrap_or(Value::Object(Map::new()));
    if status.is_success() {
        return Ok(answer);
    }
    let message = answer["error"]["message"].as_str().unwrap_or("no reason given");
    if status == reqwest::StatusCode::UNAUTHORIZED {
        bail!("{url} wants a key: set {KEY_VARIABLE} to one of role admin or operator");
    }
    bail!("{message} ({status})")
}

/// A text as part of a path or query (RFC 3986: all but unreserved characters are escaped).
fn escaped(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    let byte = |b: u8| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") };
    text.bytes().map(byte).collect()
}
