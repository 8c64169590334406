//! One request's task on a prefill node: it watches the sequence in the engine, asks the decode node for a reservation
//! while the first chunk is computed, pushes what is finished, and tells the coordinator.
//!
//! Fail closed: no token leaves before the reservation is granted, and none after the attempt has failed.

use crate::handover::{Finished, Pushed};
use baton_engine::BlockTable;
use baton_kv_transfer::{Outgoing, OutgoingSpec, Peer, TransferError};
use baton_node_host::engine::{Control, Drawn, PrefillDone, SequenceError, SequenceEvent};
use baton_node_host::work::HandoverEnd;
use baton_node_host::{Host, LastWord, Outcome, work};
use baton_node_runtime::Moment;
use baton_proto::v1::{self, prefill_event::Event};
use baton_types::Work;
use std::sync::{Arc, Weak};
use tokio::sync::mpsc;
use tonic::Status;

type Out = mpsc::Sender<Result<v1::PrefillEvent, Status>>;

pub(crate) struct PrefillRequest {
    pub host: Host,
    pub work: Work,
    pub peer: Peer,
    pub deadline: Moment,
    pub control: Arc<Control>,
    pub events: mpsc::Receiver<SequenceEvent>,
    pub out: Out,
}

/// Why a request ended before its hand-over did.
enum End {
    Cancelled,
    Deadline,
    /// The node is to be empty, and the request has had its time.
    Overdue,
    Sequence(SequenceError),
    Transfer(TransferError),
}

/// What the engine has told so far.
#[derive(Default)]
struct Progress {
    table: Weak<BlockTable>,
    /// Leading tokens whose KV is there in all layers.
    computed: usize,
    /// Leading layers in which the KV of all known tokens, so many, is there.
    layers: Option<(usize, u32)>,
    token: Option<FirstToken>,
}

struct FirstToken {
    drawn: Drawn,
    table: Arc<BlockTable>,
    prefill: Option<PrefillDone>,
    /// When the engine had it.
    at: Moment,
}

impl Progress {
    fn take(&mut self, event: SequenceEvent) -> Result<(), SequenceError> {
        match event {
            SequenceEvent::Started { table, .. } => {
                (self.table, self.computed, self.layers) = (table, 0, None);
            }
            SequenceEvent::Computed { tokens } => self.computed = tokens,
            SequenceEvent::Layers { tokens, layers } => self.layers = Some((tokens, layers)),
            SequenceEvent::Token {
                drawn,
                table: Some(table),
                prefill,
                at,
                ..
            } => {
                self.token = Some(FirstToken {
                    drawn,
                    table,
                    prefill,
                    at,
                });
            }
            // Sequences that end with their first token always bring their table.
            SequenceEvent::Token { table: None, .. } => {}
            SequenceEvent::Failed { error } => return Err(error),
        }
        Ok(())
    }
}

impl PrefillRequest {
    pub async fn run(mut self) {
        let (host, out) = (self.host.clone(), self.out.clone());
        let request_id = self.work.request_id;
        let (clock, deadline) = (host.clock(), self.deadline);
        let role = host.role();
        let result = tokio::select! {
            // The stream that the coordinator dropped: nobody wants the request any more.
            () = out.closed() => Err(End::Cancelled),
            () = clock.sleep_until(deadline) => Err(End::Deadline),
            () = host.overdue() => Err(End::Overdue),
            result = self.hand_over() => result,
        };
        drop(self);
        let (outcome, failed) = match result {
            Ok(()) => (Outcome::Done, None),
            Err(End::Cancelled) => (Outcome::Cancelled, None),
            Err(End::Deadline) => (Outcome::Deadline, Some(work::deadline_failed())),
            Err(End::Overdue) => (Outcome::Failed, Some(work::overdue_failed(&host))),
            Err(End::Sequence(error)) => {
                host.note_error(&error);
                (Outcome::Failed, Some(work::sequence_failed(&error)))
            }
            Err(End::Transfer(error)) => {
                if !is_given_up(&error) {
                    host.note_error(&error);
                }
                (
                    Outcome::Failed,
                    Some(work::transfer_failed(&error, HandoverEnd::Sender)),
                )
            }
        };
        outcome.count(role);
        tracing::debug!(%request_id, outcome = outcome.name(), "prefill ended");
        if let Some(failed) = failed {
            tracing::debug!(%request_id, code = failed.code, error = failed.message, "prefill failed");
            // A full channel is one that nobody reads: its reader is as good as gone.
            let _ = out.try_send(Ok(v1::PrefillEvent {
                event: Some(Event::Failed(failed)),
            }));
        }
    }

    async fn tell(&self, event: Event) -> Result<(), End> {
        let event = v1::PrefillEvent { event: Some(event) };
        self.out.send(Ok(event)).await.map_err(|_| End::Cancelled)
    }

