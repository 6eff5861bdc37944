//! Server-sent events out of a byte stream (WHATWG HTML, section 9.2.6, as far as OpenAI uses it).

/// An event larger than this is no token.
const EVENT_BYTES_MAX: usize = 4 << 20;

/// Cuts bytes into the data of events, wherever the network cut them.
#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    /// A carriage return ended the last line; a line feed after it belongs to it.
    after_cr: bool,
}

impl SseParser {
    /// Adds `bytes`; calls `event` with the data of each event they complete.
    ///
    /// # Errors
    /// When an event grows too large or its data is no UTF-8.
    pub fn push(&mut self, bytes: &[u8], mut event: impl FnMut(&str)) -> Result<(), String> {
        for &byte in bytes {
            let after_cr = std::mem::replace(&mut self.after_cr, byte == b'\r');
            match byte {
                b'\n' if after_cr => {}
                b'\n' | b'\r' => self.end_line(&mut event)?,
                other => {
                    if self.line.len() + self.data.len() >= EVENT_BYTES_MAX {
                        return Err(format!("an event is larger than {EVENT_BYTES_MAX} bytes"));
                    }
                    self.line.push(other);
                }
            }
        }
        Ok(())
    }

    fn end_line(&mut self, event: &mut impl FnMut(&str)) -> Result<(), String> {
        if self.line.is_empty() {
            if std::mem::take(&mut self.has_data) {
                let data = std::str::from_utf8(&self.data).map_err(|error| error.to_string())?;
                event(data);
            }
            self.data.clear();
            return Ok(());
        }
        // Other fields (event, id, retry) and comments mean nothing here.
        if let Some(value) = self.line.strip_prefix(b"data:") {
            if std::mem::replace(&mut self.has_data, true) {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
        }
        self.line.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(chunks: &[&[u8]]) -> Result<Vec<String>, String> {
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        for chunk in chunks {
            parser.push(chunk, |data| events.push(data.to_string()))?;
        }
        Ok(events)
    }

    #[test]
    fn the_same_events_wherever_the_stream_is_cut() {
        let check = |text: &str, want: &[&str]| {
            let bytes = text.as_bytes();
            assert_eq!(parse(&[bytes]).unwrap(), want, "{text:?}");
            let single: Vec<_> = bytes.chunks(1).collect();
            assert_eq!(parse(&single).unwrap(), want, "{text:?} byte by byte");
            for first in 0..=bytes.len() {
                for second in first..=bytes.len() {
                    let parts = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                    assert_eq!(
                        parse(&parts).unwrap(),
                        want,
                        "{text:?} cut at {first} and {second}"
                    );
                }
            }
        };
        check("data: a\n\ndata: b\n\n", &["a", "b"]);
        check("data: a\r\n\r\ndata:b\r\r", &["a", "b"]);
        check("data: é🕯\n\n", &["é🕯"]);
        check("data: one\ndata: two\n\n", &["one\ntwo"]);
        check(": ping\n\nevent: x\nid: 1\ndata:  a \n\n", &[" a "]);
        check("data:\n\n", &[""]);
        check("data: never ended", &[]);
        check("data: never ended\n", &[]);
        check("database: no\n\n", &[]);
        check("\n\n\n", &[]);
    }

    #[test]
    fn what_is_no_event_stream_is_refused() {
        assert!(parse(&[b"data: \xff\n\n"]).is_err());
        let endless = vec![b'x'; EVENT_BYTES_MAX];
        assert!(parse(&[b"data: ", &endless]).is_err());
    }
}
