//! Stop strings, found in a stream of text however it is cut into pieces. What may be the beginning of a stop string is
//! held back until the next text decides it. Invariant: the emitted text does not depend on where the stream was cut.

/// Finds stop strings in one generation's text.
#[derive(Debug, Clone)]
pub struct StopFinder {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

/// What came of one push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Safe to emit.
    pub text: String,
    /// A stop string was found; `text` ends before it and nothing more follows.
    pub stopped: bool,
}

impl StopFinder {
    /// Looks for any of `stops`; empty ones are ignored.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self {
            stops,
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes the next text. The stop string that is complete first wins; of two that end together, the longer.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome {
                text: String::new(),
                stopped: true,
            };
        }
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)))
            .min();
        if let Some((_, at)) = found {
            self.stopped = true;
            self.held.truncate(at);
            return StopOutcome {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let keep = self
            .stops
            .iter()
            .map(|stop| unfinished(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        StopOutcome {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// The end of the generation: what was held back and became no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length in bytes of the longest end of `text` with which `stop` begins, but does not end.
fn unfinished(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().map(|(at, _)| at).rev();
    starts
        .take_while(|at| *at > 0)
        .find(|at| text.ends_with(&stop[..*at]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut finder = StopFinder::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let outcome = finder.push(piece);
            text += &outcome.text;
            if outcome.stopped {
                return (text, true);
            }
        }
        (text + &finder.finish(), false)
    }

    #[test]
    fn found_across_pieces() {
        assert_eq!(run(&["END"], &["one E", "N", "D two"]), ("one ".into(), true));
        assert_eq!(run(&["END"], &["one E", "N", "d two"]), ("one ENd two".into(), false));
        assert_eq!(run(&[], &["one"]), ("one".into(), false));
        assert_eq!(run(&["", "。"], &["你好", "。再见"]), ("你好".into(), true));
    }

    #[test]
    fn nothing_that_may_be_a_stop_is_emitted_early() {
        let mut finder = StopFinder::new(vec!["aab".into()]);
        assert_eq!(finder.push("aa").text, "");
        assert_eq!(finder.push("a").text, "a");
        assert_eq!(
            finder.push("b"),
            StopOutcome {
                text: String::new(),
                stopped: true
            }
        );
        assert_eq!(
            finder.push("more"),
            StopOutcome {
                text: String::new(),
                stopped: true
            }
        );
        assert_eq!(finder.finish(), "");
    }

    #[test]
    fn the_first_complete_stop_wins() {
        assert_eq!(run(&["abc", "b"], &["abc"]), ("a".into(), true));
        assert_eq!(run(&["bc", "abc"], &["xabc"]), ("x".into(), true));
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(text in "[abé]{0,30}", stops in prop::collection::vec("[abé]{1,4}", 0..4),
                              cuts in prop::collection::vec(0usize..31, 0..8)) {
            let characters: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(characters.len())).collect();
            cuts.push(0);
            cuts.push(characters.len());
            cuts.sort_unstable();
            let pieces: Vec<String> = cuts.windows(2).map(|w| characters[w[0]..w[1]].iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let whole = run(&stops, &[&text]);
            prop_assert_eq!(&run(&stops, &pieces), &whole);
            prop_assert!(stops.iter().all(|stop| !whole.0.contains(stop)));
            prop_assert_eq!(whole.1, stops.iter().any(|stop| text.contains(stop)));
        }
    }
}
