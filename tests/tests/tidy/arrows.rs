//! Which package may name which: DESIGN, section 1. A package that is not in the table fails the test: give it its row.

use super::nothing;
use super::source::{lines_with, sources};
use super::workspace::{Package, packages};

/// What each of our packages may use of our own. An arrow points down only: a row names packages of rows above it.
const MAY_USE: [(&str, &[&str]); 18] = [
    ("baton-types", &[]),
    ("baton-gguf", &[]),
    ("baton-node-runtime", &["baton-types"]),
    ("baton-proto", &["baton-types"]),
    ("baton-engine", &["baton-types", "baton-gguf"]),
    ("baton-text", &["baton-types", "baton-gguf"]),
    ("baton-scheduling", &["baton-types"]),
    ("baton-planner", &["baton-types", "baton-scheduling"]),
    ("baton-load", &["baton-planner", "baton-proto"]),
    ("baton-cluster-state", &["baton-types", "baton-node-runtime"]),
    ("baton-kv-transfer", &["baton-types", "baton-node-runtime"]),
    (
        "baton-node-host",
        &[
            "baton-types",
            "baton-node-runtime",
            "baton-proto",
            "baton-engine",
            "baton-text",
            "baton-scheduling",
            "baton-cluster-state",
            "baton-kv-transfer",
        ],
    ),
    ("baton-prefill-node", NODE),
    ("baton-decode-node", NODE),
    (
        "baton-coordinator",
        &[
            "baton-types",
            "baton-node-runtime",
            "baton-proto",
            "baton-text",
            "baton-scheduling",
            "baton-cluster-state",
            "baton-planner",
        ],
    ),
    ("baton", ALL),
    ("baton-tests", ALL),
    ("baton-bench", BENCH),
];

/// A node's role: everything below but the planner.
const NODE: &[&str] = &[
    "baton-types",
    "baton-node-runtime",
    "baton-proto",
    "baton-engine",
    "baton-text",
    "baton-scheduling",
    "baton-cluster-state",
    "baton-kv-transfer",
    "baton-node-host",
];

const ALL: &[&str] = &[
    "baton-types",
    "baton-node-runtime",
    "baton-proto",
    "baton-engine",
    "baton-text",
    "baton-scheduling",
    "baton-cluster-state",
    "baton-kv-transfer",
    "baton-planner",
    "baton-load",
    "baton-node-host",
    "baton-prefill-node",
    "baton-decode-node",
    "baton-coordinator",
];

/// Programs that measure start their clusters as the tests do.
const BENCH: &[&str] = &[
    "baton-types",
    "baton-node-runtime",
    "baton-proto",
    "baton-engine",
    "baton-text",
    "baton-scheduling",
    "baton-cluster-state",
    "baton-kv-transfer",
    "baton-planner",
    "baton-load",
    "baton-node-host",
    "baton-prefill-node",
    "baton-decode-node",
    "baton-coordinator",
    "baton-tests",
];

/// What tests of a package may use beyond that: none of it is in what is built.
const TESTS_MAY_USE: [(&str, &[&str]); 2] = [
    // A hand-over has two ends.
    ("baton-decode-node", &["baton-prefill-node"]),
    // Simulated nodes have the real block pool.
    ("baton-coordinator", &["baton-engine"]),
];

/// Outside packages that only these of ours may name.
const ONLY: [(&str, &[&str]); 6] = [
    ("etcd-client", &["baton-cluster-state"]),
    ("ibverbs", &["baton-kv-transfer"]),
    ("ibverbs-sys", &["baton-kv-transfer"]),
    ("cudarc", &["baton-kv-transfer", "baton-engine"]),
    ("axum", &["baton-coordinator", "baton-node-runtime"]),
    ("tokenizers", &["baton-text"]),
];

/// Outside packages, by the beginning of their name, that these of ours must not name.
const NEVER: [(&str, &[&str]); 7] = [
    ("baton-types", &["tokio", "prost", "tonic"]),
    ("baton-gguf", &["tokio", "memmap2"]),
    (
        "baton-kv-transfer",
        &["tonic", "prost-types", "http", "axum", "etcd", "tokenizers"],
    ),
    (
        "baton-engine",
        &["tokio", "tonic", "prost", "http", "axum", "etcd", "tokenizers"],
    ),
    (
        "baton-text",
        &["tokio", "tonic", "prost", "http", "axum", "etcd", "ureq", "hf-hub"],
    ),
    ("baton-scheduling", &["tokio", "rand", "getrandom"]),
    ("baton-planner", &["tokio", "etcd", "futures", "baton-node-runtime"]),
];

fn row<'a>(table: &[(&str, &'a [&'a str])], name: &str) -> Option<&'a [&'a str]> {
    table.iter().find(|(package, _)| *package == name).map(|(_, row)| *row)
}

fn each(check: impl Fn(&Package, &str, &str) -> Option<String>) -> Vec<String> {
    let packages = packages();
    let pairs = packages
        .iter()
        .flat_map(|package| package.dependencies.iter().map(move |used| (package, used)));
    pairs
        .filter_map(|(package, (used, kind))| check(package, used, kind))
        .collect()
}

#[test]
fn arrows_point_down() {
    let unknown = packages()
        .into_iter()
        .filter(|package| row(&MAY_USE, &package.name).is_none());
    nothing(
        "packages without a row in the table of arrows",
        unknown.map(|package| package.name).collect(),
    );
    let ours: Vec<String> = packages().into_iter().map(|package| package.name).collect();
    let wrong = each(|package, used, kind| {
        let allowed = row(&MAY_USE, &package.name).is_some_and(|row| row.contains(&used))
            || kind == "dev" && row(&TESTS_MAY_USE, &package.name).is_some_and(|row| row.contains(&used))
            || !ours.iter().any(|name| name == used);
        (!allowed).then(|| format!("{} -> {used} {kind}", package.name))
    });
    nothing("arrows that the design does not have", wrong);
}

#[test]
fn the_table_has_no_arrow_up() {
    let place = |name: &str| MAY_USE.iter().position(|(package, _)| *package == name);
    let up = MAY_USE
        .iter()
        .flat_map(|(package, row)| row.iter().map(move |used| (*package, *used)));
    let up = up.filter(|(package, used)| place(used) >= place(package));
    nothing(
        "rows that name rows below them",
        up.map(|(package, used)| format!("{package} -> {used}")).collect(),
    );
}

#[test]
fn each_knows_only_what_it_must() {
    let wrong = each(|package, used, kind| {
        let name = package.name.as_str();
        let fenced_off = row(&ONLY, used).is_some_and(|owners| !owners.contains(&name)) && kind != "dev";
        let forbidden = row(&NEVER, name).is_some_and(|row| {
            row.iter()
                .any(|start| used == *start || used.starts_with(&format!("{start}-")))
        }) && kind != "dev";
        (fenced_off || forbidden).then(|| format!("{name} -> {used} {kind}"))
    });
    nothing("packages that name what they must not know", wrong);
}

#[test]
fn nodes_use_the_step_of_scheduling_only() {
    let nodes = ["crates/node-host/", "prefill-node/", "decode-node/"];
    let mut wrong = Vec::new();
    for source in sources()
        .iter()
        .filter(|source| nodes.iter().any(|node| source.file.starts_with(node)))
    {
        for line in lines_with(&source.code, "baton_scheduling") {
            let text = source.code.lines().nth(line - 1).unwrap_or_default();
            if !text.contains("baton_scheduling::step") {
                wrong.push(format!("{}:{line}", source.file));
            }
        }
    }
    nothing("nodes that use more of scheduling than `step`", wrong);
}
