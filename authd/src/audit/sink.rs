//! Where records go: numbered, written in order by a thread of their own, and counted when there is no room.
//!
//! Enters: records. Leaves: lines. Never: a wait of the one who reports; a slow disk costs records, which are counted, and
//! the count is itself a record.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use super::record::Record;
use crate::config::AuditTarget;

/// Records that wait for the disk at most.
const QUEUE: usize = 65_536;
/// Written with one system call.
const BATCH_BYTES: usize = 1 << 18;
/// Records of so much time are written together: waking the writer for each would cost the reporter more than the record.
const GATHER: Duration = Duration::from_millis(2);
/// A file that was moved away, to be kept elsewhere, is noticed after so long.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Numbers of what became of records.
#[derive(Default, Debug)]
pub struct Totals {
    pub written: AtomicU64,
    /// No room in the queue, or the write failed.
    pub lost: AtomicU64,
}

enum Line {
    Text(String),
    Flush(SyncSender<()>),
}

pub struct Sink {
    queue: Option<SyncSender<Line>>,
    writer: Option<JoinHandle<()>>,
    next: u64,
    totals: Arc<Totals>,
    /// Losses that a record told of.
    told: u64,
    node: Option<String>,
}

impl Sink {
    pub fn open(target: &AuditTarget) -> io::Result<Self> {
        let (output, next) = match target {
            AuditTarget::Stdout => (Output::Stdout, 1),
            AuditTarget::File(path) => {
                let next = last_number(path)? + 1;
                (Output::File { file: append(path)?, path: path.clone(), looked: Instant::now() }, next)
            }
        };
        let totals = Arc::new(Totals::default());
        let (queue, lines) = sync_channel(QUEUE);
        let writer = std::thread::Builder::new().name("authd-audit".to_owned()).spawn({
            let totals = totals.clone();
            move || write(output, &lines, &totals)
        })?;
        let node = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        Ok(Self { queue: Some(queue), writer: Some(writer), next, totals, told: 0, node })
    }

    /// Numbers a record and hands it on. Returns the line as it will be written, or `None` if there was no room.
    pub fn put(&mut self, mut record: Record) -> Option<String> {
        let lost = self.totals.lost.load(Ordering::Relaxed);
        if lost > self.told {
            let mut loss = Record::about("audit_lost", format!("{} records were not written", lost - self.told));
            loss.count = Some(lost - self.told);
            if self.send(&mut loss).is_some() {
                self.told = lost;
            }
        }
        let line = self.send(&mut record);
        if line.is_none() {
            self.totals.lost.fetch_add(1, Ordering::Relaxed);
        }
        line
    }

    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Waits until everything is written that was put so far.
    pub fn flush(&self) {
        let (done, wait) = sync_channel(1);
        if let Some(queue) = &self.queue
            && queue.send(Line::Flush(done)).is_ok()
        {
            let _ = wait.recv();
        }
    }

    fn send(&mut self, record: &mut Record) -> Option<String> {
        record.seq = self.next;
        record.node.clone_from(&self.node);
        let line = serde_json::to_string(record).ok()?;
        self.queue.as_ref()?.try_send(Line::Text(line.clone() + "\n")).ok()?;
        self.next += 1;
        Some(line)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// Where lines go.
enum Output {
    Stdout,
    File { file: File, path: PathBuf, looked: Instant },
}

impl Output {
    fn write(&mut self, batch: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut out = io::stdout();
                out.write_all(batch)?;
                out.flush()
            }
            Self::File { file, path, looked } => {
                if looked.elapsed() >= LOOK_AGAIN {
                    *looked = Instant::now();
                    follow(file, path);
                }
                file.write_all(batch)
            }
        }
    }
}

