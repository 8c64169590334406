//! How many nodes there should be, as something outside that starts and stops nodes can follow it.
//!
//! It is what the controller last decided, and not simply the nodes that are ready: a node that crashed, or is about to start,
//! must not lower it. It follows the nodes where there are more of them or their roles are others than it says, which is an
//! operator's doing; and where some stay away while nothing is missed.

use baton_cluster_state::NodeCounts;
use baton_planner::Nanos;

/// The target of one cluster.
#[derive(Debug, Default)]
pub(super) struct Target {
    counts: Option<NodeCounts>,
    /// Since when nodes are missing that nobody misses.
    idle_since: Option<Nanos>,
}

/// What a look showed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown {
    pub(super) now: Nanos,
    /// Nodes that take work.
    pub(super) ready: NodeCounts,
    /// A node is neither away nor at work.
    pub(super) changing: bool,
    /// Nothing is missed, or could be mended by a change.
    pub(super) fine: bool,
    /// For so long nodes may be missing before they count as not wanted.
    pub(super) patience: Nanos,
}

impl Target {
    /// Goes on from what another leader said.
    pub(super) fn resume(&mut self, counts: NodeCounts) {
        (self.counts, self.idle_since) = (Some(counts), None);
    }

    /// As of the last look; none of either while nothing was ever seen.
    pub(super) fn counts(&self) -> NodeCounts {
        self.counts.unwrap_or_default()
    }

    /// A change was decided.
    pub(super) fn decide(&mut self, counts: NodeCounts) {
        self.resume(counts);
    }

    /// What it is now.
    pub(super) fn look(&mut self, shown: Shown) -> NodeCounts {
        let total = |counts: NodeCounts| counts.prefill + counts.decode;
        let Some(counts) = self.counts.filter(|counts| total(*counts) > 0) else {
            self.counts = Some(shown.ready);
            return shown.ready;
        };
        let missing = total(shown.ready) < total(counts);
        let since = *self.idle_since.get_or_insert(shown.now);
        if shown.changing || counts == shown.ready || missing && !shown.fine {
            self.idle_since = None;
            return counts;
        }
        // A change of role that was decided may not be seen yet; what an operator does, stays.
        if shown.now.saturating_sub(since) < shown.patience {
            return counts;
        }
        (self.counts, self.idle_since) = (Some(shown.ready), None);
        shown.ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(prefill: u32, decode: u32) -> NodeCounts {
        NodeCounts { prefill, decode }
    }

    fn shown(at: u64, ready: NodeCounts, fine: bool) -> Shown {
        Shown {
            now: Nanos(at),
            ready,
            changing: false,
            fine,
            patience: Nanos(100),
        }
    }

    #[test]
    fn a_crash_does_not_lower_it_before_it_is_not_missed() {
        let mut target = Target::default();
        assert_eq!(target.counts(), counts(0, 0));
        assert_eq!(target.look(shown(0, counts(2, 2), true)), counts(2, 2));
        assert_eq!(target.counts(), counts(2, 2));
        target.decide(counts(2, 3));
        assert_eq!(target.look(shown(10, counts(2, 2), false)), counts(2, 3));
        assert_eq!(
            target.look(shown(500, counts(2, 2), false)),
            counts(2, 3),
            "still wanted"
        );
        assert_eq!(target.look(shown(510, counts(2, 3), true)), counts(2, 3));
        assert_eq!(target.look(shown(520, counts(1, 3), true)), counts(2, 3), "one crashed");
        let changing = Shown {
            changing: true,
            ..shown(630, counts(1, 3), true)
        };
        assert_eq!(target.look(changing), counts(2, 3), "it starts again");
        assert_eq!(target.look(shown(640, counts(1, 3), true)), counts(2, 3));
        assert_eq!(
            target.look(shown(740, counts(1, 3), true)),
            counts(1, 3),
            "nobody misses it"
        );
    }

    #[test]
    fn it_follows_what_operators_do() {
        let mut target = Target::default();
        target.resume(counts(1, 1));
        assert_eq!(target.look(shown(0, counts(3, 1), false)), counts(1, 1));
        assert_eq!(
            target.look(shown(100, counts(3, 1), false)),
            counts(3, 1),
            "nodes were added"
        );
        assert_eq!(target.look(shown(110, counts(2, 2), true)), counts(3, 1));
        assert_eq!(
            target.look(shown(210, counts(2, 2), true)),
            counts(2, 2),
            "a role was changed"
        );
    }
}
