//! What the fuzz targets in `kv-transfer/fuzz` call. Built for them and for tests only.

use crate::control::fuzzing as control;
use crate::transport::tcp::fuzzing as tcp;

pub use crate::transport::tcp::fuzzing::TcpVictim;

/// One input of the codecs: the first byte chooses one of them, the rest is what a peer says.
///
/// # Panics
/// Where something decodes to what does not encode back to it.
pub async fn codecs(input: &[u8]) {
    match input.split_first() {
        None => {}
        Some((choice, bytes)) if *choice < 128 => tcp::decoders(*choice, bytes),
        Some((choice, bytes)) => control::line(*choice, bytes).await,
    }
}

/// Inputs to begin with, for each target: what reaches each kind of message, well-formed.
pub fn seeds() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let chosen = |choice: u8, bytes: Vec<u8>| [vec![choice], bytes].concat();
    let data = tcp::decoder_seeds().into_iter().map(|bytes| chosen(3, bytes));
    let said = control::seeds()
        .into_iter()
        .map(|(choice, bytes)| chosen(128 + choice, bytes));
    vec![
        ("codecs", data.chain(said).collect()),
        ("tcp_receiver", tcp::receiver_seeds()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every seed passes. Where `BATON_FUZZ_SEEDS` names a folder, they are written there for the fuzzer to begin with.
    #[test]
    fn seeds_pass() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut victim = TcpVictim::start();
        for (target, seeds) in seeds() {
            for (number, seed) in seeds.iter().enumerate() {
                match target {
                    "codecs" => runtime.block_on(codecs(seed)),
                    _ => victim.feed(seed),
                }
                if let Some(folder) = std::env::var_os("BATON_FUZZ_SEEDS") {
                    let folder = std::path::Path::new(&folder).join(target);
                    std::fs::create_dir_all(&folder).unwrap();
                    std::fs::write(folder.join(format!("seed-{number}")), seed).unwrap();
                }
            }
        }
    }
}
