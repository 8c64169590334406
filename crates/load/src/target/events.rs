//! Server-sent events: just what OpenAI's streams use of them, `data:` lines.
//! Source: WHATWG HTML, "Server-sent events".

/// Cuts a stream of bytes into the values of its `data:` lines.
#[derive(Debug, Default)]
pub(super) struct Events {
    rest: Vec<u8>,
}

impl Events {
    /// More bytes came: the data of the lines that are whole now.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        self.rest.extend_from_slice(bytes);
        let mut data = Vec::new();
        let mut from = 0;
        while let Some(length) = self.rest[from..].iter().position(|byte| *byte == b'\n') {
            let line = self.rest[from..from + length].trim_ascii();
            if let Some(value) = line.strip_prefix(b"data:") {
                data.push(String::from_utf8_lossy(value.trim_ascii()).into_owned());
            }
            from += length + 1;
        }
        self.rest.drain(..from);
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_may_be_cut_anywhere() {
        let text = b": hello\r\n\r\ndata: {\"a\": 1}\r\n\r\nevent: x\ndata:{}\n\ndata: [DONE]\n\n";
        for cut in 0..text.len() {
            let mut events = Events::default();
            let mut data = events.take(&text[..cut]);
            data.extend(events.take(&text[cut..]));
            assert_eq!(data, ["{\"a\": 1}", "{}", "[DONE]"], "cut at {cut}");
        }
    }
}
