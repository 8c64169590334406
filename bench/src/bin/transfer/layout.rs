//! Random slots, and random bytes, that both processes can make for themselves.

use baton_types::BlockId;

/// Numbers that only look random: splitmix64 (Steele, Lea, Flood 2014).
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn throw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
}

/// The output function of splitmix64.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Which slots of `slots` a round uses, in which order: `count` of them, none twice, no two neighbours but by chance.
pub fn slots(seed: u64, slots: usize, count: usize) -> Vec<BlockId> {
    let mut dice = Dice::new(mix(seed));
    let mut all: Vec<u32> = (0..slots as u32).collect();
    for i in 0..count {
        let left = (slots - i) as u64;
        all.swap(i, i + (dice.throw() % left) as usize);
    }
    all.truncate(count);
    all.into_iter().map(BlockId).collect()
}

/// The slots of one round: where blocks are, and where they go.
pub struct Layout {
    pub source: Vec<BlockId>,
    pub destination: Vec<BlockId>,
}

impl Layout {
    pub fn of_round(seed: u64, round: u64, pool: usize, count: usize) -> Self {
        let seed = seed.wrapping_mul(1_000_003).wrapping_add(2 * round);
        Self {
            source: slots(seed, pool, count),
            destination: slots(seed + 1, pool, count),
        }
    }

    /// `count` slots that go through the first `distinct` again and again.
    pub fn repeated(self, count: usize, distinct: usize) -> Self {
        let again = |slots: Vec<BlockId>| slots.iter().take(distinct).copied().cycle().take(count).collect();
        Self {
            source: again(self.source),
            destination: again(self.destination),
        }
    }
}
