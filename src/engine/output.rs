//! From drawn tokens to what a client reads: text in whole characters, stop strings cut off, and
//! log-probabilities beside the text they belong to.

use std::collections::VecDeque;

use crate::{
    sampling::TokenLogprobs,
    text::{Detokenizer, SentenceEnd, StopMatcher, Tokenizer},
    types::{FinishReason, TokenId},
};

use super::request::{OutputToken, StopParams};

/// One choice of a request while it runs.
pub struct ChoiceOutput {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    stop: StopParams,
    tokens: u32,
    sentence: SentenceEnd,
    /// Bytes of text made and bytes sent; the difference is withheld.
    made_bytes: usize,
    sent_bytes: usize,
    /// Tokens not yet sent, with the byte their text starts at.
    held: VecDeque<(usize, OutputToken)>,
}

/// What one more token leads to.
#[derive(Debug, Default)]
pub struct Piece {
    pub text: String,
    pub tokens: Vec<OutputToken>,
    pub finish: Option<FinishReason>,
}

impl ChoiceOutput {
    /// The output that follows `prompt`.
    pub fn new(tokenizer: &Tokenizer, prompt: &[TokenId], stop: StopParams) -> Self {
        Self {
            detokenizer: Detokenizer::after(tokenizer, prompt),
            stops: StopMatcher::new(&stop.strings),
            stop,
            tokens: 0,
            sentence: SentenceEnd::default(),
            made_bytes: 0,
            sent_bytes: 0,
            held: VecDeque::new(),
        }
    }

    /// Output tokens so far, the ending one included.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Whether the text so far ends a sentence.
    pub fn at_sentence_end(&self) -> bool {
        self.sentence.is_here()
    }

    /// Takes a drawn token. `ends` says whether it is an end token of the model, `silent` whether it
    /// is a control token, which has no text.
    pub fn push(
        &mut self,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
        ends: bool,
        silent: bool,
    ) -> Piece {
        self.tokens += 1;
        let may_stop = self.tokens > self.stop.min_tokens;
        if ends && !self.stop.ignore_eos && may_stop {
            return self.finish(FinishReason::Eos);
        }
        self.held.push_back((self.made_bytes, OutputToken { id: token, logprobs }));
        let fresh = if silent { String::new() } else { self.detokenizer.push(token) };
        self.made_bytes += fresh.len();
        self.sentence.push(&fresh);
        let mut piece = Piece::default();
        if may_stop {
            let step = self.stops.push(&fresh);
            piece.text = step.emit;
            if step.matched {
                self.sent_bytes += piece.text.len();
                piece.tokens = self.take_sent(false);
                piece.finish = Some(FinishReason::StopString);
                return piece;
            }
        } else {
            piece.text = fresh;
        }
        self.sent_bytes += piece.text.len();
        if self.tokens >= self.stop.max_tokens {
            let rest = self.finish(FinishReason::Length);
            piece.text.push_str(&rest.text);
            piece.tokens = rest.tokens;
            piece.finish = rest.finish;
        } else {
            piece.tokens = self.take_sent(self.sent_bytes == self.made_bytes);
        }
        piece
    }

    /// Those that may still be pushed.
    pub fn tokens_left(&self) -> u64 {
        self.stop.max_tokens.saturating_sub(self.tokens).into()
    }

    /// Sends what was withheld and ends the choice; a stop string that shows only now says so.
    pub fn finish(&mut self, reason: FinishReason) -> Piece {
        let tail = self.detokenizer.finish();
        let mut step = self.stops.push(&tail);
        if !step.matched {
            let rest = self.stops.finish();
            step.emit.push_str(&rest.emit);
            step.matched = rest.matched;
        }
        self.sent_bytes += step.emit.len();
        let tokens = self.take_sent(!step.matched);
        let reason = if step.matched { FinishReason::StopString } else { reason };
        Piece { text: step.emit, tokens, finish: Some(reason) }
    }

    /// Tokens whose text has begun to be sent, or all.
    fn take_sent(&mut self, all: bool) -> Vec<OutputToken> {
        let sent = self.sent_bytes;
        let count = self.held.iter().take_while(|(start, _)| all || *start < sent).count();
        self.held.drain(..count).map(|(_, token)| token).collect()
    }
}
