//! The nodes of one model that take work, kept such that a choice among a thousand of them need not gather anything: what
//! changes with heartbeats is written when they come, and what changes with every request is read from counters.

use crate::{Held, Load, NodeView, Placed, Routed, StepTimes};
use std::sync::Arc;

/// A node that takes work.
#[derive(Debug)]
pub struct FleetNode {
    /// What does not change with each request. Its load and what it holds are filled in for each choice.
    pub view: NodeView,
    /// What the node last said.
    pub load: Load,
    /// What was placed on it.
    pub placed: Arc<Placed>,
    /// It refused for want of place and has not spoken since.
    pub full: bool,
}

/// Which of the two kinds a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It prefills for others.
    Prefill,
    /// It decodes.
    Decode,
}

/// Where a node stands in its fleet, until the fleet is cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    side: Side,
    index: usize,
}

/// What routing looks at apart from what it only needs to fill that in: the views are read several times for each choice.
#[derive(Debug, Default)]
struct Nodes {
    views: Vec<NodeView>,
    loads: Vec<(Load, Arc<Placed>, bool)>,
}

impl Nodes {
    fn refresh(&mut self, held: &Held) {
        let nobody_holds = held.nodes() == 0;
        for (view, (load, placed, full)) in self.views.iter_mut().zip(&self.loads) {
            let now = load.now(placed.figures());
            view.queued_requests = if *full {
                view.queue_capacity
            } else {
                now.queued_requests
            };
            view.queued_tokens = now.queued_tokens;
            view.running_requests = now.running_requests;
            view.held_tokens = if nobody_holds {
                0
            } else {
                held.blocks(view.instance).saturating_mul(view.block_tokens)
            };
        }
    }
}

/// The nodes of one model that take work now.
#[derive(Debug, Default)]
pub struct Fleet {
    prefill: Nodes,
    decode: Nodes,
    /// The figures of a node whose prompts were seen, for those whose were not.
    measured: Option<StepTimes>,
}

impl Fleet {
    /// No node, and no place, is any more.
    pub fn clear(&mut self) {
        for nodes in [&mut self.prefill, &mut self.decode] {
            nodes.views.clear();
            nodes.loads.clear();
        }
        self.measured = None;
    }

    /// Adds a node.
    pub fn add(&mut self, side: Side, node: FleetNode) -> Place {
        let FleetNode {
            mut view,
            load,
            placed,
            full,
        } = node;
        view.blocks = load.blocks();
        let times = view.times;
        let nodes = self.nodes(side);
        nodes.views.push(view);
        nodes.loads.push((load, placed, full));
        let index = nodes.views.len() - 1;
        let place = Place { side, index };
        self.set_times(place, times);
        place
    }

    /// The node spoke, which also means that it is asked again where it was full.
    pub fn spoke(&mut self, place: Place, load: Load, queue_capacity: u32) {
        let nodes = self.nodes(place.side);
        if let (Some(view), Some(known)) = (nodes.views.get_mut(place.index), nodes.loads.get_mut(place.index)) {
            view.blocks = load.blocks();
            view.queue_capacity = queue_capacity;
            (known.0, known.2) = (load, false);
        }
    }

    /// The node refused for want of place.
    pub fn is_full(&mut self, place: Place) {
        if let Some(known) = self.nodes(place.side).loads.get_mut(place.index) {
            known.2 = true;
        }
    }

    /// More is known of how fast the node is. Nodes without a prompt of their own take the prefill times of the one that
    /// was first to have one.
    pub fn set_times(&mut self, place: Place, times: StepTimes) {
        if times.prefill_is_measured() && self.measured.is_none() {
            for view in self.prefill.views.iter_mut().chain(&mut self.decode.views) {
                view.times = view.times.or_prefill_of(&times);
            }
        }
        if times.prefill_is_measured() {
            self.measured = Some(times);
        }
        let measured = self.measured;
        if let Some(view) = self.nodes(place.side).views.get_mut(place.index) {
            view.times = measured.map_or(times, |measured| times.or_prefill_of(&measured));
        }
    }

