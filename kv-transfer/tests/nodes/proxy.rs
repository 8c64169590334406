//! A wire between two nodes that a test can cut, or harm.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// Stands before a tcp address.
pub struct Proxy {
    pub address: String,
    cut: CancellationToken,
    harm: Arc<AtomicBool>,
}

impl Proxy {
    /// `target`: host and port.
    pub async fn before(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (cut, harm, target) = (
            CancellationToken::new(),
            Arc::<AtomicBool>::default(),
            target.to_owned(),
        );
        let (stop, harms) = (cut.clone(), Arc::clone(&harm));
        tokio::spawn(async move {
            while let Some(Ok((stream, _))) = stop.run_until_cancelled(listener.accept()).await {
                let there = TcpStream::connect(&target).await.unwrap();
                let (from, to) = (stream.into_split(), there.into_split());
                let (stop, harms) = (stop.clone(), Arc::clone(&harms));
                tokio::spawn(async move {
                    let both = async { tokio::join!(carry(from.0, to.1, Some(harms)), carry(to.0, from.1, None)) };
                    stop.run_until_cancelled(both).await;
                });
            }
        });
        Self { address, cut, harm }
    }

    /// Every connection ends, now and from now on.
    pub fn cut(&self) {
        self.cut.cancel();
    }

    /// One bit of what goes to the target next is changed.
    pub fn harm(&self) {
        self.harm.store(true, Ordering::SeqCst);
    }
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    harm: Option<Arc<AtomicBool>>,
) -> std::io::Result<()> {
    let mut bytes = vec![0; 256 << 10];
    loop {
        let read = from.read(&mut bytes).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        // In so much at once a frame's payload is where its middle is.
        if read >= 64 << 10 && harm.as_ref().is_some_and(|harm| harm.swap(false, Ordering::SeqCst)) {
            bytes[read / 2] ^= 1;
        }
        to.write_all(&bytes[..read]).await?;
    }
}
