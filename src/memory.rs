//! Memory of the machine, of the container around this process, and of the process itself, as the system tells it.
//!
//! Linux tells all of it. Elsewhere everything is unknown here, which is never a reason to refuse work.

use std::fs;
use std::path::{Path, PathBuf};

use sd_kernels::gpu;

/// What the machine has. Sizes are bytes; absent is unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total: Option<u64>,
    /// What can be had without swapping, within the container's limit. File pages that the system gives back when asked count as had.
    pub available: Option<u64>,
    /// The container's limit, where it is below the total.
    pub limit: Option<u64>,
}

impl Memory {
    /// Asks the system.
    pub fn look() -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let group = cgroup_memory(Path::new("/sys/fs/cgroup"), Path::new("/proc/self/cgroup"));
        Self::from_parts(&meminfo, group)
    }

    /// What there is where networks are computed: on a card, or in the machine.
    pub fn of_networks() -> Self {
        match gpu::chosen() {
            None => Self::look(),
            Some(card) => Self {
                total: Some(card.driver().info().memory),
                available: card.driver().free_memory().ok(),
                limit: None,
            },
        }
    }

    fn from_parts(meminfo: &str, group: Option<CgroupMemory>) -> Self {
        let total = field_bytes(meminfo, "MemTotal");
        let available = field_bytes(meminfo, "MemAvailable");
        let group = group.filter(|group| total.is_none_or(|total| group.limit < total));
        Self {
            total,
            available: match &group {
                Some(group) => Some(group.left().min(available.unwrap_or(u64::MAX))),
                None => available,
            },
            limit: group.map(|group| group.limit),
        }
    }
}

/// Bytes of this process that are resident now; `None` where the system does not tell.
pub fn resident() -> Option<u64> {
    status("VmRSS")
}

/// Bytes that this process holds where networks are computed; `None` where nobody tells.
pub fn held_by_networks() -> Option<u64> {
    match gpu::chosen() {
        None => resident(),
        Some(card) => Some(card.driver().held().0),
    }
}

/// The most bytes that were ever allocated on a card; `None` without one.
pub fn peak_on_card() -> Option<u64> {
    gpu::chosen().map(|card| card.driver().held().1)
}

/// The most bytes that were ever resident in this process; `None` where the system does not tell.
pub fn peak_resident() -> Option<u64> {
    status("VmHWM")
}

fn status(name: &str) -> Option<u64> {
    field_bytes(&fs::read_to_string("/proc/self/status").ok()?, name)
}

/// A field of `/proc/meminfo` or `/proc/self/status`, which count in KiB.
fn field_bytes(text: &str, name: &str) -> Option<u64> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value
        .trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// A container's memory.
struct CgroupMemory {
    limit: u64,
    used: u64,
    /// File pages that the system gives back when asked.
    reclaimable: u64,
}

impl CgroupMemory {
    fn left(&self) -> u64 {
        self.limit
            .saturating_sub(self.used.saturating_sub(self.reclaimable))
    }
}

/// The tightest memory limit above this process: cgroup v2's hierarchy, or v1's memory controller. `root` is where cgroups are mounted,
/// `own` names the process's own.
fn cgroup_memory(root: &Path, own: &Path) -> Option<CgroupMemory> {
    let own = fs::read_to_string(own).unwrap_or_default();
    let (folder, limit, used) = if root.join("cgroup.controllers").exists() {
        let path = own.lines().find_map(|line| line.strip_prefix("0::/"));
        (
            root.join(path.unwrap_or("")),
            "memory.max",
            "memory.current",
        )
    } else {
        let path = own
            .lines()
            .find_map(|line| line.split_once(":memory:/"))
            .map(|(_, path)| path);
        let folder = root.join("memory").join(path.unwrap_or(""));
        (folder, "memory.limit_in_bytes", "memory.usage_in_bytes")
    };
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let levels = folder
        .ancestors()
        .take_while(|level| level.starts_with(root));
    let limits = levels.filter_map(|level| {
        let stat = fs::read_to_string(level.join("memory.stat")).unwrap_or_default();
        let inactive = stat
            .lines()
            .find_map(|line| line.strip_prefix("inactive_file "));
        Some(CgroupMemory {
            limit: number(level.join(limit))?,
            used: number(level.join(used)).unwrap_or(0),
            reclaimable: inactive
                .and_then(|value| value.trim().parse().ok())
                .unwrap_or(0),
        })
    });
    limits.min_by_key(CgroupMemory::left)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    const MEMINFO: &str = "MemTotal:       16303412 kB\nMemFree: 1 kB\nMemAvailable:    2048 kB\n";

    #[test]
    fn fields_are_read() {
        assert_eq!(field_bytes(MEMINFO, "MemAvailable"), Some(2 << 20));
        assert_eq!(field_bytes(MEMINFO, "Mem"), None);
        if cfg!(target_os = "linux") {
            assert!(resident().unwrap() > 1 << 20);
            assert!(peak_resident().unwrap() >= resident().unwrap() / 2);
            assert!(Memory::look().available.unwrap() > 0);
        }
    }

    #[test]
    fn the_smaller_of_machine_and_container_counts() {
        let group = |limit, used, reclaimable| {
            Some(CgroupMemory {
                limit,
                used,
                reclaimable,
            })
        };
        let available = |group| Memory::from_parts(MEMINFO, group).available;
        assert_eq!(available(None), Some(2 << 20));
        assert_eq!(available(group(4 << 20, 1 << 20, 0)), Some(2 << 20));
        assert_eq!(available(group(2 << 20, 2 << 20, 1 << 20)), Some(1 << 20));
        // a limit above all that there is is none
        let memory = Memory::from_parts(MEMINFO, group(u64::MAX, u64::MAX, 0));
        assert_eq!((memory.available, memory.limit), (Some(2 << 20), None));
    }

    #[test]
    fn the_tightest_limit_of_the_containers_counts() {
        let folder = tempfile::tempdir().unwrap();
        let (root, own) = (folder.path().join("cgroup"), folder.path().join("own"));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        fs::write(&own, "0::/a/b\n").unwrap();
        write("cgroup.controllers", "memory");
        write("a/b/memory.max", "max\n");
        assert!(cgroup_memory(&root, &own).is_none());
        write("a/memory.max", "1000\n");
        write("a/memory.current", "700\n");
        write("a/memory.stat", "anon 3\ninactive_file 200\n");
        write("memory.max", "5000\n");
        let found = cgroup_memory(&root, &own).unwrap();
        assert_eq!((found.limit, found.left()), (1000, 500));

        fs::remove_file(root.join("cgroup.controllers")).unwrap();
        fs::write(&own, "3:cpu:/x\n2:memory:/a\n").unwrap();
        write("memory/a/memory.limit_in_bytes", "4000\n");
        write("memory/a/memory.usage_in_bytes", "1000\n");
        let found = cgroup_memory(&root, &own).unwrap();
        assert_eq!((found.limit, found.left()), (4000, 3000));
    }
}
