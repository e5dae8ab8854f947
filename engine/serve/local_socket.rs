//! Questions between processes of one machine: a socket in a folder, one line of JSON each way, then the connection ends. Who may
//! open the folder may ask. Knows no meaning of questions (`host/control.rs`); nothing here is reachable over a network.

use crate::error::{Error, Result};
use serde_json::{Value as Json, json};
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

/// The socket's name in its folder.
pub const SOCKET_NAME: &str = "control.sock";
/// Longest question; an answer has no limit.
const QUESTION_BYTES_MAX: u64 = 1 << 20;
/// How long somebody who connected may take to ask, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two attempts to accept after the system refused one (too many open files, say).
const REFUSED_WAIT: Duration = Duration::from_millis(100);

/// An open socket that answers. Dropped, it closes, and its file is removed.
pub struct Listener {
    folder: PathBuf,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Opens the socket in `folder` and answers each question with what `answer` makes of it: `Ok` becomes `{"ok": ...}`, an error
/// `{"error": text}`. Questions that wait at the same time are answered side by side, on threads of their own.
///
/// A file that a dead process left is replaced, so the caller must be the only one who may listen in this folder.
/// Errors: [`Error::Io`].
pub fn listen(folder: &Path, answer: impl Fn(&Json) -> Result<Json> + Send + Sync + 'static) -> Result<Listener> {
    let failed = |error| Error::io(&folder.join(SOCKET_NAME), "listen at", error);
    match std::fs::remove_file(folder.join(SOCKET_NAME)) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let (opened, path) = short_path(folder).map_err(failed)?;
    let listener = UnixListener::bind(&path).map_err(failed)?;
    drop(opened);
    let closing = Arc::new(AtomicBool::new(false));
    let (closed, answer) = (closing.clone(), Arc::new(answer));
    let serve = move || {
        for connection in listener.incoming() {
            if closed.load(SeqCst) {
                return;
            }
            let Ok(connection) = connection else {
                std::thread::sleep(REFUSED_WAIT);
                continue;
            };
            let answer = answer.clone();
            // Who cannot be given a thread sees the connection end.
            let _ = std::thread::Builder::new().name("question".into()).spawn(move || reply(connection, &*answer));
        }
    };
    let thread = std::thread::Builder::new().name("control".into()).spawn(serve).map_err(failed)?;
    Ok(Listener { folder: folder.to_path_buf(), closing, thread: Some(thread) })
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.closing.store(true, SeqCst);
        // Wakes the thread; if that fails it has ended already.
        let woken = connect(&self.folder).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
        // Nobody listens; whether the file is gone matters little.
        let _ = std::fs::remove_file(self.folder.join(SOCKET_NAME));
    }
}

fn reply(mut connection: UnixStream, answer: &dyn Fn(&Json) -> Result<Json>) {
    let mut line = String::new();
    let limits = connection.set_read_timeout(Some(PATIENCE)).and_then(|()| connection.set_write_timeout(Some(PATIENCE)));
    if limits.and_then(|()| BufReader::new((&connection).take(QUESTION_BYTES_MAX)).read_line(&mut line)).is_err() {
        return;
    }
    let answered = match serde_json::from_str(&line) {
        Ok(question) => answer(&question),
        Err(error) => Err(Error::Script(format!("a question is one line of JSON: {error}"))),
    };
    let answered = match answered {
        Ok(value) => json!({ "ok": value }),
        Err(error) => json!({ "error": error.to_string() }),
    };
    // Whoever went away meanwhile wants no answer.
    let _ = writeln!(connection, "{answered}");
}

