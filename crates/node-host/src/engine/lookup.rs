//! Guesses at what follows, from the sequence's own tokens: where the last few stood before, what followed them then may
//! follow again (prompt lookup; no draft model). Answers that quote, edit or summarise their prompt do so for long stretches.
//!
//! Each table maps a hash of the last n tokens to where they stood latest. A lookup compares the tokens themselves, so that
//! a collision costs a guess and nothing else; tables are of fixed size, so that memory is bounded and each token costs the same.

/// How many tokens are looked up; the longest first.
const LENGTHS: [usize; 3] = [6, 3, 2];
/// Bounds of one table's entries, 4 bytes each.
const ENTRIES: std::ops::RangeInclusive<usize> = 64..=1 << 15;
/// So many tokens of agreement are told apart.
const AGREEMENT_MAX: usize = 9;
/// After so many tokens in a row that went another way, a source is lost.
const ASTRAY_MAX: u32 = 3;

/// Where a sequence's tokens stood before.
#[derive(Debug)]
pub(super) struct Lookup {
    /// One above the place behind the tokens; 0: none.
    tables: [Vec<u32>; LENGTHS.len()],
    /// Tokens that were looked at.
    seen: usize,
    /// The place that the newest tokens seem to be copied from, and how many in a row went another way since.
    source: Option<(usize, u32)>,
}

/// What a guess rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Guess {
    /// Place of the first token that may follow.
    source: usize,
    /// Kind of guess, for [`baton_scheduling::step::speculation`]: more tokens that agree, a higher number.
    pub kind: usize,
}

impl Lookup {
    /// For a sequence of so many tokens; more are taken too, and displace one another.
    pub fn new(tokens: usize) -> Self {
        let entries = tokens.clamp(*ENTRIES.start(), *ENTRIES.end()).next_power_of_two();
        Self {
            tables: std::array::from_fn(|_| vec![0; entries]),
            seen: 0,
            source: None,
        }
    }

    /// Takes note of what is new in `tokens`, which are those of before and more.
    pub fn follow(&mut self, tokens: &[u32]) {
        for (place, token) in tokens.iter().enumerate().skip(self.seen) {
            for (table, length) in self.tables.iter_mut().zip(LENGTHS) {
                if place >= length {
                    let entry = entry(&tokens[place - length..place], table.len());
                    table[entry] = u32::try_from(place + 1).unwrap_or(0);
                }
            }
            self.source = self.source.and_then(|(source, astray)| {
                let astray = if tokens[source] == *token { 0 } else { astray + 1 };
                (astray < ASTRAY_MAX).then_some((source + 1, astray))
            });
        }
        self.seen = tokens.len();
    }

    /// What may follow `tokens`, all of which were taken note of. A source that agrees as well as the latest place stays: a
    /// changed word in a copied text is followed by the text's next one.
    pub fn guess(&mut self, tokens: &[u32]) -> Option<Guess> {
        let latest = self.latest(tokens).map(|source| (source, agreement(tokens, source)));
        let source = self.source.map(|(source, _)| (source, agreement(tokens, source)));
        let (source, agreed) = match (source, latest) {
            (Some(source), Some(latest)) if latest.1 > source.1 => latest,
            (Some(source), _) => source,
            (None, latest) => latest?,
        };
        if self.source.is_none_or(|(before, _)| before != source) {
            self.source = Some((source, 0));
        }
        let kind = match agreed {
            0..=1 => 0,
            2 => 1,
            3..=4 => 2,
            5..AGREEMENT_MAX => 3,
            AGREEMENT_MAX.. => 4,
        };
        Some(Guess { source, kind })
    }

    /// The latest place behind the last tokens, as many of them as were found.
    fn latest(&self, tokens: &[u32]) -> Option<usize> {
        self.tables.iter().zip(LENGTHS).find_map(|(table, length)| {
            let last = &tokens[tokens.len().checked_sub(length)?..];
            let place = usize::try_from(table[entry(last, table.len())]).ok()?.checked_sub(1)?;
            (place >= length && &tokens[place - length..place] == last).then_some(place)
        })
    }
}

impl Guess {
    /// Adds the guessed tokens, `count` of them. Where the source ends, it goes on with the guess itself.
    pub fn tokens(self, tokens: &[u32], count: usize, out: &mut Vec<u32>) {
        let first = out.len();
        for place in self.source..self.source + count {
            let token = match tokens.get(place) {
                Some(token) => *token,
                None => out[first + place - tokens.len()],
            };
            out.push(token);
        }
    }
}

