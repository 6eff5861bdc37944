//! The program as a user runs it.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Command, Output},
};

/// Runs the program in `dir` with nothing of this test's environment but the path.
fn candela(dir: &Path, variables: &[(&str, &str)], line: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_candela"))
        .args(line)
        .current_dir(dir)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", dir)
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

/// Asserts the exit code and that both streams together contain `parts`.
fn check(dir: &Path, variables: &[(&str, &str)], line: &[&str], code: i32, parts: &[&str]) {
    let out = candela(dir, variables, line);
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert_eq!(out.status.code(), Some(code), "{line:?} {variables:?}: {text}");
    for part in parts {
        assert!(text.contains(part), "{line:?} {variables:?} lacks {part:?}: {text}");
    }
}

#[test]
fn help_and_version() {
    let dir = tempfile::tempdir().unwrap();
    let check = |line: &[&str], code, parts: &[&str]| check(dir.path(), &[], line, code, parts);
    check(&["--help"], 0, &["serve", "pull", "doctor", "bench", "candela.toml", "Examples"]);
    check(
        &["serve", "--help"],
        0,
        &["--max-num-seqs", "CANDELA_MAX_NUM_SEQS", "[default: 32, on a GPU 256]"],
    );
    check(&["bench", "--help"], 0, &["--goodput", "--request-rate", "--url"]);
    check(&["version"], 0, &[concat!("candela ", env!("CARGO_PKG_VERSION"))]);
    check(&["--version"], 0, &[env!("CARGO_PKG_VERSION")]);
    check(&[], 2, &["Usage"]);
    check(&["sreve"], 2, &["serve"]);
    check(&["serve", "--prot", "1"], 2, &["--port"]);
    check(&["serve", "--port", "x"], 2, &["--port"]);
    check(
        &["serve", "--port", "0", "--device", "cuda:0"],
        1,
        &["built without CUDA", "--features"],
    );
    let dummy = ["serve", "--port", "0", "--device", "cpu", "--load-format", "dummy"];
    check(&dummy, 1, &["load_format dummy", "--device cuda:N"]);
}

#[test]
fn help_does_not_show_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let secrets = [("CANDELA_API_KEY", "sk-hidden-1"), ("HF_TOKEN", "hf-hidden-1")];
    for command in ["serve", "doctor", "pull", "bench"] {
        let out = candela(dir.path(), &secrets, &[command, "--help"]);
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && !text.contains("hidden-1"), "{command}: {text}");
    }
}

#[test]
fn precedence_of_flag_variable_and_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("candela.toml"), "pipeline_depth = 7\n").unwrap();
    let check = |variables: &[(&str, &str)], line: &[&str], code, parts: &[&str]| {
        check(dir.path(), variables, line, code, parts);
    };
    check(&[], &["doctor"], 1, &["7 is out of range"]);
    check(&[("CANDELA_PIPELINE_DEPTH", "8")], &["doctor"], 1, &["8 is out of range"]);
    let line = ["doctor", "--pipeline-depth", "9"];
    check(&[("CANDELA_PIPELINE_DEPTH", "8")], &line, 1, &["9 is out of range"]);
    check(&[("CANDELA_PIPELINE_DEPTH", "x")], &["doctor"], 2, &["--pipeline-depth"]);
    check(&[("CANDELA_HOST", "0.0.0.0")], &["serve"], 1, &["--allow-anonymous"]);
    check(&[], &["serve", "--host", "::"], 1, &["--allow-anonymous"]);
}

#[test]
fn doctor_on_a_sound_machine_and_on_broken_ones() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let below_a_file = file.join("models");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let check = |line: &[&str], code, parts: &[&str]| {
        let line = [&["doctor"], line].concat();
        check(dir.path(), &[], &line, code, parts);
    };
    let parts = ["device", "SIMD", "threads", "memory", "model dir", "models", "pip", "port"];
    check(&["--port", "0"], 0, &parts);
    check(&["--port", "0"], 0, &["none here yet", "Ready"]);
    check(&["--port", &port], 1, &["BROKEN", &port, "--port"]);
    check(&["--port", "0", "--kv-cache-memory", "900TiB"], 1, &["BROKEN", "lower it"]);
    check(&["--port", "0", "--offline"], 1, &["BROKEN", "none here and offline"]);
    check(&["--port", "0", "--pip", "no-such-pip"], 1, &["BROKEN", "correct --pip"]);
    check(&["--port", "0", "--manifests-dir", "absent"], 1, &["BROKEN", "absent"]);
    check(&["--config", "absent.toml"], 1, &["BROKEN", "absent.toml"]);
    let without = ["BROKEN", "built without CUDA", "--features cuda", "--device cpu"];
    check(&["--port", "0", "--device", "cuda:0"], 1, &without);
    let below = below_a_file.to_str().unwrap();
    check(&["--port", "0", "--model-dir", below], 1, &["BROKEN", "cannot be written"]);
}

#[test]
fn pull_says_what_it_cannot_find() {
    let dir = tempfile::tempdir().unwrap();
    let check = |line: &[&str], parts: &[&str]| {
        let line = [&["pull", "--offline"], line].concat();
        check(dir.path(), &[], &line, 1, parts);
    };
    check(&["no-such-model"], &["no-such-model", "smollm2-135m-instruct"]);
    check(&[], &["smollm2-135m-instruct"]);
    check(&["./absent.gguf"], &["absent.gguf"]);
}
