//! Builds a kernel as C++ once, and runs launches of it in a process of its own.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
};

/// Compilations at one time.
static COMPILERS: [Mutex<()>; 2] = [Mutex::new(()), Mutex::new(())];
const FLAGS: [&str; 8] = [
    "-x",
    "c++",
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
];
const SANITIZED: [&str; 4] =
    ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"];
const PLAIN: [&str; 2] = ["-O1", "-g1"];
/// A library of one kernel file, none of whose names meet those of another. Kernels use one piece of
/// shared memory for several types, as nvcc lets them.
const LIBRARY: [&str; 7] = [
    "-O2",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-DEMULATE_LIBRARY",
];

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// The text of kernel files, one after the other.
pub fn source(names: &[&str]) -> String {
    let read = |name: &&str| {
        let path = kernels().join(format!("{name}.cu"));
        std::fs::read_to_string(path).expect("a kernel of that name")
    };
    names.iter().map(read).collect()
}

/// A built kernel file.
pub struct Emulator(PathBuf);

impl Emulator {
    /// Of `kernels/NAME.cu`.
    pub fn of(name: &str) -> Self {
        Self::of_all(&[name])
    }

    /// Of several files, whose kernels follow each other on the same buffers.
    pub fn of_all(names: &[&str]) -> Self {
        Self::build(&names.join("-"), &source(names))
    }

    pub fn build(name: &str, source: &str) -> Self {
        Self(compiled(name, source, &SANITIZED))
    }

    /// For what wrong results show by themselves: it is built in a third of the time.
    pub fn build_without_sanitizers(name: &str, source: &str) -> Self {
        Self(compiled(name, source, &PLAIN))
    }

    /// `kernels/NAME.cu` as a library, for whole models on memory of the process that opens it: quicker,
    /// since it is not sanitized.
    pub fn library(name: &str) -> PathBuf {
        let path = kernels().join(format!("{name}.cu"));
        let source = std::fs::read_to_string(path).expect("a kernel of that name");
        compiled(&format!("{name}-library"), &source, &LIBRARY)
    }

    /// The buffers after the launches, or what the emulator said.
    pub fn run(&self, buffers: &[Vec<u8>], launches: &[Launch]) -> Result<Vec<Vec<u8>>, String> {
        let dir = tempfile::tempdir().expect("a directory");
        let (request, response) = (dir.path().join("request"), dir.path().join("response"));
        let mut bytes = Vec::new();
        bytes.extend((buffers.len() as u32).to_ne_bytes());
        for buffer in buffers {
            bytes.extend((buffer.len() as u64).to_ne_bytes());
            bytes.extend(buffer);
        }
        bytes.extend((launches.len() as u32).to_ne_bytes());
        for launch in launches {
            launch.write(&mut bytes);
        }
        std::fs::write(&request, bytes).expect("written");
        let output = Command::new(&self.0).arg(request).arg(&response).output().expect("it starts");
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let mut bytes = &std::fs::read(response).expect("a response")[..];
        let mut next = |buffer: &Vec<u8>| {
            let (buffer, rest) = bytes.split_at(buffer.len());
            bytes = rest;
            buffer.to_vec()
        };
        Ok(buffers.iter().map(&mut next).collect())
    }
}

/// The same sources are built once for all runs of the tests of this build directory.
fn compiled(name: &str, source: &str, flags: &[&str]) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    (source, FLAGS, flags).hash(&mut hasher);
    for dir in [kernels(), kernels().join("emulate")] {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(dir).expect("kernels").map(|e| e.expect("a file").path()).collect();
        files.retain(|file| file.extension().is_some_and(|e| e == "cuh" || e == "h"));
        files.sort();
        for file in files {
            std::fs::read(file).expect("readable").hash(&mut hasher);
        }
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    std::fs::create_dir_all(&dir).expect("a directory");
    let built = dir.join(format!("{name}-{:016x}", hasher.finish()));
    let lane = &COMPILERS[hasher.finish() as usize % COMPILERS.len()];
    let _one = lane.lock().unwrap_or_else(PoisonError::into_inner);
    if !built.exists() {
        let own = tempfile::tempdir_in(&dir).expect("a directory");
        let (from, to) = (own.path().join("kernel.cu"), own.path().join("kernel"));
        std::fs::write(&from, source).expect("written");
        let mut compiler = Command::new("g++");
        compiler.args(FLAGS).args(flags).arg("-I").arg(kernels()).arg(from).arg("-o").arg(&to);
        let output =
            compiler.output().expect("g++, with its sanitizers, which the README asks for");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::rename(to, &built).expect("renamed");
    }
    built
}

/// A field of a kernel's argument struct.
#[derive(Clone, Copy)]
pub enum Arg {
    /// A pointer to the buffer of that index.
    Buffer(u32),
    Null,
    U32(u32),
    U64(u64),
    F32(f32),
}

pub struct Launch {
    pub kernel: String,
    pub grid: [u32; 3],
    pub threads: u32,
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    pub args: Vec<Arg>,
}

impl Launch {
    fn write(&self, to: &mut Vec<u8>) {
        let word = |value: u32, to: &mut Vec<u8>| to.extend(value.to_ne_bytes());
        word(self.kernel.len() as u32, to);
        to.extend(self.kernel.as_bytes());
        for size in self.grid.into_iter().chain([self.threads, 1, 1, self.shared_bytes]) {
            word(size, to);
        }
        let (args, pointers) = self.lay_out();
        word(args.len() as u32, to);
        to.extend(args);
        word(pointers.len() as u32, to);
        for (place, buffer) in pointers {
            word(place, to);
            word(buffer, to);
        }
    }

    /// The struct as C lays it out, and where its pointers are.
    fn lay_out(&self) -> (Vec<u8>, Vec<(u32, u32)>) {
        let (mut bytes, mut pointers, mut most) = (Vec::<u8>::new(), Vec::new(), 1);
        for arg in &self.args {
            let value = match *arg {
                Arg::Buffer(_) | Arg::Null => 0u64.to_ne_bytes().to_vec(),
                Arg::U64(value) => value.to_ne_bytes().to_vec(),
                Arg::U32(value) => value.to_ne_bytes().to_vec(),
                Arg::F32(value) => value.to_ne_bytes().to_vec(),
            };
            most = most.max(value.len());
            bytes.resize(bytes.len().next_multiple_of(value.len()), 0);
            if let Arg::Buffer(buffer) = *arg {
                pointers.push((bytes.len() as u32, buffer));
            }
            bytes.extend(value);
        }
        bytes.resize(bytes.len().next_multiple_of(most), 0);
        (bytes, pointers)
    }
}
