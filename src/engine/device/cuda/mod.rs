//! A CUDA GPU: runs what the ops plan on one stream.

mod matmul;
mod staging;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use candle_core::{DType, Device, Result, Tensor, bail};
use cudarc::{
    driver::{
        CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaModule, CudaStream, DevicePtr,
        DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
        sys::{
            CUdevice_attribute, CUevent_flags, CUfunction_attribute, CUgraphInstantiate_flags,
            CUstreamCaptureMode,
        },
    },
    nvrtc::Ptx,
};

use super::gpus::GpuFacts;
use crate::ops::{
    Region,
    gpu::{Args, Buffer, Gpu, Graph, Half, Launch, Matmul, Pending},
};
use matmul::Matmuls;
use staging::{Downloads, Uploads};

// `FATBINS`: the files of `kernels/`, by name, compiled by its build script.
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Dynamic shared memory that a kernel may have without asking for more.
const SHARED_BYTES_DEFAULT: u32 = 48 << 10;
/// Least compute capability of the kernels.
const CAPABILITY_MIN: (i32, i32) = (8, 0);
/// Driver API that CUDA 13 needs, as `cuDriverGetVersion` counts.
const DRIVER_VERSION_MIN: i32 = 13_000;

/// A GPU, its stream, and what has been loaded onto it.
pub struct Cuda {
    device: Device,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    multiprocessors: usize,
    modules: HashMap<&'static str, Arc<CudaModule>>,
    functions: Mutex<HashMap<&'static str, CudaFunction>>,
    matmuls: Mutex<Matmuls>,
    uploads: Mutex<Uploads>,
    downloads: Arc<Downloads>,
    begun: Mutex<Option<CudaEvent>>,
}

/// How many GPUs the driver shows, or why it shows none.
pub fn count() -> std::result::Result<usize, String> {
    let counted = CudaContext::device_count().map_err(|error| advice(&error))?;
    let mut version = 0;
    // SAFETY: the driver writes one integer there.
    let asked = unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) };
    asked.result().map_err(|error| advice(&error))?;
    if version < DRIVER_VERSION_MIN {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(format!(
            "the NVIDIA driver is for CUDA {major}.{minor}: install driver 580 or newer"
        ));
    }
    Ok(counted.max(0) as usize)
}

/// What to do about a failure of the driver.
fn advice(error: &DriverError) -> String {
    use cudarc::driver::sys::CUresult as Code;
    match error.0 {
        Code::CUDA_ERROR_NO_DEVICE => {
            "the driver shows no NVIDIA GPU: look at `nvidia-smi`, and in a container run it with \
             --gpus all"
                .into()
        }
        Code::CUDA_ERROR_OUT_OF_MEMORY => {
            "the GPU is out of memory: lower --gpu-memory-utilization or stop what else uses it"
                .into()
        }
        Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | Code::CUDA_ERROR_STUB_LIBRARY => {
            "the NVIDIA driver does not fit its libraries: install driver 580 or newer and reboot"
                .into()
        }
        _ => error.to_string(),
    }
}

fn failed(error: DriverError) -> candle_core::Error {
    candle_core::Error::Msg(advice(&error))
}

impl Cuda {
    /// Opens a GPU by the driver's number and loads the kernels.
    pub fn open(ordinal: usize) -> Result<Self> {
        let count = count().map_err(candle_core::Error::Msg)?;
        if ordinal >= count {
            bail!("there is no cuda:{ordinal}: the driver shows {count}, counted from 0");
        }
        let device = Device::new_cuda_with_stream(ordinal)?;
        let stream = device.as_cuda_device()?.cuda_stream();
        let context = stream.context().clone();
        // SAFETY: nothing has been allocated, and all there is runs on this one stream.
        unsafe { context.disable_event_tracking() };
        let capability = context.compute_capability().map_err(failed)?;
        if capability < CAPABILITY_MIN {
            let (major, minor) = capability;
            bail!(
                "cuda:{ordinal} has compute capability {major}.{minor}: 8.0 (Ampere) or newer is needed"
            );
        }
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(attribute).map_err(failed)? as usize;
        let load = |(name, image): &(&'static str, &'static [u8])| {
            let module = context.load_module(Ptx::from_binary(image.to_vec())).map_err(failed)?;
            Ok((*name, module))
        };
        let modules = FATBINS.iter().map(load).collect::<Result<_>>()?;
        Ok(Self {
            multiprocessors,
            modules,
            functions: Mutex::default(),
            matmuls: Mutex::new(Matmuls::new(&stream)?),
            uploads: Mutex::new(Uploads::new(&context)?),
            downloads: Arc::default(),
            begun: Mutex::default(),
            device,
            context,
            stream,
        })
    }

