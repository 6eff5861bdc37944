//! Text in, text out: tokenizer, chat template, incremental detokenizer, stop strings.

mod detokenizer;
mod gguf;
mod pieces;
mod sentence;
mod special;
mod stop;
mod template;
mod tokenizer;

pub use detokenizer::Detokenizer;
pub use gguf::GgufVocab;
pub use pieces::Lead;
pub use sentence::SentenceEnd;
pub use stop::{StopMatcher, StopStep};
pub use template::{ChatMessage, ChatTemplate};
pub use tokenizer::Tokenizer;

/// What can go wrong with text.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template refused the messages.
    #[error("chat template: {0}")]
    Template(String),
    #[error("{0} is not supported")]
    Unsupported(String),
}
