//! One request's task on a decode node: open, wait for the hand-over (or compute the prompt here), stream.
//!
//! Fail closed: the sequence joins the batch only with a committed table and a first token that has the right index.
//! Dropping the task's parts ends everything: the expected hand-over fences its epochs, the guard cancels the sequence.

use crate::commands::{Commands, Wish};
use crate::tokens::finished;
use baton_engine::BlockTable;
use baton_kv_transfer::{ExpectSpec, Incoming, IncomingEvent};
use baton_node_host::engine::{Beginning, Constraint, Control, SequenceError, SequenceEvent, SequenceSpec, Until};
use baton_node_host::work::HandoverEnd;
use baton_node_host::{CancelOnDrop, Compiling, EventStream, Host, LastWord, Outcome, work};
use baton_node_runtime::Moment;
use baton_proto::convert;
use baton_proto::v1::{self, decode_event::Event};
use baton_types::{Attempt, FinishReason, Work};
use std::any::Any;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::Status;

/// How long a coordinator may take to open a stream that it made.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a failed attempt is kept to oneself: its prefill node tells the coordinator why it gave up (it may have finished
/// the request), and that word should come first.
const FAILURE_GRACE: Duration = Duration::from_millis(500);
/// Events of a sequence beside its tokens.
const EVENTS_BESIDE_TOKENS: usize = 64;

pub(crate) struct DecodeRequest {
    pub host: Host,
    pub commands: Commands,
    pub deadline: Moment,
    pub work: Work,
    /// Tokens of the context that come with the hand-over, behind those of `work`.
    ahead: usize,
    /// Tokens generated so far, here and before, once the sequence runs.
    pub generated: Vec<u32>,
    out: mpsc::Sender<Result<v1::DecodeEvent, Status>>,
}

/// Why a request ended before its last token.
pub(crate) enum End {
    /// The coordinator said so.
    Cancelled,
    /// The coordinator is gone.
    Gone,
    Deadline,
    /// The node is to be empty, and the request has had its time.
    Overdue,
    Status(Status),
    Sequence(SequenceError),
    /// What was handed over cannot be gone on from.
    BadHandover(&'static str),
}

/// What was asked for.
struct Opened {
    work: Work,
    local: bool,
    ahead: usize,
}

/// A sequence in the engine.
pub(crate) struct Running {
    /// Ends it with the request.
    pub guard: CancelOnDrop,
    pub control: Arc<Control>,
    pub events: mpsc::Receiver<SequenceEvent>,
}

/// What a hand-over brought.
struct Handed {
    attempt: Attempt,
    table: BlockTable,
    held_blocks: usize,
    last_word: LastWord,
    bytes: u64,
    /// Kept as long as the request: later attempts are answered that this one was committed.
    incoming: Incoming,
}

impl DecodeRequest {
    /// Serves one stream from its first command to its last event.
    pub async fn run(
        host: Host,
        stream: EventStream<v1::DecodeCommand>,
        out: mpsc::Sender<Result<v1::DecodeEvent, Status>>,
    ) {
        let role = host.role();
        let mut commands = Commands::new(stream);
        let opened = tokio::select! {
            () = out.closed() => return,
            opened = host.clock().timeout(OPEN_TIMEOUT, commands.open()) => opened,
        };
        let opened = opened.unwrap_or_else(|_| Err(Status::deadline_exceeded("command: open did not come")));
        let refuse = |status: Status| {
            Outcome::Refused.count(role);
            tracing::debug!(code = ?status.code(), error = status.message(), "request refused");
            let _ = out.try_send(Err(status));
        };
        let Opened { work, local, ahead } = match opened.and_then(|open| Self::check(&host, open)) {
            Ok(checked) => checked,
            Err(status) => return refuse(status),
        };
        let request_id = work.request_id;
        let deadline = host.clock().now() + work.budget.0;
        let mut request = Self {
            host: host.clone(),
            commands,
            deadline,
            work,
            ahead,
            generated: Vec::new(),
            out: out.clone(),
        };
        let result = tokio::select! {
            // The stream that the coordinator dropped: nobody wants the request any more.
            () = out.closed() => Err(End::Gone),
            () = host.clock().sleep_until(deadline) => Err(End::Deadline),
            () = host.overdue() => Err(End::Overdue),
            result = request.serve(local) => result,
        };
        // Blocks first, then the last word: who reads it finds them free.
        drop(request);
        let (outcome, last) = Self::last_word(&host, result);
        outcome.count(role);
        tracing::debug!(%request_id, outcome = outcome.name(), "decode ended");
        let Some(last) = last else { return };
        if outcome == Outcome::Failed {
            let error = match &last {
                Ok(v1::DecodeEvent {
                    event: Some(Event::Failed(failed)),
                }) => failed.message.clone(),
                Ok(_) => String::new(),
                Err(status) => status.message().to_owned(),
            };
            host.note_error(&error);
            tracing::info!(%request_id, error, "decode failed");
        }
        // A full channel may still be read: it gets its last word, but not beyond the deadline's grace.
        let _ = host.clock().timeout(OPEN_TIMEOUT, out.send(last)).await;
    }

