//! A running sequence on its way to another decode node, while it goes on here.
//!
//! What goes is a snapshot: whole blocks up to a border that the sequence has yet to reach, each sent as soon as it is full,
//! and then the tokens up to the one that follows it. Nothing here waits for the other node, and whatever becomes of it, the
//! sequence goes on: the coordinator drops its stream once the other node has taken over.

use crate::commands::HandOnSpec;
use baton_kv_transfer::{Outgoing, OutgoingSpec, TransferError};
use baton_node_host::engine::{Control, ShareWish, SharedBlocks};
use baton_node_host::work::HandoverEnd;
use baton_node_host::{Host, LastWord, work};
use baton_node_runtime::CancellationToken;
use baton_proto::v1::{self, handed_on};
use baton_types::Ticket;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

/// Messages of shared blocks that may wait: what finds no room is sent again after a later step.
const SHARED: usize = 8;
/// Where the other node has no blocks yet when the sequence is so many tokens beyond the snapshot, it would come too late:
/// it has to draw all of them again, while the client waits.
const LATE_TOKENS: usize = 16;

/// One hand-over of a running sequence. Dropping it gives it up, unless everything was said already.
pub(crate) struct HandingOn {
    ticket: Ticket,
    /// Place of the first token of the last word among the generated ones.
    known: usize,
    /// Place of the token that the other node goes on from.
    next: usize,
    last_word: Option<oneshot::Sender<LastWord>>,
    granted: Arc<AtomicBool>,
    given_up: CancellationToken,
    end: oneshot::Receiver<Result<v1::HandedOver, TransferError>>,
}

/// The task's half.
struct Task {
    host: Host,
    outgoing: Outgoing,
    blocks: usize,
    shared: mpsc::Receiver<SharedBlocks>,
    last_word: oneshot::Receiver<LastWord>,
    granted: Arc<AtomicBool>,
    given_up: CancellationToken,
}

impl HandingOn {
    /// Begins it. `prompt_tokens` is where the generated tokens begin; `time_left` is the request's.
    pub fn start(
        host: &Host,
        control: &Control,
        spec: HandOnSpec,
        prompt_tokens: usize,
        time_left: Duration,
    ) -> Result<Self, Status> {
        let block_tokens = host.model().geometry.block_tokens as usize;
        let HandOnSpec {
            ticket,
            attempt,
            peer,
            context_tokens,
            known_tokens,
        } = spec;
        if !context_tokens.is_multiple_of(block_tokens) || context_tokens < prompt_tokens + known_tokens {
            return Err(Status::invalid_argument(format!(
                "context_tokens: {context_tokens}; whole blocks of {block_tokens} are handed on, and at least the \
                 {prompt_tokens} tokens of the prompt and the {known_tokens} behind them that the other node knows"
            )));
        }
        let blocks = context_tokens / block_tokens;
        let (to, shared) = mpsc::channel(SHARED);
        control.share(ShareWish { blocks, to });
        host.engine().wake();
        let (last_word, said) = oneshot::channel();
        let (ended, end) = oneshot::channel();
        let (granted, given_up) = (Arc::new(AtomicBool::new(false)), CancellationToken::new());
        let task = Task {
            host: host.clone(),
            outgoing: host.endpoint().open(OutgoingSpec {
                peer,
                ticket,
                attempt,
                context_tokens,
                deadline: time_left,
            }),
            blocks,
            shared,
            last_word: said,
            granted: granted.clone(),
            given_up: given_up.clone(),
        };
        host.supervisor().spawn("hand-on", async move {
            let result = task.run().await;
            let outcome = if result.is_ok() { "done" } else { "failed" };
            metrics::counter!("baton_node_handed_on_total", "outcome" => outcome).increment(1);
            // Nobody waits any more where the other node took over first.
            let _ = ended.send(result);
        });
        Ok(Self {
            ticket,
            known: known_tokens,
            next: context_tokens - prompt_tokens,
            last_word: Some(last_word),
            granted,
            given_up,
            end,
        })
    }

    /// The sequence has these generated tokens. True where the last word was said now.
    pub fn generated(&mut self, tokens: &[u32]) -> bool {
        if tokens.len() <= self.next {
            return false;
        }
        let Some(last_word) = self.last_word.take() else {
            return false;
        };
        let word = LastWord {
            first_index: u32::try_from(self.known).unwrap_or(u32::MAX),
            tokens: tokens[self.known..=self.next].to_vec(),
        };
        // A task that is over has said why.
        last_word.send(word).is_ok()
    }

    /// The other node would come too late for a sequence of so many generated tokens.
    pub fn is_late(&self, tokens: usize) -> bool {
        tokens > self.next + LATE_TOKENS && !self.granted.load(Ordering::Acquire)
    }

    /// How it ended; never where there is none. Cancel safe.
    pub async fn ended(this: Option<&mut Self>) -> Result<v1::HandedOver, TransferError> {
        match this {
            Some(this) => match (&mut this.end).await {
                Ok(result) => result,
                Err(_) => Err(TransferError::ShuttingDown),
            },
            None => pending().await,
        }
    }

    /// The coordinator's word on how it ended.
    pub fn word(&self, result: Result<v1::HandedOver, TransferError>) -> v1::HandedOn {
        let end = match result {
            Ok(report) => handed_on::End::HandedOver(report),
            Err(error) => handed_on::End::Failed(work::transfer_failed(&error, HandoverEnd::Sender)),
        };
        v1::HandedOn {
            ticket: baton_proto::convert::ticket_bytes(self.ticket),
            end: Some(end),
        }
    }
}

impl Drop for HandingOn {
    fn drop(&mut self) {
        self.given_up.cancel();
    }
}

impl Task {
    async fn run(self) -> Result<v1::HandedOver, TransferError> {
        let Self {
            host,
            mut outgoing,
            blocks,
            mut shared,
            last_word,
            granted,
            given_up,
        } = self;
        let send = async {
            let wanted = outgoing.reserve().await?.wanted;
            granted.store(true, Ordering::Release);
            let layers = 0..host.model().geometry.layers;
            let mut sent = 0;
            while sent < blocks {
                let SharedBlocks { first, table } = tokio::select! {
                    error = outgoing.failed() => return Err(error),
                    shared = shared.recv() => shared.ok_or_else(sequence_ended)?,
                };
                let table = Arc::new(table);
                sent = first + table.blocks().len();
                for (ordinal, source) in (first..).zip(table.blocks()) {
                    let ordinal = u32::try_from(ordinal).unwrap_or(u32::MAX);
                    if wanted.contains(&ordinal) {
                        outgoing.push(ordinal, layers.clone(), *source, table.clone())?;
                    }
                }
            }
            tokio::select! {
                error = outgoing.failed() => Err(error),
                word = last_word => word.map_err(|_| sequence_ended()),
            }
        };
        let word = tokio::select! {
            () = given_up.cancelled() => return Err(sequence_ended()),
            word = send => word?,
        };
        // Everything was said: the other node may have it all, and goes on although nobody here wants to know.
        let report = outgoing.complete(word.encode()).await?;
        let exposed = report.exposed;
        metrics::histogram!("baton_node_handover_exposed_seconds").record(exposed.as_secs_f64());
        Ok(work::handed_over(report, exposed))
    }
}

fn sequence_ended() -> TransferError {
    let reason = "the sequence ended, or is handed on no more".to_owned();
    TransferError::Aborted { reason }
}
