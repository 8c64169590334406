//! The steps of a schedule, how they are drawn, and the tests that run them.

use super::{Owner, TICKETS, WRITERS, World};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

/// One random step; the numbers choose among what there is.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Expect {
        ticket: u128,
        blocks: u32,
        budget: u64,
    },
    Supersede {
        ticket: u128,
        by: u32,
    },
    Forget {
        ticket: u128,
    },
    Reserve {
        writer: u64,
        ticket: u128,
        attempt: u32,
        budget: u64,
    },
    /// Begins to write an extent of some known grant, over one of two connections.
    Claim {
        grant: usize,
        ordinal: u32,
        layers: u32,
        connection: u64,
        foreign: bool,
    },
    /// Ends one of the frames being written: whole or torn.
    Frame {
        frame: usize,
        whole: bool,
    },
    Complete {
        grant: usize,
        foreign: bool,
    },
    Abort {
        grant: usize,
    },
    /// Honest fencing: no frame of the writer is left when its markers come.
    Fence {
        grant: usize,
    },
    Renew {
        grant: usize,
    },
    Close {
        writer: u64,
        connection: u64,
    },
    PeerLost {
        writer: u64,
    },
    Disconnected {
        which: usize,
    },
    Room,
    Wait {
        ms: u64,
    },
}

fn steps() -> impl Strategy<Value = Step> {
    let ticket = || 0..TICKETS;
    let grant = || 0..usize::MAX;
    prop_oneof![
        3 => (ticket(), 0u32..3, 300u64..3000).prop_map(|(ticket, blocks, budget)| Step::Expect { ticket, blocks, budget }),
        1 => (ticket(), 0u32..3).prop_map(|(ticket, by)| Step::Supersede { ticket, by }),
        1 => ticket().prop_map(|ticket| Step::Forget { ticket }),
        6 => (0..WRITERS, ticket(), 1u32..3, 1u64..3000)
            .prop_map(|(writer, ticket, attempt, budget)| Step::Reserve { writer, ticket, attempt, budget }),
        20 => (grant(), 0u32..4, 0u32..6, 0u64..2, prop::bool::weighted(0.1)).prop_map(
            |(grant, ordinal, layers, connection, foreign)| Step::Claim { grant, ordinal, layers, connection, foreign }
        ),
        20 => (grant(), prop::bool::weighted(0.98)).prop_map(|(frame, whole)| Step::Frame { frame, whole }),
        8 => (grant(), prop::bool::weighted(0.1)).prop_map(|(grant, foreign)| Step::Complete { grant, foreign }),
        1 => grant().prop_map(|grant| Step::Abort { grant }),
        1 => grant().prop_map(|grant| Step::Fence { grant }),
        1 => grant().prop_map(|grant| Step::Renew { grant }),
        1 => (0..2 * WRITERS, 0u64..2).prop_map(|(writer, connection)| Step::Close { writer, connection }),
        1 => (0..2 * WRITERS).prop_map(|writer| Step::PeerLost { writer }),
        3 => grant().prop_map(|which| Step::Disconnected { which }),
        1 => Just(Step::Room),
        3 => (0u64..150).prop_map(|ms| Step::Wait { ms }),
    ]
}

/// Runs a schedule, then lets time pass until all is over.
fn run(schedule: Vec<Step>) -> World {
    run_in(World::new(), schedule)
}

fn run_in(mut world: World, schedule: Vec<Step>) -> World {
    for step in schedule {
        world.step(step);
    }
    for _ in 0..200 {
        if world.is_over() {
            break;
        }
        while !world.condemned.is_empty() {
            world.step(Step::Disconnected { which: 0 });
        }
        world.step(Step::Wait { ms: 100 });
    }
    assert!(world.is_over(), "it does not come to an end");
    assert!(world.open.is_empty(), "attempts that never ended: {:?}", world.open);
    assert!(world.frames.is_empty(), "frames of dead epochs are left");
    assert!(
        world.owners.iter().all(|owner| *owner == Owner::Pool),
        "blocks are lost: {:?}",
        world.owners
    );
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn no_schedule_corrupts_leaks_or_hangs(schedule in proptest::collection::vec(steps(), 0..160)) {
        let world = run(schedule);
        prop_assert!(world.commits.len() <= TICKETS as usize);
    }
}

/// The schedules reach what they are there for.
#[test]
fn schedules_commit_and_quarantine() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = proptest::collection::vec(steps(), 160);
    let (mut commits, mut epochs) = (0, 0);
    for _ in 0..100 {
        let schedule = strategy.new_tree(&mut runner).unwrap().current();
        let world = run(schedule);
        commits += world.commits.values().sum::<usize>();
        epochs += world.epochs.len();
    }
    assert!(commits > 50, "{commits} commits in 100 schedules");
    assert!(
        epochs > commits + 50,
        "{epochs} epochs in 100 schedules, {commits} of them committed"
    );
}

/// The model sees what it is there to see.
#[test]
#[should_panic(expected = "is being written into a block of Pool")]
fn a_missing_quarantine_is_caught() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = proptest::collection::vec(steps(), 160);
    for _ in 0..100 {
        let schedule = strategy.new_tree(&mut runner).unwrap().current();
        let world = World {
            no_quarantine: true,
            ..World::new()
        };
        run_in(world, schedule);
    }
}
