//! Sizes and shapes of files, and words that only some of them may use.

use super::nothing;
use super::source::{Source, lines_with, sources};
use super::workspace;
use std::collections::BTreeSet;

/// Lines of a file before its tests.
const LINES_MAX: usize = 600;
/// Lines of a file of tests.
const TEST_LINES_MAX: usize = 1000;
const MAIN_LINES_MAX: usize = 60;

/// Roots that hold more than declarations, and why.
const ROOTS: [(&str, &str); 2] = [
    (
        "kv-transfer/src/session/receiver/mod.rs",
        "the machine, whose parts in the folder share its private fields",
    ),
    (
        "crates/text/src/source/mod.rs",
        "the error that all sources share, and the choice between them",
    ),
];
/// A root this short may hold a small item that its whole folder shares.
const ROOT_LINES_MAX: usize = 40;
/// Items that do something, and what may stand before their names.
const ITEMS: [&str; 7] = ["fn", "impl", "struct", "enum", "trait", "union", "macro_rules!"];
const PREFIXES: [&str; 6] = ["pub", "async", "const", "unsafe", "extern", "default"];

/// The only files with unsafe code: those that wrap mapped memory, raw socket calls and SIMD, and tests that look into arenas.
const UNSAFE: [&str; 30] = [
    "bench/src/bin/transfer/pool.rs",
    "crates/engine/src/backend/cpu/arena.rs",
    "crates/engine/src/backend/cpu/kernels/attention.rs",
    "crates/engine/src/backend/cpu/kernels/dispatch.rs",
    "crates/engine/src/backend/cpu/kernels/format.rs",
    "crates/engine/src/backend/cpu/kernels/int8.rs",
    "crates/engine/src/backend/cpu/kernels/matmul.rs",
    "crates/engine/src/backend/cpu/kernels/neon.rs",
    "crates/engine/src/backend/cpu/kernels/portable.rs",
    "crates/engine/src/backend/cpu/kernels/simd.rs",
    "crates/engine/src/backend/cpu/kernels/stored.rs",
    "crates/engine/src/backend/cpu/kernels/x86.rs",
    "crates/engine/src/backend/cpu/kernels/x86_int8.rs",
    "crates/engine/src/backend/cpu/pages.rs",
    "crates/engine/src/backend/cpu/pool.rs",
    "crates/engine/src/backend/stub.rs",
    "crates/engine/src/kv/zero.rs",
    "crates/engine/src/load/mapped.rs",
    "crates/types/src/arena.rs",
    "kv-transfer/src/arena.rs",
    "kv-transfer/src/transport/raw.rs",
    "kv-transfer/src/transport/rdma/verbs/context.rs",
    "kv-transfer/src/transport/rdma/verbs/memory.rs",
    "kv-transfer/src/transport/rdma/verbs/queue.rs",
    "kv-transfer/src/transport/rdma/verbs/work.rs",
    "kv-transfer/src/transport/shm/copy.rs",
    "kv-transfer/src/transport/shm/map.rs",
    "kv-transfer/tests/nodes/mod.rs",
    "kv-transfer/tests/support/node.rs",
    "kv-transfer/tests/support/shm_writer.rs",
];

/// Where tasks may be spawned past the supervisor: it, and programs that end with their work.
const SPAWN: [&str; 3] = ["crates/node-runtime/src/", "crates/cli/src/", "bench/"];

/// Where the environment may be read.
const ENVIRONMENT: [&str; 2] = ["crates/node-runtime/src/", "crates/cli/src/"];

fn written() -> impl Iterator<Item = Source> {
    sources().into_iter().filter(|source| !source.is_generated())
}

#[test]
fn files_are_short() {
    let long = written().filter_map(|source| {
        let (lines, max) = match source.is_test() {
            true => (source.text.lines().count(), TEST_LINES_MAX),
            false if source.file.ends_with("/main.rs") => (source.lines_before_tests(), MAIN_LINES_MAX),
            false => (source.lines_before_tests(), LINES_MAX),
        };
        (lines > max).then(|| format!("{}: {lines} lines, {max} at most", source.file))
    });
    nothing("files that are too long", long.collect());
}

