//! What each hand-over of a campaign does, by seed and number, known to both processes and to the test that watches them.

use baton_types::{Attempt, BlockHash, Ticket};
use std::time::Duration;

/// SplitMix64: all there is to know about a hand-over comes from its first words.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Where a hand-over is given up, and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GivenUp {
    Never,
    BeforeReserve,
    AfterGrant,
    /// By the sender, after so many blocks.
    MidPush(u32),
    BeforeComplete,
    /// By the sender, so many microseconds after it said that all is there.
    WhileCompleting(u64),
    /// By the receiver.
    ByReceiver(Moment),
    /// The receiver names the second attempt, which the sender then makes.
    Superseded(Moment),
}

/// When the receiver does so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Moment {
    Granted,
    FirstBlock,
    /// So many microseconds after it expected it.
    After(u64),
}

/// Leading blocks whose content is the same in many hand-overs: the receiver has them cached.
pub const SHARED_BLOCKS: u32 = 4;

#[derive(Debug, Clone)]
pub struct Plan {
    pub ticket: Ticket,
    pub tokens: usize,
    /// The context begins with the shared blocks.
    pub shared: bool,
    pub given_up: GivenUp,
    /// Between pushes.
    pub pause: Duration,
    content: u64,
}

impl Plan {
    /// One in ten is given up somewhere.
    pub fn of(seed: u64, number: u64) -> Self {
        let mut random = Random(seed ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93));
        let ticket = Ticket(u128::from(random.next()) << 64 | u128::from(number));
        let tokens = 1 + random.below(40) as usize;
        let shared = tokens > 4 * SHARED_BLOCKS as usize && random.below(2) == 0;
        let given_up = match random.below(10) {
            0 => Self::giving_up(&mut random),
            _ => GivenUp::Never,
        };
        // Most as fast as they can; some as compute would let them.
        let pause = match random.below(8) {
            0 => Duration::from_micros(random.below(300)),
            _ => Duration::ZERO,
        };
        let content = random.next() >> 1;
        Self {
            ticket,
            tokens,
            shared,
            given_up,
            pause,
            content,
        }
    }

    /// One that nobody gives up.
    pub fn whole(seed: u64, number: u64) -> Self {
        Self {
            given_up: GivenUp::Never,
            ..Self::of(seed, number)
        }
    }

    /// As large and slow as they come: there is something to interrupt.
    pub fn long(seed: u64, number: u64) -> Self {
        let mut plan = Self::whole(seed, number);
        let mut random = Random(plan.content);
        plan.tokens = 40;
        plan.shared = false;
        plan.pause = Duration::from_micros(random.below(800));
        plan
    }

    fn giving_up(random: &mut Random) -> GivenUp {
        match random.below(7) {
            0 => GivenUp::BeforeReserve,
            1 => GivenUp::AfterGrant,
            2 => GivenUp::MidPush(1 + random.below(9) as u32),
            3 => GivenUp::BeforeComplete,
            4 => GivenUp::WhileCompleting(random.below(1500)),
            5 => GivenUp::ByReceiver(Moment::any(random)),
            _ => GivenUp::Superseded(Moment::any(random)),
        }
    }

    /// What fills a block of the context.
    pub fn content(&self, ordinal: u32) -> u64 {
        if self.shared && ordinal < SHARED_BLOCKS {
            shared_content(ordinal)
        } else {
            self.content.wrapping_add(u64::from(ordinal)) | 1 << 63
        }
    }

    pub fn hashes(&self) -> Vec<BlockHash> {
        let shared = if self.shared { SHARED_BLOCKS } else { 0 };
        (0..shared).map(shared_hash).collect()
    }

    pub fn payload(&self) -> [u8; 16] {
        self.ticket.0.to_le_bytes()
    }

    pub fn second() -> Attempt {
        Attempt(Attempt::FIRST.0 + 1)
    }
}

impl Moment {
    fn any(random: &mut Random) -> Self {
        match random.below(4) {
            0 => Self::Granted,
            1 => Self::FirstBlock,
            _ => Self::After(random.below(2500)),
        }
    }
}

pub fn shared_content(ordinal: u32) -> u64 {
    1000 + u64::from(ordinal)
}

pub fn shared_hash(ordinal: u32) -> BlockHash {
    BlockHash([ordinal as u8 + 1; 16])
}
