//! The sequences that one node decodes, as a batch: each gets one token per step, so what changes from step to step is known
//! without looking at any of them. Tokens grow by the batch size, and a sequence takes a block where it crosses a block's border,
//! which happens in steps of one remainder modulo the block size.

use super::pool::Table;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

/// One sequence.
#[derive(Debug)]
pub(super) struct Member {
    pub request: u32,
    pub arrival: u64,
    pub table: Table,
    /// Tokens whose KV was there when it joined.
    computed: u32,
    joined: u64,
    /// The step, counted over the node's life, after which it has all its tokens.
    ends: u64,
    /// Gaps beyond the bound among the node's steps when it joined.
    late_before: u64,
    /// Where it crosses a border for which it has the block already.
    prepaid: Option<u64>,
}

/// One that left.
#[derive(Debug)]
pub(super) struct Left {
    pub request: u32,
    pub arrival: u64,
    pub table: Table,
    /// Tokens whose KV is there.
    pub computed: u32,
    /// Tokens that it got here.
    pub drawn: u32,
    /// Of the gaps before them, those beyond the bound.
    pub late: u32,
}

#[derive(Debug)]
pub(super) struct DecodeBatch {
    block_tokens: u64,
    /// Steps of the node's life.
    step: u64,
    members: Vec<Option<Member>>,
    free: Vec<usize>,
    len: u32,
    ends: BinaryHeap<Reverse<(u64, usize)>>,
    /// Tokens of all members that the next step attends to.
    tokens: u64,
    /// How many members cross a border in steps of each remainder.
    crossing: Vec<u32>,
    /// Blocks that are there already, by the step that would take them.
    prepaid: BTreeMap<u64, u32>,
    /// Steps that took longer than the bound on ITL.
    pub late_steps: u64,
}

impl DecodeBatch {
    pub fn new(block_tokens: u32) -> Self {
        Self {
            block_tokens: block_tokens.into(),
            step: 0,
            members: Vec::new(),
            free: Vec::new(),
            len: 0,
            ends: BinaryHeap::new(),
            tokens: 0,
            crossing: vec![0; block_tokens as usize],
            prepaid: BTreeMap::new(),
            late_steps: 0,
        }
    }

    pub fn len(&self) -> u32 {
        self.len
    }

    /// Tokens of all that the next step attends to.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Members' requests and arrivals.
    pub fn arrivals(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let there = self.members.iter().enumerate();
        there.filter_map(|(place, member)| member.as_ref().map(|member| (place, member.arrival)))
    }

    /// Members' requests, and how many tokens of each have their KV before the run under way.
    pub fn requests(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let there = self.members.iter().flatten();
        there.map(|member| (member.request, member.computed + (self.step - member.joined) as u32))
    }

    /// Takes a request's sequence out, where it is here.
    pub fn take_request(&mut self, request: u32) -> Option<Left> {
        let is = |member: &Option<Member>| member.as_ref().is_some_and(|member| member.request == request);
        let place = self.members.iter().position(is)?;
        self.take(place)
    }

    /// A sequence joins: `computed` tokens have their KV, one more is known, and it wants `left` more, at least 1. `blocks` is
    /// what it has.
    pub fn join(&mut self, request: u32, arrival: u64, table: Table, computed: u32, left: u32, blocks: u32) {
        let (size, at) = (self.block_tokens, u64::from(computed));
        let remainder = (self.step + size - at % size) % size;
        self.crossing[remainder as usize] += 1;
        // The first step of that remainder, from the next one on.
        let first = self.step + (remainder + size - self.step % size) % size;
        let prepaid = (u64::from(blocks) > at.div_ceil(size)).then_some(first);
        if let Some(first) = prepaid {
            *self.prepaid.entry(first).or_default() += 1;
        }
        let member = Member {
            request,
            arrival,
            table,
            computed,
            joined: self.step,
            ends: self.step + u64::from(left),
            late_before: self.late_steps,
            prepaid,
        };
        let place = self.free.pop().unwrap_or(self.members.len());
        if place == self.members.len() {
            self.members.push(None);
        }
        self.ends.push(Reverse((member.ends, place)));
        self.members[place] = Some(member);
        self.len += 1;
        self.tokens += at + 1;
    }

    /// Steps until the first of them has all its tokens; none where there is none.
    pub fn until_first_end(&mut self) -> Option<u64> {
        while let Some(Reverse((ends, place))) = self.ends.peek().copied() {
            let there = self.members[place].as_ref().is_some_and(|member| member.ends == ends);
            if there {
                return Some(ends - self.step);
            }
            // It was taken out before its end.
            self.ends.pop();
        }
        None
    }

