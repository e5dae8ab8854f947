//! Ctrl-C (and SIGTERM): the first asks the running loop to end at its next step boundary, the second ends the process.
//! A signal belongs to the whole process, which is why this file has statics and no other in this folder does.

use crate::error::Error;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

static PENDING: AtomicBool = AtomicBool::new(false);
static LOOPS: AtomicUsize = AtomicUsize::new(0);

/// Exit code of a process that Ctrl-C ended: 128 + SIGINT.
pub const EXIT_CODE: u8 = 130;

/// Starts to listen. For the program's own process, once; tests and other users of the crate keep their handlers.
///
/// Errors: [`Error::Io`] if the system refuses a handler.
pub fn listen() -> Result<(), Error> {
    let refused = |source| Error::Io { path: "SIGINT".into(), action: "listen for the signal", source };
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).map_err(refused)?;
    let wait = move || {
        for _ in signals.forever() {
            if PENDING.swap(true, SeqCst) {
                std::process::exit(i32::from(EXIT_CODE));
            }
            if in_loop() {
                eprintln!("\nstopping at the end of this step; Ctrl-C again stops at once");
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map_err(refused)?;
    Ok(())
}

/// Asks to stop, as the first Ctrl-C does.
pub fn request() {
    PENDING.store(true, SeqCst);
}

/// Forgets a wish to stop that was followed: what it ended is not all that the program does.
pub fn clear() {
    PENDING.store(false, SeqCst);
}

/// Whether the user asked to stop.
pub fn is_pending() -> bool {
    PENDING.load(SeqCst)
}

/// Whether a loop runs whose next boundary will take the wish.
pub fn in_loop() -> bool {
    LOOPS.load(SeqCst) > 0
}

/// Says that a loop runs, for as long as this value lives.
pub struct InLoop(());

impl InLoop {
    pub fn enter() -> Self {
        LOOPS.fetch_add(1, SeqCst);
        Self(())
    }
}

impl Drop for InLoop {
    fn drop(&mut self) {
        LOOPS.fetch_sub(1, SeqCst);
    }
}
