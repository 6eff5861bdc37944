//! A libnvidia-ml of a test's own, built from `fake_nvml.c`, whose GPUs do what a script says.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

/// As the driver's library is called.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// A library of its own for each test, as a loaded one is known to the system by its file.
pub struct Fake {
    dir: tempfile::TempDir,
}

#[allow(dead_code, reason = "not every test uses all of it")]
impl Fake {
    pub fn new(script: &str) -> Self {
        Self::without(&[], script)
    }

    /// A library that lacks some functions.
    pub fn without(functions: &[&str], script: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_nvml.c");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-o"]).arg(dir.path().join(LIBRARY)).arg(source);
        cc.args(functions.iter().map(|function| format!("-DWITHOUT_{function}"))).arg("-ldl");
        let built = cc.output().expect("cc, which Rust links with");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let fake = Self { dir };
        fake.script(script);
        fake
    }

    pub fn library(&self) -> PathBuf {
        self.dir.path().join(LIBRARY)
    }

    /// Changes the GPUs at once.
    pub fn script(&self, text: &str) {
        let mut file = tempfile::NamedTempFile::new_in(self.dir.path()).expect("a file");
        file.write_all(text.as_bytes()).expect("written");
        file.persist(self.dir.path().join("script")).expect("renamed");
    }

    pub fn calls(&self) -> Vec<String> {
        let calls = std::fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    /// Where the system's loader finds it by its name.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}
