//! Compiling a request's grammar, on a thread where that holds up nobody.

use crate::engine::Constraint;
use crate::host::Host;
use baton_text::{GrammarError, GrammarMatcher};
use baton_types::Work;
use tokio::sync::oneshot;
use tonic::Status;

/// The grammar of a request on its way, where it has one.
#[derive(Debug)]
pub struct Compiling(Option<oneshot::Receiver<Result<GrammarMatcher, GrammarError>>>);

impl Compiling {
    /// Begins.
    pub fn start(host: &Host, work: &Work) -> Self {
        let Some(grammar) = work.sampling.grammar.clone() else {
            return Self(None);
        };
        let (done, compiled) = oneshot::channel();
        let (grammars, generated, clock) = (host.grammars().clone(), work.generated.clone(), host.clock());
        host.supervisor().spawn_blocking("grammar-compile", move || {
            let begun = clock.now();
            let matcher = grammars.matcher(&grammar, &generated);
            metrics::histogram!("baton_node_grammar_compile_seconds").record(clock.elapsed(begun).as_secs_f64());
            // Nobody waits where the request is gone.
            let _ = done.send(matcher);
        });
        Self(Some(compiled))
    }

    /// True where the request has no grammar.
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// Where the output is, once it goes on with `ahead` behind what the request began with; `None` without a grammar.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` where the grammar cannot be served or the tokens are not its.
    pub async fn constraint(self, host: &Host, ahead: Vec<u32>) -> Result<Option<Constraint>, Status> {
        let Some(compiled) = self.0 else { return Ok(None) };
        match compiled.await {
            Ok(Ok(matcher)) => Ok(Some(Constraint::new(host.lookout(), matcher, ahead))),
            Ok(Err(error)) => Err(Status::invalid_argument(format!("grammar: {error}"))),
            Err(_) => Err(Status::internal("compiling the grammar failed")),
        }
    }
}
