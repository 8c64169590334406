//! What drafts are worth: decode speed with them and without, by turns, on answers that quote their prompt and on free ones.
//!
//! Both engines are of this process, one computes at a time, and each answers each prompt in every round. Their outputs must be
//! the same, token for token, and no answer may go in circles.

mod answers;
mod options;
mod prompts;
mod report;

use anyhow::{Result, ensure};
use clap::Parser;
use options::Options;

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(
        options.rounds > 0 && options.at_once > 0,
        "--rounds and --at-once: at least 1"
    );
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(report::run(options))
}
