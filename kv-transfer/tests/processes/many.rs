//! Very many hand-overs between two processes, one in ten of them given up somewhere: nothing is lost on the way.

use crate::plan::{GivenUp, Plan};
use crate::process::{Process, Said, hear, is_long, seed};
use baton_kv_transfer::PathKind;
use std::collections::{BTreeMap, HashMap};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

/// At once.
const WINDOW: usize = 12;
/// Of each process: 8 MiB, so that what is compared is not a bare program.
const BLOCKS: usize = 4096;
const SENDER: usize = 0;
const RECEIVER: usize = 1;

#[derive(Default)]
struct Ends {
    sender: Option<String>,
    receiver: Option<String>,
}

struct Campaign {
    seed: u64,
    processes: [Process; 2],
    said: Receiver<Said>,
    running: HashMap<u64, Ends>,
    next: u64,
    ended: BTreeMap<String, usize>,
}

#[test]
fn many_handovers_over_tcp() {
    run(PathKind::Tcp);
}

#[test]
fn many_handovers_over_shm() {
    run(PathKind::Shm);
}

fn run(path: PathKind) {
    let (seed, count) = (seed(), if is_long() { 100_000 } else { 5_000 });
    println!("{count} hand-overs over {path}, seed {seed}");
    let (sender, said) = channel();
    let mut processes = [SENDER, RECEIVER].map(|id| Process::start(id, path, seed, BLOCKS, &sender));
    let receiver = processes[RECEIVER].peer.clone();
    processes[SENDER].tell(&format!("to receiver {receiver}"));
    let mut campaign = Campaign {
        seed,
        processes,
        said,
        running: HashMap::new(),
        next: 0,
        ended: BTreeMap::new(),
    };
    let begin = Instant::now();
    campaign.reach(count / 10);
    let warm = campaign.figures();
    campaign.reach(count);
    let end = campaign.figures();
    println!(
        "{count} hand-overs over {path} in {:.1} s; memory in KiB, descriptors, tasks (sender, receiver): {warm:?} after a \
         tenth, {end:?} at the end; ends: {:?}",
        begin.elapsed().as_secs_f64(),
        campaign.ended
    );
    for (warm, end) in warm.iter().zip(&end) {
        assert!(
            end.resident as f64 <= warm.resident as f64 * 1.05,
            "memory grew: {warm:?} to {end:?}"
        );
        assert_eq!(
            (warm.descriptors, warm.tasks),
            (end.descriptors, end.tasks),
            "descriptors or tasks leak"
        );
    }
    campaign.quit();
}

#[derive(Debug, PartialEq, Eq)]
struct Figures {
    resident: u64,
    descriptors: usize,
    tasks: usize,
}

impl Campaign {
    /// Makes hand-overs up to that number, and waits for the last of them.
    fn reach(&mut self, count: u64) {
        loop {
            while self.running.len() < WINDOW && self.next < count {
                self.running.insert(self.next, Ends::default());
                self.processes[RECEIVER].tell(&format!("expect any {}", self.next));
                self.next += 1;
            }
            if self.running.is_empty() {
                return;
            }
            let what = format!(
                "{:?}",
                self.running
                    .iter()
                    .map(|(number, ends)| (number, &ends.sender, &ends.receiver))
                    .collect::<Vec<_>>()
            );
            let (_, words) = hear(&self.said, &what);
            self.heard(&words);
        }
    }

    fn heard(&mut self, words: &str) {
        let mut parts = words.splitn(3, ' ');
        let (what, number, end) = (parts.next(), parts.next(), parts.next().unwrap_or_default());
        let number: u64 = number
            .and_then(|number| number.parse().ok())
            .expect("it is about one of them");
        let plan = Plan::of(self.seed, number);
        let ends = self.running.get_mut(&number).expect("it is one of those that run");
        match what {
            Some("expecting") => return self.processes[SENDER].tell(&format!("send any receiver {number}")),
            Some("out") => {
                ends.sender = Some(end.to_owned());
                if ends.receiver.is_none() && !end.starts_with("ok") {
                    // As the coordinator would.
                    self.processes[RECEIVER].tell(&format!("drop {number}"));
                }
            }
            Some("in") => ends.receiver = Some(end.to_owned()),
            _ => panic!("`{words}` means nothing"),
        }
        if let (Some(sender), Some(receiver)) = (&ends.sender, &ends.receiver) {
            let story = format!("{:?} of {number}: sender {sender}, receiver {receiver}", plan.given_up);
            assert!(fits(plan.given_up, sender, receiver), "{story} (seed {})", self.seed);
            let kind = format!("{:?}", plan.given_up);
            let story = format!("{}: {}/{}", split(&kind).0, split(sender).0, split(receiver).0);
            *self.ended.entry(story).or_default() += 1;
            self.running.remove(&number);
        }
    }

    /// Once all blocks are free or cached and nothing runs.
    fn figures(&mut self) -> Vec<Figures> {
        let mut tasks = BTreeMap::new();
        for process in &mut self.processes {
            process.tell("clean");
        }
        while tasks.len() < 2 {
            let (id, words) = hear(&self.said, "both to be clean");
            let count = words.strip_prefix("clean ").expect("nothing else runs");
            tasks.insert(id, count.parse().expect("it is a number"));
        }
        let figures = self.processes.iter().map(|process| Figures {
            resident: process.resident(),
            descriptors: process.descriptors(),
            tasks: tasks[&process.id],
        });
        figures.collect()
    }

    fn quit(mut self) {
        for at in [SENDER, RECEIVER] {
            self.processes[at].tell("quit");
            assert_eq!(hear(&self.said, "its end"), (at, "bye".to_owned()));
            assert!(matches!(self.said.recv(), Ok((id, None)) if id == at));
        }
    }
}

/// The first word, and the rest.
fn split(text: &str) -> (&str, &str) {
    text.split_once(|c: char| !c.is_alphanumeric()).unwrap_or((text, ""))
}

/// Whether both ends are what the plan allows: what the sender takes for committed, is.
fn fits(plan: GivenUp, sender: &str, receiver: &str) -> bool {
    let (sent, received) = (split(sender).0, split(receiver).0);
    match plan {
        GivenUp::Never | GivenUp::Superseded(_) => (sent, received) == ("ok", "committed"),
        GivenUp::BeforeReserve | GivenUp::AfterGrant | GivenUp::MidPush(_) | GivenUp::BeforeComplete => {
            sent == "dropped" && received != "committed"
        }
        GivenUp::WhileCompleting(_) => matches!((sent, received), ("ok", "committed") | ("dropped", _)),
        // Its handle can be dropped behind a commit that nobody read yet.
        GivenUp::ByReceiver(_) => matches!((sent, received), ("ok", _) | ("failed", "dropped" | "failed")),
    }
}