    async fn hand_over(&mut self) -> Result<(), End> {
        let mut progress = Progress::default();
        self.wait_for_start(&mut progress).await?;
        let now = self.host.clock().now();
        let mut outgoing = self.host.endpoint().open(OutgoingSpec {
            peer: self.peer.clone(),
            ticket: self.work.ticket,
            attempt: self.work.attempt,
            context_tokens: self.work.context_tokens(),
            deadline: self.deadline.saturating_since(now),
        });
        let granted = self.reserve(&mut outgoing, &mut progress).await?;
        self.control.let_continue();
        self.host.engine().wake();
        let mut pushed = Pushed::new(granted, self.host.model().geometry);
        let token = self.push_until_token(&outgoing, &mut progress, &mut pushed).await?;
        self.finish(outgoing, token, &mut pushed).await
    }

    async fn wait_for_start(&mut self, progress: &mut Progress) -> Result<(), End> {
        let event = self
            .events
            .recv()
            .await
            .ok_or(End::Sequence(SequenceError::ShuttingDown))?;
        if let SequenceEvent::Started {
            held_blocks, queued, ..
        } = &event
        {
            let cached = held_blocks * self.host.model().geometry.block_tokens as usize;
            metrics::histogram!("baton_node_queue_seconds").record(queued.as_secs_f64());
            metrics::counter!("baton_node_cached_tokens_total").increment(cached as u64);
            let cached_tokens = u32::try_from(cached).unwrap_or(u32::MAX);
            self.tell(Event::Started(v1::PrefillStarted {
                queue_us: as_us(*queued),
                cached_tokens,
            }))
            .await?;
        }
        progress.take(event).map_err(End::Sequence)
    }

    /// Asks for the reservation while the engine computes the first chunk.
    async fn reserve(
        &mut self,
        outgoing: &mut Outgoing,
        progress: &mut Progress,
    ) -> Result<baton_kv_transfer::Granted, End> {
        let mut reserve = std::pin::pin!(outgoing.reserve());
        loop {
            tokio::select! {
                granted = &mut reserve => return granted.map_err(End::Transfer),
                event = self.events.recv(), if progress.token.is_none() => {
                    let event = event.ok_or(End::Sequence(SequenceError::ShuttingDown))?;
                    progress.take(event).map_err(End::Sequence)?;
                }
            }
        }
    }

    async fn push_until_token(
        &mut self,
        outgoing: &Outgoing,
        progress: &mut Progress,
        pushed: &mut Pushed,
    ) -> Result<FirstToken, End> {
        let block_tokens = self.host.model().geometry.block_tokens as usize;
        loop {
            if let Some(token) = progress.token.take() {
                return Ok(token);
            }
            if let Some(table) = progress.table.upgrade() {
                // Blocks from this node's prefix cache are finished from the start.
                let whole = Finished::Tokens(progress.computed.max(table.held() * block_tokens));
                pushed.push(outgoing, &table, whole).map_err(End::Transfer)?;
                if let Some((tokens, layers)) = progress.layers {
                    let finished = Finished::Layers { tokens, layers };
                    pushed.push(outgoing, &table, finished).map_err(End::Transfer)?;
                }
            }
            tokio::select! {
                error = outgoing.failed() => return Err(End::Transfer(error)),
                event = self.events.recv() => {
                    let event = event.ok_or(End::Sequence(SequenceError::ShuttingDown))?;
                    progress.take(event).map_err(End::Sequence)?;
                }
            }
        }
    }

    async fn finish(&self, outgoing: Outgoing, token: FirstToken, pushed: &mut Pushed) -> Result<(), End> {
        let FirstToken {
            drawn,
            table,
            prefill,
            at,
        } = token;
        let ends = drawn.finish.is_some();
        if !ends {
            let all = Finished::Layers {
                tokens: self.work.context_tokens(),
                layers: self.host.model().geometry.layers,
            };
            pushed.push(&outgoing, &table, all).map_err(End::Transfer)?;
        }
        drop(table);
        let last_word = LastWord {
            first_index: drawn.index,
            tokens: vec![drawn.token],
        };
        self.tell(Event::FirstToken(v1::FirstToken {
            index: drawn.index,
            token: drawn.token,
            logprobs: drawn.logprobs.map(Into::into),
            finish_reason: drawn.finish.map_or(0, |reason| v1::FinishReason::from(reason) as i32),
            prefill_us: prefill.map_or(0, |done| as_us(done.took)),
            prefill_tokens: prefill.map_or(0, |done| u32::try_from(done.tokens).unwrap_or(u32::MAX)),
        }))
        .await?;
        if ends {
            // Nothing is handed over: dropping the hand-over tells the receiver.
            return Ok(());
        }
        let report = outgoing.complete(last_word.encode()).await.map_err(End::Transfer)?;
        let exposed = self.host.clock().elapsed(at);
        metrics::histogram!("baton_node_handover_exposed_seconds").record(exposed.as_secs_f64());
        self.tell(Event::HandedOver(work::handed_over(report, exposed))).await
    }
}

/// Somebody gave the hand-over up, which is how cancelled requests end: no error of this node.
fn is_given_up(error: &TransferError) -> bool {
    matches!(
        error,
        TransferError::Aborted { .. }
            | TransferError::Fenced
            | TransferError::AlreadyCommitted
            | TransferError::UnknownTicket
            | TransferError::Deadline
    )
}

fn as_us(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
