//! The second half of a request: its sequence is in the engine, tokens come, the coordinator gets them in frames.

use crate::commands::Wish;
use crate::frames::{Frame, LocalPrefill};
use crate::handing_on::HandingOn;
use crate::request::{DecodeRequest, End, Running};
use baton_kv_transfer::TransferError;
use baton_node_host::engine::{Drawn, SequenceError, SequenceEvent};
use baton_proto::v1::{self, decode_event::Event};
use baton_types::FinishReason;
use std::time::Duration;

/// What this node did for the sequence.
#[derive(Default)]
struct Tally {
    tokens: u32,
    first: Option<baton_node_runtime::Moment>,
    spent: Duration,
}

impl DecodeRequest {
    /// Streams until the last token. `began` is when a token that came with a hand-over was known: time counts from there.
    pub(crate) async fn stream(
        &mut self,
        running: Running,
        began: Option<baton_node_runtime::Moment>,
    ) -> Result<(), End> {
        let Running {
            guard: _guard,
            control,
            mut events,
        } = running;
        let (clock, host) = (self.host.clock(), self.host.clone());
        let mut stops = std::pin::pin!(host.stops());
        let mut told_leaving = false;
        let mut handing_on: Option<HandingOn> = None;
        let mut frame = Frame::new();
        let mut tally = Tally {
            first: began,
            ..Tally::default()
        };
        let mut local = LocalPrefill::default();
        let mut told_prefill = began.is_some();
        loop {
            let due = frame.due();
            tokio::select! {
                biased;
                wish = self.commands.next() => match wish {
                    // Committed, or computed here: no other attempt can take its place.
                    Wish::Supersede(_) => {}
                    Wish::HandOn(spec) => {
                        let (prompt, left) = (self.work.prompt.len(), self.deadline.saturating_since(clock.now()));
                        let begun = HandingOn::start(&host, &control, spec, prompt, left).map_err(End::Status)?;
                        self.goes_on(handing_on.insert(begun), &mut frame).await?;
                    }
                    Wish::Cancel => return Err(End::Cancelled),
                    Wish::Gone => return Err(End::Gone),
                    Wish::Nonsense(status) => return Err(End::Status(status)),
                },
                result = HandingOn::ended(handing_on.as_mut()) => {
                    if let Some(ended) = handing_on.take() {
                        self.tell(Event::HandedOn(ended.word(result))).await?;
                    }
                }
                // The node wants to be rid of it. Not before the client has a token: until then there is little to move.
                () = &mut stops, if !told_leaving && tally.first.is_some() => {
                    told_leaving = true;
                    self.send(&mut frame).await?;
                    self.tell(Event::Leaving(v1::Leaving {})).await?;
                }
                event = events.recv() => {
                    let event = event.ok_or(End::Sequence(SequenceError::ShuttingDown))?;
                    if let SequenceEvent::Token { prefill, .. } = &event
                        && !told_prefill
                    {
                        told_prefill = true;
                        local.done = *prefill;
                        frame.add_prefill(&local);
                    }
                    match self.take(event, &mut local, &mut tally)? {
                        None => {}
                        Some(drawn) => {
                            let finish = drawn.finish;
                            self.generated.push(drawn.token);
                            frame.push(drawn, clock.now());
                            if let Some(finish) = finish {
                                return self.finish(frame, finish, &tally).await;
                            }
                            if let Some(ongoing) = &mut handing_on {
                                self.goes_on(ongoing, &mut frame).await?;
                                if ongoing.is_late(self.generated.len()) {
                                    let error = TransferError::Aborted {
                                        reason: "the other node gave no blocks in time".to_owned(),
                                    };
                                    let word = ongoing.word(Err(error));
                                    handing_on = None;
                                    self.tell(Event::HandedOn(word)).await?;
                                }
                            }
                        }
                    }
                    // Tokens of one step go together.
                    let due = frame.due().is_some_and(|due| due <= clock.now());
                    if frame.is_full() || due && events.is_empty() {
                        self.send(&mut frame).await?;
                    }
                }
                () = clock.sleep_until(due.unwrap_or(self.deadline)), if due.is_some() => {
                    self.send(&mut frame).await?;
                }
            }
        }
    }

    fn take(&self, event: SequenceEvent, local: &mut LocalPrefill, tally: &mut Tally) -> Result<Option<Drawn>, End> {
        match event {
            SequenceEvent::Started {
                held_blocks, queued, ..
            } => {
                // A sequence that gave way starts again; what the client waited for is the first time.
                if tally.tokens == 0 {
                    metrics::histogram!("baton_node_queue_seconds").record(queued.as_secs_f64());
                    let cached = held_blocks * self.host.model().geometry.block_tokens as usize;
                    metrics::counter!("baton_node_cached_tokens_total").increment(cached as u64);
                    *local = LocalPrefill {
                        queued,
                        cached_tokens: cached,
                        done: None,
                    };
                }
                Ok(None)
            }
            SequenceEvent::Computed { .. } | SequenceEvent::Layers { .. } => Ok(None),
            SequenceEvent::Token { drawn, .. } => {
                let now = self.host.clock().now();
                let first = *tally.first.get_or_insert(now);
                tally.tokens += 1;
                tally.spent = now.saturating_since(first);
                Ok(Some(drawn))
            }
            SequenceEvent::Failed { error } => Err(End::Sequence(error)),
        }
    }

    /// Lets a hand-over know of the tokens that there are. With its last word everything goes to the coordinator that is there:
    /// only behind the token that the other node goes on from can that one take over.
    async fn goes_on(&mut self, handing_on: &mut HandingOn, frame: &mut Frame) -> Result<(), End> {
        if handing_on.generated(&self.generated) {
            self.send(frame).await?;
        }
        Ok(())
    }

    async fn send(&mut self, frame: &mut Frame) -> Result<(), End> {
        match frame.take(self.host.clock().now()) {
            Some(tokens) => self.tell(Event::Tokens(tokens)).await,
            None => Ok(()),
        }
    }

    async fn finish(&mut self, mut frame: Frame, finish: FinishReason, tally: &Tally) -> Result<(), End> {
        self.send(&mut frame).await?;
        self.tell(Event::Finished(finished(finish, tally.tokens, tally.spent)))
            .await
    }
}

pub(crate) fn finished(finish: FinishReason, decoded_tokens: u32, spent: Duration) -> v1::DecodeFinished {
    v1::DecodeFinished {
        finish_reason: v1::FinishReason::from(finish) as i32,
        decoded_tokens,
        decode_us: u64::try_from(spent.as_micros()).unwrap_or(u64::MAX),
    }
}
