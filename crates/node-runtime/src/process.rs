//! Figures of this process and of the machine under it, as Linux tells them in /proc and in the control groups.

use std::path::{Path, PathBuf};

/// This process's id.
pub fn pid() -> u32 {
    std::process::id()
}

/// How many file descriptors it has open; 0 where /proc is not to be read.
pub fn open_files() -> usize {
    // One of those listed is the listing's own.
    std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1))
}

/// Bytes of memory that it occupies; 0 where /proc is not to be read.
pub fn resident_bytes() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|text| kib_field(&text, "VmRSS:"))
        .unwrap_or(0)
}

/// Names the machine since it was booted, the same in all its processes and containers.
pub fn host_id() -> String {
    [
        "/proc/sys/kernel/random/boot_id",
        "/etc/machine-id",
        "/proc/sys/kernel/hostname",
    ]
    .iter()
    .find_map(|path| std::fs::read_to_string(path).ok())
    .map_or_else(|| "unknown".to_owned(), |text| text.trim().to_owned())
}

/// Bytes that this process can still take: what the machine has available, cut to what each enclosing control group
/// (version 1 or 2) leaves. Page cache that can be dropped counts as available.
pub fn available_memory() -> u64 {
    available_memory_under(Path::new("/"))
}

fn available_memory_under(root: &Path) -> u64 {
    let machine = read(&root.join("proc/meminfo"))
        .and_then(|text| kib_field(&text, "MemAvailable:"))
        .unwrap_or(0);
    control_groups(root)
        .iter()
        .filter_map(|group| group.left())
        .fold(machine, u64::min)
}

/// One control group's memory controller.
struct ControlGroup {
    folder: PathBuf,
    limit: &'static str,
    usage: &'static str,
    droppable: &'static str,
}

impl ControlGroup {
    /// Bytes left under its limit; none where it has no limit or is not to be read.
    fn left(&self) -> Option<u64> {
        // Version 2 writes "max", version 1 a number near 2^63 where there is no limit: more than any machine has.
        let limit: u64 = read(&self.folder.join(self.limit))?.trim().parse().ok()?;
        let usage: u64 = read(&self.folder.join(self.usage))?.trim().parse().ok()?;
        let stat = read(&self.folder.join("memory.stat")).unwrap_or_default();
        let droppable = stat
            .lines()
            .find_map(|line| line.strip_prefix(self.droppable)?.trim().parse::<u64>().ok())
            .unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(droppable)))
    }
}

/// This process's control groups with a memory controller, innermost first.
fn control_groups(root: &Path) -> Vec<ControlGroup> {
    let mut groups = Vec::new();
    for line in read(&root.join("proc/self/cgroup")).unwrap_or_default().lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (mount, limit, usage, droppable) = if controllers.is_empty() {
            ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file ")
        } else if controllers.split(',').any(|name| name == "memory") {
            (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file ",
            )
        } else {
            continue;
        };
        // Inside a container the path may be the host's while the mount shows only our own group: parents that do not
        // exist are skipped, and the mount's root is always looked at.
        let mount = root.join(mount);
        let inside = Path::new(path.trim_start_matches('/'));
        groups.extend(inside.ancestors().map(|part| ControlGroup {
            folder: mount.join(part),
            limit,
            usage,
            droppable,
        }));
    }
    groups
}

/// A field such as `MemAvailable:  123 kB` in bytes.
fn kib_field(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = value.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:  9999999 kB\nMemAvailable:    1048576 kB\n");

    #[test]
    fn plain_machine() {
        assert_eq!(available_memory_under(machine(&[MEMINFO]).path()), 1024 * MIB);
        let unlimited = machine(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/user.slice\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "max\n"),
            ("sys/fs/cgroup/user.slice/memory.current", "5\n"),
        ]);
        assert_eq!(available_memory_under(unlimited.path()), 1024 * MIB);
    }

    #[test]
    fn version_2_takes_the_tightest_parent() {
        let root = machine(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/pod/box\n"),
            ("sys/fs/cgroup/pod/box/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/box/memory.current", "104857600\n"),
            ("sys/fs/cgroup/pod/memory.max", "536870912\n"),
            ("sys/fs/cgroup/pod/memory.current", "209715200\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 104857600\n"),
        ]);
        assert_eq!(available_memory_under(root.path()), 412 * MIB);
    }

    #[test]
    fn version_1_in_a_container_looks_at_the_mount() {
        let root = machine(&[
            MEMINFO,
            (
                "proc/self/cgroup",
                "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "268435456\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "134217728\n"),
            (
                "sys/fs/cgroup/memory/memory.stat",
                "inactive_file 7\ntotal_inactive_file 67108864\n",
            ),
        ]);
        assert_eq!(available_memory_under(root.path()), 192 * MIB);
        let full = machine(&[
            MEMINFO,
            ("proc/self/cgroup", "4:memory:/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "100\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "200\n"),
        ]);
        assert_eq!(available_memory_under(full.path()), 0);
    }

    #[test]
    fn this_process_has_figures() {
        assert!(open_files() > 2);
        assert!(resident_bytes() > MIB);
        assert!(available_memory() > MIB);
        assert!(!host_id().is_empty());
        assert_eq!(pid(), std::process::id());
    }
}
