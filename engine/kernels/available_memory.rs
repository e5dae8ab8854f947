//! How much memory the machine can still give, so that what cannot fit is refused before it is tried. Reserves nothing:
//! another process may take it in between.

use super::buffer::free_bytes;

/// Bytes that the system says this process may still use; `None` where it does not tell (other than Linux).
pub fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let machine = number_after(&text, "MemAvailable:")?.saturating_mul(1024);
    // A container may have less than the machine.
    let cgroup = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok();
    let container = available_in_container(&cgroup("memory.max"), &cgroup("memory.current"), &cgroup("memory.stat"));
    Some(machine.min(container.unwrap_or(u64::MAX)))
}

/// Bytes that a container may still use, by the texts of its cgroup's files; `None` without a limit. Pages of files count as used
/// there, up to the limit where large files were read or written, and go when memory is asked for.
fn available_in_container(max: &Option<String>, current: &Option<String>, stat: &Option<String>) -> Option<u64> {
    let number = |text: &Option<String>| text.as_ref()?.trim().parse::<u64>().ok();
    let stat = stat.as_deref().unwrap_or_default();
    let files: u64 = ["active_file ", "inactive_file "].iter().filter_map(|key| number_after(stat, key)).sum();
    Some(number(max)?.saturating_sub(number(current).unwrap_or(0).saturating_sub(files)))
}

/// The number behind `key` in a text of `key number` lines, which may name a unit, as /proc and cgroups write them.
fn number_after(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

/// Whether `bytes` more can be had: by the system's account, and by asking for the addresses.
pub fn fits(bytes: u64) -> bool {
    // Recycled blocks count as used to the system, and are free to us.
    let room = available_bytes().map_or(u64::MAX, |available| available.saturating_add(free_bytes() as u64));
    let addresses = usize::try_from(bytes).is_ok_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok());
    bytes <= room && addresses
}

/// Whether a copy of `bytes` leaves an eighth of them free. Recycled blocks do not count as free, since the next step takes them.
pub fn has_room_for_copy(bytes: u64) -> bool {
    leaves_an_eighth(bytes, available_bytes())
}

fn leaves_an_eighth(bytes: u64, available: Option<u64>) -> bool {
    available.is_none_or(|available| bytes.saturating_add(bytes / 8) <= available)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_needs_what_the_system_still_gives() {
        for (bytes, available, has_room) in [(800, Some(900), true), (801, Some(900), false), (801, None, true), (0, Some(0), true)] {
            assert_eq!(leaves_an_eighth(bytes, available), has_room, "{bytes} of {available:?}");
        }
        assert!(!leaves_an_eighth(u64::MAX, Some(1 << 40)));
    }

    #[test]
    fn little_fits_and_an_absurd_size_does_not() {
        assert!(fits(0) && fits(1 << 20));
        assert!(!fits(1 << 60) && !fits(u64::MAX));
        assert_eq!((number_after("MemAvailable:  12 kB\n", "MemAvailable:"), number_after("x: y", "x:")), (Some(12), None));
    }

    #[test]
    fn pages_of_files_do_not_fill_a_container() {
        let text = |text: &str| Some(text.to_string());
        let stat = text("anon 300\nfile 650\ninactive_file 400\nactive_file 200\n");
        assert_eq!(available_in_container(&text("1000\n"), &text("990\n"), &stat), Some(610));
        assert_eq!(available_in_container(&text("1000\n"), &text("990\n"), &None), Some(10));
        assert_eq!(available_in_container(&text("max\n"), &text("990\n"), &stat), None);
    }
}