#[test]
fn roots_only_declare() {
    let mut wrong = Vec::new();
    let mut excused = BTreeSet::new();
    for source in written().filter(|source| source.file.ends_with("/lib.rs") || source.file.ends_with("/mod.rs")) {
        if source.is_test() || source.lines_before_tests() <= ROOT_LINES_MAX {
            continue;
        }
        for (line, at) in source.code_without_tests().lines().zip(1..) {
            let mut words = line
                .split_whitespace()
                .skip_while(|word| PREFIXES.contains(word) || word.starts_with("pub("));
            let item = words.next().unwrap_or_default();
            if ITEMS
                .iter()
                .any(|name| item.starts_with(name) && !item[name.len()..].starts_with(char::is_alphanumeric))
            {
                match ROOTS.iter().find(|(file, _)| *file == source.file) {
                    Some((file, _)) => drop(excused.insert(*file)),
                    None => wrong.push(format!("{}:{at}: {item}", source.file)),
                }
            }
        }
    }
    nothing("lib.rs and mod.rs that do more than declare and re-export", wrong);
    let stale = ROOTS.iter().filter(|(file, _)| !excused.contains(file));
    nothing("excused roots that only declare", stale.map(|(file, _)| file).collect());
}

#[test]
fn unsafe_code_stands_where_it_is_known() {
    let found: Vec<String> = written()
        .filter(|source| !lines_with(&source.code, "unsafe").is_empty() || source.code.contains("allow(unsafe_code)"))
        .map(|source| source.file)
        .collect();
    let unknown = found.iter().filter(|file| !UNSAFE.contains(&file.as_str()));
    nothing("files with unsafe code that are not on the list", unknown.collect());
    let stale = UNSAFE.iter().filter(|file| !found.iter().any(|found| found == *file));
    nothing("files on the list of unsafe code that have none", stale.collect());
}

#[test]
fn unsafe_blocks_say_why_they_are_sound() {
    let mut wrong = Vec::new();
    for source in written() {
        // A file of kernels whose blocks all lean on one contract says so, and that, in one place.
        if source.code.contains("allow(clippy::undocumented_unsafe_blocks)") {
            continue;
        }
        let lines: Vec<&str> = source.text.lines().collect();
        for start in ["unsafe {", "unsafe impl"] {
            for line in lines_with(&source.code, start) {
                // The comment stands above the block, or above the statement or function that it begins.
                let above = &lines[line.saturating_sub(20)..line];
                if !above
                    .iter()
                    .any(|text| text.contains("SAFETY") || text.contains("# Safety"))
                {
                    wrong.push(format!("{}:{line}", source.file));
                }
            }
        }
    }
    nothing("unsafe blocks without a `SAFETY:` comment", wrong);
}

#[test]
fn the_environment_is_read_in_few_places() {
    let mut wrong = Vec::new();
    for source in written().filter(|source| !source.is_test()) {
        if ENVIRONMENT.iter().any(|folder| source.file.starts_with(folder)) || source.file.ends_with("build.rs") {
            continue;
        }
        let code = source.code_without_tests();
        for word in ["env::var", "env::vars", "env::var_os", "env::vars_os"] {
            wrong.extend(
                lines_with(&code, word)
                    .iter()
                    .map(|line| format!("{}:{line}", source.file)),
            );
        }
    }
    nothing("files that read the environment", wrong);
}

#[test]
fn nothing_is_left_to_do() {
    let mut wrong = Vec::new();
    for source in written() {
        for word in ["todo!", "unimplemented!", "dbg!"] {
            wrong.extend(
                lines_with(&source.code, word)
                    .iter()
                    .map(|line| format!("{}:{line}: {word}", source.file)),
            );
        }
    }
    nothing("code that is not finished", wrong);
}

#[test]
fn tasks_are_supervised() {
    let mut wrong = Vec::new();
    for source in written().filter(|source| !source.is_test()) {
        if SPAWN.iter().any(|folder| source.file.starts_with(folder)) {
            continue;
        }
        let code = source.code_without_tests();
        for word in ["tokio::spawn", "task::spawn", "task::spawn_blocking", "thread::spawn"] {
            wrong.extend(
                lines_with(&code, word)
                    .iter()
                    .map(|line| format!("{}:{line}: {word}", source.file)),
            );
        }
    }
    nothing("tasks that are spawned past the supervisor", wrong);
}

#[test]
fn no_file_names_a_folder_of_one_machine() {
    // Put together, so that this file does not name them.
    let folders = ["work", "root", "home"].map(|folder| format!("/{folder}"));
    let in_path = |c: char| c.is_alphanumeric() || "._-~".contains(c);
    let mut wrong = Vec::new();
    for file in workspace::files() {
        let Some(text) = workspace::read(&file) else { continue };
        for (line, at) in text.lines().zip(1..) {
            for folder in &folders {
                let absolute = line.match_indices(folder.as_str()).any(|(start, _)| {
                    let before = line[..start].chars().next_back();
                    let after = line[start + folder.len()..].chars().next();
                    let begins = before.is_none_or(|c| !(in_path(c) || "*})]>/".contains(c)));
                    begins && after.is_none_or(|c| !in_path(c))
                });
                if absolute {
                    wrong.push(format!("{file}:{at}: {folder}"));
                }
            }
        }
    }
    nothing("files that name absolute folders of one machine", wrong);
}
