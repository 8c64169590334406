//! Sequences whose output has a grammar: which tokens may come next is computed on a thread of its own, beside the step that
//! computes their logits, so that the engine waits only where that takes longer than the step.

use super::sequence::SequenceError;
use baton_node_runtime::Supervisor;
use baton_text::{GrammarError, GrammarMatcher};
use baton_types::TokenSet;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

/// Takes a matcher on by some tokens and looks what may follow.
struct Look {
    matcher: GrammarMatcher,
    tokens: Vec<u32>,
    answer: SyncSender<Seen>,
}

type Seen = Result<(GrammarMatcher, TokenSet), GrammarError>;

enum Job {
    Look(Box<Look>),
    End,
}

/// The thread that looks. Clones are one.
#[derive(Debug, Clone)]
pub struct Lookout {
    jobs: Sender<Job>,
}

impl Lookout {
    /// Starts the thread; it ends with `supervisor`.
    pub(crate) fn start(supervisor: &Supervisor) -> Self {
        let (jobs, receiver) = channel();
        // As many jobs as there are sequences with a grammar: their number is bounded where they come in.
        supervisor.spawn_blocking("grammar", move || serve(&receiver));
        let (closer, token) = (jobs.clone(), supervisor.shutdown_token());
        supervisor.spawn("grammar-closer", async move {
            token.cancelled().await;
            // A thread that is gone needs no end.
            let _ = closer.send(Job::End);
        });
        Self { jobs }
    }
}

fn serve(jobs: &Receiver<Job>) {
    while let Ok(Job::Look(look)) = jobs.recv() {
        let Look {
            mut matcher,
            tokens,
            answer,
        } = *look;
        let allowed = matcher.accept(&tokens).and_then(|()| matcher.allowed());
        // Nobody waits where the sequence is gone.
        let _ = answer.send(allowed.map(|allowed| (matcher, allowed)));
    }
}

/// Where one sequence is in its grammar.
#[derive(Debug)]
pub struct Constraint {
    lookout: Lookout,
    /// Of the last look.
    seen: Receiver<Seen>,
    /// Present between `allowed` and `accept`.
    matcher: Option<GrammarMatcher>,
}

impl Constraint {
    /// Behind `tokens` that `matcher` has not taken yet.
    pub fn new(lookout: &Lookout, matcher: GrammarMatcher, tokens: Vec<u32>) -> Self {
        let (_, nothing) = sync_channel(1);
        let mut this = Self {
            lookout: lookout.clone(),
            seen: nothing,
            matcher: Some(matcher),
        };
        this.accept(tokens);
        this
    }

    /// The tokens that may come next. Waits where they are not known yet.
    pub(super) fn allowed(&mut self) -> Result<TokenSet, SequenceError> {
        match self.seen.recv() {
            Ok(Ok((matcher, allowed))) => {
                self.matcher = Some(matcher);
                Ok(allowed)
            }
            Ok(Err(error)) => Err(SequenceError::Grammar(error)),
            Err(_) => Err(SequenceError::ShuttingDown),
        }
    }

    /// The sequence goes on with these.
    pub(super) fn accept(&mut self, tokens: Vec<u32>) {
        let Some(matcher) = self.matcher.take() else { return };
        let (answer, seen) = sync_channel(1);
        self.seen = seen;
        let look = Look {
            matcher,
            tokens,
            answer,
        };
        // A thread that is gone drops the job, and with it `answer`.
        let _ = self.lookout.jobs.send(Job::Look(Box::new(look)));
    }
}
