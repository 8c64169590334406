//! Progress on standard error: a bar where that is a terminal, else one line at the start.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;

/// A bar over `total` bytes. It shows itself on a terminal only.
pub fn bytes(what: &str, total: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        eprintln!("baton: {what} ({:.0} MB)", total as f64 / 1e6);
    }
    let style = ProgressStyle::with_template("{msg} {wide_bar:.cyan} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
        .with_style(style)
        .with_message(what.to_owned())
}
