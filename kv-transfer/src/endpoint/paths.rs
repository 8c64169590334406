//! Which path a hand-over takes: what is known of the ways to one peer, and the choice between them. Pure: no clock, no IO.
//! The driver is `link`.
//!
//! A way is opened when a hand-over wants it first, and stays open. One that fails is down for all hand-overs, for a time that
//! doubles with each failure in a row; then it is due to be tried. Only a write that was applied ends the row: a way that can
//! be opened and carries nothing must not be taken again and again.
//!
//! The choice is by predicted time for the size at hand. A prediction starts from what such a transport should do and moves
//! to what was measured; what was measured fades, so that a way that was slow once is tried again.

use crate::PathKind;
use std::time::Duration;

/// Rest after the first failure; doubled by each more in a row.
const BACK_OFF_MIN: Duration = Duration::from_secs(1);
const BACK_OFF_MAX: Duration = Duration::from_secs(30);
/// What was measured so long ago weighs half.
const HALF_LIFE: Duration = Duration::from_secs(30);
/// What the expectation weighs beside bytes that were measured, and beside writes whose latency was.
const PRIOR_BYTES: f64 = (64u64 << 20) as f64;
const PRIOR_WRITES: f64 = 32.0;
/// Smaller writes tell of latency, larger ones of bandwidth.
const SMALL: u64 = 128 << 10;
/// One write may be this much slower than predicted, as far as the prediction is concerned: a host that stalls once says
/// little of the path, one that is slow every time is learnt within a few writes.
const SURPRISE_MAX: f64 = 4.0;
/// Predictions that differ by less than this are equal: then the faster kind is taken.
const SAME: (f64, f64) = (1.25, 200e-6);

/// What a kind of path should do.
#[derive(Debug, Clone, Copy)]
struct Prior {
    bytes_per_second: f64,
    latency: f64,
}

impl Prior {
    fn of(kind: PathKind) -> Self {
        let (bytes_per_second, latency) = match kind {
            PathKind::Memory => (5e9, 2e-6),
            PathKind::Shm => (5e9, 5e-6),
            PathKind::Rdma => (10e9, 10e-6),
            PathKind::Cuda => (20e9, 10e-6),
            PathKind::Tcp => (1e9, 50e-6),
        };
        Self {
            bytes_per_second,
            latency,
        }
    }

    fn seconds_for(&self, bytes: u64) -> f64 {
        self.latency + bytes as f64 / self.bytes_per_second
    }
}

/// One write that was applied at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sample {
    pub bytes: u64,
    /// Since the later of its beginning and the end of the write before it: times of writes side by side do not add up to
    /// more than passed.
    pub took: Duration,
    /// No other write was under way when it began.
    pub alone: bool,
}

/// What was measured, as sums that fade, and what was expected.
#[derive(Debug)]
struct Estimate {
    prior: Prior,
    bytes: f64,
    seconds: f64,
    writes: f64,
    latencies: f64,
    at: Duration,
}

impl Estimate {
    fn new(kind: PathKind) -> Self {
        Self {
            prior: Prior::of(kind),
            bytes: 0.0,
            seconds: 0.0,
            writes: 0.0,
            latencies: 0.0,
            at: Duration::ZERO,
        }
    }

    fn faded(&self, now: Duration) -> f64 {
        let age = now.saturating_sub(self.at).as_secs_f64();
        (-age / HALF_LIFE.as_secs_f64()).exp2()
    }

    fn bytes_per_second(&self, now: Duration) -> f64 {
        let faded = self.faded(now);
        (PRIOR_BYTES + self.bytes * faded) / (PRIOR_BYTES / self.prior.bytes_per_second + self.seconds * faded)
    }

    fn latency(&self, now: Duration) -> f64 {
        let faded = self.faded(now);
        (PRIOR_WRITES * self.prior.latency + self.latencies * faded) / (PRIOR_WRITES + self.writes * faded)
    }

    fn seconds_for(&self, now: Duration, bytes: u64) -> f64 {
        self.latency(now) + bytes as f64 / self.bytes_per_second(now)
    }

