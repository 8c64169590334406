//! Whose turn it is: requests that wait, by priority and tenant.
//!
//! A higher priority always goes first. Within one priority tenants take turns by deficit round robin: each turn adds a
//! quantum times the tenant's weight to its credit, and its oldest requests go while the credit pays for them, so that over
//! time tenants with requests waiting get tokens in proportion to their weights, whatever the sizes of their requests.
//! Source: Shreedhar and Varghese, *Efficient Fair Queueing using Deficit Round Robin*, 1995.

use std::collections::{BTreeMap, HashMap, VecDeque};

/// Tokens that one turn is worth to a tenant of weight 1.
pub const QUANTUM_TOKENS: u64 = 512;

/// Who goes first. The order is that of the variants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Priority {
    /// Before all others.
    High,
    /// The usual one.
    #[default]
    Normal,
    /// When nobody else waits.
    Low,
}

/// A request that wants to wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<T> {
    /// Place of its tenant among all.
    pub tenant: usize,
    /// The tenant's share; 0 counts as 1.
    pub weight: u32,
    /// Before or after others.
    pub priority: Priority,
    /// What serving it costs its tenant, tokens.
    pub tokens: u64,
    /// Which it is.
    pub item: T,
}

impl<T> Entry<T> {
    /// The same entry for another item.
    pub fn with<U>(self, item: U) -> Entry<U> {
        Entry {
            tenant: self.tenant,
            weight: self.weight,
            priority: self.priority,
            tokens: self.tokens,
            item,
        }
    }
}

#[derive(Debug)]
struct Lane<T> {
    weight: u64,
    credit: u64,
    waiting: VecDeque<(u64, T)>,
}

#[derive(Debug)]
struct Class<T> {
    lanes: HashMap<usize, Lane<T>>,
    /// Tenants with requests waiting, the next turn's first.
    round: VecDeque<usize>,
}

/// The queue. Its owner bounds it.
#[derive(Debug)]
pub struct FairQueue<T> {
    classes: BTreeMap<Priority, Class<T>>,
    len: usize,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            classes: BTreeMap::new(),
            len: 0,
        }
    }
}

impl<T> FairQueue<T> {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes out those that are not to be kept.
    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        let mut len = 0;
        self.classes.retain(|_, class| {
            class.lanes.retain(|_, lane| {
                lane.waiting.retain(|(_, item)| keep(item));
                len += lane.waiting.len();
                !lane.waiting.is_empty()
            });
            class.round.retain(|tenant| class.lanes.contains_key(tenant));
            !class.round.is_empty()
        });
        self.len = len;
    }

    /// Lets one wait.
    pub fn push(&mut self, entry: Entry<T>) {
        self.len += 1;
        let class = self.classes.entry(entry.priority).or_insert_with(|| Class {
            lanes: HashMap::new(),
            round: VecDeque::new(),
        });
        let lane = class.lanes.entry(entry.tenant).or_insert_with(|| {
            class.round.push_back(entry.tenant);
            Lane {
                weight: 1,
                credit: 0,
                waiting: VecDeque::new(),
            }
        });
        lane.weight = u64::from(entry.weight.max(1));
        lane.waiting.push_back((entry.tokens, entry.item));
    }

    /// Whose turn it is; none where nobody waits.
    pub fn pop(&mut self) -> Option<T> {
        let mut first = self.classes.first_entry()?;
        let item = first.get_mut().pop();
        self.len -= usize::from(item.is_some());
        if first.get().round.is_empty() {
            first.remove();
        }
        item
    }
}

