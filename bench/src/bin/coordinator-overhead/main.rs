//! What the coordinator adds to each token: an echo node of zero cost stamps every token as it sends it, the client stamps
//! it as it comes out of the coordinator, and, interleaved, the same straight from the node. One machine, one clock.

mod arguments;
mod echo_node;
mod measure;
mod open_loop;

use anyhow::Result;
use arguments::Arguments;
use clap::Parser;
use echo_node::{EchoNode, Pace};
use std::time::Duration;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut coordinator = measure::Coordinator::start().await?;
    let pace = match arguments.rate {
        Some(_) => Pace {
            gap: Duration::ZERO,
            aligned: true,
            frame: open_loop::FRAME_TOKENS,
        },
        None => Pace {
            gap: Duration::from_micros(arguments.gap_us),
            aligned: arguments.aligned,
            frame: 1,
        },
    };
    let node = EchoNode::start(&coordinator.store, pace).await?;
    if let Some(rate) = arguments.rate {
        let figures = open_loop::run(&mut coordinator, &node, &arguments, rate).await?;
        match arguments.json {
            true => println!("{}", serde_json::to_string(&figures)?),
            false => println!("{figures}"),
        }
        return Ok(());
    }
    let figures = measure::run(&mut coordinator, &node, &arguments).await?;
    if arguments.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("{figures}");
    }
    Ok(())
}
