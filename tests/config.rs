//! Precedence, mistakes and refusals of the configuration.

use std::{fs, path::Path};

use candela::config::{ByteSize, Config, ConfigError, IsaMax, KvCacheDtype, LedgerPlace, Settings};
use clap::Parser;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

/// The configuration of a command line over a file with `text`.
fn load(text: &str, flags: &[&str]) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("candela.toml");
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    let line = ["candela", "--config", path].into_iter().chain(flags.iter().copied());
    let line = Line::try_parse_from(line).map_err(|error| error.to_string())?;
    Config::load(line.settings).map_err(|error| error.to_string())
}

fn refuses(text: &str, flags: &[&str], parts: &[&str]) {
    match load(text, flags) {
        Ok(_) => panic!("{text:?} {flags:?} was accepted"),
        Err(error) => {
            for part in parts {
                assert!(error.contains(part), "{text:?} {flags:?}: {error:?} lacks {part:?}");
            }
            assert!(!error.contains("sk-hidden"), "the key is shown: {error}");
        }
    }
}

#[test]
fn prices_name_their_line_and_key() {
    let price = |lines: &str| format!("port = 9\n[[price]]\nmodel = \"m\"\n{lines}\n");
    let good = load(&price("input = \"0.02\"\noutput = \"0.04\"\ntenant = \"a\""), &[]).unwrap();
    assert_eq!(good.prices.len(), 1);
    assert_eq!(good.prices[0].rates.cached_input.0, 20_000_000);
    refuses(&price("input = 0.02\noutput = \"1\""), &[], &["line 4", "`input`"]);
    refuses(&price("input = \"1\"\noutput = \"1e3\""), &[], &["line 5", "`output`", "1e3"]);
    refuses(&price("input = \"1\"\nouptut = \"1\""), &[], &["line 5", "`ouptut`", "output"]);
    refuses(&price("input = \"1\""), &[], &["line 2", "`price`", "output"]);
    refuses(&price("input = \"1\"\noutput = \"1\"\ncached_input = \"2\""), &[], &["cached"]);
    refuses(&price("input = \"1\"\noutput = \"1\"\ngpu = \"abacus\""), &[], &["abacus", "l4"]);
    refuses(&price("billing = \"device\""), &[], &["gpu_hour"]);
    refuses("[[price]]\ninput = \"1\"\noutput = \"1\"", &[], &["line 1", "model"]);
}

#[test]
fn a_flag_wins_over_the_file_and_that_over_the_default() {
    let check = |text: &str, flags: &[&str], port| {
        assert_eq!(load(text, flags).unwrap().port, port, "{text:?} {flags:?}");
    };
    check("", &[], 8000);
    check("port = 9000", &[], 9000);
    check("port = 9000", &["--port", "9001"], 9001);
    check("", &["--port", "0"], 0);
}

#[test]
fn every_kind_of_value_is_read() {
    let text = "kv_cache_memory = \"1.5GiB\"\nkv_cache_dtype = \"f32\"\nisa_max = \"avx2\"\noffline = true\n\
                drain_timeout = 0\nthreads = 3\nmodel = \"m\"\nbody_bytes_max = 2048\n";
    let config = load(text, &[]).unwrap();
    assert_eq!(config.kv_cache_memory_bytes, Some(3 << 29));
    assert_eq!(config.kv_cache_dtype, KvCacheDtype::F32);
    assert_eq!(config.isa_max, Some(IsaMax::Avx2));
    assert!(config.sources.offline);
    assert_eq!(config.drain_timeout.as_secs(), 0);
    assert_eq!(config.threads, Some(3));
    assert_eq!(config.model.as_deref(), Some("m"));
    assert_eq!(config.body_bytes_max, 2048);
    assert!(!load(text, &["--offline=false"]).unwrap().sources.offline);
    assert!(load("", &["--offline"]).unwrap().sources.offline);
}

