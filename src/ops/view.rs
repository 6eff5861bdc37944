//! Where a matrix lies inside the activation arena.

/// A row-major f32 matrix in the arena: `cols` elements a row, rows packed, first element at
/// `offset`. The number of rows is the step's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    pub offset: usize,
    pub cols: usize,
}

impl View {
    /// The elements of the first `rows` rows.
    pub fn range(self, rows: usize) -> std::ops::Range<usize> {
        self.offset..self.offset + rows * self.cols
    }
}
