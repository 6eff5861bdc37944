//! Where a matrix lies inside the activation arena.

use super::gpu::Half;

/// A row-major matrix in the arena: `cols` elements a row, rows packed, first element at
/// `offset`. The number of rows is the step's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    pub offset: usize,
    pub cols: usize,
}

impl View {
    /// Where it begins in the memory of a GPU, whose arena is of 16-bit elements.
    pub fn address(self, arena: u64) -> u64 {
        arena + (self.offset * Half::BYTES) as u64
    }

    /// The elements of the first `rows` rows.
    pub fn range(self, rows: usize) -> std::ops::Range<usize> {
        self.offset..self.offset + rows * self.cols
    }
}
