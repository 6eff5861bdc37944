//! Products through cuBLASLt: a shape's algorithm is looked for once.

use std::{collections::HashMap, ffi::c_void, sync::Arc};

use candle_core::Result;
use cudarc::{
    cublaslt::{
        result,
        result::CublasError,
        sys::{
            cublasComputeType_t, cublasLtEpilogue_t, cublasLtHandle_t, cublasLtMatmulAlgo_t,
            cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t,
            cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cudaDataType,
        },
    },
    driver::{CudaSlice, CudaStream, DevicePtr},
};

use super::failed;
use crate::ops::gpu::{Half, Matmul};

/// What cuBLASLt may use beside operands: what NVIDIA advises for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// `CUBLAS_OP_T` of `cublasOperation_t`.
const OPERATION_T: i32 = 1;

/// A handle, its workspace, and a plan for each shape.
pub struct Matmuls {
    handle: cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    plans: HashMap<Shape, Plan>,
}

// SAFETY: the handle may be used by any thread, one at a time.
unsafe impl Send for Matmuls {}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    stride: usize,
    bf16: bool,
    bias: bool,
    wide: bool,
}

/// cuBLASLt is column-major: its product is `yᵀ = (wᵀ)ᵀ xᵀ`.
struct Plan {
    desc: cublasLtMatmulDesc_t,
    w: cublasLtMatrixLayout_t,
    x: cublasLtMatrixLayout_t,
    y: cublasLtMatrixLayout_t,
    algorithm: cublasLtMatmulAlgo_t,
}

impl Matmuls {
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        stream.context().bind_to_thread().map_err(failed)?;
        // SAFETY: cuBLASLt writes what it reads there.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE_BYTES) }.map_err(failed)?;
        let handle = result::create_handle().map_err(wrong)?;
        Ok(Self { handle, workspace, plans: HashMap::new() })
    }

    pub fn run(&mut self, stream: &CudaStream, op: &Matmul) -> Result<()> {
        let shape = Shape {
            m: op.m,
            n: op.n,
            k: op.k,
            stride: op.y_stride,
            bf16: op.dtype == Half::Bf16,
            bias: op.bias.is_some(),
            wide: op.wide,
        };
        if !self.plans.contains_key(&shape) {
            let plan = Plan::new(self.handle, &shape).map_err(wrong)?;
            self.plans.insert(shape, plan);
        }
        let plan = &self.plans[&shape];
        let (alpha, beta) = (1f32, 0f32);
        if let Some(bias) = op.bias {
            let pointer = cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set(plan.desc, pointer, &bias).map_err(wrong)?;
        }
        let workspace = self.workspace.device_ptr(stream).0;
        // SAFETY: the plan is of these operands, which the op that planned the product has.
        unsafe {
            result::matmul(
                self.handle,
                plan.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                op.w as *const c_void,
                plan.w,
                op.x as *const c_void,
                plan.x,
                op.y as *const c_void,
                plan.y,
                op.y as *mut c_void,
                plan.y,
                &plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.cu_stream().cast(),
            )
        }
        .map_err(wrong)
    }
}

impl Plan {
    fn new(handle: cublasLtHandle_t, shape: &Shape) -> std::result::Result<Self, CublasError> {
        let half = if shape.bf16 { cudaDataType::CUDA_R_16BF } else { cudaDataType::CUDA_R_16F };
        let out = if shape.wide { cudaDataType::CUDA_R_32F } else { half };
        let Shape { m, n, k, stride, .. } = *shape;
        let layout = |kind, rows: usize, cols: usize, ld: usize| {
            result::create_matrix_layout(kind, rows as u64, cols as u64, ld as i64)
        };
        let compute = cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(compute, cudaDataType::CUDA_R_32F)?;
        let (w, x) = (layout(half, k, n, k)?, layout(half, k, m, k)?);
        let y = layout(out, n, m, stride)?;
        set(desc, cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &OPERATION_T)?;
        if shape.bias {
            let epilogue = cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            set(desc, cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            let kind = cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE;
            set(desc, kind, &half)?;
        }
        let preference = result::create_matmul_pref()?;
        let most = cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = WORKSPACE_BYTES;
        // SAFETY: the preference and the layouts are alive, and the attribute is a size.
        let found = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                most,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| result::get_matmul_algo_heuristic(handle, desc, w, x, y, y, preference))
        };
        // SAFETY: it was created above and is not used again.
        unsafe { result::destroy_matmul_pref(preference) }?;
        Ok(Self { desc, w, x, y, algorithm: found?.algo })
    }
}

fn set<T>(
    desc: cublasLtMatmulDesc_t,
    attribute: cublasLtMatmulDescAttributes_t,
    value: &T,
) -> std::result::Result<(), CublasError> {
    // SAFETY: the description is alive, and the attribute has the type of `value`.
    unsafe {
        result::set_matmul_desc_attribute(
            desc,
            attribute,
            (value as *const T).cast(),
            size_of::<T>(),
        )
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each was created with the plan. What cannot be freed at the end stays.
        unsafe {
            let _ = result::destroy_matmul_desc(self.desc);
            for layout in [self.w, self.x, self.y] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Drop for Matmuls {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: created in `new`; no plan is left.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn wrong(error: CublasError) -> candle_core::Error {
    candle_core::Error::Msg(format!("cuBLASLt: {error}"))
}
