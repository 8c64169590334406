//! Stop strings across token borders.
/// Finds stop strings in a stream of text.
#[derive(Debug, Clone)]
pub struct StopFinder;
/// What came of one push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Safe to emit.
    pub text: String,
    /// A stop string was found; `text` ends before it, nothing more follows.
    pub stopped: bool,
}
impl StopFinder {
    /// Of any of these.
    pub fn new(_stops: Vec<String>) -> Self { todo!() }
    /// Takes the next text.
    pub fn push(&mut self, _text: &str) -> StopOutcome { todo!() }
    /// The end: what was held back.
    pub fn finish(&mut self) -> String { todo!() }
}
