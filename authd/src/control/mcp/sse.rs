//! Server-sent events (WHATWG HTML, 9.2), read and written.
//!
//! Enters: pieces of a stream, cut anywhere. Leaves: events of a bounded size. Never: a line or an event that grows without
//! end. Own code, as the crates that parse such streams (`sse-stream`, `eventsource-stream`) put no bound to an event.

use std::time::Duration;

/// Of an event's id, which comes back in a header (`Last-Event-ID`).
pub const ID_BYTES: usize = 256;

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Event {
    /// As it stands then: an id holds until the next one.
    pub id: Option<String>,
    pub retry: Option<Duration>,
    /// `None`: the event has another type than `message`, or says nothing but its id.
    pub data: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SseError {
    #[error("an event is longer than {0} bytes")]
    Oversize(usize),
    #[error("an event is no UTF-8")]
    NotUtf8,
}

/// Reads a stream piece by piece.
pub struct Reader {
    most: usize,
    line: Vec<u8>,
    after_cr: bool,
    at_start: bool,
    data: Option<String>,
    kind: Option<String>,
    id: Option<String>,
    retry: Option<Duration>,
    ready: std::collections::VecDeque<Event>,
}

impl Reader {
    pub fn new(most: usize) -> Self {
        Self {
            most,
            line: Vec::new(),
            after_cr: false,
            at_start: true,
            data: None,
            kind: None,
            id: None,
            retry: None,
            ready: std::collections::VecDeque::new(),
        }
    }

    pub fn feed(&mut self, piece: &[u8]) -> Result<(), SseError> {
        for &byte in piece {
            let after_cr = std::mem::replace(&mut self.after_cr, byte == b'\r');
            match byte {
                b'\n' if after_cr => {}
                b'\r' | b'\n' => self.end_line()?,
                _ if self.line.len() + self.data.as_ref().map_or(0, String::len) >= self.most => {
                    return Err(SseError::Oversize(self.most));
                }
                _ => self.line.push(byte),
            }
        }
        Ok(())
    }

    /// The next event that is complete.
    pub fn take(&mut self) -> Option<Event> {
        self.ready.pop_front()
    }

    fn end_line(&mut self) -> Result<(), SseError> {
        let line = std::mem::take(&mut self.line);
        let mut line = std::str::from_utf8(&line).map_err(|_| SseError::NotUtf8)?;
        if std::mem::take(&mut self.at_start) {
            line = line.strip_prefix('\u{feff}').unwrap_or(line);
        }
        if line.is_empty() {
            self.end_event();
            return Ok(());
        }
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match name {
            "data" => {
                match &mut self.data {
                    Some(data) => {
                        data.push('\n');
                        data.push_str(value);
                    }
                    None => self.data = Some(value.to_owned()),
                }
                if self.data.as_ref().is_some_and(|data| data.len() > self.most) {
                    return Err(SseError::Oversize(self.most));
                }
            }
            "event" => self.kind = Some(value.chars().take(64).collect()),
            "id" if is_id(value) => self.id = Some(value.to_owned()),
            "retry" => {
                let millis = value.parse().ok().filter(|_| value.bytes().all(|b| b.is_ascii_digit()));
                self.retry = millis.map(Duration::from_millis).or(self.retry);
            }
            _ => {}
        }
        Ok(())
    }

    fn end_event(&mut self) {
        let data = self.data.take().filter(|data| !data.is_empty());
        let kind = self.kind.take().filter(|kind| !kind.is_empty());
        let event = Event { id: self.id.take(), retry: self.retry.take(), data };
        let is_message = kind.is_none_or(|kind| kind == "message");
        let event = if is_message { event } else { Event { data: None, ..event } };
        if event != Event::default() {
            self.ready.push_back(event);
        }
    }
}

/// What can come back in a header, and stands for itself there.
pub fn is_id(text: &str) -> bool {
    (1..=ID_BYTES).contains(&text.len()) && text.bytes().all(|b| (0x21..=0x7e).contains(&b))
}

/// One event. The data has no line ends.
pub fn write(event: &Event) -> String {
    let mut text = String::with_capacity(event.data.as_ref().map_or(0, String::len) + 64);
    if let Some(id) = &event.id {
        text.push_str(&format!("id: {id}\n"));
    }
    if let Some(retry) = event.retry {
        text.push_str(&format!("retry: {}\n", retry.as_millis()));
    }
    match &event.data {
        Some(data) => {
            text.push_str("event: message\ndata: ");
            text.push_str(data);
            text.push('\n');
        }
        // An id alone: clients take it as where to go on.
        None => text.push_str("data:\n"),
    }
    text.push('\n');
    text
}

/// A comment, which says that the stream is still there.
pub const KEEP_ALIVE: &str = ":\n\n";

#[cfg(test)]
mod tests {
    use super::*;

    fn events(most: usize, pieces: &[&[u8]]) -> Result<Vec<Event>, SseError> {
        let mut reader = Reader::new(most);
        for piece in pieces {
            reader.feed(piece)?;
        }
        Ok(std::iter::from_fn(|| reader.take()).collect())
    }

    fn message(data: &str) -> Event {
        Event { data: Some(data.to_owned()), ..Event::default() }
    }

    #[test]
    fn a_stream_reads_alike_wherever_it_is_cut() {
        let stream =
            "\u{feff}: hello\r\nid: 7\r\nevent: message\ndata: {\"a\":\ndata: 1}\r\rretry: 250\nid: 8\ndata:\n\n\
                      event: other\ndata: x\n\ndata: \u{e4}\n\n"
                .as_bytes();
        let expected = vec![
            Event { id: Some("7".to_owned()), ..message("{\"a\":\n1}") },
            Event { id: Some("8".to_owned()), retry: Some(Duration::from_millis(250)), data: None },
            message("\u{e4}"),
        ];
        assert_eq!(events(64, &[stream]).unwrap(), expected);
        for cut in 0..stream.len() {
            assert_eq!(events(64, &[&stream[..cut], &stream[cut..]]).unwrap(), expected, "{cut}");
        }
        let single: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(events(64, &single).unwrap(), expected);
    }

    #[test]
    fn an_event_has_a_bound_however_it_is_spread() {
        let long = format!("data: {}\n\n", "x".repeat(100));
        assert_eq!(events(64, &[long.as_bytes()]), Err(SseError::Oversize(64)));
        let lines = "data: xxxxxxx\n".repeat(20);
        assert_eq!(events(64, &[lines.as_bytes()]), Err(SseError::Oversize(64)));
        let comment = format!(":{}", "x".repeat(100));
        assert_eq!(events(64, &[comment.as_bytes()]), Err(SseError::Oversize(64)));
        let many = "data: xxxxxxx\n\n".repeat(20);
        assert_eq!(events(64, &[many.as_bytes()]).unwrap().len(), 20);
    }

    #[test]
    fn ids_that_could_not_come_back_are_no_ids() {
        let stream = format!("id: {}\ndata: a\n\nid: a b\ndata: b\n\nid: \u{e4}\ndata: c\n\n", "x".repeat(300));
        assert_eq!(events(1024, &[stream.as_bytes()]).unwrap(), [message("a"), message("b"), message("c")]);
    }

    #[test]
    fn what_is_written_reads_back() {
        for event in [
            message("{}"),
            Event { id: Some("a/1".to_owned()), retry: Some(Duration::from_secs(1)), data: None },
            Event { id: Some("a/2".to_owned()), ..message("x") },
        ] {
            assert_eq!(events(64, &[KEEP_ALIVE.as_bytes(), write(&event).as_bytes()]).unwrap(), [event]);
        }
    }
}
