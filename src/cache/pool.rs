//! The block allocator: a free list and a reference count per block.

use crate::types::BlockId;

use super::BlockKey;

/// All KV blocks of one model replica. Every block is either free or held by one or more owners.
#[derive(Debug)]
pub struct BlockPool {
    refs: Vec<u32>,
    keys: Vec<Option<BlockKey>>,
    free: Vec<BlockId>,
}

impl BlockPool {
    pub fn new(blocks: usize) -> Self {
        let free = (0..blocks as u32).rev().map(BlockId).collect();
        Self { refs: vec![0; blocks], keys: vec![None; blocks], free }
    }

    pub fn total(&self) -> usize {
        self.refs.len()
    }

    pub fn available(&self) -> usize {
        self.free.len()
    }

    pub fn used(&self) -> usize {
        self.total() - self.available()
    }

    /// A block with one owner, or `None` when all are held.
    pub fn alloc(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.refs[block.0 as usize] = 1;
        Some(block)
    }

    /// All or nothing.
    pub fn alloc_many(&mut self, count: usize) -> Option<Vec<BlockId>> {
        (self.available() >= count).then(|| (0..count).filter_map(|_| self.alloc()).collect())
    }

    /// One more owner of a held block.
    pub fn retain(&mut self, block: BlockId) {
        let refs = &mut self.refs[block.0 as usize];
        assert!(*refs > 0, "retain of free block {block:?}");
        *refs += 1;
    }

    /// One owner less; the block is free when none is left.
    pub fn release(&mut self, block: BlockId) {
        let refs = &mut self.refs[block.0 as usize];
        assert!(*refs > 0, "release of free block {block:?}");
        *refs -= 1;
        if *refs == 0 {
            self.keys[block.0 as usize] = None;
            self.free.push(block);
        }
    }

    /// Whether a write by one owner would be seen by another.
    pub fn is_shared(&self, block: BlockId) -> bool {
        self.refs[block.0 as usize] > 1
    }

    /// Notes what a block holds, once it is full.
    pub fn set_key(&mut self, block: BlockId, key: BlockKey) {
        assert!(self.refs[block.0 as usize] > 0, "key for free block {block:?}");
        self.keys[block.0 as usize] = Some(key);
    }

    /// What a full block holds; `None` while it fills.
    pub fn key(&self, block: BlockId) -> Option<BlockKey> {
        self.keys[block.0 as usize]
    }
}
