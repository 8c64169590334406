//! The open loop: sends each request when it is due.

use crate::{Observed, Planned, Run, Target};
use std::future::Future;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// Between two reports of progress.
const REPORT: Duration = Duration::from_secs(2);

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Since its start.
    pub elapsed: Duration,
    /// Requests of the schedule.
    pub planned: usize,
    /// Those that were sent.
    pub sent: usize,
    /// Those that ended.
    pub ended: usize,
    /// Of these, those that failed or were refused.
    pub failed: usize,
}

/// Offers a schedule, in the order of its times, until all has ended or `stop` has. What had not ended by then is counted, but not
/// measured.
pub async fn offer(
    target: &Target,
    schedule: Vec<Planned>,
    stop: impl Future<Output = ()>,
    mut progress: impl FnMut(Progress),
) -> Run {
    let begun = Instant::now();
    let (mut running, mut done) = (JoinSet::new(), Vec::with_capacity(schedule.len()));
    let mut told = Progress {
        planned: schedule.len(),
        ..Progress::default()
    };
    let mut ticks = interval(REPORT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks.tick().await;
    let mut coming = schedule.into_iter().peekable();
    tokio::pin!(stop);
    loop {
        let due = coming.peek().map(|next| begun + next.at);
        if due.is_none() && running.is_empty() {
            break;
        }
        tokio::select! {
            biased;
            () = &mut stop => break,
            () = sleep_until(due.unwrap_or(begun)), if due.is_some() => {
                if let Some(planned) = coming.next() {
                    told.sent += 1;
                    running.spawn(target.clone().send(planned, begun));
                }
            }
            Some(ended) = running.join_next(), if !running.is_empty() => {
                told.ended += 1;
                // A task that panicked has said so already.
                if let Ok(observed) = ended {
                    told.failed += usize::from(!observed.is_served());
                    done.push(observed);
                }
            }
            _ = ticks.tick() => {
                told.elapsed = begun.elapsed();
                progress(told);
            }
        }
    }
    let took = begun.elapsed();
    let unfinished = running.len();
    running.shutdown().await;
    done.sort_by_key(|observed: &Observed| observed.at);
    Run {
        requests: done,
        unfinished,
        unsent: coming.count(),
        took,
    }
}
