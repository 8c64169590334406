//! How fast blocks get from one process to another, and what that costs: the work of the peers' benches, over our own paths.
//!
//! The initiator starts this program again as the target, and writes 256 MiB of scattered blocks a round from its arena into
//! random slots of the target's. One line per block size, with the peers' fields; the target compares every byte at the end.

mod book;
mod case;
mod initiator;
mod layout;
mod machine;
mod node;
mod options;
mod pool;
mod report;
mod target;

use anyhow::Result;
use clap::Parser;
use options::{Options, Role};

fn main() -> Result<()> {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let _inside = runtime.enter();
    match options.role {
        Role::Initiator => initiator::run(&options, &runtime),
        Role::Target => target::serve(&options, &runtime),
    }
}
