//! A connection for what reads much, so that nothing waits for it.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::{LedgerError, db::Db};

/// Reads beside the ledger's thread, one reader at a time. Clones share the connection.
#[derive(Clone)]
pub struct Reader(Arc<Mutex<Box<dyn Db>>>);

impl Reader {
    pub fn new(db: Box<dyn Db>) -> Self {
        Self(Arc::new(Mutex::new(db)))
    }

    /// Runs `work`, which must not write, off the serving threads.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut dyn Db) -> T + Send + 'static,
    ) -> Result<T, LedgerError> {
        // Waited for here, so that readers in line take no thread of the blocking pool.
        let mut db = self.0.clone().lock_owned().await;
        let done = tokio::task::spawn_blocking(move || work(&mut **db));
        done.await.map_err(|error| LedgerError::Unavailable(error.to_string()))
    }
}
