//! What a GPU is told before a step: many small arrays in one copy, which a kernel puts in their places.

use candle_core::{Result, bail};

use super::gpu::{Args, Buffer, Gpu, Launch, THREADS, Work};

/// Bytes that describe an array of a packet.
const SEGMENT_BYTES: usize = 24;
/// Arrays of a packet, at most.
const SEGMENTS_MAX: usize = 32;
/// Blocks of threads that an array gets, at most.
const PARTS_MAX: usize = 64;

/// Arrays of 32-bit words on their way.
#[derive(Default)]
pub struct Packet {
    segments: Vec<Segment>,
    words: Vec<u32>,
}

struct Segment {
    to: u64,
    from: usize,
    words: usize,
    row: usize,
    stride: usize,
}

/// Where packets arrive.
#[derive(Clone)]
pub struct Inbox(Buffer);

impl Inbox {
    /// For packets of `words_max` words.
    pub fn new(gpu: &dyn Gpu, words_max: usize) -> Result<Self> {
        gpu.allocate(SEGMENTS_MAX * SEGMENT_BYTES + words_max * 4).map(Self)
    }
}

impl Packet {
    pub fn clear(&mut self) {
        self.segments.clear();
        self.words.clear();
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
        let from = self.words.len();
        self.words.extend(words);
        let words = self.words.len() - from;
        if words > 0 {
            self.segments.push(Segment { to, from, words, row, stride });
        }
    }

    /// As [`Packet::words`], of 64 bits, which lie as a GPU has them: the low half first.
    pub fn longs(&mut self, to: u64, longs: impl IntoIterator<Item = i64>) {
        self.words(to, longs.into_iter().flat_map(|long| [long as u32, (long >> 32) as u32]));
    }

    /// Sends everything, and puts it in its places.
    pub fn send(&self, gpu: &dyn Gpu, inbox: &Inbox) -> Result<()> {
        let head = self.segments.len() * SEGMENT_BYTES;
        let bytes = head + self.words.len() * 4;
        if self.segments.len() > SEGMENTS_MAX || bytes > inbox.0.bytes {
            bail!("a packet of {bytes} bytes is larger than its {}", inbox.0.bytes);
        }
        let Some(most) = self.segments.iter().map(|segment| segment.words).max() else {
            return Ok(());
        };
        let mut packet = Vec::with_capacity(bytes);
        for segment in &self.segments {
            packet.extend(segment.to.to_le_bytes());
            let from = head / 4 + segment.from;
            for word in [from, segment.words, segment.row, segment.stride] {
                packet.extend((word as u32).to_le_bytes());
            }
        }
        packet.extend(self.words.iter().flat_map(|word| word.to_le_bytes()));
        gpu.upload(inbox.0.address, &packet)?;
        let parts = most.div_ceil(THREADS as usize).min(PARTS_MAX);
        gpu.launch(&Launch {
            kernel: "unpack",
            grid: [parts as u32, self.segments.len() as u32, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: Args::default().address(inbox.0.address),
            work: Work { bytes: 2 * bytes as u64, flops: 0 },
        })
    }
}
