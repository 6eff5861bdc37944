//! Weights where they are used: packed for the CPU's kernels, or row-major in a GPU's memory.

use candle_core::{Result, bail};

use super::{
    DenseType, PackedWeight, PackedWeightBuilder, QuantRow, QuantSpec,
    fill::Fill,
    gpu::{Buffer, Gpu, Half, PACK},
    weight::read_dense,
};

/// Bytes that go to a GPU at once.
const UPLOAD_BYTES: usize = 16 << 20;

/// A matrix `[n, k]`.
pub enum Matrix {
    Host(PackedWeight),
    Gpu(GpuMatrix),
}

/// Row-major, in the type of its model.
pub struct GpuMatrix {
    pub memory: Buffer,
    pub n: usize,
    pub k: usize,
}

/// A vector.
pub enum Vector {
    Host(Vec<f32>),
    Gpu(Buffer),
}

/// Where weights go.
#[derive(Clone, Copy)]
pub enum WeightPlace<'a> {
    Cpu,
    Gpu(&'a dyn Gpu, Half),
}

impl Matrix {
    pub fn n(&self) -> usize {
        match self {
            Self::Host(packed) => packed.n(),
            Self::Gpu(matrix) => matrix.n,
        }
    }

    pub fn k(&self) -> usize {
        match self {
            Self::Host(packed) => packed.k(),
            Self::Gpu(matrix) => matrix.k,
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Self::Host(packed) => packed.bytes(),
            Self::Gpu(matrix) => matrix.memory.bytes,
        }
    }

    pub fn host(&self) -> Result<&PackedWeight> {
        match self {
            Self::Host(packed) => Ok(packed),
            Self::Gpu(_) => bail!("a weight is on a GPU"),
        }
    }

    pub fn gpu(&self) -> Result<&GpuMatrix> {
        match self {
            Self::Gpu(matrix) => Ok(matrix),
            Self::Host(_) => bail!("a weight is not on a GPU"),
        }
    }
}

impl Vector {
    pub fn host(&self) -> Result<&[f32]> {
        match self {
            Self::Host(values) => Ok(values),
            Self::Gpu(_) => bail!("a vector is on a GPU"),
        }
    }

    pub fn gpu(&self) -> Result<u64> {
        match self {
            Self::Gpu(memory) => Ok(memory.address),
            Self::Host(_) => bail!("a vector is not on a GPU"),
        }
    }
}

impl<'a> WeightPlace<'a> {
    /// Rounded to the type of the model, where it goes to a GPU.
    pub fn vector(self, values: Vec<f32>) -> Result<Vector> {
        let Self::Gpu(gpu, dtype) = self else { return Ok(Vector::Host(values)) };
        let bytes: Vec<u8> =
            values.iter().flat_map(|value| dtype.bits(*value).to_ne_bytes()).collect();
        upload(gpu, &bytes).map(Vector::Gpu)
    }

    /// As it is.
    pub fn wide_vector(self, values: Vec<f32>) -> Result<Vector> {
        let Self::Gpu(gpu, _) = self else { return Ok(Vector::Host(values)) };
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        upload(gpu, &bytes).map(Vector::Gpu)
    }

    /// A matrix of `n` rows of `k`, which come in parts.
    pub fn matrix(self, n: usize, k: usize) -> Result<MatrixBuilder<'a>> {
        Ok(match self {
            Self::Cpu => MatrixBuilder::Host(PackedWeight::builder(k)),
            Self::Gpu(gpu, dtype) => {
                if !k.is_multiple_of(PACK) {
                    bail!("a weight with rows of {k}: a GPU takes multiples of {PACK}");
                }
                let memory = gpu.allocate(n * k * Half::BYTES)?;
                let rows = GpuRows { gpu, dtype, memory, k, staged: Vec::new(), sent: 0 };
                MatrixBuilder::Gpu(rows)
            }
        })
    }
}

fn upload(gpu: &dyn Gpu, bytes: &[u8]) -> Result<Buffer> {
    let memory = gpu.allocate(bytes.len())?;
    gpu.upload(memory.address, bytes)?;
    Ok(memory)
}

/// Rows of the result are those of the calls, in their order.
pub enum MatrixBuilder<'a> {
    Host(PackedWeightBuilder),
    Gpu(GpuRows<'a>),
}

/// Rows on their way to a GPU.
pub struct GpuRows<'a> {
    gpu: &'a dyn Gpu,
    dtype: Half,
    memory: Buffer,
    k: usize,
    staged: Vec<u8>,
    sent: usize,
}

