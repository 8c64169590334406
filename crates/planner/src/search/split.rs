//! Which nodes a cluster has: so many of each class on each side.

use super::Prices;
use crate::profile::NodeModel;
use std::sync::Arc;

/// Kinds of nodes in one plan, at most.
pub const CLASSES_MAX: usize = 4;

/// One kind of node that a cluster may have.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeClass {
    /// What plans call it.
    pub name: String,
    /// How fast it is.
    pub node: Arc<NodeModel>,
    /// What one costs.
    pub prices: Prices,
    /// How many there are; none where there are as many as are wanted.
    pub count_max: Option<usize>,
    /// It may prefill.
    pub prefill: bool,
    /// It may decode.
    pub decode: bool,
}

impl NodeClass {
    /// As many as are wanted, for both sides.
    pub fn new(node: &Arc<NodeModel>, prices: Prices) -> Self {
        Self {
            name: node.name.clone(),
            node: Arc::clone(node),
            prices,
            count_max: None,
            prefill: true,
            decode: true,
        }
    }
}

/// One of the two sides of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Nodes that compute prompts for others.
    Prefill,
    /// Nodes that decode.
    Decode,
}

impl Side {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// So many nodes of each class on each side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Split {
    prefill: [u16; CLASSES_MAX],
    decode: [u16; CLASSES_MAX],
}

impl Split {
    /// Of one class only.
    pub fn of(prefill: usize, decode: usize) -> Self {
        Self::default()
            .with(0, Side::Prefill, prefill)
            .with(0, Side::Decode, decode)
    }

    /// The same with so many of one class on one side.
    #[must_use]
    pub fn with(mut self, class: usize, side: Side, count: usize) -> Self {
        let counts = match side {
            Side::Prefill => &mut self.prefill,
            Side::Decode => &mut self.decode,
        };
        counts[class] = u16::try_from(count).unwrap_or(u16::MAX);
        self
    }

    /// The same with one more of one class on one side.
    #[must_use]
    pub fn one_more(self, class: usize, side: Side) -> Self {
        self.with(class, side, self.count(class, side) + 1)
    }

    /// How many of a class are on a side.
    pub fn count(&self, class: usize, side: Side) -> usize {
        match side {
            Side::Prefill => self.prefill[class].into(),
            Side::Decode => self.decode[class].into(),
        }
    }

    /// Prefill nodes of all classes.
    pub fn prefill(&self) -> usize {
        self.prefill.iter().copied().map(usize::from).sum()
    }

    /// Decode nodes of all classes.
    pub fn decode(&self) -> usize {
        self.decode.iter().copied().map(usize::from).sum()
    }

    /// Nodes of both sides.
    pub fn nodes(&self) -> usize {
        self.prefill() + self.decode()
    }

    /// Nodes of one class on both sides.
    pub fn of_class(&self, class: usize) -> usize {
        self.count(class, Side::Prefill) + self.count(class, Side::Decode)
    }

    /// No side has more of any class.
    pub fn is_within(&self, other: &Self) -> bool {
        let within = |a: &[u16], b: &[u16]| a.iter().zip(b).all(|(a, b)| a <= b);
        within(&self.prefill, &other.prefill) && within(&self.decode, &other.decode)
    }

    /// Nodes that would have to come, go or change their role to make the other of it.
    pub(super) fn distance(&self, other: &Self) -> usize {
        let apart = |a: &[u16], b: &[u16]| a.iter().zip(b).map(|(a, b)| usize::from(a.abs_diff(*b))).sum::<usize>();
        apart(&self.prefill, &other.prefill) + apart(&self.decode, &other.decode)
    }

    /// Cost of all nodes per hour.
    pub fn per_hour(&self, classes: &[NodeClass]) -> f64 {
        let cost = |(class, of): (usize, &NodeClass)| {
            self.count(class, Side::Prefill) as f64 * of.prices.prefill
                + self.count(class, Side::Decode) as f64 * of.prices.decode
        };
        classes.iter().enumerate().map(cost).sum()
    }

    /// As plans write it: `3P+5D`, or with the names of classes where there are several.
    pub fn name(&self, classes: &[NodeClass]) -> String {
        if classes.len() < 2 {
            return self.to_string();
        }
        let mut parts = Vec::new();
        for (side, letter) in [(Side::Prefill, 'P'), (Side::Decode, 'D')] {
            for (class, of) in classes
                .iter()
                .enumerate()
                .filter(|(class, _)| self.count(*class, side) > 0)
            {
                parts.push(format!("{}{letter} {}", self.count(class, side), of.name));
            }
        }
        parts.join(" + ")
    }
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}P+{}D", self.prefill(), self.decode())
    }
}