    fn check(host: &Host, open: v1::DecodeOpen) -> Result<Opened, Status> {
        let wire = open.work.ok_or(convert::ConvertError::Missing { field: "work" })?;
        let (work, local, ahead) = (Work::try_from(wire)?, open.local_prefill, open.ahead as usize);
        work::check(host, &work, &open.instance)?;
        let after = work.generated.len().saturating_add(ahead);
        if ahead > 0 && (local || after >= work.sampling.max_tokens as usize) {
            return Err(Status::invalid_argument(format!(
                "ahead: {ahead}; such tokens come with a hand-over, and not beyond max_tokens"
            )));
        }
        work::check_place(host)?;
        Ok(Opened { work, local, ahead })
    }

    fn last_word(host: &Host, result: Result<(), End>) -> (Outcome, Option<Result<v1::DecodeEvent, Status>>) {
        let event = |event| Some(Ok(v1::DecodeEvent { event: Some(event) }));
        match result {
            Ok(()) => (Outcome::Done, None),
            Err(End::Gone) => (Outcome::Cancelled, None),
            Err(End::Cancelled) => (
                Outcome::Cancelled,
                event(Event::Finished(finished(FinishReason::Cancelled, 0, Duration::ZERO))),
            ),
            Err(End::Deadline) => (Outcome::Deadline, event(Event::Failed(work::deadline_failed()))),
            Err(End::Overdue) => (Outcome::Failed, event(Event::Failed(work::overdue_failed(host)))),
            Err(End::Status(status)) => (Outcome::Refused, Some(Err(status))),
            Err(End::Sequence(error)) => (Outcome::Failed, event(Event::Failed(work::sequence_failed(&error)))),
            Err(End::BadHandover(reason)) => {
                let status = Status::data_loss(format!("the hand-over cannot be used: {reason}"));
                (
                    Outcome::Failed,
                    event(Event::Failed(work::status_failed(&status, true))),
                )
            }
        }
    }

    /// Sends one event; waits while the coordinator is slow.
    pub(crate) async fn tell(&mut self, event: Event) -> Result<(), End> {
        self.out
            .send(Ok(v1::DecodeEvent { event: Some(event) }))
            .await
            .map_err(|_| End::Gone)
    }

    async fn serve(&mut self, local: bool) -> Result<(), End> {
        if local {
            self.serve_alone().await
        } else {
            self.serve_handed().await
        }
    }

    async fn accept(&mut self) -> Result<(), End> {
        let peer = self.host.endpoint().peer();
        let held = self.host.pool().held(&self.work.block_hashes);
        self.tell(Event::Accepted(v1::Accepted {
            ticket: convert::ticket_bytes(self.work.ticket),
            held_blocks: u32::try_from(held).unwrap_or(u32::MAX),
            peer: Some(v1::TransferPeer {
                node_id: peer.node.to_string(),
                instance: peer.instance.to_string(),
                addresses: peer.addresses,
            }),
        }))
        .await
    }

    /// Brings the sequence to the engine, with what was generated before.
    fn submit(
        &mut self,
        beginning: Beginning,
        generated: Vec<u32>,
        constraint: Option<Constraint>,
    ) -> Result<Running, Status> {
        self.generated.clone_from(&generated);
        let control = Control::new(true);
        // The engine never waits for a request, so all tokens to come have room; memory is taken as they come.
        let to_come = (self.work.sampling.max_tokens as usize).saturating_sub(generated.len());
        let (progress, events) = mpsc::channel(to_come + EVENTS_BESIDE_TOKENS);
        let sequence = SequenceSpec {
            request_id: self.work.request_id,
            prompt: self.work.prompt.clone(),
            generated,
            sampling: self.work.sampling.clone(),
            constraint,
            hashes: self.work.block_hashes.clone(),
            chain: work::chain(&self.host, &self.work),
            deadline: self.deadline,
            beginning,
            until: Until::End,
            layer_borders: Arc::default(),
            control: control.clone(),
            events: progress,
        };
        let guard = CancelOnDrop::new(control.clone(), self.host.engine().clone());
        self.host
            .engine()
            .submit(sequence)
            .map_err(|error| work::submit_status(&error))?;
        Ok(Running { guard, control, events })
    }

    async fn serve_alone(&mut self) -> Result<(), End> {
        let compiling = Compiling::start(&self.host, &self.work);
        let constraint = compiling
            .constraint(&self.host, Vec::new())
            .await
            .map_err(End::Status)?;
        let submitted = self.submit(Beginning::Compute, self.work.generated.clone(), constraint);
        let running = submitted.map_err(End::Status)?;
        self.accept().await?;
        self.stream(running, None).await
    }

