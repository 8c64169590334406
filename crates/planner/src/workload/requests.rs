//! The requests of one workload.

use crate::Nanos;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// When it comes, from the start.
    pub at: Nanos,
    /// Tokens of its prompt; at least 1.
    pub input: u32,
    /// Tokens of its answer; at least 1.
    pub output: u32,
    /// Where its prompt's block ids begin in the workload's list.
    pub(super) first_block: u32,
    /// How many there are: full blocks only.
    pub(super) blocks: u32,
}

/// Requests in order of their times.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Workload {
    pub(super) requests: Vec<Request>,
    /// Block ids of all prompts, one after another. Equal ids: the same block, with the same blocks before it.
    pub(super) blocks: Vec<u32>,
    /// Tokens of one of these blocks; none where prefixes are not known.
    pub(super) block_tokens: Option<u32>,
}

impl Workload {
    /// In order of their times.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Tokens of one prefix block, where prefixes are known.
    pub fn block_tokens(&self) -> Option<u32> {
        self.block_tokens
    }

    /// The full blocks of a request's prompt.
    pub fn chain(&self, request: &Request) -> &[u32] {
        let first = request.first_block as usize;
        &self.blocks[first..first + request.blocks as usize]
    }

    /// From the first request to the last.
    pub fn duration(&self) -> Nanos {
        match (self.requests.first(), self.requests.last()) {
            (Some(first), Some(last)) => last.at.saturating_sub(first.at),
            _ => Nanos::ZERO,
        }
    }

    /// Requests per second: gaps between them over the time they take.
    pub fn rate(&self) -> f64 {
        let seconds = self.duration().seconds();
        if seconds > 0.0 {
            (self.len() - 1) as f64 / seconds
        } else {
            0.0
        }
    }

    /// Means of prompt and answer, tokens.
    pub fn mean_lengths(&self) -> (f64, f64) {
        let sum = |of: fn(&Request) -> u32| self.requests.iter().map(|r| f64::from(of(r))).sum::<f64>();
        let count = self.len().max(1) as f64;
        (sum(|r| r.input) / count, sum(|r| r.output) / count)
    }

    /// Share of prompt tokens that stand in a block which an earlier prompt had: what one cache without end would save.
    pub fn shared_share(&self) -> f64 {
        let mut seen = rustc_hash::FxHashSet::default();
        let (mut shared, mut all) = (0u64, 0u64);
        for request in &self.requests {
            all += u64::from(request.input);
            for id in self.chain(request) {
                if !seen.insert(*id) {
                    shared += u64::from(self.block_tokens.unwrap_or(0));
                }
            }
        }
        shared as f64 / all.max(1) as f64
    }

    /// No request yet; prefix blocks, where there are any, have so many tokens.
    pub fn empty(block_tokens: Option<u32>) -> Self {
        Self {
            block_tokens,
            ..Self::default()
        }
    }

    /// This workload, and behind a pause another one. Blocks of the other are others than this one's: nobody says the same
    /// twice on one day. None where both have prefix blocks, of different sizes.
    pub fn then(mut self, pause: Nanos, other: &Self) -> Option<Self> {
        if let (Some(ours), Some(theirs)) = (self.block_tokens, other.block_tokens)
            && ours != theirs
        {
            return None;
        }
        let start = self.requests.last().map_or(Nanos::ZERO, |last| last.at + pause);
        let fresh = self.blocks.iter().max().map_or(0, |most| most + 1);
        let first_block = self.blocks.len() as u32;
        self.block_tokens = self.block_tokens.or(other.block_tokens);
        self.blocks.extend(other.blocks.iter().map(|id| id + fresh));
        self.requests.extend(other.requests.iter().map(|request| Request {
            at: start + request.at,
            first_block: first_block + request.first_block,
            ..*request
        }));
        Some(self)
    }

    /// Adds a request that comes last; `chain` are its prompt's blocks, of which only full ones are kept.
    pub fn push(&mut self, at: Nanos, input: u32, output: u32, chain: &[u32]) {
        let full = self
            .block_tokens
            .map_or(0, |tokens| (input / tokens) as usize)
            .min(chain.len());
        let first_block = self.blocks.len() as u32;
        self.blocks.extend_from_slice(&chain[..full]);
        self.requests.push(Request {
            at,
            input,
            output,
            first_block,
            blocks: full as u32,
        });
    }

    pub(super) fn sort(&mut self) {
        self.requests.sort_by_key(|request| request.at);
        let start = self.requests.first().map_or(Nanos::ZERO, |first| first.at);
        self.requests
            .iter_mut()
            .for_each(|request| request.at = request.at - start);
    }
}
