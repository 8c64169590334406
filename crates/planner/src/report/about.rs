//! What a plan was made with.

use crate::profile::Profile;
use crate::search::{Given, Question};
use crate::workload::Spread;

/// What was planned with.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    /// Of each class of nodes, in their order.
    pub profiles: &'a [Profile],
    /// What was asked.
    pub question: &'a Question,
    /// What was given.
    pub given: Given,
    /// The trace's name.
    pub trace: &'a str,
    /// What was done about its times.
    pub spread: Spread,
    /// Nodes have prices; without, costs are left out.
    pub priced: bool,
}