    async fn serve_handed(&mut self) -> Result<(), End> {
        let geometry = self.host.model().geometry;
        let context_tokens = self.work.context_tokens() + self.ahead;
        let now = self.host.clock().now();
        let expected = self.host.endpoint().expect(ExpectSpec {
            ticket: self.work.ticket,
            attempt: self.work.attempt,
            hashes: self.work.block_hashes.clone(),
            blocks: geometry.blocks_for(context_tokens) + 1,
            context_tokens,
            deadline: self.deadline.saturating_since(now),
        });
        let incoming = expected.map_err(|error| End::Status(work::expect_status(&error)))?;
        self.accept().await?;
        // Beside the hand-over: it is done before the first token comes.
        let compiling = Compiling::start(&self.host, &self.work);
        let handed = self.wait_for_commit(incoming).await?;
        let began = self.host.clock().now();
        let Handed {
            attempt,
            table,
            held_blocks,
            last_word,
            bytes,
            incoming,
        } = handed;
        let _incoming = incoming;
        let Some((mut generated, index, token)) = self.goes_on_from(last_word) else {
            drop(table);
            self.host.endpoint().room_changed();
            return Err(End::BadHandover("its tokens have other indexes than were asked for"));
        };
        let held_tokens = held_blocks * geometry.block_tokens as usize;
        self.tell(Event::Committed(v1::Committed {
            attempt: attempt.0,
            index,
            token,
            handover_bytes: bytes,
            held_tokens: u32::try_from(held_tokens).unwrap_or(u32::MAX),
        }))
        .await?;
        let finish = self
            .host
            .ending()
            .finish(&self.work.sampling, context_tokens, index, token);
        if let Some(finish) = finish {
            drop(table);
            self.host.endpoint().room_changed();
            return self.tell(Event::Finished(finished(finish, 0, Duration::ZERO))).await;
        }
        generated.push(token);
        let ahead = generated[self.work.generated.len()..].to_vec();
        let constraint = compiling.constraint(&self.host, ahead).await.map_err(End::Status)?;
        let running = self
            .submit(Beginning::Resume(table), generated, constraint)
            .map_err(End::Status)?;
        self.stream(running, Some(began)).await
    }

    /// The tokens of the context that were generated, then the place and the id of the one that the sequence goes on from;
    /// none where that is not what was asked for.
    fn goes_on_from(&self, word: LastWord) -> Option<(Vec<u32>, u32, u32)> {
        let LastWord {
            first_index,
            mut tokens,
        } = word;
        let asked_for = first_index as usize == self.work.generated.len() && tokens.len() == self.ahead + 1;
        let token = tokens.pop().filter(|_| asked_for)?;
        let vocab = self.host.model().config.vocab;
        if token >= vocab || tokens.iter().any(|token| *token >= vocab) {
            return None;
        }
        let generated = [self.work.generated.as_slice(), &tokens].concat();
        let index = u32::try_from(generated.len()).ok()?;
        Some((generated, index, token))
    }

    /// Waits until one attempt's hand-over is committed. A failed attempt is told, and the next one waited for.
    async fn wait_for_commit(&mut self, mut incoming: Incoming) -> Result<Handed, End> {
        let clock = self.host.clock();
        let mut failure: Option<(Moment, v1::WorkFailed)> = None;
        loop {
            let due = failure.as_ref().map_or(self.deadline, |(due, _)| *due);
            tokio::select! {
                wish = self.commands.next() => match wish {
                    Wish::Supersede(attempt) => {
                        failure = None;
                        incoming.supersede(attempt);
                    }
                    Wish::HandOn(_) => {
                        return Err(End::Status(Status::invalid_argument("hand_on: no sequence runs here yet")));
                    }
                    Wish::Cancel => return Err(End::Cancelled),
                    Wish::Gone => return Err(End::Gone),
                    Wish::Nonsense(status) => return Err(End::Status(status)),
                },
                event = incoming.next() => match event {
                    IncomingEvent::Granted { .. } | IncomingEvent::FirstBlock => {}
                    IncomingEvent::AttemptFailed { attempt, error } => {
                        let request_id = self.work.request_id;
                        tracing::debug!(%request_id, attempt = attempt.0, %error, "hand-over failed");
                        let told = work::transfer_failed(&error, HandoverEnd::Receiver);
                        failure = Some((clock.now() + FAILURE_GRACE, told));
                    }
                    IncomingEvent::Committed { attempt, blocks, held_blocks, payload, bytes, .. } => {
                        let table = table(blocks)?;
                        let last_word = LastWord::decode(&payload)
                            .ok_or(End::BadHandover("its last word is no token"))?;
                        return Ok(Handed { attempt, table, held_blocks, last_word, bytes, incoming });
                    }
                },
                () = clock.sleep_until(due), if failure.is_some() => {
                    if let Some((_, told)) = failure.take() {
                        self.host.note_error(&told.message);
                        self.tell(Event::Failed(told)).await?;
                    }
                }
            }
        }
    }
}

/// What `PoolBlocks` committed is a table of this node's pool.
fn table(blocks: Box<dyn Any + Send>) -> Result<BlockTable, End> {
    blocks
        .downcast::<BlockTable>()
        .map(|table| *table)
        .map_err(|_| End::BadHandover("its blocks are of another pool"))
}
