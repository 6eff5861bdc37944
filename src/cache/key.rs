//! What a full KV block holds, as a collision-safe hash, so that equal prefixes can be found.

use crate::types::TokenId;

/// Identifies the content of a full block: everything its K and V depend on. Two blocks with equal
/// keys hold the same numbers; 256-bit BLAKE3 makes a collision as good as impossible, so a key
/// may stand for the content across tenants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockKey([u8; 32]);

impl BlockKey {
    /// The parent of the first block of every sequence of one model, adapter and salt.
    pub fn root(model: &str, adapter: u32, salt: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(model.len() as u64).to_le_bytes());
        hasher.update(model.as_bytes());
        hasher.update(&adapter.to_le_bytes());
        hasher.update(salt);
        Self(*hasher.finalize().as_bytes())
    }

    /// The key of the block that follows `self` and holds `tokens`.
    pub fn child(&self, tokens: &[TokenId]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_everything_the_block_depends_on() {
        let base = BlockKey::root("m", 0, b"").child(&[1, 2]).child(&[3, 4]);
        let others = [
            BlockKey::root("n", 0, b"").child(&[1, 2]).child(&[3, 4]),
            BlockKey::root("m", 1, b"").child(&[1, 2]).child(&[3, 4]),
            BlockKey::root("m", 0, b"t").child(&[1, 2]).child(&[3, 4]),
            BlockKey::root("m", 0, b"").child(&[2, 1]).child(&[3, 4]),
            BlockKey::root("m", 0, b"").child(&[3, 4]),
        ];
        assert!(others.iter().all(|other| *other != base));
        assert_eq!(base, BlockKey::root("m", 0, b"").child(&[1, 2]).child(&[3, 4]));
    }
}
