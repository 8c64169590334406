//! Schedules from their seeds, and the bugs that they must catch.

use super::super::planted::{self, Planted};
use super::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Steps in which things go wrong; those after them, in which they end, are bounded too.
const STEPS: usize = 3_000;
const CALM_STEPS: usize = 40_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Told {
    log: u64,
    commits: usize,
    resumed: usize,
    refused_digests: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let senders = (0..SENDERS as u64).map(|at| SenderNode {
            instance: Instance(100 + at),
            stopped: false,
            sources: vec![SourceBlock::default(); SOURCES],
        });
        Self {
            digests: dice.one_in(2),
            mildness: [1, 3, 8][dice.throw(3)],
            dice,
            now: MS,
            calm: false,
            receivers: (0..RECEIVERS).map(|_| ReceiverNode::new(1)).collect(),
            senders: senders.collect(),
            hands: BTreeMap::new(),
            paths: BTreeMap::new(),
            wires: BTreeMap::new(),
            lines: BTreeMap::new(),
            unseen_by_sender: Vec::new(),
            unseen_by_receiver: Vec::new(),
            grants: Vec::new(),
            numbers: 0,
            tickets: 0,
            commits: 0,
            resumed: 0,
            refused_digests: 0,
            log: 0xcbf2_9ce4_8422_2325,
        }
    }

    fn is_over(&self) -> bool {
        let idle = |node: &ReceiverNode| {
            node.roles.is_empty()
                && node.sequences.is_empty()
                && node.machine.blocks_out() == (0, 0)
                && node.machine.asking() == 0
        };
        self.hands.is_empty() && self.receivers.iter().all(idle)
    }

    /// Lets everything come to its end. A process that is stopped stays so, or ends, or goes on.
    fn end(&mut self) {
        self.calm = true;
        self.tickets = TICKETS;
        for at in 0..SENDERS {
            if self.senders[at].stopped {
                match self.dice.throw(2) {
                    0 => self.restart_sender(at),
                    _ => self.senders[at].stopped = false,
                }
            }
        }
        for _ in 0..CALM_STEPS {
            if self.is_over() {
                break;
            }
            self.step();
        }
        for (to, node) in self.receivers.iter().enumerate() {
            assert!(
                node.roles.values().all(|role| !role.open),
                "attempts at {to} never ended"
            );
            assert_eq!(
                node.machine.blocks_out(),
                (0, 0),
                "blocks of {to} are in nobody's hands"
            );
            let pool = |owner: &Owner| *owner == Owner::Pool;
            assert!(
                node.owners.iter().all(pool),
                "blocks of {to} are lost: {:?}",
                node.owners
            );
        }
        assert!(self.is_over(), "it does not come to an end");
    }
}

fn run(seed: u64) -> Told {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
    }
    world.end();
    Told {
        log: world.log,
        commits: world.commits,
        resumed: world.resumed,
        refused_digests: world.refused_digests,
    }
}

/// Runs a schedule; where it fails, says which.
fn told(seed: u64) -> Told {
    catch_unwind(AssertUnwindSafe(|| run(seed)))
        .unwrap_or_else(|_| panic!("schedule failed: run it again with BATON_SEED={seed}"))
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_schedule_corrupts_leaks_or_outlives_its_deadline() {
    let seeds = match (variable("BATON_SEED"), variable("BATON_TEST_LONG")) {
        (Some(seed), _) => seed..seed + 1,
        (None, Some(1)) => 0..20_000,
        (None, _) => 0..2_000,
    };
    let runs = seeds.end - seeds.start;
    let mut sum = Told::default();
    for seed in seeds.clone() {
        let told = told(seed);
        sum.commits += told.commits;
        sum.resumed += told.resumed;
        sum.refused_digests += told.refused_digests;
        sum.log = sum.log.wrapping_mul(31).wrapping_add(told.log);
    }
    println!("schedules {seeds:?}: {sum:?}");
    // They reach what they are there for.
    if runs > 1 {
        assert!(sum.commits as u64 > runs, "{sum:?}");
        assert!(sum.resumed as u64 > runs / 8, "{sum:?}");
        assert!(sum.refused_digests > 0, "{sum:?}");
    }
}

#[test]
fn a_schedule_run_again_is_the_same() {
    for seed in 0..50 {
        assert_eq!(told(seed), told(seed), "BATON_SEED={seed}");
    }
}

/// Runs schedules with a bug until one fails; says which, and how.
fn caught(bug: Planted, within: u64) -> Option<(u64, String)> {
    planted::with(Some(bug), || {
        (0..within).find_map(|seed| {
            let panic = catch_unwind(AssertUnwindSafe(|| run(seed))).err()?;
            let said = panic.downcast_ref::<String>().cloned();
            Some((
                seed,
                said.or_else(|| panic.downcast_ref::<&str>().map(|said| (*said).to_owned()))
                    .unwrap_or_default(),
            ))
        })
    })
}

#[test]
fn every_planted_bug_is_caught() {
    let expected = [
        (Planted::NoQuarantine, "is being written into a block of"),
        (Planted::FlushIsProof, "is being written into a block of"),
        (Planted::OldEpoch, "got a claim when it was over"),
        (Planted::RestartedPeer, "a foreign writer got a claim"),
        (Planted::DuplicateCounts, "two frames into one place"),
        (Planted::EarlyCommit, "was committed with block"),
        (Planted::SourceFreed, "was committed with block"),
        (Planted::CheckedBeforeOnly, "was committed with block"),
    ];
    let mut missed = Vec::new();
    for (bug, how) in expected {
        match caught(bug, 500) {
            Some((seed, said)) => {
                println!("{bug:?}: schedule {seed}: {said}");
                assert!(said.contains(how), "{bug:?} was seen otherwise: {said}");
            }
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "bugs that nobody saw: {missed:?}");
}
