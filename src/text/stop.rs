//! Stop strings over a stream of text.

/// What one push releases.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that can no longer be part of a stop string; on a match, what precedes the match.
    pub emit: String,
    pub matched: bool,
}

/// Finds the leftmost stop string, withholding text that may still begin one.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    matched: bool,
}

impl StopMatcher {
    /// Empty stop strings are ignored: they would match before any text.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { stops, held: String::new(), matched: false }
    }

    pub fn push(&mut self, text: &str) -> StopStep {
        if self.matched {
            return StopStep { emit: String::new(), matched: true };
        }
        self.held.push_str(text);
        // The earliest place where a stop string is complete or may still become so.
        for (at, _) in self.held.char_indices() {
            let rest = &self.held[at..];
            if self.stops.iter().any(|s| rest.starts_with(s.as_str())) {
                self.matched = true;
                self.held.truncate(at);
                return StopStep { emit: std::mem::take(&mut self.held), matched: true };
            }
            if self.stops.iter().any(|s| s.starts_with(rest)) {
                let tail = self.held.split_off(at);
                return StopStep { emit: std::mem::replace(&mut self.held, tail), matched: false };
            }
        }
        StopStep { emit: std::mem::take(&mut self.held), matched: false }
    }

    /// What is withheld, once no more text will come: a longer stop string that began earlier may
    /// have kept a complete shorter one from being seen.
    pub fn finish(&mut self) -> StopStep {
        let mut emit = std::mem::take(&mut self.held);
        let at = self.stops.iter().filter_map(|stop| emit.find(stop.as_str())).min();
        if let Some(at) = at {
            emit.truncate(at);
            self.matched = true;
        }
        StopStep { emit, matched: at.is_some() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
        let mut matcher = StopMatcher::new(&stops);
        let mut text = String::new();
        for piece in pieces {
            let step = matcher.push(piece);
            text.push_str(&step.emit);
            if step.matched {
                return (text, true);
            }
        }
        let step = matcher.finish();
        (text + &step.emit, step.matched)
    }

    #[test]
    fn stops_are_cut_off_wherever_the_text_is_split() {
        for (stops, text, expected) in [
            (&["END"][..], "oneENDtwo", ("one", true)),
            (&["END"], "oneENtwo", ("oneENtwo", false)),
            (&["abc", "b"], "ab", ("a", true)),
            (&["aab"], "aaab", ("a", true)),
            (&["", "x"], "yz", ("yz", false)),
            (&["é!"], "caf\u{e9}!x", ("caf", true)),
        ] {
            let whole = run(stops, &[text]);
            assert_eq!((whole.0.as_str(), whole.1), expected, "{stops:?} {text}");
            let singles: Vec<String> = text.chars().map(String::from).collect();
            let singles: Vec<&str> = singles.iter().map(String::as_str).collect();
            assert_eq!(run(stops, &singles), whole, "{stops:?} {text} by character");
        }
    }
}
