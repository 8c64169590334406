//! What is kept in files: predictions before anything runs, results as they come.

use super::division::Division;
use super::speed::Speed;
use anyhow::{Context, Result, ensure};
use baton_load::Summary;
use baton_planner::predict::Figures;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One cluster under one load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Case {
    pub division: Division,
    /// Share of the division's predicted goodput.
    pub load: f64,
    /// Requests per second.
    pub rate: f64,
    /// Share of the time that prefill nodes, and decode nodes, were predicted to compute.
    pub busy: [f64; 2],
    pub figures: Figures,
}

/// All predictions of a validation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Predictions {
    /// The profile's name.
    pub profile: String,
    /// What is replayed, in words: predictions are of nothing else.
    pub workload: String,
    pub slo: String,
    pub cases: Vec<Case>,
}

/// A case and the replays of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    pub case: Case,
    pub runs: Vec<Summary>,
    /// Before and after each replay.
    pub machine: Vec<[Speed; 2]>,
    /// Replays that do not count, since the machine was not what was profiled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set_aside: Vec<SetAside>,
}

/// A replay that was repeated.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SetAside {
    pub summary: Summary,
    /// Before and after it.
    pub machine: [Speed; 2],
}

impl Measured {
    /// A case that nothing was replayed of yet.
    pub fn none(case: &Case) -> Self {
        Self {
            case: case.clone(),
            runs: Vec::new(),
            machine: Vec::new(),
            set_aside: Vec::new(),
        }
    }
}

impl Predictions {
    /// Those of a file, which must be of the same question.
    pub fn read(path: &Path, asked: &Self) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let found: Self =
            serde_json::from_str(&text).with_context(|| format!("{} holds no predictions", path.display()))?;
        let same = [
            ("profile", &found.profile, &asked.profile),
            ("workload", &found.workload, &asked.workload),
            ("slo", &found.slo, &asked.slo),
        ];
        for (field, found, asked) in same {
            ensure!(
                found == asked,
                "{}: its {field} is `{found}`, but `{asked}` is asked for: take another folder with --out, or remove the file to \
                 predict anew",
                path.display()
            );
        }
        Ok(found)
    }
}

/// Writes as JSON.
pub fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("as JSON")?;
    std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
}