impl<T> Class<T> {
    fn pop(&mut self) -> Option<T> {
        loop {
            let tenant = self.round.pop_front()?;
            let Some(lane) = self.lanes.get_mut(&tenant) else {
                continue;
            };
            let tokens = lane.waiting.front().map_or(0, |(tokens, _)| *tokens);
            if lane.credit < tokens {
                lane.credit += QUANTUM_TOKENS * lane.weight;
                self.round.push_back(tenant);
                continue;
            }
            lane.credit -= tokens;
            let item = lane.waiting.pop_front().map(|(_, item)| item);
            if lane.waiting.is_empty() {
                // Credit is not saved up while nothing waits.
                self.lanes.remove(&tenant);
            } else {
                self.round.push_front(tenant);
            }
            return item;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(tenant: usize, weight: u32, priority: Priority, tokens: u64) -> Entry<(usize, u64)> {
        Entry {
            tenant,
            weight,
            priority,
            tokens,
            item: (tenant, tokens),
        }
    }

    fn tokens_served(queue: &mut FairQueue<(usize, u64)>, requests: usize, tenant: usize) -> u64 {
        let served = (0..requests).filter_map(|_| queue.pop());
        served.filter(|(who, _)| *who == tenant).map(|(_, tokens)| tokens).sum()
    }

    #[test]
    fn a_tenant_of_many_requests_does_not_hold_up_one_of_few() {
        let mut queue = FairQueue::default();
        (0..1000).for_each(|_| queue.push(entry(0, 1, Priority::Normal, 500)));
        (0..3).for_each(|_| queue.push(entry(1, 1, Priority::Normal, 500)));
        assert_eq!(tokens_served(&mut queue, 8, 1), 1500);
    }

    #[test]
    fn tokens_are_shared_by_weight_whatever_the_sizes() {
        let mut queue = FairQueue::default();
        (0..4000).for_each(|_| queue.push(entry(0, 1, Priority::Normal, 100)));
        (0..4000).for_each(|_| queue.push(entry(1, 3, Priority::Normal, 4000)));
        let (mut small, mut large) = (0, 0);
        while small + large < 1_000_000 {
            match queue.pop() {
                Some((0, tokens)) => small += tokens,
                Some((_, tokens)) => large += tokens,
                None => panic!("nobody is left"),
            }
        }
        let share = large as f64 / small as f64;
        assert!((2.9..3.1).contains(&share), "{share}");
    }

    #[test]
    fn a_higher_priority_goes_first_and_an_idle_tenant_saves_no_credit() {
        let mut queue = FairQueue::default();
        queue.push(entry(0, 1, Priority::Low, 1));
        queue.push(entry(1, 1, Priority::Normal, 1));
        queue.push(entry(2, 1, Priority::High, 9000));
        let order: Vec<usize> = std::iter::from_fn(|| queue.pop()).map(|(tenant, _)| tenant).collect();
        assert_eq!(order, [2, 1, 0]);
        assert!(queue.classes.is_empty());
    }

    proptest! {
        #[test]
        fn everybody_is_served_once_and_each_tenant_in_order(
            requests in prop::collection::vec((0usize..5, 0u32..4, 0usize..3, 0u64..5000), 0..60),
        ) {
            let priorities = [Priority::High, Priority::Normal, Priority::Low];
            let mut queue = FairQueue::default();
            for (index, (tenant, weight, priority, tokens)) in requests.iter().enumerate() {
                let (priority, item) = (priorities[*priority], (priorities[*priority], *tenant, index));
                queue.push(Entry { tenant: *tenant, weight: *weight, priority, tokens: *tokens, item });
            }
            prop_assert_eq!(queue.len(), requests.len());
            let even = |(_, _, index): &(Priority, usize, usize)| index % 2 == 0;
            queue.retain(even);
            let requests = requests.len().div_ceil(2);
            prop_assert_eq!((queue.len(), queue.is_empty()), (requests, requests == 0));
            let served: Vec<(Priority, usize, usize)> = std::iter::from_fn(|| queue.pop()).collect();
            prop_assert_eq!((served.len(), queue.len()), (requests, 0));
            prop_assert!(served.iter().all(even));
            prop_assert!(served.is_sorted_by_key(|(priority, _, _)| *priority));
            for priority in priorities {
                for tenant in 0..5 {
                    let own = served.iter().filter(|(p, t, _)| (*p, *t) == (priority, tenant));
                    prop_assert!(own.is_sorted_by_key(|(_, _, index)| *index));
                }
            }
        }
    }
}
