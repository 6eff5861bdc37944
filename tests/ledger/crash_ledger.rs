//! The ledger alone, with streams that tell what they deliver: it dies at every write, in every mode,
//! and its successor dies while it recovers.

use std::{
    io::Write,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use candela::{
    ledger::{Demand, EndCause, Opening, Payer},
    types::{KeyId, ModelId, RequestId, TenantId},
};

use super::{
    crash::{MODES, Seen, Shim, base, check, copy, start},
    world::MODEL,
};

const CHILD: &str = "crash_ledger::the_process_that_dies";

/// Says something that survives this process.
fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).expect("heard");
}

/// Streams that tell each token before it is counted, and each bill once it has come.
#[tokio::test]
#[ignore = "the process that other tests here start and kill"]
async fn the_process_that_dies() {
    let dir = PathBuf::from(std::env::var_os("CRASH_DIR").expect("started by another test"));
    let life = std::env::var("CRASH_LIFE").expect("started by another test");
    let (ledger, thread) = start(&dir, "child");
    let stream = async |index: u64| {
        let id = format!("{life}-{index}");
        let payer = match index % 2 {
            0 => Payer::Key(KeyId::new("k0")),
            _ => Payer::Tenant(TenantId::new("red")),
        };
        let opening = Opening {
            request: RequestId::new(&id),
            payer,
            model: ModelId::new(MODEL),
            user_label: String::new(),
            metadata: "{}".into(),
            input_tokens: 5,
            choices: 1 + index as u32 % 2,
            device_bound_ns: 0,
            cap: None,
            parts: 1,
            idempotency: (index == 1).then(|| ("name".into(), [life.len() as u8; 32])),
        };
        let Ok(mut lease) = ledger.open(opening).await else { return };
        lease.use_input(5, 0);
        let mut tokens = 0;
        while tokens < 6 * (index + 1) {
            lease.renew(Demand { sequences: 1 + index % 2, in_flight: 0, left: u64::MAX });
            if lease.end(0).is_some() {
                break;
            }
            if lease.affordable() == 0 {
                tokio::time::sleep(Duration::from_micros(100)).await;
                continue;
            }
            tell(&format!("token {id}"));
            lease.use_output(1);
            tokens += 1;
        }
        if index == 2 {
            return drop(lease);
        }
        let (told, bill) = tokio::sync::oneshot::channel();
        lease.close(EndCause::Finished, move |bill| drop(told.send(bill)));
        if let Ok(Some(bill)) = bill.await {
            tell(&format!("bill {id} {}", bill.cost.0));
        }
    };
    futures_util::future::join_all((0..4).map(stream)).await;
    ledger.stop();
    thread.join().expect("ends well");
    tell("survived");
}

/// Runs the process above; whether it survived.
fn child(shim: &Shim, dir: &Path, life: &str, at: u64, mode: &str, seen: &mut Seen) -> bool {
    let out = Command::new(std::env::current_exe().expect("a path"))
        .args([CHILD, "--exact", "--ignored", "--nocapture"])
        .env("CRASH_DIR", dir)
        .env("CRASH_LIFE", life)
        .envs(shim.variables(at, mode))
        .output()
        .expect("runs");
    let text = String::from_utf8(out.stdout).expect("UTF-8");
    for line in text.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["token", id] => seen.entry(id.to_owned()).or_default().tokens += 1,
            ["bill", id, bill] => {
                seen.entry(id.to_owned()).or_default().bill = Some(bill.parse().expect("a number"));
            }
            _ => {}
        }
    }
    let survived = text.lines().any(|line| line == "survived");
    let killed = out.status.signal() == Some(libc::SIGKILL);
    assert!(survived != killed, "{:?}: {}", out.status, String::from_utf8_lossy(&out.stderr));
    survived
}

#[test]
fn every_write_of_a_ledger_may_be_its_last() {
    let (shim, base) = (Shim::build(), base());
    let dir = copy(&base);
    let mut seen = Seen::new();
    assert!(child(&shim, dir.path(), "whole", 0, "kill", &mut seen), "it lives without a crash");
    let writes = shim.count();
    assert!(seen.len() == 4 && writes > 100, "{writes} writes, {seen:?}");
    check(dir.path(), &seen, 0, "without a crash");
    let (mut died, mut twice) = (0, 0);
    for mode in MODES {
        // Torn writes at some of them: the other two modes have them all.
        let every = if mode == "torn" && std::env::var_os("CANDELA_CRASH_ROUNDS").is_none() {
            3
        } else {
            1
        };
        for at in (1..=writes).step_by(every) {
            let (dir, mut seen) = (copy(&base), Seen::new());
            died += u32::from(!child(&shim, dir.path(), "first", at, mode, &mut seen));
            // The next one dies while it gives up what the first left.
            if at % 4 == 0 {
                twice += u32::from(!child(
                    &shim,
                    dir.path(),
                    "second",
                    1 + at / 4 % 40,
                    mode,
                    &mut seen,
                ));
            }
            check(dir.path(), &seen, 0, &format!("{mode} at {at}"));
        }
    }
    println!("{writes} writes, {died} deaths, {twice} of the second life");
    // Groups of commits differ from run to run, and the last writes of one may be missing in another.
    assert!(u64::from(died) >= writes * 2 && twice > 10, "{died} and {twice} deaths");
}
