//! Processes that are killed or stopped in the middle of hand-overs, at random moments: the other end has its blocks back.

use crate::plan::Random;
use crate::process::{PATIENCE, Process, Said, is_long, seed};
use baton_kv_transfer::{EndpointOptions, PathKind};
use rustix::process::Signal;
use std::collections::{BTreeMap, HashMap};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Of each process: few, so that the bound on what one sender can tie up is felt.
const BLOCKS: usize = 256;
const VICTIM: usize = 0;
const OTHER: usize = 1;
const RECEIVER: usize = 2;
/// Of the victim, at once.
const AT_ONCE: u64 = 16;
/// Of the other sender, while the victim is stopped.
const SERVED: u64 = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Fault {
    KillSender,
    KillReceiver,
    StopAndContinue,
    StopAndKill,
}

#[test]
fn killed_and_stopped_over_tcp() {
    run(PathKind::Tcp);
}

#[test]
fn killed_and_stopped_over_shm() {
    run(PathKind::Shm);
}

fn run(path: PathKind) {
    let (seed, rounds) = (seed(), if is_long() { 250 } else { 20 });
    println!("{rounds} rounds of kills over {path}, seed {seed}");
    let begin = Instant::now();
    let mut campaign = Campaign::start(path, seed);
    for round in 0..rounds {
        campaign.round(round);
    }
    println!(
        "{rounds} rounds over {path} in {:.1} s; rounds and longest until the other end had its blocks back: {:?}; ends: {:?}",
        begin.elapsed().as_secs_f64(),
        campaign.longest,
        campaign.ends
    );
    for at in [VICTIM, OTHER, RECEIVER] {
        campaign.clean(at);
        campaign.dying.push(at);
        campaign.processes[at].tell("quit");
        assert_eq!(campaign.answer(at, "bye"), "");
    }
}

struct Campaign {
    path: PathKind,
    seed: u64,
    random: Random,
    sender: Sender<Said>,
    said: Receiver<Said>,
    processes: [Process; 3],
    next: u64,
    /// Ends of hand-overs: (who, number).
    heard: HashMap<(usize, u64), String>,
    /// Answers to other orders.
    answers: Vec<(usize, String)>,
    /// Processes that were killed, and whose end was not heard of yet.
    dying: Vec<usize>,
    longest: BTreeMap<Fault, (usize, Duration)>,
    ends: BTreeMap<String, usize>,
}

impl Campaign {
    fn start(path: PathKind, seed: u64) -> Self {
        let (sender, said) = channel();
        let processes = [VICTIM, OTHER, RECEIVER].map(|id| Process::start(id, path, seed, BLOCKS, &sender));
        let mut campaign = Self {
            path,
            seed,
            random: Random(seed),
            sender,
            said,
            processes,
            next: 0,
            heard: HashMap::new(),
            answers: Vec::new(),
            dying: Vec::new(),
            longest: BTreeMap::new(),
            ends: BTreeMap::new(),
        };
        campaign.introduce();
        campaign
    }

    fn introduce(&mut self) {
        let receiver = self.processes[RECEIVER].peer.clone();
        for at in [VICTIM, OTHER] {
            self.processes[at].tell(&format!("to receiver {receiver}"));
        }
    }

    /// A killed process comes again, as another instance.
    fn restart(&mut self, at: usize) {
        self.processes[at] = Process::start(at, self.path, self.seed, BLOCKS, &self.sender);
        self.introduce();
    }

    fn round(&mut self, round: u64) {
        let fault = [
            Fault::KillSender,
            Fault::KillReceiver,
            Fault::KillSender,
            Fault::StopAndContinue,
            Fault::StopAndKill,
        ][round as usize % 5];
        let story = format!("round {round}, {fault:?}, seed {}", self.seed);
        let numbers: Vec<u64> = (0..AT_ONCE).map(|_| self.begin(VICTIM, "long")).collect();
        let moment = Duration::from_micros(self.random.below(14_000));
        self.listen_for(moment);
        let since = Instant::now();
        match fault {
            Fault::KillSender => {
                self.kill(VICTIM);
                self.blocks_return(&story, since, fault);
                self.restart(VICTIM);
            }
            Fault::KillReceiver => {
                self.kill(RECEIVER);
                for number in &numbers {
                    let end = self.end_of(VICTIM, *number);
                    assert!(end.starts_with("ok") || end.starts_with("failed"), "{story}: {end}");
                }
                self.clean(VICTIM);
                self.took(&story, since, fault);
                self.restart(RECEIVER);
            }
            Fault::StopAndContinue | Fault::StopAndKill => self.stopped(&story, fault, since),
        }
        self.conclude(&numbers, fault);
        // And all three go on as before.
        for at in [VICTIM, OTHER] {
            let number = self.begin(at, "long");
            assert_eq!(
                self.end_of(at, number),
                format!("ok {}", self.path),
                "{story}, afterwards"
            );
            let end = self.end_of(RECEIVER, number);
            assert!(end.starts_with("committed"), "{story}, afterwards: {end}");
        }
    }

