//! What became of each request.

use crate::{Planned, Prompt};
use baton_proto::v1;
use std::time::Duration;

/// Tokens that arrived together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// When, from the start of the run.
    pub at: Duration,
    /// How many.
    pub tokens: u32,
}

/// Why a request has no whole answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The server said that it has no room now.
    Refused {
        /// What it said.
        reason: String,
        /// When to come again, where it told.
        retry_after: Option<Duration>,
    },
    /// Anything else that went wrong.
    Error(String),
}

/// One request, as its client saw it.
#[derive(Debug, Clone)]
pub struct Observed {
    /// When it was due, from the start of the run.
    pub at: Duration,
    /// How much later it was sent: the generator's own delay. It is part of all times, which begin when the request was due.
    pub dispatch_delay: Duration,
    /// Tokens of its prompt, where they are known.
    pub prompt_tokens: u32,
    /// Tokens that were asked for.
    pub wanted: u32,
    /// Its tokens, as they came.
    pub frames: Vec<Frame>,
    /// When its stream ended.
    pub ended: Duration,
    /// How it failed, where it did.
    pub failure: Option<Failure>,
    /// What Baton says of it; none elsewhere.
    pub timeline: Option<v1::Timeline>,
}

impl Observed {
    /// Before it is sent.
    pub(crate) fn of(planned: &Planned) -> Self {
        let prompt_tokens = match &planned.prompt {
            Prompt::Tokens(ids) => ids.len() as u32,
            Prompt::Text(_) => 0,
        };
        Self {
            at: planned.at,
            dispatch_delay: Duration::ZERO,
            prompt_tokens,
            wanted: planned.output,
            frames: Vec::new(),
            ended: planned.at,
            failure: None,
            timeline: None,
        }
    }

    /// Its stream is over. An answer that is shorter than was asked for is an error: the load was not what was planned.
    pub(crate) fn ends(&mut self, at: Duration, failure: Option<Failure>) {
        self.ended = at;
        let (came, wanted) = (self.tokens(), self.wanted);
        let short = || (came != wanted).then(|| Failure::Error(format!("{came} tokens came of {wanted}")));
        self.failure = failure.or_else(short);
    }

    /// Tokens that came.
    pub fn tokens(&self) -> u32 {
        self.frames.iter().map(|frame| frame.tokens).sum()
    }

    /// All that was asked for came.
    pub fn is_served(&self) -> bool {
        self.failure.is_none()
    }

    /// From when it was due to its first token.
    pub fn ttft(&self) -> Option<Duration> {
        Some(self.frames.first()?.at.saturating_sub(self.at))
    }

    /// From when it was due to its last token; none where it failed.
    pub fn e2e(&self) -> Option<Duration> {
        let last = self.frames.last().filter(|_| self.is_served())?;
        Some(last.at.saturating_sub(self.at))
    }

    /// Mean gap between its tokens; none where it failed or has one token only.
    pub fn tpot(&self) -> Option<Duration> {
        let decoded = self.tokens().checked_sub(1).filter(|gaps| *gaps > 0)?;
        Some(self.e2e()?.saturating_sub(self.ttft()?) / decoded)
    }

    /// Gaps between tokens, in seconds: a frame of n tokens after a gap of g counts as n gaps of g/n. Tokens that came with the first
    /// one have no gap of their own.
    pub fn token_gaps(&self) -> impl Iterator<Item = f64> + '_ {
        self.frames.windows(2).flat_map(|pair| {
            let each = pair[1].at.saturating_sub(pair[0].at).as_secs_f64() / f64::from(pair[1].tokens.max(1));
            std::iter::repeat_n(each, pair[1].tokens as usize)
        })
    }

    /// Gaps between frames, in seconds, as they came.
    pub fn frame_gaps(&self) -> impl Iterator<Item = f64> + '_ {
        self.frames
            .windows(2)
            .map(|pair| pair[1].at.saturating_sub(pair[0].at).as_secs_f64())
    }
}

/// What came of a schedule.
#[derive(Debug, Clone, Default)]
pub struct Run {
    /// Requests that ended, in the order in which they were due.
    pub requests: Vec<Observed>,
    /// Requests that were sent but had not ended when the run was stopped.
    pub unfinished: usize,
    /// Requests that were not sent any more.
    pub unsent: usize,
    /// How long it took.
    pub took: Duration,
}
