//! Another engine on the same machine, busy or idle as told: what a node's neighbours do to it.

use super::engine::Engine;
use anyhow::{Result, anyhow};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// What it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Doing {
    /// Nothing.
    Idle = 0,
    /// Steps of prompts.
    Prefill = 1,
    /// Steps of decoding.
    Decode = 2,
    /// It ends.
    End = 3,
}

/// A thread with an engine of its own.
pub struct Neighbour {
    wanted: Arc<AtomicU8>,
    doing: Arc<AtomicU8>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// Steps that stand for a prefill node's work and a decode node's.
const PREFILL: (u32, u32) = (128, 512);
const DECODE: (u32, u32) = (2, 1024);

impl Neighbour {
    /// Starts it, idle.
    pub fn start(mut engine: Engine) -> Self {
        let atom = || Arc::new(AtomicU8::new(Doing::Idle as u8));
        let (wanted, doing) = (atom(), atom());
        let (told, tells) = (Arc::clone(&wanted), Arc::clone(&doing));
        let thread = std::thread::spawn(move || {
            loop {
                let now = told.load(Ordering::Relaxed);
                tells.store(now, Ordering::Relaxed);
                match now {
                    1 => drop(engine.step(PREFILL.0, PREFILL.1, 0, 0)?),
                    2 => drop(engine.step(0, 0, DECODE.0, DECODE.1)?),
                    3 => return Ok(()),
                    _ => std::thread::park_timeout(Duration::from_millis(1)),
                }
            }
        });
        Self {
            wanted,
            doing,
            thread: Some(thread),
        }
    }

    /// From now on. Waits until the step before is over: it would be beside something else.
    pub fn does(&self, doing: Doing) {
        self.wanted.store(doing as u8, Ordering::Relaxed);
        let ended = || self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        while self.doing.load(Ordering::Relaxed) != doing as u8 && !ended() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends it.
    pub fn end(mut self) -> Result<()> {
        self.wanted.store(Doing::End as u8, Ordering::Relaxed);
        let joined = self.thread.take().map_or(Ok(Ok(())), JoinHandle::join);
        joined.map_err(|_| anyhow!("the neighbour's engine panicked"))?
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.wanted.store(Doing::End as u8, Ordering::Relaxed);
    }
}