#[test]
fn a_mistake_in_the_file_names_line_and_key() {
    refuses("\n\nprot = 1\n", &[], &["line 3", "`prot`", "did you mean `port`"]);
    refuses("max_num_seq = 4", &[], &["line 1", "`max_num_seq`", "`max_num_seqs`"]);
    refuses("zzzzzzzz = 4", &[], &["line 1", "`zzzzzzzz`", "unknown field"]);
    refuses("model = \"m\"\nport = \"x\"", &[], &["line 2", "`port`"]);
    refuses("port = 70000", &[], &["line 1", "`port`"]);
    refuses("port = -1", &[], &["line 1", "`port`"]);
    refuses("device = \"cuda:x\"", &[], &["line 1", "`device`", "cuda:N"]);
    refuses("kv_cache_memory = \"4 apples\"", &[], &["line 1", "`kv_cache_memory`", "4GiB"]);
    refuses("kv_cache_memory = -4", &[], &["line 1", "`kv_cache_memory`"]);
    refuses("offline = 1", &[], &["line 1", "`offline`"]);
    refuses("config = \"other.toml\"", &[], &["line 1", "`config`"]);
    refuses("[server]\nport = 1", &[], &["line 1", "`server`"]);
    refuses("port = 1\nport = 2", &[], &["line 2", "`port`"]);
    refuses("port =", &[], &["line 1", "`port`"]);
}

#[test]
fn a_mistake_beside_the_key_does_not_show_it() {
    refuses("api_key = \"sk-hidden", &[], &["line 1", "`api_key`"]);
    refuses("api_key = [\"sk-hidden\"]", &[], &["line 1", "`api_key`"]);
    refuses("api_key = sk-hidden", &[], &["line 1", "`api_key`"]);
    refuses("api_kez = \"sk-hidden\"", &[], &["line 1", "`api_key`"]);
    refuses("", &["--api-key", "sk-hidden sk-hidden"], &["api_key", "printable"]);
    let config = load("api_key = \"sk-hidden-1\"", &[]).unwrap();
    assert!(!format!("{config:?}").contains("sk-hidden"));
    assert_eq!(config.api_key.unwrap().reveal(), "sk-hidden-1");
}

#[test]
fn values_out_of_range_are_refused() {
    refuses("", &["--pipeline-depth", "0"], &["pipeline_depth", "1 to 2"]);
    refuses("", &["--pipeline-depth", "3"], &["pipeline_depth", "1 to 2"]);
    refuses("", &["--threads", "0"], &["threads"]);
    refuses("", &["--max-num-seqs", "0"], &["max_num_seqs"]);
    let both = &["--max-num-seqs", "1000", "--max-num-batched-tokens", "512"];
    refuses("", both, &["max_num_batched_tokens", "max_num_seqs"]);
    refuses("", &["--waiting-requests-max", "0"], &["waiting_requests_max"]);
    refuses("", &["--choices-max", "129"], &["choices_max"]);
    refuses("", &["--logprobs-top-max", "21"], &["logprobs_top_max"]);
    refuses("", &["--kv-cache-memory", "1KiB"], &["kv_cache_memory", "at least"]);
    refuses("", &["--drain-timeout", "99999999"], &["drain_timeout"]);
    refuses("", &["--client-stall-s-max", "0"], &["client_stall_s_max"]);
    refuses("retention_days = 34", &[], &["retention_days", "35 to"]);
    refuses("", &["--retention-days", "0"], &["retention_days", "35 to"]);
    let kept = load("retention_days = 35", &[]).unwrap().retention;
    assert_eq!(kept.map(|kept| kept.as_secs()), Some(35 * 86_400));
    assert_eq!(load("", &[]).unwrap().retention, None, "for ever");
    refuses("", &["--model", " "], &["model", "empty"]);
    for device in ["gpu", "cuda:", "cuda:-1", "cpu:0", "CUDA:0"] {
        refuses("", &["--device", device], &[device, "auto, cpu, cuda or cuda:N"]);
    }
    for share in ["0", "1.1", "-0.5", "nan", "all"] {
        let flag = format!("--gpu-memory-utilization={share}");
        refuses("", &[&flag], &["gpu"]);
    }
    refuses("", &["--dtype", "fp8"], &["bf16 or f16"]);
    refuses("", &["--load-format", "random"], &["auto or dummy"]);
    refuses("", &["--api-key", "short"], &["api_key"]);
    refuses("kv_cache_dtype = \"bf16\"", &[], &["line 1", "`bf16` is not f16 or f32"]);
    refuses("isa_max = \"avx\"", &[], &["line 1", "`avx` is not portable, avx2 or avx512"]);
    refuses("", &["--host", "example"], &["host", "no IP address"]);
}