/// Asks who listens in `folder`; what stands under `ok` in the answer.
///
/// - `patience`: how long the answer may take
///
/// Errors: [`Error::Io`] if nobody listens or no answer comes in time; [`Error::Script`] with the text of an error answer.
pub fn ask(folder: &Path, question: &Json, patience: Duration) -> Result<Json> {
    let failed = |error| Error::io(&folder.join(SOCKET_NAME), "ask the process at", error);
    let exchange = || -> io::Result<String> {
        let mut connection = connect(folder)?;
        connection.set_write_timeout(Some(PATIENCE))?;
        connection.set_read_timeout(Some(patience))?;
        writeln!(connection, "{question}")?;
        let mut line = String::new();
        BufReader::new(&connection).read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::Error::new(ErrorKind::ConnectionReset, "it ended without an answer"));
        }
        Ok(line)
    };
    let line = exchange().map_err(|error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            failed(io::Error::new(ErrorKind::TimedOut, format!("no answer in {} s", patience.as_secs_f64())))
        }
        _ => failed(error),
    })?;
    let mut answer: Json = serde_json::from_str(&line)
        .map_err(|error| Error::format(&folder.join(SOCKET_NAME), "answer", "a line of JSON", error.to_string()))?;
    match answer.get("error").and_then(Json::as_str) {
        Some(text) => Err(Error::Script(text.to_string())),
        None => Ok(answer["ok"].take()),
    }
}

fn connect(folder: &Path) -> io::Result<UnixStream> {
    let (_opened, path) = short_path(folder)?;
    UnixStream::connect(path)
}

/// A path of the socket that fits the 107 bytes of `sun_path`, however long that of its folder is: through the open folder,
/// which has to stay open while the path is used. Source: unix(7), proc(5).
fn short_path(folder: &Path) -> io::Result<(File, PathBuf)> {
    let opened = File::open(folder)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
    let path = if path.exists() { path } else { folder.to_path_buf() };
    Ok((opened, path.join(SOCKET_NAME)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn questions_are_answered_side_by_side_in_folders_with_long_names() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("long".repeat(50));
        std::fs::create_dir(&folder).unwrap();
        assert!(ask(&folder, &json!(1), SOON).unwrap_err().to_string().contains("control.sock: cannot ask"));
        let meeting = std::sync::Barrier::new(3);
        let answer = move |question: &Json| {
            // Nobody gets past here unless three are inside at once.
            meeting.wait();
            if question["n"] == 1 { Err(Error::Script("not one".into())) } else { Ok(json!([question, "x".repeat(1 << 20)])) }
        };
        let listener = listen(&folder, answer).unwrap();
        std::thread::scope(|scope| {
            let asked: Vec<_> = (0..3)
                .map(|n| {
                    scope.spawn({
                        let folder = &folder;
                        move || ask(folder, &json!({ "n": n }), SOON)
                    })
                })
                .collect();
            let answers: Vec<_> = asked.into_iter().map(|asked| asked.join().unwrap()).collect();
            assert_eq!(answers[0].as_ref().unwrap()[0], json!({ "n": 0 }));
            assert_eq!(answers[1].as_ref().unwrap_err().to_string(), "not one");
            assert_eq!(answers[2].as_ref().unwrap()[1].as_str().unwrap().len(), 1 << 20);
        });
        drop(listener);
        assert!(!folder.join(SOCKET_NAME).exists());
        assert!(ask(&folder, &json!(1), SOON).is_err());
    }

    #[test]
    fn what_a_dead_process_left_is_replaced_and_nonsense_is_refused() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join(SOCKET_NAME), "left").unwrap();
        let _listener = listen(root.path(), |question| Ok(question.clone())).unwrap();
        assert_eq!(ask(root.path(), &json!({ "a": [1] }), SOON).unwrap(), json!({ "a": [1] }));
        let mut connection = connect(root.path()).unwrap();
        connection.write_all(b"{\"a\": \n").unwrap();
        let mut line = String::new();
        BufReader::new(&connection).read_line(&mut line).unwrap();
        assert!(line.contains("a question is one line of JSON"), "{line}");
        // Silence is waited for only so long.
        let slow = tempfile::tempdir().unwrap();
        let _listener = listen(slow.path(), |_| {
            std::thread::sleep(Duration::from_secs(2));
            Ok(Json::Null)
        })
        .unwrap();
        let message = ask(slow.path(), &json!(1), Duration::from_millis(50)).unwrap_err().to_string();
        assert!(message.contains("no answer in 0.05 s"), "{message}");
    }
}
