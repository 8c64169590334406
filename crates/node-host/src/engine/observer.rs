//! Watches a step from inside: tells of finished layers while the others are computed, and breaks the step off when most of
//! what it computes is wanted by nobody any more.

use super::sequence::{Control, SequenceEvent};
use baton_engine::StepObserver;
use std::ops::ControlFlow;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Places of a sequence's channel that progress leaves to what must not be lost: a new start, the token, a failure.
const KEPT_PLACES: usize = 4;

/// Tells progress where there is room for it. The next one says more than one that is left out.
pub(super) fn tell_progress(events: &mpsc::Sender<SequenceEvent>, event: SequenceEvent) {
    if events.capacity() > KEPT_PLACES {
        // A closed channel is noticed by whoever owns the sequence.
        let _ = events.try_send(event);
    }
}

/// A sequence whose last chunk this step computes, and whose task wants to hear of its layers.
pub(super) struct LayersTold {
    pub events: mpsc::Sender<SequenceEvent>,
    /// After how many layers.
    pub borders: Arc<[u32]>,
    /// Tokens whose KV is final in those layers.
    pub tokens: usize,
}

/// Watches one step: each sequence's control and how many tokens it has in the step, and whom to tell of layers.
#[derive(Default)]
pub(super) struct Watch {
    pub parts: Vec<(Arc<Control>, usize)>,
    pub told: Vec<LayersTold>,
}

impl StepObserver for Watch {
    fn layer_done(&mut self, layer: u32) -> ControlFlow<()> {
        let tokens = |cancelled: bool| -> usize {
            self.parts
                .iter()
                .filter(|(control, _)| control.is_cancelled() == cancelled)
                .map(|(_, tokens)| tokens)
                .sum()
        };
        // A broken-off step is computed again for those that are left, so it must cost them less than it saves.
        if tokens(true) > tokens(false) {
            return ControlFlow::Break(());
        }
        let layers = layer + 1;
        for told in &self.told {
            if told.borders.contains(&layers) {
                let tokens = told.tokens;
                tell_progress(&told.events, SequenceEvent::Layers { tokens, layers });
            }
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(capacity: usize, borders: &[u32]) -> (LayersTold, mpsc::Receiver<SequenceEvent>) {
        let (events, receiver) = mpsc::channel(capacity);
        let told = LayersTold {
            events,
            borders: borders.into(),
            tokens: 50,
        };
        (told, receiver)
    }

    fn layers(receiver: &mut mpsc::Receiver<SequenceEvent>) -> Vec<u32> {
        let mut all = Vec::new();
        while let Ok(SequenceEvent::Layers { tokens: 50, layers }) = receiver.try_recv() {
            all.push(layers);
        }
        all
    }

    #[test]
    fn layers_are_told_at_their_borders_until_nobody_wants_the_step() {
        let (told, mut receiver) = told(64, &[2, 4, 6]);
        let (first, second) = (Control::new(true), Control::new(true));
        let mut watch = Watch {
            parts: vec![(first.clone(), 40), (second.clone(), 50)],
            told: vec![told],
        };
        for layer in 0..3 {
            assert!(watch.layer_done(layer).is_continue());
        }
        assert_eq!(layers(&mut receiver), [2]);
        first.cancel();
        assert!(watch.layer_done(3).is_continue(), "most of the step is still wanted");
        assert_eq!(layers(&mut receiver), [4]);
        second.cancel();
        assert!(watch.layer_done(4).is_break());
        assert!(watch.layer_done(5).is_break());
        assert_eq!(layers(&mut receiver), [0; 0]);
    }

    #[test]
    fn progress_leaves_room_for_what_must_not_be_lost() {
        let borders: Vec<u32> = (1..=80).collect();
        let (told, mut receiver) = told(16, &borders);
        let events = told.events.clone();
        let mut watch = Watch {
            parts: Vec::new(),
            told: vec![told],
        };
        for layer in 0..80 {
            assert!(watch.layer_done(layer).is_continue());
        }
        assert_eq!(events.capacity(), KEPT_PLACES);
        assert_eq!(layers(&mut receiver).len(), 16 - KEPT_PLACES);
    }
}
