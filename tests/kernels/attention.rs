//! Sequences in a paged cache, and their attention in f64 with a bound of what a kernel may differ.

use crate::{
    emulator::Emulator,
    values::{POISON, Random, Type},
};

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

    /// Sets K (`false`) and V (`true`) of all tokens that are not poison, by token and element.
    pub fn set_kv(&mut self, value: impl Fn(bool, usize, usize) -> f64) {
        let dim = self.heads.dim;
        for sequence in 0..self.sequences.len() {
            for token in 0..self.sequences[sequence].len {
                let entry = self.tables[sequence * self.table_stride + token / BLOCK_TOKENS];
                for kv_head in (0..2 * self.heads.kv_heads).filter(|_| entry != NO_BLOCK) {
                    let at = self.place(sequence, token, kv_head);
                    for (index, x) in self.cache[at..at + dim].iter_mut().enumerate() {
                        if *x != POISON {
                            let value = value(kv_head >= self.heads.kv_heads, token, index);
                            *x = self.heads.of.round(value);
                        }
                    }
                }
            }
        }
    }

    /// Only some of the sequences, with their last rows.
    pub fn part(&self, picked: &[(usize, Sequence)]) -> Self {
        let (stride, mut q, mut tables) = (self.heads.q_stride(), Vec::new(), Vec::new());
        for (index, Sequence { len, queries }) in picked {
            let table = &self.tables[index * self.table_stride..][..self.table_stride];
            tables.extend(table);
            let first = self.sequences[..*index].iter().map(|s| s.queries).sum::<usize>();
            let whole = self.sequences[*index];
            let end = first + whole.queries - (whole.len - len);
            q.extend(&self.q[(end - queries) * stride..end * stride]);
        }
        let sequences = picked.iter().map(|(_, sequence)| *sequence).collect();
        Self { sequences, q, tables, cache: self.cache.clone(), ..*self }
    }

    /// Checks `y`: each row, and one more, which nothing may have written.
    pub fn check(&self, y: &[u16]) -> Result<(), String> {
        let mut rows = y.chunks(self.heads.heads() * self.heads.dim).enumerate();
        for (index, sequence) in self.sequences.iter().enumerate() {
            for query in 0..sequence.queries {
                let (row, y) = rows.next().ok_or("too few rows")?;
                if sequence.len > 0 {
                    self.check_row(row, index, query, y)?;
                } else if y.iter().any(|y| *y != 0) {
                    return Err(format!("padding row {row} is not zeros"));
                }
            }
        }
        let (_, spare) = rows.next().ok_or("no spare row")?;
        if spare.iter().any(|y| *y != POISON) { Err("a row too many".into()) } else { Ok(()) }
    }

    fn check_row(&self, row: usize, index: usize, query: usize, y: &[u16]) -> Result<(), String> {
        let Sequence { len, queries } = self.sequences[index];
        for head in 0..self.heads.heads() {
            let q = self.vector(&self.q[row * self.heads.q_stride() + head * self.heads.dim..]);
            let (exact, most) = self.attend(&q, index, len - queries + query, head);
            for (at, (exact, most)) in exact.into_iter().zip(most).enumerate() {
                let ours = self.heads.of.widen(y[head * self.heads.dim + at]);
                // Not a NaN either.
                if (ours - exact).abs() <= most {
                    continue;
                }
                return Err(format!(
                    "sequence {index} of {len}, query {query}, head {head}, element {at}: {ours} for \
                     {exact}, within {most}"
                ));
            }
        }
        Ok(())
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

/// Scores of `2^30` and more that only one token has: its V is the result, exactly.
pub fn large_scores(heads: Heads, sequences: &[Sequence]) -> Step {
    let mut step = Step::new(heads, sequences, &mut Random::new(3));
    let stride = heads.q_stride();
    for row in step.q.chunks_mut(stride) {
        for (at, x) in row[..heads.heads() * heads.dim].iter_mut().enumerate() {
            *x = heads.of.round(if at % heads.dim == 3 { 32768.0 } else { 0.0 });
        }
    }
    step.set_kv(|is_v, token, at| match (is_v, at) {
        (true, _) => (token * 64 + at) as f64 / 64.0,
        (false, 3) => 1024.0 * (rank(token) as f64 - 20.0),
        (false, _) => 0.0,
    });
    step
}

/// Tokens below 61 in another order.
fn rank(token: usize) -> usize {
    token * 7 % 61
}

pub fn check_large_scores(step: &Step, y: &[u16]) {
    let Heads { of, dim, .. } = step.heads;
    let mut rows = y.chunks(step.heads.heads() * dim);
    for Sequence { len, queries } in &step.sequences {
        for position in len - queries..*len {
            let winner = step.seen(position).max_by_key(|token| rank(*token)).expect("a token");
            for (at, y) in rows.next().expect("a row for each").iter().enumerate() {
                let exact = of.round((winner * 64 + at % dim) as f64 / 64.0);
                assert_eq!(*y, exact, "{:?}, position {position}, {at}", step.heads);
            }
        }
    }
}

/// Values at the type's limit, of one sign in a third of the elements and else of both: sums of them
/// must not overflow.
pub fn large_values(heads: Heads, sequences: &[Sequence]) -> Step {
    let mut step = Step::new(heads, sequences, &mut Random::new(4));
    let limit = match heads.of {
        Type::Bf16 => half::bf16::MAX.to_f64(),
        Type::F16 => half::f16::MAX.to_f64(),
    };
    step.set_kv(|is_v, token, at| {
        let small = ((token * 13 + at * 5) % 11) as f64 / 11.0 - 0.5;
        let sign = if at % 3 != 0 && (token + at) % 2 == 0 { -1.0 } else { 1.0 };
        if is_v { sign * limit } else { small }
    });
    step
}

/// A kernel's source with one thing broken, of which only the entry for bf16 and 64 is built.
pub fn broken(name: &str, from: &str, to: &str) -> Emulator {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("kernels/{name}.cu"));
    let source = std::fs::read_to_string(path).expect("a kernel of that name");
    assert_eq!(source.matches(from).count(), 1, "{from}");
    let other = |line: &&str| line.starts_with("ATTENTION_") && !line.ends_with("(bf16, 64)");
    let kept: Vec<&str> = source.lines().filter(|line| !other(line)).collect();
    Emulator::build_without_sanitizers(name, &kept.join("\n").replace(from, to))
}