    fn learn(&mut self, now: Duration, sample: Sample) {
        let predicted = self.seconds_for(now, sample.bytes);
        let took = sample.took.as_secs_f64().min(predicted * SURPRISE_MAX);
        let (latency, carrying) = (self.latency(now), sample.bytes as f64 / self.bytes_per_second(now));
        let faded = self.faded(now);
        self.bytes *= faded;
        self.seconds *= faded;
        self.writes *= faded;
        self.latencies *= faded;
        self.at = now;
        if sample.bytes >= SMALL {
            self.bytes += sample.bytes as f64;
            let waited = if sample.alone { latency } else { 0.0 };
            self.seconds += (took - waited).max(took / SURPRISE_MAX);
        } else if sample.alone {
            self.writes += 1.0;
            self.latencies += (took - carrying).max(0.0);
        }
    }

    /// Of large writes only.
    fn measured(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.bytes / self.seconds)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Never opened.
    Closed,
    /// Being opened, for a hand-over or as a probe.
    Opening,
    Up,
    /// Not to be opened before that.
    Down(Duration),
}

#[derive(Debug)]
struct Way {
    kind: PathKind,
    standing: Standing,
    /// How often it was opened: what is said of an earlier opening is not about this one.
    opening: u64,
    /// Failures since the last write that was applied.
    failures: u32,
    estimate: Estimate,
}

/// What a hand-over is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// Take the path that is open.
    Use(PathKind),
    /// Open it, and report.
    Open(PathKind),
    /// Somebody opens it: choose again when that ended.
    Wait(PathKind),
    /// There is no other way.
    Nothing,
}

/// How a way stands, for those who watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Report {
    pub kind: PathKind,
    pub up: bool,
    pub down: bool,
}

/// The ways to one peer.
#[derive(Debug)]
pub(super) struct Paths {
    ways: Vec<Way>,
}

impl Paths {
    /// Each kind counts once.
    pub(super) fn new(kinds: impl IntoIterator<Item = PathKind>) -> Self {
        let mut ways: Vec<Way> = Vec::new();
        for kind in kinds {
            if ways.iter().all(|way| way.kind != kind) {
                ways.push(Way {
                    kind,
                    standing: Standing::Closed,
                    opening: 0,
                    failures: 0,
                    estimate: Estimate::new(kind),
                });
            }
        }
        Self { ways }
    }

    fn way(&mut self, kind: PathKind) -> Option<&mut Way> {
        self.ways.iter_mut().find(|way| way.kind == kind)
    }

    /// For a hand-over of about so many bytes that has tried `excluding`. Where all ways are down, the one that is due next
    /// is tried before its time: nothing better is left.
    pub(super) fn choose(&mut self, now: Duration, bytes: u64, excluding: &[PathKind]) -> Choice {
        let mut best: Option<f64> = None;
        let open = |way: &&Way| !excluding.contains(&way.kind);
        let is_down = |way: &Way| matches!(way.standing, Standing::Down(_));
        for way in self.ways.iter().filter(open).filter(|way| !is_down(way)) {
            let seconds = way.estimate.seconds_for(now, bytes);
            best = Some(best.map_or(seconds, |best: f64| best.min(seconds)));
        }
        let chosen = match best {
            Some(best) => self
                .ways
                .iter()
                .filter(open)
                .filter(|way| !is_down(way))
                .filter(|way| way.estimate.seconds_for(now, bytes) <= best * SAME.0 + SAME.1)
                .min_by(|a, b| {
                    let [a, b] = [a, b].map(|way| way.estimate.prior.seconds_for(bytes));
                    a.total_cmp(&b)
                }),
            None => self.ways.iter().filter(open).min_by_key(|way| match way.standing {
                Standing::Down(until) => until,
                Standing::Closed | Standing::Opening | Standing::Up => Duration::ZERO,
            }),
        };
        match chosen.map(|way| way.kind) {
            None => Choice::Nothing,
            Some(kind) => self.take(kind),
        }
    }

