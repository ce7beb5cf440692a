//! Everything that is printed: results on stdout, errors and notes on stderr, tables and bars.

use crate::error::{Error, Result};
use serde::Serialize;
use std::io::{ErrorKind, Write};

/// Prints a finished text on stdout.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| match e.kind() {
        ErrorKind::BrokenPipe => Error::StdoutClosed,
        _ => Error::failed(format!("cannot write to stdout: {e}")),
    })
}

/// Prints one JSON document on stdout.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Error::failed(format!("cannot write the result as JSON: {e}")))?;
    print(&(text + "\n"))
}

/// A line on stderr. A closed stderr is nobody's problem.
pub(crate) fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Reports an error as one line and returns the exit code.
pub(crate) fn report(error: &Error) -> u8 {
    if !matches!(error, Error::StdoutClosed) {
        note(&format!("error: {}", one_line(&error.to_string())));
    }
    error.exit_code()
}

/// Prints help and versions as they are and usage errors as one line; returns the exit code.
pub(crate) fn usage(error: &clap::Error) -> u8 {
    if !error.use_stderr() {
        let _ = error.print();
        return 0;
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return 2;
    }
    let rendered = error.render().to_string();
    let (message, usage) = rendered.split_once("Usage:").unwrap_or((rendered.as_str(), ""));
    // "Usage: sparge attend --output <OUT> <IN>": the words before the first argument.
    let command: Vec<&str> = usage
        .split_whitespace()
        .take_while(|word| {
            word.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !word.starts_with('-')
        })
        .collect();
    let command = if command.is_empty() { "sparge".into() } else { command.join(" ") };
    let message = message.replace("For more information, try '--help'.", "");
    note(&format!("{} (see '{command} --help')", one_line(&message)));
    2
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Seconds in the unit that suits them.
pub(crate) fn seconds(s: f64) -> String {
    match s {
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.0} µs", s * 1e6),
    }
}

/// A share as a percentage.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

/// A text table: the first column left-aligned, the others right-aligned.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column heads.
    pub(crate) fn new<S: Into<String>>(heads: impl IntoIterator<Item = S>) -> Self {
        Self { rows: vec![heads.into_iter().map(Into::into).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The table as text, a rule under the heads.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| {
            self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for (i, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (c, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[c] - cell.chars().count());
                let gap = if c == 0 { "" } else { "  " };
                line += &if c == 0 { format!("{cell}{pad}") } else { format!("{gap}{pad}{cell}") };
            }
            text += line.trim_end();
            text.push('\n');
            if i == 0 {
                text += &"─".repeat(widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1));
                text.push('\n');
            }
        }
        text
    }
}

/// A horizontal bar of `width` cells for a share, in eighths of a cell.
pub(crate) fn bar(share: f64, width: usize) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (share.clamp(0.0, 1.0) * (width * 8) as f64).round() as usize;
    let bar = "█".repeat(eighths / 8) + EIGHTHS[eighths % 8];
    let blank = width.saturating_sub(bar.chars().count());
    bar + &"·".repeat(blank)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_have_their_width() {
        for share in [0.0, 0.01, 0.5, 0.77, 1.0, 3.0, f64::NAN] {
            assert_eq!(bar(share, 20).chars().count(), 20, "{share}");
        }
    }

    #[test]
    fn tables_align() {
        let mut table = Table::new(["name", "s"]);
        table.row(["a", "12.5"]);
        assert_eq!(table.render(), "name     s\n──────────\na     12.5\n");
    }

    #[test]
    fn usage_is_one_line() {
        let command = clap::Command::new("sparge").arg(clap::Arg::new("in").required(true));
        let error = command.try_get_matches_from(["sparge"]).expect_err("an argument is missing");
        assert_eq!(usage(&error), 2);
    }
}
