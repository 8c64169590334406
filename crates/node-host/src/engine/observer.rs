//! Breaks a step off when most of what it computes is wanted by nobody any more.

use super::sequence::Control;
use baton_engine::StepObserver;
use std::ops::ControlFlow;
use std::sync::Arc;

/// Watches one step: each sequence's control and how many tokens it has in the step.
pub(super) struct Watch {
    pub parts: Vec<(Arc<Control>, usize)>,
}

impl StepObserver for Watch {
    fn layer_done(&mut self, _layer: u32) -> ControlFlow<()> {
        let tokens = |cancelled: bool| -> usize {
            self.parts
                .iter()
                .filter(|(control, _)| control.is_cancelled() == cancelled)
                .map(|(_, tokens)| tokens)
                .sum()
        };
        // A broken-off step is computed again for those that are left, so it must cost them less than it saves.
        if tokens(true) > tokens(false) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}
