//! What a long run shows: a bar on a terminal, plain lines at growing intervals elsewhere, nothing when asked for quiet.
//! Only shows numbers; `loops.rs` collects them and writes the same ones to the run's metrics.

use super::memory::resident_bytes;
use crate::kernels::buffer::live_bytes;
use crate::tensor::place::device_bytes;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The user's screen: lines go above the bar, if there is one. Cheap to clone.
#[derive(Clone)]
pub struct Screen(Arc<Inner>);

struct Inner {
    quiet: bool,
    /// Nothing at all is shown.
    silent: bool,
    terminal: bool,
    bar: Mutex<Option<ProgressBar>>,
}

impl Screen {
    /// The process's own standard streams. `quiet` leaves only what scripts print, and errors.
    pub fn new(quiet: bool) -> Self {
        Self(Arc::new(Inner { quiet, silent: false, terminal: std::io::stderr().is_terminal(), bar: Mutex::new(None) }))
    }

    /// The same streams for somebody of whom nothing is to be seen: what scripts print there is lost, too.
    pub fn quiet(&self) -> Self {
        Self(Arc::new(Inner { quiet: true, silent: true, terminal: false, bar: Mutex::new(None) }))
    }

    fn above_bar(&self, write: impl FnOnce()) {
        let bar = self.0.bar.lock().expect("no panic happens under this lock").clone();
        match bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// A line on standard output: what a script prints. A closed pipe (`| head`) is no error of the run.
    pub fn print(&self, line: &str) {
        if self.0.silent {
            return;
        }
        self.above_bar(|| {
            let _ = writeln!(std::io::stdout(), "{line}");
        });
    }

    /// A line about the run on standard error, unless quiet.
    pub fn note(&self, line: &str) {
        if !self.0.quiet {
            self.above_bar(|| {
                let _ = writeln!(std::io::stderr(), "{line}");
            });
        }
    }
}

/// One loop's display.
pub struct Progress {
    screen: Screen,
    name: String,
    steps: Option<u64>,
    bar: Option<ProgressBar>,
    started: Instant,
    /// Share of the loop that was done when the display began.
    done_before: Option<f64>,
    printed: Option<Instant>,
    interval: Duration,
}

/// What a loop knows after a step.
pub struct Report<'a> {
    /// Steps done so far.
    pub count: u64,
    /// Share of the loop that is done, 0 to 1, if it is known.
    pub done: Option<f64>,
    /// The values last logged, in the order they are shown.
    pub values: &'a [(String, String)],
    pub tokens_per_second: Option<f64>,
    pub share_of_peak: Option<f64>,
}

/// Between plain lines at first, and at most: an hour's run gives a page or two.
const INTERVAL_FIRST: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(30);
/// Steps that are always printed: the first losses tell whether a run is worth waiting for.
const STEPS_FIRST: u64 = 3;

impl Progress {
    pub fn start(screen: &Screen, name: &str, steps: Option<u64>) -> Self {
        let bar = (screen.0.terminal && !screen.0.quiet).then(|| {
            let bar = ProgressBar::with_draw_target(steps, ProgressDrawTarget::stderr());
            let template = if steps.is_some() { "{prefix} {bar:20.cyan/dim} {pos}/{len}  {msg}" } else { "{prefix} step {pos}  {msg}" };
            bar.set_style(
                ProgressStyle::with_template(template).expect("the template is a constant and well-formed").progress_chars("━╸─"),
            );
            bar.set_prefix(name.to_string());
            *screen.0.bar.lock().expect("no panic happens under this lock") = Some(bar.clone());
            bar
        });
        let (started, interval) = (Instant::now(), INTERVAL_FIRST);
        Self { screen: screen.clone(), name: name.to_string(), steps, bar, started, done_before: None, printed: None, interval }
    }

    pub fn step(&mut self, report: &Report) {
        if self.screen.0.quiet {
            return;
        }
        if self.done_before.is_none() {
            self.done_before = report.done.map(|done| done - done / report.count.max(1) as f64);
        }
        if let Some(bar) = &self.bar {
            bar.set_message(self.facts(report).join("  "));
            bar.set_position(report.count);
            return;
        }
        let last = self.steps == Some(report.count);
        let due = self.printed.is_none_or(|printed| printed.elapsed() >= self.interval);
        if !(due || last || report.count <= STEPS_FIRST) {
            return;
        }
        if due && report.count > STEPS_FIRST {
            self.interval = (self.interval * 3 / 2).min(INTERVAL_MAX);
        }
        self.printed = Some(Instant::now());
        let of = self.steps.map_or_else(String::new, |steps| format!("/{steps}"));
        let mut line = vec![format!("{} {}{of}", self.name, report.count)];
        line.extend(self.facts(report));
        self.screen.note(&line.join("  "));
    }

    fn facts(&self, report: &Report) -> Vec<String> {
        let mut facts: Vec<String> = report.values.iter().map(|(name, value)| format!("{name} {value}")).collect();
        facts.extend(report.tokens_per_second.map(|rate| format!("{} tokens/s", short(rate))));
        facts.extend(report.share_of_peak.map(|share| format!("{:.0}% of peak", share * 100.0)));
        if let Some((done, before)) = report.done.zip(self.done_before).filter(|(done, before)| before < done && *done < 1.0) {
            let left = self.started.elapsed().as_secs_f64() * (1.0 - done) / (done - before);
            facts.push(format!("{} left", clock(left)));
        }
        let resident = resident_bytes().map_or_else(String::new, |bytes| format!(" of {}", memory(bytes)));
        facts.push(format!("{}{resident}", memory(live_bytes())));
        facts.extend((device_bytes() > 0).then(|| format!("{} on the GPU", memory(device_bytes()))));
        facts
    }

    /// Takes the bar away. What was shown last stays as a line.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            *self.screen.0.bar.lock().expect("no panic happens under this lock") = None;
            bar.abandon();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A number in five characters or so: 3.2104, 812, 8.2k, 1.3M, 4e-7.
pub fn short(value: f64) -> String {
    let size = value.abs();
    match size {
        0.0 => "0".into(),
        _ if !value.is_finite() => format!("{value}"),
        _ if size < 1e-3 => format!("{value:.2e}"),
        _ if size < 10.0 => format!("{value:.4}"),
        _ if size < 1e3 => format!("{value:.1}"),
        _ if size < 1e6 => format!("{:.1}k", value / 1e3),
        _ if size < 1e9 => format!("{:.1}M", value / 1e6),
        _ => format!("{value:.2e}"),
    }
}

fn clock(seconds: f64) -> String {
    let seconds = seconds.min(1e8) as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

fn memory(bytes: usize) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (value, text) in [(3.21044, "3.2104"), (0.0, "0"), (4e-7, "4.00e-7"), (8234.0, "8.2k"), (-1.5, "-1.5000"), (2e9, "2.00e9")] {
            assert_eq!(short(value), text);
        }
        assert_eq!((clock(3725.0), clock(61.9)), ("1:02:05".into(), "1:01".into()));
        assert_eq!(memory(3 << 30), "3.00 GiB");
    }
}
