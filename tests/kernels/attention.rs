//! Sequences in a paged cache, and their attention in f64 with a bound of what a kernel may differ.

use crate::values::{POISON, Random, Type};

pub const BLOCK_TOKENS: usize = 16;
/// A table's entry that no kernel has reason to read; a block so far away is not there.
const NO_BLOCK: u32 = 0xffff_fff0;

#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub of: Type,
    pub dim: usize,
    pub kv_heads: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// 0: none.
    pub window: usize,
    pub scale: f32,
}

impl Heads {
    pub fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// Elements of a row of q, k, v.
    pub fn q_stride(&self) -> usize {
        (self.heads() + 2 * self.kv_heads) * self.dim
    }
}

/// The last `queries` of `len` tokens are rows of the step.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    pub len: usize,
    pub queries: usize,
}

/// All that a kernel reads. What none of the rows sees is poison: other blocks, tokens past the end
/// of a block, tokens and table entries in front of the window, k and v among the rows.
pub struct Step {
    pub heads: Heads,
    pub sequences: Vec<Sequence>,
    /// `[rows, q_stride]`
    pub q: Vec<u16>,
    pub cache: Vec<u16>,
    /// `[sequences, table_stride]`
    pub tables: Vec<u32>,
    pub table_stride: usize,
}

impl Step {
    pub fn new(heads: Heads, sequences: &[Sequence], random: &mut Random) -> Self {
        let Heads { of, dim, kv_heads, .. } = heads;
        let rows: usize = sequences.iter().map(|sequence| sequence.queries).sum();
        let mut q = vec![POISON; rows * heads.q_stride()];
        for row in q.chunks_mut(heads.q_stride()) {
            let elements = random.elements(of, heads.heads() * dim);
            row[..elements.len()].copy_from_slice(&elements);
        }
        let blocks = |sequence: &Sequence| sequence.len.div_ceil(BLOCK_TOKENS);
        let table_stride = 1 + sequences.iter().map(blocks).max().unwrap_or(0);
        let count = sequences.iter().map(blocks).sum::<usize>() + 2;
        let mut free: Vec<u32> = (0..count as u32).collect();
        for left in (1..free.len()).rev() {
            free.swap(left, random.below(left as u32 + 1) as usize);
        }
        let cache = vec![POISON; count * 2 * kv_heads * BLOCK_TOKENS * dim];
        let tables = vec![NO_BLOCK; sequences.len() * table_stride];
        let sequences = sequences.to_vec();
        let mut step = Self { heads, sequences, q, cache, tables, table_stride };
        for index in 0..step.sequences.len() {
            let Sequence { len, queries } = step.sequences[index];
            let first = if queries == 0 { len } else { step.seen(len - queries.min(len)).start };
            for token in first..len {
                let entry = &mut step.tables[index * table_stride + token / BLOCK_TOKENS];
                if *entry == NO_BLOCK {
                    *entry = free.pop().expect("blocks for all");
                }
                for kv_head in 0..2 * kv_heads {
                    let at = step.place(index, token, kv_head);
                    step.cache[at..at + dim].copy_from_slice(&random.elements(of, dim));
                }
            }
        }
        step
    }

    /// Tokens that a query sees.
    fn seen(&self, position: usize) -> std::ops::Range<usize> {
        let window = if self.heads.window == 0 { usize::MAX } else { self.heads.window };
        (position + 1).saturating_sub(window)..position + 1
    }

    /// Where K of a token is, for `kv_head` below `kv_heads`, or its V, for those after.
    pub fn place(&self, sequence: usize, token: usize, kv_head: usize) -> usize {
        let block = self.tables[sequence * self.table_stride + token / BLOCK_TOKENS] as usize;
        let head = block * 2 * self.heads.kv_heads + kv_head;
        (head * BLOCK_TOKENS + token % BLOCK_TOKENS) * self.heads.dim
    }

    fn vector(&self, from: &[u16]) -> Vec<f64> {
        from[..self.heads.dim].iter().map(|x| self.heads.of.widen(*x)).collect()
    }

    /// Checks `y`, a row of the step that is query `query` of a sequence.
    pub fn check(&self, what: &str, row: usize, sequence: usize, query: usize, y: &[u16]) {
        let Sequence { len, queries } = self.sequences[sequence];
        for head in 0..self.heads.heads() {
            let q = self.vector(&self.q[row * self.heads.q_stride() + head * self.heads.dim..]);
            let (exact, most) = self.attend(&q, sequence, len - queries + query, head);
            for (at, (exact, most)) in exact.into_iter().zip(most).enumerate() {
                let ours = self.heads.of.widen(y[head * self.heads.dim + at]);
                assert!(
                    (ours - exact).abs() <= most,
                    "{what}, sequence {sequence} of {len}, query {query}, head {head}, {at}: \
                     {ours} for {exact}, within {most}"
                );
            }
        }
    }

    /// Each element and how far a kernel's may be from it. With u half a unit of the type:
    /// - the result is rounded: `u |o|`;
    /// - weights are rounded before they meet V: `u sum(w |v|)`;
    /// - a score is a sum of `dim` products in f32, wrong by up to `dim 2^-24 sum |q k|`, and a weight
    ///   by as much relative to it, as is the sum that all are divided by;
    /// - the sums over tokens, the exponentials and their arguments, up to 30 in what has any weight:
    ///   `(tokens + 100) 2^-23`.
    fn attend(
        &self,
        q: &[f64],
        sequence: usize,
        position: usize,
        head: usize,
    ) -> (Vec<f64>, Vec<f64>) {
        let (scale, kv_head) = (f64::from(self.heads.scale), head / self.heads.group);
        let (mut scores, mut sizes, mut values) = (Vec::new(), 0f64, Vec::new());
        for token in self.seen(position) {
            let k = self.vector(&self.cache[self.place(sequence, token, kv_head)..]);
            scores.push(scale * q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>());
            sizes = sizes.max(q.iter().zip(&k).map(|(q, k)| (q * k).abs()).sum());
            let v = self.place(sequence, token, self.heads.kv_heads + kv_head);
            values.push(self.vector(&self.cache[v..]));
        }
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let all: f64 = weights.iter().sum();
        let unit = self.heads.of.rounding();
        let sums = (weights.len() + 100) as f64 * 2f64.powi(-23);
        let score = scale * sizes * self.heads.dim as f64 * 2f64.powi(-24);
        let relative = unit + (2.0 * score).exp_m1() + sums;
        let (mut exact, mut most) = (vec![0f64; q.len()], vec![0f64; q.len()]);
        for (weight, value) in weights.iter().zip(&values) {
            for (at, value) in value.iter().enumerate() {
                exact[at] += weight / all * value;
                most[at] += weight / all * value.abs() * relative;
            }
        }
        for (most, exact) in most.iter_mut().zip(&exact) {
            *most += unit * exact.abs() + 1e-7;
        }
        (exact, most)
    }
}