/// Which splits are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Within {
    /// So many nodes in all.
    Nodes(usize),
    /// All nodes that the classes have; those without a bound have none.
    All,
    /// Up to so many of each class that prefill, and that decode.
    UpTo([[usize; 2]; CLASSES_MAX]),
}

/// All splits of these nodes with at least one decode node, as far as roles and bounds allow; those of one class in the order of
/// their prefill nodes. The ones without prefill nodes are among them: every node does both.
pub(super) fn splits(classes: &[NodeClass], within: Within) -> Vec<Split> {
    let mut all = vec![Split::default()];
    for (index, class) in classes.iter().enumerate() {
        let bound = class.count_max.unwrap_or(match within {
            Within::Nodes(nodes) => nodes,
            Within::All => 0,
            Within::UpTo(each) => each[index][0] + each[index][1],
        });
        let mut next = Vec::new();
        for split in &all {
            let room = match within {
                Within::Nodes(nodes) => bound.min(nodes - split.nodes()),
                Within::All | Within::UpTo(_) => bound,
            };
            for (prefill, decode) in counts(index, class, within, room) {
                next.push(
                    split
                        .with(index, Side::Prefill, prefill)
                        .with(index, Side::Decode, decode),
                );
            }
        }
        all = next;
    }
    all.retain(|split| {
        split.decode() > 0
            && match within {
                Within::Nodes(nodes) => split.nodes() == nodes,
                Within::All | Within::UpTo(_) => true,
            }
    });
    all
}

/// Counts of one class, `(prefill, decode)`.
fn counts(index: usize, class: &NodeClass, within: Within, room: usize) -> Vec<(usize, usize)> {
    let [prefill_max, decode_max] = match within {
        Within::UpTo(each) => each[index].map(|most| most.min(room)),
        Within::Nodes(_) | Within::All => [room; 2],
    };
    let most = |may: bool, most: usize| if may { most } else { 0 };
    let mut counts = Vec::new();
    for prefill in 0..=most(class.prefill, prefill_max) {
        let rest = most(class.decode, decode_max).min(room - prefill);
        counts.extend((0..=rest).map(|decode| (prefill, decode)));
    }
    if within == Within::All {
        counts.retain(|(prefill, decode)| prefill + decode == room);
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{estimate, gpu, model};

    fn class(name: &str, count_max: Option<usize>, roles: (bool, bool), price: f64) -> NodeClass {
        let profile = estimate(gpu("h100").unwrap(), model("llama-3.1-8b").unwrap()).unwrap();
        NodeClass {
            name: name.to_owned(),
            count_max,
            prefill: roles.0,
            decode: roles.1,
            ..NodeClass::new(&Arc::new(NodeModel::new(&profile)), Prices::both(price))
        }
    }

    #[test]
    fn splits_keep_to_counts_and_roles() {
        let one = [class("a", None, (true, true), 1.0)];
        let names = |splits: Vec<Split>| splits.iter().map(Split::to_string).collect::<Vec<_>>();
        assert_eq!(names(splits(&one, Within::Nodes(3))), ["0P+3D", "1P+2D", "2P+1D"]);
        let two = [
            class("a", Some(2), (true, false), 3.0),
            class("b", Some(3), (true, true), 1.0),
        ];
        let all = splits(&two, Within::All);
        assert_eq!(names(all.clone()), ["2P+3D", "3P+2D", "4P+1D"], "each node is used");
        assert_eq!(all[1].name(&two), "2P a + 1P b + 2D b");
        assert_eq!((all[1].per_hour(&two), all[1].of_class(1)), (9.0, 3));
        let four = splits(&two, Within::Nodes(4));
        assert!(
            four.iter()
                .all(|split| split.nodes() == 4 && split.of_class(0) <= 2 && split.of_class(1) <= 3)
        );
        assert!(four.iter().all(|split| split.count(0, Side::Decode) == 0));
        assert_eq!(splits(&two, Within::UpTo([[1; 2]; CLASSES_MAX])).len(), 2 * 2);
        assert!(all[0].is_within(&all[0].one_more(0, Side::Prefill)) && !all[0].is_within(&all[1]));
    }
}