impl MatrixBuilder<'_> {
    /// `bytes` is row-major `[n, k]`, little endian.
    pub fn push_dense(&mut self, n: usize, dtype: DenseType, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Host(builder) => builder.push_dense(n, dtype, bytes),
            Self::Gpu(rows) => rows.push_dense(n, dtype, bytes),
        }
    }

    /// `fill` is called once a row, in order. Quantised rows are expanded for a GPU.
    pub fn push_quant(
        &mut self,
        n: usize,
        spec: QuantSpec,
        fill: &mut dyn FnMut(usize, QuantRow<'_>),
    ) -> Result<()> {
        match self {
            Self::Host(builder) => builder.push_quant(n, spec, fill),
            Self::Gpu(rows) => rows.push_quant(n, spec, fill),
        }
    }

    /// `n` rows of made-up values, the same for the same seed, of about the size that trained ones have.
    pub fn push_dummy(&mut self, n: usize, seed: u32) -> Result<()> {
        match self {
            Self::Host(_) => bail!("made-up weights are for a GPU"),
            Self::Gpu(rows) => rows.push_dummy(n, seed),
        }
    }

    pub fn build(self) -> Result<Matrix> {
        match self {
            Self::Host(builder) => Ok(Matrix::Host(builder.build())),
            Self::Gpu(rows) => rows.build().map(Matrix::Gpu),
        }
    }
}

impl GpuRows<'_> {
    fn push_dense(&mut self, n: usize, dtype: DenseType, bytes: &[u8]) -> Result<()> {
        if bytes.len() != n * self.k * dtype.bytes() {
            let (k, found) = (self.k, bytes.len());
            bail!("a dense weight of {n} x {k} has {found} bytes, not {}", n * k * dtype.bytes());
        }
        if dtype == self.dtype.dense() {
            self.flush()?;
            return self.send(bytes);
        }
        for index in 0..n * self.k {
            self.push(read_dense(bytes, dtype, index))?;
        }
        Ok(())
    }

    fn push_quant(
        &mut self,
        n: usize,
        spec: QuantSpec,
        fill: &mut dyn FnMut(usize, QuantRow<'_>),
    ) -> Result<()> {
        let groups = self.k / spec.group;
        let (mut q, mut scale) = (vec![0; self.k], vec![0.0; groups]);
        let mut min = vec![0.0; if spec.has_min { groups } else { 0 }];
        for row in 0..n {
            fill(row, QuantRow { q: &mut q, scale: &mut scale, min: &mut min });
            for (index, q) in q.iter().enumerate() {
                let group = index / spec.group;
                let min = min.get(group).copied().unwrap_or(0.0);
                self.push(scale[group] * (f32::from(*q) - f32::from(spec.zero)) + min)?;
            }
        }
        Ok(())
    }

    fn push_dummy(&mut self, n: usize, seed: u32) -> Result<()> {
        self.flush()?;
        let (to, count) = (self.memory.address + self.sent as u64, n * self.k);
        // Products of such rows with activations of size 1 are of size 1.
        let size = (3.0 / self.k as f32).sqrt();
        self.sent += count * Half::BYTES;
        if self.sent > self.memory.bytes {
            bail!("a weight has more rows than it should");
        }
        Fill { to, count, dtype: self.dtype, seed, size }.run(self.gpu)
    }

    fn push(&mut self, value: f32) -> Result<()> {
        self.staged.extend(self.dtype.bits(value).to_le_bytes());
        if self.staged.len() >= UPLOAD_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let staged = std::mem::take(&mut self.staged);
        self.send(&staged)?;
        self.staged = staged;
        self.staged.clear();
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        if self.sent + bytes.len() > self.memory.bytes {
            bail!("a weight has more rows than it should");
        }
        for part in bytes.chunks(UPLOAD_BYTES) {
            self.gpu.upload(self.memory.address + self.sent as u64, part)?;
            self.sent += part.len();
        }
        Ok(())
    }

    fn build(mut self) -> Result<GpuMatrix> {
        self.flush()?;
        if self.sent != self.memory.bytes {
            bail!("a weight has {} bytes of {}", self.sent, self.memory.bytes);
        }
        let n = self.memory.bytes / (self.k * Half::BYTES);
        Ok(GpuMatrix { memory: self.memory, n, k: self.k })
    }
}
