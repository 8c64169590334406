//! What a node takes work for, and until when what it has may run. Pure; the host keeps one and tells of its changes.
//!
//! `Working -> Changing -> Working` is a change of role, `-> Draining` the way out; nothing leads back from there. Once the
//! time for what runs is over, the phase is *overdue*: whoever still works on this node gives up, so that it is done elsewhere.

use baton_types::{NodeRole, NodeState};
use std::time::Duration;

/// Where a node is in its life, once it is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// The role whose requests it has. While it changes: the one that it gives up.
    pub role: NodeRole,
    /// What becomes of it.
    pub goal: Goal,
    /// What still runs has had its time.
    pub overdue: bool,
}

/// What becomes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// It takes work.
    Work,
    /// It takes none, and takes up this role once it is empty.
    Change {
        /// Which.
        to: NodeRole,
        /// What runs may take so long to end or to move.
        within: Duration,
    },
    /// It takes none, and leaves once it is empty.
    Leave {
        /// What runs may take so long to end or to move.
        within: Duration,
    },
}

/// Why a node does not take up another role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RoleRefused {
    /// The program has the code of one role.
    #[error(
        "role: the program {role}-node has the {role} role only; a node that is started as `baton node --role {role}` can \
         change its role"
    )]
    SingleRole {
        /// Which.
        role: NodeRole,
    },
    /// It is on its way to something else.
    #[error("node {node} {what}; ask again once it is ready")]
    Busy {
        /// Its name.
        node: String,
        /// What it does.
        what: String,
    },
}

impl RoleRefused {
    /// The same may be asked again later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::SingleRole { .. } => false,
            Self::Busy { .. } => true,
        }
    }
}

impl Phase {
    pub(crate) fn new(role: NodeRole) -> Self {
        Self {
            role,
            goal: Goal::Work,
            overdue: false,
        }
    }

    /// It takes new work.
    pub fn takes_work(&self) -> bool {
        self.goal == Goal::Work
    }

    /// It will leave the cluster.
    pub fn leaves(&self) -> bool {
        matches!(self.goal, Goal::Leave { .. })
    }

    /// As records and heartbeats say it.
    pub fn state(&self) -> NodeState {
        if self.takes_work() {
            NodeState::Ready
        } else {
            NodeState::Draining
        }
    }

    /// Towards the way out. The first word on its time counts.
    pub(crate) fn leave(&mut self, within: Duration) -> bool {
        let first = !self.leaves();
        if first {
            self.goal = Goal::Leave { within };
            self.overdue = false;
        }
        first
    }

    /// Towards another role; the present one asked for again changes nothing.
    pub(crate) fn change(&mut self, node: &str, to: NodeRole, within: Duration) -> Result<bool, RoleRefused> {
        let busy = |what: String| {
            let node = node.to_owned();
            Err(RoleRefused::Busy { node, what })
        };
        match self.goal {
            Goal::Work if self.role == to => Ok(false),
            Goal::Work => {
                self.goal = Goal::Change { to, within };
                self.overdue = false;
                Ok(true)
            }
            Goal::Change { to: already, .. } if already == to => Ok(false),
            Goal::Change { to: other, .. } => busy(format!("is becoming a {other} node")),
            Goal::Leave { .. } => busy("is draining".to_owned()),
        }
    }

    /// It is empty: the role that it was to take up is its own. Nothing changes where that is no longer its goal.
    pub(crate) fn changed(&mut self) -> bool {
        match self.goal {
            Goal::Change { to, .. } => {
                *self = Self::new(to);
                true
            }
            Goal::Work | Goal::Leave { .. } => false,
        }
    }

    /// The time of what runs is over, unless it takes work.
    pub(crate) fn expire(&mut self) {
        self.overdue = !self.takes_work();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_role_changes_once_it_is_empty_and_draining_is_for_good() {
        let mut phase = Phase::new(NodeRole::Decode);
        assert_eq!(phase.change("n", NodeRole::Decode, MINUTE), Ok(false));
        assert!(phase.takes_work());
        assert_eq!(phase.change("n", NodeRole::Prefill, MINUTE), Ok(true));
        assert_eq!(phase.change("n", NodeRole::Prefill, MINUTE), Ok(false), "asked twice");
        assert_eq!((phase.role, phase.state()), (NodeRole::Decode, NodeState::Draining));
        let refused = phase.change("n", NodeRole::Decode, MINUTE).unwrap_err();
        assert!(
            refused.is_retryable() && refused.to_string().contains("becoming a prefill node"),
            "{refused}"
        );
        phase.expire();
        assert!(phase.overdue);
        assert!(phase.changed());
        assert_eq!(phase, Phase::new(NodeRole::Prefill));
        phase.expire();
        assert!(!phase.overdue, "who takes work is not overdue");

        assert!(phase.change("n", NodeRole::Decode, MINUTE).is_ok());
        assert!(phase.leave(MINUTE));
        assert!(!phase.leave(Duration::ZERO), "the first word counts");
        assert_eq!(phase.goal, Goal::Leave { within: MINUTE });
        assert!(!phase.changed());
        assert!(phase.change("n", NodeRole::Decode, MINUTE).is_err());
    }
}