    /// Its blocks are kept from everyone as long as it could write them, no more of them than the bound; others are served.
    fn stopped(&mut self, story: &str, fault: Fault, since: Instant) {
        let logged = self.processes[RECEIVER].log().len();
        self.processes[VICTIM].signal(Signal::STOP);
        for _ in 0..SERVED {
            let number = self.begin(OTHER, "whole");
            assert_eq!(
                self.end_of(OTHER, number),
                format!("ok {}", self.path),
                "{story}, of the other sender"
            );
            let end = self.end_of(RECEIVER, number);
            assert!(end.starts_with("committed"), "{story}, of the other sender: {end}");
        }
        // Its grants end: by silence, by their lease at the latest. Asks that wait for room end too.
        let bound = BLOCKS / 4;
        self.until(story, since + PATIENCE, |[_, reserved, quarantined]| {
            assert!(
                reserved + quarantined <= bound,
                "{reserved} + {quarantined} blocks of one sender"
            );
            reserved == 0
        });
        // What is proven over at once was in quarantine for a moment only.
        std::thread::sleep(Duration::from_millis(100));
        let quarantined = self.stats()[2];
        self.is_logged(story, logged, quarantined);
        *self
            .ends
            .entry(format!("{fault:?}: quarantined {}", quarantined > 0))
            .or_default() += 1;
        let since = Instant::now();
        match fault {
            Fault::StopAndContinue => self.processes[VICTIM].signal(Signal::CONT),
            _ => self.kill(VICTIM),
        }
        self.blocks_return(story, since, fault);
        if fault == Fault::StopAndKill {
            self.restart(VICTIM);
        }
    }