#[test]
fn an_open_address_needs_a_key_or_a_word() {
    let check = |flags: &[&str]| assert!(load("", flags).is_ok(), "{flags:?}");
    refuses("", &["--host", "0.0.0.0"], &["CANDELA_API_KEY", "--allow-anonymous"]);
    refuses("", &["--host", "::"], &["--allow-anonymous"]);
    refuses("", &["--host", "10.0.0.1"], &["--allow-anonymous"]);
    refuses("host = \"0.0.0.0\"", &["--allow-anonymous=false"], &["--allow-anonymous"]);
    check(&["--host", "0.0.0.0", "--api-key", "sk-12345"]);
    check(&["--host", "0.0.0.0", "--allow-anonymous"]);
    check(&["--host", "127.0.0.2"]);
    check(&["--host", "::1"]);
    check(&["--host", "localhost"]);
}

#[test]
fn a_named_file_must_be_there() {
    let settings = Settings { config: Some("absent/candela.toml".into()), ..Settings::default() };
    match Config::load(settings) {
        Err(ConfigError::Read { path, .. }) => assert_eq!(path, Path::new("absent/candela.toml")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn sizes() {
    let check = |text: &str, want: Option<u64>| {
        assert_eq!(text.parse::<ByteSize>().ok().map(|size| size.0), want, "{text:?}");
    };
    check("0", Some(0));
    check("4GiB", Some(4 << 30));
    check("512 mib", Some(512 << 20));
    check("2GB", Some(2_000_000_000));
    check("0.5KiB", Some(512));
    check("18446744073709551615", Some(u64::MAX));
    check("18446744073709551616", None);
    check("18446744073709551615KiB", None);
    check("", None);
    check("GiB", None);
    check("-1", None);
    check("1.2.3", None);
    check("4GiBs", None);
    check("1e9", None);
}

#[test]
fn a_ledger_is_a_directory_or_a_database_whose_password_stays_hidden() {
    let place = |text: &str, flags: &[&str]| load(text, flags).unwrap().ledger;
    let url = "postgres://u:sk-hidden@127.0.0.1/db";
    for found in [place("", &["--ledger", url]), place(&format!("ledger = \"{url}\""), &[])] {
        assert!(matches!(&found, LedgerPlace::Postgres(known) if known.reveal() == url));
        assert!(!format!("{found:?}").contains("sk-hidden"));
    }
    let found = place("ledger = \"postgresql://h/db\"", &["--data-dir", "/tmp/x"]);
    assert!(matches!(found, LedgerPlace::Postgres(_)), "the database comes first");
    assert_eq!(place("data_dir = \"/tmp/x\"", &[]), LedgerPlace::Directory("/tmp/x".into()));
    for wrong in
        ["", "ledger.sqlite", "mysql://u:sk-hidden@h/db", "POSTGRES:sk-hidden", "sqlite:///x"]
    {
        refuses("", &["--ledger", wrong], &["ledger", "postgres://user:password@host", "data_dir"]);
    }
    refuses("ledger = 5", &[], &["line 1", "`ledger`"]);
}