/// Goes on in the file that has the path now, if it is another one.
fn follow(file: &mut File, path: &Path) {
    let inode = |metadata: io::Result<std::fs::Metadata>| metadata.map(|found| (found.dev(), found.ino())).ok();
    if inode(std::fs::metadata(path)) == inode(file.metadata()) {
        return;
    }
    match append(path) {
        Ok(other) => {
            *file = other;
            tracing::info!(path = %path.display(), "records go on in another file");
        }
        Err(error) => tracing::error!(%error, path = %path.display(), "records go on in the file that was moved away"),
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

fn write(mut output: Output, lines: &Receiver<Line>, totals: &Totals) {
    let mut batch = Vec::new();
    let mut torn = false;
    while let Ok(first) = lines.recv() {
        if matches!(first, Line::Text(_)) {
            sleep(GATHER);
        }
        let (mut records, mut waiting) = (0, Vec::new());
        batch.clear();
        if torn {
            batch.push(b'\n');
        }
        // As many as there are; then they must be seen.
        let mut next = Some(first);
        while let Some(line) = next {
            match line {
                Line::Text(text) => {
                    batch.extend_from_slice(text.as_bytes());
                    records += 1;
                }
                Line::Flush(done) => waiting.push(done),
            }
            next = if batch.len() < BATCH_BYTES { lines.try_recv().ok() } else { None };
        }
        match output.write(&batch) {
            Ok(()) => {
                torn = false;
                totals.written.fetch_add(records, Ordering::Relaxed);
            }
            Err(error) => {
                // What of the batch did get there cannot be known; none of it counts as written.
                torn = true;
                totals.lost.fetch_add(records, Ordering::Relaxed);
                tracing::error!(%error, records, "audit records cannot be written");
            }
        }
        for done in waiting {
            let _ = done.send(());
        }
    }
}

/// Number of the last whole record of a file; 0 if there is none. A line that a crash cut short is ended.
fn last_number(path: &Path) -> io::Result<u64> {
    const TAIL: u64 = 1 << 16;
    let mut file = match OpenOptions::new().read(true).append(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut tail = Vec::new();
    Read::by_ref(&mut file).take(TAIL).read_to_end(&mut tail)?;
    if tail.last().is_some_and(|byte| *byte != b'\n') {
        end_line(&mut file)?;
    }
    let number = tail.split(|byte| *byte == b'\n').rev().find_map(|line| {
        let record: Record = serde_json::from_slice(line).ok()?;
        Some(record.seq)
    });
    Ok(number.unwrap_or(0))
}

fn end_line(file: &mut File) -> io::Result<()> {
    file.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("authd-audit-{}-{name}", std::process::id()))
    }

    #[test]
    fn numbers_go_on_after_a_restart_and_after_a_torn_line() {
        let path = scratch("torn");
        std::fs::write(&path, "{\"seq\":41,\"time\":\"t\",\"event\":\"x\"}\n{\"seq\":42,\"ti").unwrap();
        let target = AuditTarget::File(path.clone());
        let mut sink = Sink::open(&target).unwrap();
        sink.put(Record::about("a", "b"));
        drop(sink);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let last: Record = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!((last.seq, last.event.as_str()), (42, "a"));
        assert_eq!(text.lines().count(), 3);
    }

    #[test]
    fn records_go_on_in_the_file_that_took_the_place() {
        let (path, moved) = (scratch("kept"), scratch("kept.1"));
        let mut sink = Sink::open(&AuditTarget::File(path.clone())).unwrap();
        sink.put(Record::about("before", ""));
        sink.flush();
        std::fs::rename(&path, &moved).unwrap();
        sleep(LOOK_AGAIN);
        sink.put(Record::about("after", ""));
        drop(sink);
        let events = |path: &Path| {
            let text = std::fs::read_to_string(path).unwrap();
            std::fs::remove_file(path).unwrap();
            let event = |line: &str| (serde_json::from_str::<Record>(line).unwrap().seq, line.contains("after"));
            text.lines().map(event).collect::<Vec<_>>()
        };
        assert_eq!((events(&moved), events(&path)), (vec![(1, false)], vec![(2, true)]));
    }

    #[test]
    fn records_without_room_are_counted_and_told() {
        let (done, lines) = sync_channel(1);
        let totals = Arc::new(Totals::default());
        let mut sink = Sink { queue: Some(done), writer: None, next: 1, totals, told: 0, node: None };
        assert!(sink.put(Record::about("a", "")).is_some());
        assert!(sink.put(Record::about("b", "")).is_none());
        assert!(sink.put(Record::about("c", "")).is_none());
        assert_eq!(sink.totals().lost.load(Ordering::Relaxed), 2);
        drop(lines.recv());
        sink.put(Record::about("d", ""));
        let Line::Text(text) = lines.recv().unwrap() else { panic!("not a record") };
        let record: Record = serde_json::from_str(&text).unwrap();
        assert_eq!((record.event.as_str(), record.count), ("audit_lost", Some(2)));
    }
}
