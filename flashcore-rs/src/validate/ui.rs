//! Progress: a bar with the time left on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Where progress goes.
pub(super) struct Ui {
    terminal: bool,
    bar: ProgressBar,
}

impl Ui {
    pub(super) fn new() -> Self {
        Self { terminal: stderr().is_terminal(), bar: ProgressBar::hidden() }
    }

    /// Starts a phase of so many steps.
    pub(super) fn phase(&mut self, name: &str, steps: usize) {
        self.bar.finish_and_clear();
        if !self.terminal {
            self.line(&format!("{name}: {steps} steps"));
            return;
        }
        let template = "{prefix:>12} [{bar:40}] {pos}/{len}, {eta} left  {wide_msg}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        self.bar = ProgressBar::new(steps as u64).with_style(style.progress_chars("=> ")).with_prefix(name.to_owned());
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }

    /// One step is about to start.
    pub(super) fn doing(&self, what: &str) {
        self.bar.set_message(what.to_string());
    }

    /// One step is done.
    pub(super) fn done(&self) {
        self.bar.inc(1);
    }

    /// Ends the phase.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// A line that only plain output shows.
    pub(super) fn plain(&self, text: &str) {
        if !self.terminal {
            self.line(text);
        }
    }

    /// A line, above the bar. Where nobody listens it is lost.
    pub(super) fn line(&self, text: &str) {
        self.bar.suspend(|| drop(writeln!(stderr(), "{text}")));
    }
}