    /// Chooses: `choose` gets the prefill and the decode nodes as they are now, with what they hold of a prompt.
    pub fn choose(&mut self, held: &Held, choose: impl FnOnce(&[NodeView], &[NodeView]) -> Routed) -> Routed {
        self.prefill.refresh(held);
        self.decode.refresh(held);
        choose(&self.prefill.views, &self.decode.views)
    }

    fn nodes(&mut self, side: Side) -> &mut Nodes {
        match side {
            Side::Prefill => &mut self.prefill,
            Side::Decode => &mut self.decode,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockIndex, Decision, RefuseReason, Reported, StepModel};
    use baton_types::{BlockHash, Instance};
    use std::time::Duration;

    fn node(instance: u64) -> FleetNode {
        FleetNode {
            view: NodeView {
                instance: Instance(instance),
                queued_requests: 0,
                queue_capacity: 4,
                queued_tokens: 0,
                running_requests: 0,
                times: StepTimes::default(),
                blocks: Default::default(),
                block_tokens: 16,
                held_tokens: 0,
            },
            load: Load::default(),
            placed: Arc::default(),
            full: false,
        }
    }

    fn views(fleet: &mut Fleet, held: &Held) -> [Vec<NodeView>; 2] {
        let mut seen = [Vec::new(), Vec::new()];
        fleet.choose(held, |prefill, decode| {
            seen = [prefill.to_vec(), decode.to_vec()];
            Routed {
                decision: Decision::Refuse {
                    reason: RefuseReason::NoDecodeNode,
                    retry_after: Duration::ZERO,
                },
                candidates: Vec::new(),
            }
        });
        seen
    }

    #[test]
    fn views_follow_reports_claims_and_what_is_held() {
        let (mut fleet, mut index) = (Fleet::default(), BlockIndex::new(10));
        let (first, second) = (node(1), node(2));
        let placed = Arc::clone(&second.placed);
        let (p, d) = (fleet.add(Side::Prefill, first), fleet.add(Side::Decode, second));
        placed.comes(30);
        index.add(Instance(1), &[BlockHash([7; 16])]);
        let [prefill, decode] = views(&mut fleet, &index.held(&[BlockHash([7; 16])]));
        assert_eq!((prefill[0].held_tokens, prefill[0].queued_requests), (16, 0));
        assert_eq!((decode[0].held_tokens, decode[0].queued_tokens), (0, 30));
        fleet.is_full(p);
        let reported = Reported {
            queued_requests: 3,
            queued_tokens: 90,
            ..Reported::default()
        };
        fleet.spoke(d, Load::new(reported, placed.figures()), 9);
        let [prefill, decode] = views(&mut fleet, &Held::default());
        assert_eq!((prefill[0].held_tokens, prefill[0].queued_requests), (0, 4), "full");
        assert_eq!((decode[0].queued_requests, decode[0].queued_tokens), (3, 90));
        fleet.spoke(p, Load::default(), 4);
        assert_eq!(views(&mut fleet, &Held::default())[0][0].queued_requests, 0);
        fleet.clear();
        assert!(views(&mut fleet, &Held::default()).iter().all(Vec::is_empty));
    }

    #[test]
    fn who_was_never_measured_is_taken_for_one_who_was() {
        let mut fleet = Fleet::default();
        fleet.add(Side::Prefill, node(1));
        let place = fleet.add(Side::Prefill, node(2));
        let mut model = StepModel::default();
        (0..9).for_each(|_| model.prefilled(512, 0, Duration::from_millis(100)));
        fleet.set_times(place, model.times());
        fleet.add(Side::Decode, node(3));
        let [prefill, decode] = views(&mut fleet, &Held::default());
        for view in prefill.iter().chain(&decode) {
            assert_eq!(view.times.prefill(512, 0), model.times().prefill(512, 0));
            assert_eq!(view.times.prefill_is_measured(), view.instance == Instance(2));
        }
    }
}
