//! What a GPU is told before a step: many small arrays in one copy, which a kernel puts in their places.

use candle_core::{Result, bail};

use super::gpu::{Args, Buffer, Gpu, Launch, THREADS, Work};

/// Bytes that describe an array of a packet: `Segment` of `kernels/unpack.cu`.
const SEGMENT_BYTES: usize = 24;
/// Arrays of a packet, at most, and the bytes that are kept for them at its beginning.
const SEGMENTS_MAX: usize = 32;
const HEAD_BYTES: usize = SEGMENTS_MAX * SEGMENT_BYTES;
/// Blocks of threads that an array gets, at most.
const PARTS_MAX: usize = 64;

/// Arrays of 32-bit words on their way, as they travel.
#[derive(Default)]
pub struct Packet {
    bytes: Vec<u8>,
    segments: usize,
    /// Words of the longest array.
    longest: usize,
}

/// Where packets arrive.
#[derive(Clone)]
pub struct Inbox(Buffer);

impl Inbox {
    /// For packets of `words_max` words.
    pub fn new(gpu: &dyn Gpu, words_max: usize) -> Result<Self> {
        gpu.allocate(HEAD_BYTES + words_max * 4).map(Self)
    }
}

impl Packet {
    pub fn clear(&mut self) {
        self.bytes.clear();
        (self.segments, self.longest) = (0, 0);
    }

    /// Words that go to one place.
    pub fn words(&mut self, to: u64, words: impl IntoIterator<Item = u32>) {
        self.rows(to, words, 1, 1);
    }

    /// Rows of `row` words that go to a matrix whose rows are `stride` words apart.
    pub fn rows(
        &mut self,
        to: u64,
        words: impl IntoIterator<Item = u32>,
        row: usize,
        stride: usize,
    ) {
        self.bytes.resize(self.bytes.len().max(HEAD_BYTES), 0);
        let from = self.bytes.len();
        for word in words {
            self.bytes.extend_from_slice(&word.to_le_bytes());
        }
        let words = (self.bytes.len() - from) / 4;
        if words == 0 {
            return;
        }
        // What has no place at the beginning is refused when it is sent.
        let at = self.segments * SEGMENT_BYTES;
        if at < HEAD_BYTES {
            let head = &mut self.bytes[at..at + SEGMENT_BYTES];
            head[..8].copy_from_slice(&to.to_le_bytes());
            for (field, value) in head[8..].chunks_exact_mut(4).zip([from / 4, words, row, stride])
            {
                field.copy_from_slice(&(value as u32).to_le_bytes());
            }
        }
        self.segments += 1;
        self.longest = self.longest.max(words);
    }

    /// As [`Packet::words`], of 64 bits, which lie as a GPU has them: the low half first.
    pub fn longs(&mut self, to: u64, longs: impl IntoIterator<Item = i64>) {
        self.words(to, longs.into_iter().flat_map(|long| [long as u32, (long >> 32) as u32]));
    }

    /// Sends everything, and puts it in its places.
    pub fn send(&self, gpu: &dyn Gpu, inbox: &Inbox) -> Result<()> {
        let bytes = self.bytes.len();
        if self.segments > SEGMENTS_MAX || bytes > inbox.0.bytes {
            bail!("a packet of {bytes} bytes is larger than its {}", inbox.0.bytes);
        }
        if self.segments == 0 {
            return Ok(());
        }
        gpu.upload(inbox.0.address, &self.bytes)?;
        let parts = self.longest.div_ceil(THREADS as usize).min(PARTS_MAX);
        gpu.launch(&Launch {
            kernel: "unpack",
            grid: [parts as u32, self.segments as u32, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: Args::default().address(inbox.0.address),
            work: Work { bytes: 2 * bytes as u64, flops: 0 },
        })
    }
}