    /// Blocks that the next `steps` steps take.
    pub fn growth(&self, steps: u64) -> u32 {
        let size = self.block_tokens;
        let cycles = (steps / size) as u32 * self.len;
        let rest: u32 = (0..steps % size)
            .map(|k| self.crossing[((self.step + k) % size) as usize])
            .sum();
        let there: u32 = self
            .prepaid
            .range(self.step..self.step + steps)
            .map(|(_, count)| count)
            .sum();
        cycles + rest - there
    }

    /// The most steps, at most `most`, that take no more than `room` blocks; 0 where the next one does not.
    pub fn steps_within(&self, room: u32, most: u64) -> u64 {
        if self.growth(most) <= room {
            return most;
        }
        let (mut low, mut high) = (0, most);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.growth(middle) <= room {
                low = middle
            } else {
                high = middle
            }
        }
        low
    }

    /// So many steps were done; the blocks they take were counted before. Gives those that have all their tokens.
    pub fn advance(&mut self, steps: u64, left: &mut Vec<Left>) {
        self.tokens += steps * u64::from(self.len);
        self.step += steps;
        while self
            .prepaid
            .first_key_value()
            .is_some_and(|(step, _)| *step < self.step)
        {
            self.prepaid.pop_first();
        }
        while self.until_first_end() == Some(0) {
            let Some(Reverse((_, place))) = self.ends.pop() else {
                return;
            };
            left.extend(self.take(place));
        }
    }

    /// Takes one out.
    pub fn take(&mut self, place: usize) -> Option<Left> {
        let mut member = self.members.get_mut(place)?.take()?;
        self.free.push(place);
        self.len -= 1;
        let (size, steps) = (self.block_tokens, self.step - member.joined);
        let at = u64::from(member.computed);
        self.tokens -= at + 1 + steps;
        let remainder = (member.joined + size - at % size) % size;
        self.crossing[remainder as usize] -= 1;
        let crossed = (at + steps).div_ceil(size) - at.div_ceil(size);
        let mut taken = crossed as u32;
        if let Some(first) = member.prepaid {
            match self.prepaid.get_mut(&first) {
                Some(count) => {
                    *count -= 1;
                    if *count == 0 {
                        self.prepaid.remove(&first);
                    }
                }
                None => taken -= 1,
            }
        }
        member.table.own += taken;
        Some(Left {
            request: member.request,
            arrival: member.arrival,
            table: member.table,
            computed: member.computed + steps as u32,
            drawn: steps as u32,
            late: (self.late_steps - member.late_before) as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same, one sequence and one step at a time.
    struct Slow {
        computed: u32,
        blocks: u32,
        left: u32,
    }

    proptest! {
        #[test]
        fn a_batch_is_what_its_sequences_are_one_by_one(
            joins in prop::collection::vec((0u32..70, 1u32..60, 0u32..2, 0u64..9), 1..12),
        ) {
            let mut batch = DecodeBatch::new(16);
            let mut slow: Vec<Option<Slow>> = Vec::new();
            let mut left = Vec::new();
            for (request, (computed, wants, more, steps)) in joins.into_iter().enumerate() {
                let blocks = computed.div_ceil(16) + more;
                let table = Table { shared: Vec::new(), own: blocks };
                batch.join(request as u32, request as u64, table, computed, wants, blocks);
                slow.push(Some(Slow { computed, blocks, left: wants }));
                for _ in 0..steps {
                    let most = batch.until_first_end().unwrap_or(0).min(3);
                    if most == 0 { break; }
                    let tokens: u64 = slow.iter().flatten().map(|s| u64::from(s.computed) + 1).sum();
                    prop_assert_eq!(batch.tokens(), tokens);
                    let mut taken = 0;
                    for s in slow.iter_mut().flatten() {
                        let after = s.blocks.max((s.computed + most as u32).div_ceil(16));
                        taken += after - s.blocks;
                        (s.blocks, s.computed, s.left) = (after, s.computed + most as u32, s.left - most as u32);
                    }
                    prop_assert_eq!(batch.growth(most), taken);
                    prop_assert_eq!(batch.steps_within(u32::MAX, most), most);
                    left.clear();
                    batch.advance(most, &mut left);
                    for gone in &left {
                        let s = slow[gone.request as usize].take().unwrap();
                        prop_assert_eq!((s.left, s.blocks, s.computed), (0, gone.table.own, gone.computed));
                    }
                    prop_assert!(slow.iter().flatten().all(|s| s.left > 0));
                }
                prop_assert_eq!(batch.len() as usize, slow.iter().flatten().count());
            }
        }
    }
}
