//! What commands print on standard output, and how wide it may be. Knows nothing of what it says.

use crate::error::{Error, Result};
use std::io::{self, ErrorKind, IsTerminal, Write};

/// Columns where no terminal says otherwise.
const COLUMNS: usize = 100;

/// Writes `text` to standard output. A reader who went away (`| head`) is no error.
///
/// Errors: [`Error::Io`].
pub fn print(text: &str) -> Result<()> {
    print_with(|out| out.write_all(text.as_bytes()))
}

/// As [`print`], for output that is made piece by piece.
///
/// Errors: [`Error::Io`].
pub fn print_with(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    match write(&mut out).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        Err(source) => Err(Error::Io { path: "standard output".into(), action: "write to", source }),
        Ok(()) => Ok(()),
    }
}

/// The columns of the terminal; 100 where there is none.
pub fn columns() -> usize {
    if !io::stdout().is_terminal() {
        return COLUMNS;
    }
    console::Term::stdout().size_checked().map_or(COLUMNS, |(_, columns)| usize::from(columns).max(20))
}
