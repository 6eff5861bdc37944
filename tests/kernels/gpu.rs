//! GPUs for the forward: one that runs every kernel emulated, on memory of this process, and one that
//! only notes what it is asked.

use std::{
    collections::HashMap,
    ffi::{CString, c_char, c_void},
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use candela::ops::{
    Region,
    gpu::{Buffer, Gpu, Graph, Half, Launch, Matmul, Pending},
};
use candle_core::{Result, bail};

use crate::emulator::Emulator;

type EmulatedLaunch = unsafe extern "C" fn(*const c_char, *const u32, *const c_char, u64);

/// Files of `kernels/`, by the kernels in them: their names begin so.
const FILES: [&str; 16] = [
    "attention_combine",
    "attention_decode",
    "attention_prefill",
    "block_copy",
    "embed",
    "fill",
    "gather_rows",
    "gemv",
    "logprobs",
    "rms_norm",
    "rope",
    "sample_begin",
    "sample_scan",
    "sample",
    "silu_mul",
    "unpack",
];

/// Memory of a GPU holds NaN until it is written.
const POISON: u8 = 0xff;

/// What is open, for all tests of the process: an emulated kernel has one grid at a time.
static KERNELS: LazyLock<Mutex<HashMap<&'static str, EmulatedLaunch>>> =
    LazyLock::new(Mutex::default);

pub struct EmulatedGpu {
    /// What a capture has kept so far.
    captured: Mutex<Option<Vec<Asked>>>,
    /// Few, so that small models have several splits in decode attention, and some with many rows none.
    pub multiprocessors: usize,
    /// Products of so few rows run our own kernel, which takes long here.
    pub gemv_rows_max: usize,
    /// Steps after which the device is lost.
    pub steps_left: AtomicU32,
}

impl EmulatedGpu {
    pub fn new(multiprocessors: usize, gemv_rows_max: usize) -> Self {
        let steps_left = AtomicU32::new(u32::MAX);
        Self { captured: Mutex::default(), multiprocessors, gemv_rows_max, steps_left }
    }
}

/// A step that ended at once.
struct Ended(std::result::Result<Vec<u8>, String>);

impl Pending for Ended {
    fn wait(self: Box<Self>) -> Result<(Vec<u8>, u64)> {
        Ok((self.0.map_err(candle_core::Error::Msg)?, 1_000))
    }
}

/// What was captured, with the arguments it had then.
struct Replayed {
    gpu: EmulatedGpu,
    asked: Vec<Asked>,
}

impl Graph for Replayed {
    fn replay(&self) -> Result<()> {
        for asked in &self.asked {
            match asked {
                Asked::Kernel(launch) => self.gpu.launch(launch)?,
                Asked::Matmul(matmul) => self.gpu.matmul(matmul)?,
            }
        }
        Ok(())
    }
}

/// Memory that nothing moves.
struct Memory(Vec<u128>);

fn memory(bytes: usize, value: u8) -> Buffer {
    let memory = Memory(vec![u128::from_ne_bytes([value; 16]); bytes.div_ceil(16).max(1)]);
    let address = memory.0.as_ptr() as u64;
    Buffer::new(address, bytes, Arc::new(memory))
}

impl EmulatedGpu {
    fn captured(&self) -> MutexGuard<'_, Option<Vec<Asked>>> {
        self.captured.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gpu for EmulatedGpu {
    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        assert!(self.captured().is_none(), "memory is asked for while capturing");
        Ok(memory(bytes, POISON))
    }

    fn region(&self, elements: usize, _: Half) -> Result<Region> {
        Ok(Region::Emulated(memory(elements * Half::BYTES, POISON)))
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((1 << 30, 1 << 30))
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        assert!(self.captured().is_none(), "something is sent while capturing");
        write(to, bytes);
        Ok(())
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn gemv_rows_max(&self) -> usize {
        self.gemv_rows_max
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        if let Some(captured) = &mut *self.captured() {
            captured.push(Asked::Kernel(launch.clone()));
            return Ok(());
        }
        let file = FILES.into_iter().find(|file| launch.kernel.starts_with(file));
        let Some(file) = file else { bail!("no file has the kernel {}", launch.kernel) };
        let mut kernels = KERNELS.lock().unwrap_or_else(PoisonError::into_inner);
        let run = *kernels.entry(file).or_insert_with(|| open(file));
        let name = CString::new(launch.kernel).expect("no NUL");
        let [x, y, z] = launch.grid;
        let shape = [x, y, z, launch.threads, 1, 1, launch.shared_bytes];
        let args = launch.args.bytes();
        // SAFETY: what the arguments point to lives as long as the model that planned the launch.
        unsafe { run(name.as_ptr(), shape.as_ptr(), args.as_ptr().cast(), args.len() as u64) };
        Ok(())
    }

    fn begin(&self) -> Result<()> {
        Ok(())
    }

    fn end(&self, from: u64, bytes: usize) -> Result<Box<dyn Pending>> {
        let results = match self.steps_left.fetch_sub(1, Ordering::Relaxed) {
            0 => Err("an illegal memory access was encountered".into()),
            _ => Ok(read(from, bytes)),
        };
        Ok(Box::new(Ended(results)))
    }

    fn capture(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Graph>> {
        *self.captured() = Some(Vec::new());
        let done = work();
        let asked = self.captured().take().unwrap_or_default();
        done?;
        // It launches on the same memory; the tests hold the GPU for as long as the graph.
        Ok(Box::new(Replayed { gpu: Self::new(self.multiprocessors, self.gemv_rows_max), asked }))
    }

    fn matmul(&self, op: &Matmul) -> Result<()> {
        if let Some(captured) = &mut *self.captured() {
            captured.push(Asked::Matmul(*op));
            return Ok(());
        }
        let halves = |at: u64, count: usize| -> Vec<f32> {
            let words = read(at, count * Half::BYTES);
            let (words, _) = words.as_chunks::<2>();
            words.iter().map(|word| op.dtype.value(u16::from_ne_bytes(*word))).collect()
        };
        let (x, w) = (halves(op.x, op.m * op.k), halves(op.w, op.n * op.k));
        let bias = op.bias.map(|bias| halves(bias, op.n));
        for row in 0..op.m {
            let x = &x[row * op.k..][..op.k];
            for col in 0..op.n {
                let products = x.iter().zip(&w[col * op.k..]).map(|(x, w)| x * w);
                let sum = products.sum::<f32>() + bias.as_ref().map_or(0.0, |bias| bias[col]);
                let at = row * op.y_stride + col;
                match op.wide {
                    true => write(op.y + 4 * at as u64, &sum.to_ne_bytes()),
                    false => write(op.y + 2 * at as u64, &op.dtype.bits(sum).to_ne_bytes()),
                }
            }
        }
        Ok(())
    }
}

/// Opens the kernels of a file, which stay.
fn open(file: &str) -> EmulatedLaunch {
    let path = Emulator::library(file);
    let path = CString::new(path.to_str().expect("a path of UTF-8")).expect("no NUL");
    // SAFETY: a library that was built from a kernel's source; its symbol has this type.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!library.is_null(), "{path:?} does not open");
        let symbol = libc::dlsym(library, c"emulate_launch".as_ptr());
        assert!(!symbol.is_null(), "{path:?} has no emulate_launch");
        std::mem::transmute::<*mut c_void, EmulatedLaunch>(symbol)
    }
}

pub fn read(at: u64, bytes: usize) -> Vec<u8> {
    // SAFETY: the callers have addresses of memory that is still allocated.
    unsafe { std::slice::from_raw_parts(at as *const u8, bytes) }.to_vec()
}

fn write(at: u64, bytes: &[u8]) {
    // SAFETY: as above, and one thread at a time computes.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
}

/// What a step consists of.
#[derive(Clone, Debug)]
pub enum Asked {
    Kernel(Launch),
    Matmul(Matmul),
}

/// Has no memory: addresses count up from nothing.
#[derive(Default)]
pub struct NotedGpu {
    pub asked: Mutex<Vec<Asked>>,
    used: Mutex<u64>,
}

impl NotedGpu {
    fn note(&self, asked: Asked) {
        self.asked.lock().expect("no panic").push(asked);
    }

    /// Bytes that were asked for.
    pub fn allocated(&self) -> u64 {
        *self.used.lock().expect("no panic")
    }
}

impl Gpu for NotedGpu {
    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        let mut used = self.used.lock().expect("no panic");
        let address = *used;
        *used += bytes as u64;
        Ok(Buffer::new(address, bytes, Arc::new(())))
    }

    fn region(&self, elements: usize, _: Half) -> Result<Region> {
        self.allocate(elements * Half::BYTES).map(Region::Emulated)
    }

    fn memory(&self) -> Result<(u64, u64)> {
        Ok((1 << 40, 1 << 40))
    }

    fn upload(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn multiprocessors(&self) -> usize {
        132
    }

    fn gemv_rows_max(&self) -> usize {
        4
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.note(Asked::Kernel(launch.clone()));
        Ok(())
    }

    fn begin(&self) -> Result<()> {
        Ok(())
    }

    fn end(&self, _: u64, _: usize) -> Result<Box<dyn Pending>> {
        bail!("a GPU that only notes has no results")
    }

    fn capture(&self, _: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Graph>> {
        bail!("a GPU that only notes has no graphs")
    }

    fn matmul(&self, matmul: &Matmul) -> Result<()> {
        self.note(Asked::Matmul(*matmul));
        Ok(())
    }
}
