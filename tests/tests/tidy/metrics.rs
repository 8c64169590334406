//! Every metric that the code names stands in docs/metrics.md, and every one that stands there is named by the code.

use super::nothing;
use super::source::sources;
use super::workspace::{packages, read};
use std::collections::BTreeSet;

const PAGE: &str = "docs/metrics.md";

fn is_name(text: &str) -> bool {
    text.starts_with("baton_")
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

/// Names of metrics in the code that is built, tests left out. Names of crates look alike and are none.
fn emitted() -> BTreeSet<String> {
    let crates: BTreeSet<String> = packages()
        .into_iter()
        .map(|package| package.name.replace('-', "_"))
        .collect();
    let mut names = BTreeSet::new();
    for source in sources()
        .iter()
        .filter(|source| !source.is_test() && !source.is_generated())
    {
        let found = source
            .strings_without_tests()
            .filter(|text| is_name(text) && !crates.contains(*text));
        names.extend(found.map(str::to_owned));
    }
    names
}

/// Names in the first column of the page's tables.
fn documented() -> Vec<String> {
    let page = read(PAGE).unwrap_or_default();
    let cells = page.lines().filter_map(|line| {
        line.strip_prefix("| `")?
            .split_once('`')
            .map(|(name, _)| name.to_owned())
    });
    cells.filter(|name| is_name(name)).collect()
}

#[test]
fn every_metric_is_documented() {
    let documented: BTreeSet<String> = documented().into_iter().collect();
    let emitted = emitted();
    nothing(
        "metrics that docs/metrics.md does not have",
        emitted.difference(&documented).collect(),
    );
    nothing(
        "metrics in docs/metrics.md that nothing emits",
        documented.difference(&emitted).collect(),
    );
}

#[test]
fn every_metric_is_documented_once() {
    let mut seen = BTreeSet::new();
    let twice: Vec<String> = documented()
        .into_iter()
        .filter(|name| !seen.insert(name.clone()))
        .collect();
    nothing("metrics that docs/metrics.md has twice", twice);
}