    fn take(&mut self, kind: PathKind) -> Choice {
        let Some(way) = self.way(kind) else {
            return Choice::Nothing;
        };
        match way.standing {
            Standing::Up => Choice::Use(kind),
            Standing::Opening => Choice::Wait(kind),
            Standing::Closed | Standing::Down(_) => {
                way.standing = Standing::Opening;
                Choice::Open(kind)
            }
        }
    }

    /// It is open. Gives the number of this opening.
    pub(super) fn opened(&mut self, kind: PathKind) -> u64 {
        let Some(way) = self.way(kind) else { return 0 };
        way.standing = Standing::Up;
        way.opening += 1;
        way.opening
    }

    /// It cannot be opened. Says when it is due again.
    pub(super) fn open_failed(&mut self, now: Duration, kind: PathKind) -> Duration {
        self.way(kind).map_or(Duration::MAX, |way| way.fail(now))
    }

    /// It broke in use. Says whether that was news, and when it is due again.
    pub(super) fn broke(&mut self, now: Duration, kind: PathKind, opening: u64) -> Option<Duration> {
        let way = self.way(kind)?;
        let news = way.opening == opening && way.standing == Standing::Up;
        news.then(|| way.fail(now))
    }

    /// A write was applied.
    pub(super) fn applied(&mut self, now: Duration, kind: PathKind, opening: u64, sample: Sample) {
        if let Some(way) = self.way(kind) {
            way.estimate.learn(now, sample);
            if way.opening == opening {
                way.failures = 0;
            }
        }
    }

    pub(super) fn is_opening(&self, kind: PathKind) -> bool {
        let opening = |way: &Way| way.kind == kind && way.standing == Standing::Opening;
        self.ways.iter().any(opening)
    }

    /// Bytes per second of large writes lately.
    pub(super) fn measured(&self, kind: PathKind) -> Option<f64> {
        self.ways.iter().find(|way| way.kind == kind)?.estimate.measured()
    }

    /// Nothing is open or down any more: the peer is gone.
    pub(super) fn forget(&mut self) {
        for way in &mut self.ways {
            (way.standing, way.failures) = (Standing::Closed, 0);
        }
    }

    /// The ways that are down and due: each is to be opened, and reported on.
    pub(super) fn due(&mut self, now: Duration) -> Vec<PathKind> {
        let due = |way: &&mut Way| matches!(way.standing, Standing::Down(until) if until <= now);
        let probe = |way: &mut Way| {
            way.standing = Standing::Opening;
            way.kind
        };
        self.ways.iter_mut().filter(due).map(probe).collect()
    }

    /// When the next one is due.
    pub(super) fn next_due(&self) -> Duration {
        let until = |way: &Way| match way.standing {
            Standing::Down(until) => Some(until),
            Standing::Closed | Standing::Opening | Standing::Up => None,
        };
        self.ways.iter().filter_map(until).min().unwrap_or(Duration::MAX)
    }

    pub(super) fn report(&self) -> impl Iterator<Item = Report> + '_ {
        self.ways.iter().map(|way| Report {
            kind: way.kind,
            up: way.standing == Standing::Up,
            // A way that is probed is still down for those who watch.
            down: matches!(way.standing, Standing::Down(_)) || (way.standing == Standing::Opening && way.failures > 0),
        })
    }
}

