//! Divisions of the nodes, as flags write them.

use baton_planner::Policy;
use baton_planner::search::Split;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// So many nodes of each kind, and whether decode nodes may prefill by themselves where that is predicted to be faster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Division {
    pub prefill: usize,
    pub decode: usize,
    pub local: bool,
}

impl Division {
    pub fn split(self) -> Split {
        Split::of(self.prefill, self.decode)
    }

    /// The policy by which the coordinator chooses: only one of them lets decode nodes prefill beside prefill nodes.
    pub fn policy(self) -> Policy {
        if self.local || self.prefill == 0 {
            Policy::Predicted
        } else {
            Policy::LeastLoaded
        }
    }
}

impl FromStr for Division {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (counts, local) = match text.strip_suffix(":local") {
            Some(counts) => (counts, true),
            None => (text, false),
        };
        let split = counts.split_once('+').and_then(|(prefill, decode)| {
            let prefill = prefill.trim_end_matches(['P', 'p']).parse().ok()?;
            Some((prefill, decode.trim_end_matches(['D', 'd']).parse::<usize>().ok()?))
        });
        match split {
            Some((prefill, decode)) if decode >= 1 => Ok(Self { prefill, decode, local }),
            _ => Err(format!(
                "`{text}` is no division: expected PREFILL+DECODE nodes with at least one decode node, such as 1+1, 0+2 (colocated), or \
                 1+1:local (decode nodes may prefill too)"
            )),
        }
    }
}

impl fmt::Display for Division {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.prefill, self.local) {
            (0, _) => write!(f, "{} colocated", self.decode),
            (_, true) => write!(f, "{}, local prefill", self.split()),
            (_, false) => write!(f, "{}", self.split()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisions_are_read() {
        let division: Division = "1+1:local".parse().unwrap();
        assert_eq!(
            (division.policy(), division.to_string().as_str()),
            (Policy::Predicted, "1P+1D, local prefill")
        );
        let strict: Division = "1P+1D".parse().unwrap();
        assert_eq!(
            (strict.policy(), strict.to_string().as_str()),
            (Policy::LeastLoaded, "1P+1D")
        );
        assert_eq!("0+2".parse::<Division>().unwrap().to_string(), "2 colocated");
        for bad in ["1+0", "2", "a+b", "1+1:remote"] {
            assert!(bad.parse::<Division>().unwrap_err().contains("1+1:local"), "{bad}");
        }
    }
}