    /// What happened is one line of the receiver's log; what it does about it another, where there is something.
    fn is_logged(&mut self, story: &str, from: usize, quarantined: usize) {
        let victim = self.processes[VICTIM].peer.split(' ').next().unwrap_or_default();
        let victim = victim.trim_start_matches("node-").to_owned();
        let words = if quarantined > 0 {
            "stay in quarantine"
        } else {
            "was silent"
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = self.processes[RECEIVER].log().split_off(from);
            let said = log
                .iter()
                .filter(|line| line.contains(&victim) && line.contains(words))
                .count();
            if said == 1 {
                return;
            }
            let story = format!(
                "{story}: {quarantined} blocks in quarantine, said {said} times:\n{}",
                log.join("\n")
            );
            assert!(said == 0 && Instant::now() < deadline, "{story}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// By itself: nobody has told the receiver yet that the sender is gone.
    fn blocks_return(&mut self, story: &str, since: Instant, fault: Fault) {
        let lease = EndpointOptions::default().reservation_lease;
        self.until(story, since + lease, |[_, reserved, quarantined]| {
            reserved + quarantined == 0
        });
        self.took(story, since, fault);
    }

    fn took(&mut self, story: &str, since: Instant, fault: Fault) {
        let took = since.elapsed();
        let lease = EndpointOptions::default().reservation_lease;
        assert!(took <= lease, "{story}: {took:?} until the blocks were back");
        let (count, longest) = self.longest.entry(fault).or_default();
        (*count, *longest) = (*count + 1, took.max(*longest));
    }

    /// Polls the receiver's (hand-overs, reserved blocks, quarantined blocks).
    fn until(&mut self, story: &str, deadline: Instant, mut enough: impl FnMut([usize; 3]) -> bool) {
        loop {
            let stats = self.stats();
            if enough(stats) {
                return;
            }
            assert!(Instant::now() < deadline, "{story}: too late: {stats:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn stats(&mut self) -> [usize; 3] {
        self.processes[RECEIVER].tell("stats");
        let answer = self.answer(RECEIVER, "stats ");
        let numbers: Vec<usize> = answer.split(' ').map(|number| number.parse().unwrap()).collect();
        [numbers[0], numbers[2], numbers[3]]
    }

    /// What the coordinator does for hand-overs whose end nobody heard of, until all are over.
    fn conclude(&mut self, numbers: &[u64], fault: Fault) {
        for number in numbers {
            let sender = match fault {
                Fault::KillSender | Fault::StopAndKill => {
                    self.heard.get(&(VICTIM, *number)).cloned().unwrap_or_default()
                }
                Fault::KillReceiver | Fault::StopAndContinue => self.end_of(VICTIM, *number),
            };
            let receiver = match fault {
                Fault::KillReceiver => self.heard.get(&(RECEIVER, *number)).cloned().unwrap_or_default(),
                _ => {
                    self.processes[RECEIVER].tell(&format!("drop {number}"));
                    self.end_of(RECEIVER, *number)
                }
            };
            let word = |end: &str| end.split(' ').next().unwrap_or_default().to_owned();
            let (sender, receiver) = (word(&sender), word(&receiver));
            // The receiver may be killed between its commit and its saying so.
            let fits = sender != "ok" || receiver == "committed" || fault == Fault::KillReceiver;
            assert!(
                fits,
                "{fault:?}: hand-over {number} is {sender} at the sender and {receiver} at the receiver"
            );
            *self.ends.entry(format!("{fault:?}: {sender}/{receiver}")).or_default() += 1;
        }
        self.heard.clear();
        self.clean(OTHER);
        self.clean(RECEIVER);
        self.clean(VICTIM);
    }

    fn clean(&mut self, at: usize) {
        self.processes[at].tell("clean");
        self.answer(at, "clean ");
    }

    /// One more hand-over, once its receiver expects it.
    fn begin(&mut self, from: usize, kind: &str) -> u64 {
        let number = self.next;
        self.next += 1;
        self.processes[RECEIVER].tell(&format!("expect {kind} {number}"));
        assert_eq!(self.answer(RECEIVER, "expecting "), number.to_string());
        self.processes[from].tell(&format!("send {kind} receiver {number}"));
        number
    }

    fn kill(&mut self, at: usize) {
        self.dying.push(at);
        self.processes[at].signal(Signal::KILL);
        while self.dying.contains(&at) {
            self.hear("a killed process to end");
        }
        self.answers.retain(|(id, _)| *id != at);
    }

    fn end_of(&mut self, at: usize, number: u64) -> String {
        loop {
            if let Some(end) = self.heard.get(&(at, number)) {
                return end.clone();
            }
            self.hear(&format!("the end of {number} at {at}"));
        }
    }

    fn answer(&mut self, at: usize, start: &str) -> String {
        loop {
            let found = self
                .answers
                .iter()
                .position(|(id, words)| *id == at && words.starts_with(start));
            if let Some(found) = found {
                return self.answers.swap_remove(found).1.split_off(start.len());
            }
            self.hear(&format!("`{start}` of {at}"));
        }
    }

    fn hear(&mut self, what: &str) {
        match self.said.recv_timeout(PATIENCE) {
            Ok((id, Some(words))) => self.sort(id, words),
            Ok((id, None)) => {
                let dying = self.dying.iter().position(|dying| *dying == id);
                let dying =
                    dying.unwrap_or_else(|| panic!("process {id} ended, waiting for {what} (seed {})", self.seed));
                self.dying.swap_remove(dying);
            }
            Err(_) => panic!("waited in vain for {what} (seed {})", self.seed),
        }
    }

    fn listen_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Ok((id, words)) = self.said.recv_timeout(end.saturating_duration_since(Instant::now())) {
            self.sort(id, words.expect("nobody ends by itself"));
        }
    }

    fn sort(&mut self, id: usize, words: String) {
        let mut parts = words.splitn(3, ' ');
        match (
            parts.next(),
            parts.next().and_then(|number| number.parse().ok()),
            parts.next(),
        ) {
            (Some("in" | "out"), Some(number), end) => {
                self.heard.insert((id, number), end.unwrap_or_default().to_owned());
            }
            _ => self.answers.push((id, words)),
        }
    }
}