impl Way {
    fn fail(&mut self, now: Duration) -> Duration {
        let doubled = 1u32.checked_shl(self.failures).unwrap_or(u32::MAX);
        let rest = BACK_OFF_MIN.saturating_mul(doubled).min(BACK_OFF_MAX);
        self.failures = self.failures.saturating_add(1);
        let until = now.saturating_add(rest);
        self.standing = Standing::Down(until);
        until
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PathKind::{Memory, Rdma, Shm, Tcp};
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn sample(bytes: u64, bytes_per_second: f64) -> Sample {
        Sample {
            bytes,
            took: Duration::from_secs_f64(bytes as f64 / bytes_per_second),
            alone: true,
        }
    }

    /// Opens whatever is chosen.
    fn taken(paths: &mut Paths, now: Duration, bytes: u64, excluding: &[PathKind]) -> Option<PathKind> {
        match paths.choose(now, bytes, excluding) {
            Choice::Use(kind) => Some(kind),
            Choice::Open(kind) => {
                paths.opened(kind);
                Some(kind)
            }
            Choice::Wait(_) | Choice::Nothing => None,
        }
    }

    #[test]
    fn what_should_be_fastest_for_the_size_is_taken_first() {
        let mut paths = Paths::new([Tcp, Shm, Rdma, Tcp]);
        assert_eq!(taken(&mut paths, at(0), 4096, &[]), Some(Shm));
        assert_eq!(taken(&mut paths, at(0), 1024 * MIB, &[]), Some(Rdma));
        assert_eq!(taken(&mut paths, at(0), 4096, &[Shm]), Some(Rdma));
        assert_eq!(taken(&mut paths, at(0), 4096, &[Shm, Rdma]), Some(Tcp));
        assert_eq!(paths.choose(at(0), 4096, &[Shm, Rdma, Tcp]), Choice::Nothing);
        let mut paths = Paths::new([Tcp, Shm, Memory]);
        assert_eq!(taken(&mut paths, at(0), 4096, &[]), Some(Memory));
    }

    #[test]
    fn a_path_is_opened_once() {
        let mut paths = Paths::new([Tcp]);
        assert_eq!(paths.choose(at(0), 1, &[]), Choice::Open(Tcp));
        assert_eq!(paths.choose(at(0), 1, &[]), Choice::Wait(Tcp));
        paths.opened(Tcp);
        assert_eq!(paths.choose(at(0), 1, &[]), Choice::Use(Tcp));
    }

    #[test]
    fn what_is_measured_outweighs_what_was_expected_and_fades() {
        let mut paths = Paths::new([Rdma, Tcp]);
        assert_eq!(taken(&mut paths, at(0), 64 * MIB, &[]), Some(Rdma));
        let opening = 1;
        for _ in 0..3 {
            paths.applied(at(0), Rdma, opening, sample(8 * MIB, 0.2e9));
        }
        assert_eq!(
            taken(&mut paths, at(0), 64 * MIB, &[]),
            Some(Rdma),
            "a few slow writes prove little"
        );
        for _ in 0..60 {
            paths.applied(at(0), Rdma, opening, sample(8 * MIB, 0.2e9));
        }
        assert_eq!(taken(&mut paths, at(0), 64 * MIB, &[]), Some(Tcp));
        assert_eq!(
            taken(&mut paths, at(0), 4096, &[]),
            Some(Rdma),
            "its latency is not known to be bad"
        );
        assert_eq!(
            taken(&mut paths, at(600), 64 * MIB, &[]),
            Some(Rdma),
            "that was long ago"
        );
    }

    #[test]
    fn small_writes_tell_nothing_of_bandwidth() {
        let mut paths = Paths::new([Tcp]);
        let opening = paths.opened(Tcp);
        paths.applied(at(1), Tcp, opening, sample(4096, 1e6));
        assert_eq!(paths.measured(Tcp), None);
        for _ in 0..100 {
            paths.applied(at(1), Tcp, opening, sample(8 * MIB, 2e9));
        }
        let measured = paths.measured(Tcp).unwrap();
        assert!((1.8e9..2.2e9).contains(&measured), "{measured}");
    }

    #[test]
    fn a_failed_path_is_down_for_all_until_it_is_probed() {
        let mut paths = Paths::new([Shm, Tcp]);
        assert_eq!(taken(&mut paths, at(10), 1, &[]), Some(Shm));
        assert_eq!(paths.broke(at(10), Shm, 1), Some(at(11)));
        assert_eq!(paths.broke(at(10), Shm, 1), None, "others say it too");
        assert_eq!(taken(&mut paths, at(10), 1, &[]), Some(Tcp));
        assert_eq!((paths.next_due(), paths.due(at(10))), (at(11), vec![]));
        assert_eq!(paths.due(at(11)), [Shm]);
        assert_eq!((paths.next_due(), paths.due(at(11))), (Duration::MAX, vec![]));
        let down = |paths: &Paths| {
            paths
                .report()
                .filter(|way| way.down)
                .map(|way| way.kind)
                .collect::<Vec<_>>()
        };
        assert_eq!(down(&paths), [Shm], "a probe is no path yet");
        let opening = paths.opened(Shm);
        assert_eq!(down(&paths), []);
        assert_eq!(taken(&mut paths, at(11), 1, &[]), Some(Shm), "it came back");
        assert_eq!(paths.broke(at(12), Shm, 1), None, "the one before broke, not this one");
        assert_eq!(paths.broke(at(12), Shm, opening), Some(at(14)), "twice as long");
    }

    #[test]
    fn the_back_off_doubles_up_to_its_bound_and_ends_with_a_write() {
        let mut paths = Paths::new([Tcp]);
        let rests: Vec<u64> = (0..7)
            .map(|_| (paths.open_failed(at(100), Tcp) - at(100)).as_secs())
            .collect();
        assert_eq!(rests, [1, 2, 4, 8, 16, 30, 30]);
        for _ in 0..40 {
            assert_eq!(paths.open_failed(at(100), Tcp), at(130));
        }
        let opening = paths.opened(Tcp);
        assert_eq!(
            paths.broke(at(200), Tcp, opening),
            Some(at(230)),
            "opening alone proves nothing"
        );
        let opening = paths.opened(Tcp);
        paths.applied(at(230), Tcp, opening, sample(1, 1e9));
        assert_eq!(paths.broke(at(240), Tcp, opening), Some(at(241)));
    }

    #[test]
    fn a_path_that_is_down_is_better_than_none() {
        let mut paths = Paths::new([Shm, Tcp]);
        paths.opened(Shm);
        paths.opened(Tcp);
        paths.broke(at(1), Tcp, 1);
        paths.broke(at(2), Shm, 1);
        assert_eq!(paths.choose(at(2), 1, &[]), Choice::Open(Tcp));
        assert_eq!(paths.choose(at(2), 1, &[Tcp]), Choice::Open(Shm));
    }

    proptest! {
        /// Whatever happens: what is chosen is not excluded, one that is down is never preferred, each probe comes in time,
        /// and every prediction is a positive number.
        #[test]
        fn choices_are_sound(steps in proptest::collection::vec((0..6u8, 0..3usize, 0..2_000u64, 0..1u64 << 30), 1..200)) {
            let kinds = [Shm, Rdma, Tcp];
            let mut paths = Paths::new(kinds);
            let mut now = Duration::ZERO;
            for (what, which, millis, bytes) in steps {
                now += Duration::from_millis(millis);
                let kind = kinds[which];
                let opening = paths.ways[which].opening;
                match what {
                    0 | 1 => {
                        let some_up = paths.ways.iter().any(|way| way.kind != kind && !matches!(way.standing, Standing::Down(_)));
                        let before: Vec<Standing> = paths.ways.iter().map(|way| way.standing).collect();
                        match paths.choose(now, bytes, &[kind]) {
                            Choice::Use(chosen) | Choice::Open(chosen) | Choice::Wait(chosen) => {
                                prop_assert_ne!(chosen, kind);
                                let index = kinds.iter().position(|kind| *kind == chosen).unwrap();
                                prop_assert!(!some_up || !matches!(before[index], Standing::Down(_)));
                            }
                            Choice::Nothing => prop_assert!(false, "there is always another"),
                        }
                    }
                    2 if paths.ways[which].standing == Standing::Opening => { paths.opened(kind); }
                    3 if paths.ways[which].standing == Standing::Opening => {
                        let until = paths.open_failed(now, kind);
                        prop_assert!(until >= now + BACK_OFF_MIN && until <= now + BACK_OFF_MAX);
                    }
                    4 => { paths.broke(now, kind, opening); }
                    _ => {
                        let took = Duration::from_micros(millis);
                        paths.applied(now, kind, opening, Sample { bytes, took, alone: millis % 2 == 0 });
                    }
                }
                paths.due(now);
                prop_assert!(paths.next_due() > now);
                for way in &paths.ways {
                    let seconds = way.estimate.seconds_for(now, bytes);
                    prop_assert!(seconds.is_finite() && seconds > 0.0, "{}", seconds);
                }
            }
        }
    }
}
