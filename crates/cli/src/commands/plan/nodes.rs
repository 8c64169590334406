//! `--nodes FILE`: kinds of nodes that differ in speed and price.

use super::given::parse_cost;
use anyhow::{Context, Result, bail, ensure};
use baton_planner::profile::{NodeModel, Profile, estimate, gpu, model};
use baton_planner::search::{NodeClass, Prices};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the file holds: `[[nodes]]`, one for each kind.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    nodes: Vec<Kind>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kind {
    /// What plans call it; the GPU's or the profile's name where it is absent.
    name: Option<String>,
    /// A measured profile; a path is taken from the folder of the file.
    profile: Option<PathBuf>,
    /// Or a GPU whose profile is estimated, with --model.
    gpu: Option<String>,
    /// What one costs per hour on either side.
    price: f64,
    /// How many there are; absent: as many as are wanted.
    count: Option<usize>,
    /// Sides on which it may be; absent: both.
    roles: Option<Vec<Role>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    Prefill,
    Decode,
}

/// The kinds of nodes of a file, with their profiles; all of one model, that of `wanted` where it is named.
pub fn read(path: &Path, wanted: Option<&str>) -> Result<(Vec<NodeClass>, Vec<Profile>)> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read the nodes of {}", path.display()))?;
    let file: File = toml::from_str(&text).with_context(|| {
        format!(
            "{} is no list of nodes: expected [[nodes]] with price, and profile or gpu; count, roles and name may follow",
            path.display()
        )
    })?;
    ensure!(!file.nodes.is_empty(), "{} names no nodes", path.display());
    let folder = path.parent().unwrap_or(Path::new("."));
    let (mut classes, mut profiles) = (Vec::new(), Vec::<Profile>::new());
    for (kind, place) in file.nodes.iter().zip(1..) {
        let (class, profile) = one(kind, folder, wanted).with_context(|| {
            let name = kind.name.as_deref().or(kind.gpu.as_deref()).unwrap_or("without a name");
            format!("{}, [[nodes]] {place} ({name})", path.display())
        })?;
        if let Some(first) = profiles.first() {
            profile.check_model(&first.model.name)?;
        }
        classes.push(class);
        profiles.push(profile);
    }
    Ok((classes, profiles))
}

fn one(kind: &Kind, folder: &Path, wanted: Option<&str>) -> Result<(NodeClass, Profile)> {
    let profile = match (&kind.profile, &kind.gpu) {
        (Some(path), None) => {
            let profile = Profile::read(&folder.join(path))?;
            if let Some(wanted) = wanted {
                profile.check_model(wanted)?;
            }
            profile
        }
        (None, Some(name)) => {
            let wanted = wanted.context("gpu: give --model, of which the profile is estimated")?;
            estimate(gpu(name)?, model(wanted)?)?
        }
        (Some(_), Some(_)) => bail!("profile and gpu: one of them names the profile, not both"),
        (None, None) => bail!("neither profile (a file) nor gpu (a built-in estimate) is named"),
    };
    parse_cost(kind.price).map_err(|error| anyhow::anyhow!("price: {error}"))?;
    ensure!(kind.count != Some(0), "count: 0 nodes; leave the kind out");
    let roles = kind.roles.as_deref().unwrap_or(&[Role::Prefill, Role::Decode]);
    ensure!(!roles.is_empty(), "roles: name prefill, decode or both");
    let name = kind.name.clone().or_else(|| kind.gpu.clone());
    let class = NodeClass {
        name: name.unwrap_or_else(|| profile.hardware.clone()),
        count_max: kind.count,
        prefill: roles.contains(&Role::Prefill),
        decode: roles.contains(&Role::Decode),
        ..NodeClass::new(&Arc::new(NodeModel::new(&profile)), Prices::both(kind.price))
    };
    Ok((class, profile))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str, model: Option<&str>) -> Result<(Vec<NodeClass>, Vec<Profile>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mixed.toml");
        std::fs::write(&path, text).unwrap();
        read(&path, model)
    }

    #[test]
    fn kinds_are_read_and_wrong_ones_are_named() {
        let text = "[[nodes]]\ngpu = \"h100\"\nprice = 2.5\ncount = 4\nroles = [\"prefill\"]\n\n[[nodes]]\nname = \"cheap\"\ngpu = \
                    \"l40s\"\nprice = 0.8\n";
        let (classes, profiles) = of(text, Some("llama-3.1-8b")).unwrap();
        assert_eq!((classes[0].name.as_str(), classes[1].name.as_str()), ("h100", "cheap"));
        assert_eq!((classes[0].count_max, classes[0].decode), (Some(4), false));
        assert_eq!((classes[1].prices.decode, classes[1].prefill), (0.8, true));
        assert_eq!(profiles[1].hardware, "l40s");
        let wrong = |text: &str| format!("{:#}", of(text, Some("llama-3.1-8b")).unwrap_err());
        assert!(wrong("").contains("[[nodes]]"));
        assert!(wrong("[[nodes]]\ngpu = \"h100\"\n").contains("missing field `price`"));
        assert!(wrong("[[nodes]]\ngpu = \"h100\"\nprice = 1.0\nprize = 2\n").contains("unknown field `prize`"));
        assert!(wrong("[[nodes]]\ngpu = \"h100\"\nprice = -1.0\n").contains("price: "));
        assert!(wrong("[[nodes]]\ngpu = \"h100\"\nprice = 1.0\ncount = 0\n").contains("count: 0 nodes"));
        assert!(wrong("[[nodes]]\nprice = 1.0\n").contains("neither profile"));
        assert!(wrong("[[nodes]]\ngpu = \"h9\"\nprice = 1.0\n").contains("no built-in profile of the GPU `h9`"));
        assert!(
            wrong("[[nodes]]\ngpu = \"h100\"\nprice = 1.0\nroles = [\"both\"]\n").contains("unknown variant `both`")
        );
        assert!(format!("{:#}", of(text, None).unwrap_err()).contains("give --model"));
    }
}