    pub fn facts(&self) -> Result<GpuFacts> {
        let uuid = self.context.uuid().map_err(failed)?;
        let (free_bytes, total_bytes) = self.memory()?;
        Ok(GpuFacts {
            name: self.context.name().map_err(failed)?,
            uuid: uuid_text(uuid.bytes.map(|byte| byte as u8)),
            capability: self.context.compute_capability().map_err(failed)?,
            free_bytes,
            total_bytes,
        })
    }

    fn function(&self, launch: &Launch) -> Result<CudaFunction> {
        let mut functions = lock(&self.functions);
        if let Some(known) = functions.get(launch.kernel) {
            return Ok(known.clone());
        }
        // A kernel is in the file whose name its own begins with: the longest of them.
        let files = self.modules.iter().filter(|(file, _)| launch.kernel.starts_with(**file));
        let Some((_, module)) = files.max_by_key(|(file, _)| file.len()) else {
            bail!("no file has the kernel {}", launch.kernel);
        };
        let function = module.load_function(launch.kernel).map_err(failed)?;
        if launch.shared_bytes > SHARED_BYTES_DEFAULT {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, launch.shared_bytes as i32).map_err(failed)?;
        }
        functions.insert(launch.kernel, function.clone());
        Ok(function)
    }
}

// SAFETY: it begins with plain bytes, laid out as the kernel's struct, of which the driver copies as many as
// the kernel takes.
unsafe impl DeviceRepr for Args {}

impl Gpu for Cuda {
    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        // SAFETY: who asks for memory writes it before it is read.
        let memory = unsafe { self.stream.alloc::<u8>(bytes.max(1)) }.map_err(failed)?;
        let address = memory.device_ptr(&self.stream).0;
        Ok(Buffer::new(address, bytes, Arc::new(memory)))
    }

    fn region(&self, elements: usize, dtype: Half) -> Result<Region> {
        let dtype = match dtype {
            Half::Bf16 => DType::BF16,
            Half::F16 => DType::F16,
        };
        Ok(Region::Tensor(Tensor::zeros(elements, dtype, &self.device)?))
    }

    fn memory(&self) -> Result<(u64, u64)> {
        // What was given back is free once everything before it has run.
        self.stream.synchronize().map_err(failed)?;
        let (free, total) = self.context.mem_get_info().map_err(failed)?;
        Ok((free as u64, total as u64))
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        lock(&self.uploads).send(&self.context, &self.stream, to, bytes)
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn gemv_rows_max(&self) -> usize {
        // Above it one pass over the weights has work for tensor cores.
        4
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let function = self.function(launch)?;
        let [x, y, z] = launch.grid;
        let config = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared_bytes,
        };
        let mut builder = self.stream.launch_builder(&function);
        builder.arg(&launch.args);
        // SAFETY: the op that planned the launch gave the kernel's own struct, with addresses of memory
        // that lives as long as the model.
        unsafe { builder.launch(config) }.map_err(failed).map(drop)
    }

    fn matmul(&self, matmul: &Matmul) -> Result<()> {
        self.context.bind_to_thread().map_err(failed)?;
        lock(&self.matmuls).run(&self.stream, matmul)
    }

    fn begin(&self) -> Result<()> {
        let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
        *lock(&self.begun) = Some(self.stream.record_event(timed).map_err(failed)?);
        Ok(())
    }

    fn end(&self, from: u64, bytes: usize) -> Result<Box<dyn Pending>> {
        let Some(begun) = lock(&self.begun).take() else { bail!("a step ended that never began") };
        let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let done = self.stream.record_event(timed).map_err(failed)?;
        let results = self.downloads.start(&self.context, &self.stream, from, bytes)?;
        let arrived = self.stream.record_event(None).map_err(failed)?;
        let downloads = self.downloads.clone();
        Ok(Box::new(Ended { begun, done, arrived, results, bytes, downloads }))
    }

    fn capture(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Graph>> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed)?;
        let done = work();
        // Also after a failure, which leaves the stream capturing.
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(failed);
        done?;
        let Some(graph) = graph? else { bail!("nothing was captured") };
        graph.upload().map_err(failed)?;
        Ok(Box::new(Captured(graph)))
    }
}

struct Captured(CudaGraph);

impl Graph for Captured {
    fn replay(&self) -> Result<()> {
        self.0.launch().map_err(failed)
    }
}

/// A step on the stream, or past it.
struct Ended {
    begun: CudaEvent,
    done: CudaEvent,
    arrived: CudaEvent,
    results: staging::Pinned,
    bytes: usize,
    downloads: Arc<Downloads>,
}

impl Pending for Ended {
    fn wait(self: Box<Self>) -> Result<(Vec<u8>, u64)> {
        self.arrived.synchronize().map_err(failed)?;
        let device_ms = self.begun.elapsed_ms(&self.done).map_err(failed)?;
        let bytes = self.results.as_slice().map_err(failed)?[..self.bytes].to_vec();
        self.downloads.give_back(self.results);
        Ok((bytes, (f64::from(device_ms) * 1e6) as u64))
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn uuid_text(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    format!("GPU-{}", parts.join("-"))
}
