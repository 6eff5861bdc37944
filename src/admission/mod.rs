//! Who may enter: one API key for the whole server.

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// A key, kept as its hash: it cannot be printed or logged.
#[derive(Clone)]
pub struct ApiKey([u8; 32]);

impl ApiKey {
    pub fn new(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Compares in constant time.
    pub fn matches(&self, given: &str) -> bool {
        let given: [u8; 32] = Sha256::digest(given.as_bytes()).into();
        self.0.ct_eq(&given).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_key_matches() {
        let key = ApiKey::new("secret");
        for (given, matches) in [("secret", true), ("Secret", false), ("secre", false), ("", false)]
        {
            assert_eq!(key.matches(given), matches, "{given}");
        }
    }
}