/// Tokens before `place` that are also the last ones.
fn agreement(tokens: &[u32], place: usize) -> usize {
    let before = tokens[..place].iter().rev();
    let last = tokens.iter().rev();
    before.zip(last).take(AGREEMENT_MAX).take_while(|(a, b)| a == b).count()
}

/// Place of these tokens in a table of `entries`, a power of two.
fn entry(tokens: &[u32], entries: usize) -> usize {
    let mix = |state: u64, token: &u32| {
        (state ^ u64::from(*token))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(23)
    };
    let hash = tokens.iter().fold(0x2545_f491_4f6c_dd1d, mix);
    usize::try_from(hash >> 40).unwrap_or(0) & (entries - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn guessed(tokens: &[u32], count: usize) -> Option<(Vec<u32>, usize)> {
        let mut lookup = Lookup::new(tokens.len());
        lookup.follow(tokens);
        let guess = lookup.guess(tokens)?;
        let mut out = Vec::new();
        guess.tokens(tokens, count, &mut out);
        Some((out, guess.kind))
    }

    #[test]
    fn what_followed_the_last_tokens_latest_is_guessed() {
        assert_eq!(guessed(&[1, 2, 7, 8, 3, 1, 2, 9, 4, 1, 2], 3), Some((vec![9, 4, 1], 1)));
        assert_eq!(guessed(&[1, 2, 3, 4, 5], 3), None);
        assert_eq!(guessed(&[], 3), None);
        // Three that agree go before two that stood later.
        assert_eq!(guessed(&[5, 1, 2, 7, 0, 6, 1, 2, 9, 0, 5, 1, 2], 1), Some((vec![7], 2)));
        // A loop goes on with itself.
        assert_eq!(
            guessed(&[4, 1, 2, 1, 2, 1, 2], 5).map(|g| g.0),
            Some(vec![1, 2, 1, 2, 1])
        );
    }

    #[test]
    fn a_changed_word_does_not_lose_the_source() {
        let text: Vec<u32> = (10..40).collect();
        let mut tokens = text.clone();
        tokens.extend([10, 11, 12]);
        let mut lookup = Lookup::new(100);
        let mut next = |tokens: &[u32]| {
            lookup.follow(tokens);
            let guess = lookup.guess(tokens)?;
            let mut out = Vec::new();
            guess.tokens(tokens, 2, &mut out);
            Some((out, guess.kind))
        };
        assert_eq!(next(&tokens), Some((vec![13, 14], 2)));
        tokens.push(99);
        assert_eq!(next(&tokens), Some((vec![14, 15], 0)));
        tokens.push(14);
        assert_eq!(next(&tokens), Some((vec![15, 16], 0)));
        tokens.extend([98, 97, 96]);
        assert_eq!(next(&tokens), None, "it went another way");
    }

    /// What a search from the end finds.
    fn searched(tokens: &[u32]) -> Option<usize> {
        LENGTHS.iter().find_map(|length| {
            let last = &tokens[tokens.len().checked_sub(*length)?..];
            (*length..tokens.len())
                .rev()
                .find(|place| &tokens[place - length..*place] == last)
        })
    }

    proptest! {
        /// Tokens come in any portions; tables are large enough here that little collides, and what does gives no wrong place.
        #[test]
        fn the_latest_place_is_found(tokens in prop::collection::vec(0u32..6, 0..120), cuts in prop::collection::vec(0usize..120, 0..6)) {
            let mut lookup = Lookup::new(1 << 15);
            let mut ends: Vec<usize> = cuts.into_iter().filter(|cut| *cut < tokens.len()).collect();
            ends.sort_unstable();
            ends.push(tokens.len());
            for end in ends {
                lookup.follow(&tokens[..end]);
            }
            prop_assert_eq!(lookup.latest(&tokens), searched(&tokens));
        }

        #[test]
        fn small_tables_give_no_wrong_guess_and_never_grow(tokens in prop::collection::vec(0u32..40, 1..600), count in 1usize..9) {
            let mut lookup = Lookup::new(0);
            for end in 1..=tokens.len() {
                let known = &tokens[..end];
                lookup.follow(known);
                if let Some(place) = lookup.latest(known) {
                    prop_assert!(place < end && agreement(known, place) >= 2);
                }
                if let Some(guess) = lookup.guess(known) {
                    let mut out = Vec::new();
                    guess.tokens(known, count, &mut out);
                    prop_assert_eq!(out.len(), count);
                    prop_assert!(guess.source < end);
                }
            }
            prop_assert!(lookup.tables.iter().all(|table| table.len() == *ENTRIES.start()));
        }
    }
}
