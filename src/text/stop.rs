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

    /// The withheld text, once no more will come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
