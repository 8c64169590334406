//! Prompts made of a workload's block ids: equal blocks are equal tokens, so that a server's prefix cache finds what it would
//! find in the trace, and the count of tokens is exact.

use crate::{Planned, Prompt};
use baton_planner::workload::{Request, Workload};
use std::str::FromStr;

/// Token ids that prompts are drawn from: `low..high`, the high end excluded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRange {
    /// From.
    pub low: u32,
    /// Up to, excluded.
    pub high: u32,
}

impl Default for TokenRange {
    /// Plain tokens of most vocabularies (and of the stub's): no special ones, and below every vocabulary's size.
    fn default() -> Self {
        Self { low: 32, high: 250 }
    }
}

impl FromStr for TokenRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once("..").and_then(|(low, high)| {
            let (low, high) = (low.parse().ok()?, high.parse().ok()?);
            (low + 1 < high).then_some(Self { low, high })
        });
        parsed.ok_or_else(|| format!("`{text}` is no range of token ids: expected LOW..HIGH, such as 32..250"))
    }
}

impl std::fmt::Display for TokenRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..{}", self.low, self.high)
    }
}

/// Makes prompts. Two runs with unequal salts share nothing, so that the second does not find the first one's prefixes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prompts {
    /// Which token ids.
    pub range: TokenRange,
    /// Which run.
    pub salt: u64,
}

/// Numbers without pattern. Source: SplitMix64, Steele, Lea and Flood 2014.
pub fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Prompts {
    fn token(&self, block: u64, offset: u64) -> u32 {
        let spread = mix(mix(mix(self.salt) ^ block).wrapping_add(offset));
        self.range.low + (spread % u64::from(self.range.high - self.range.low)) as u32
    }

    /// So many tokens that no other `name` of this run begins with.
    pub fn alone(&self, name: u64, tokens: u32) -> Vec<u32> {
        (0..u64::from(tokens))
            .map(|at| self.token(1 << 63 | name, at))
            .collect()
    }

    /// The prompt of a workload's request, the `index`th: its full blocks by their ids, what is behind them its own.
    pub fn of(&self, workload: &Workload, index: usize, request: &Request) -> Vec<u32> {
        let size = workload.block_tokens().unwrap_or(1);
        let mut prompt = Vec::with_capacity(request.input as usize);
        for id in workload.chain(request) {
            prompt.extend((0..u64::from(size)).map(|at| self.token(u64::from(*id), at)));
        }
        let rest = request.input - prompt.len() as u32;
        prompt.extend(self.alone(index as u64, rest));
        prompt
    }

    /// A workload's requests, each when it comes.
    pub fn schedule(&self, workload: &Workload) -> Vec<Planned> {
        let planned = |(index, request): (usize, &Request)| Planned {
            at: request.at.duration(),
            prompt: Prompt::Tokens(self.of(workload, index, request)),
            output: request.output,
        };
        workload.requests().iter().enumerate().map(planned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_planner::workload::read;

    #[test]
    fn equal_blocks_are_equal_tokens_and_nothing_else_is() {
        let path = std::env::temp_dir().join(format!("baton-load-{}.jsonl", std::process::id()));
        let rows = "{\"timestamp\": 0, \"input_length\": 40, \"output_length\": 3, \"hash_ids\": [0, 1, 2]}\n\
                    {\"timestamp\": 9, \"input_length\": 40, \"output_length\": 3, \"hash_ids\": [0, 7, 8]}\n";
        std::fs::write(&path, rows).unwrap();
        let workload = read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let prompts = Prompts::default();
        let schedule = prompts.schedule(&workload);
        let [Prompt::Tokens(a), Prompt::Tokens(b)] = [&schedule[0].prompt, &schedule[1].prompt] else {
            panic!()
        };
        assert_eq!((a.len(), b.len()), (40, 40));
        assert_eq!(a[..16], b[..16], "block 0");
        assert_ne!(a[16..32], b[16..32]);
        assert_ne!(a[32..], b[32..], "what no id names is a request's own");
        assert!(a.iter().all(|id| (32..250).contains(id)));
        assert_eq!(schedule[1].at.as_millis(), 9);
        assert_eq!(schedule, prompts.schedule(&workload));
        let other = Prompts { salt: 1, ..prompts }.schedule(&workload);
        assert_ne!(other[0].prompt, schedule[0].prompt);
    }

    #[test]
    fn ranges_are_read() {
        assert_eq!("5..9".parse(), Ok(TokenRange { low: 5, high: 9 }));
        for bad in ["5", "9..5", "5..6", "a..b"] {
            assert!(bad.parse::<TokenRange>().unwrap_err().contains("32..250"), "{bad}");
        }
    }
}
