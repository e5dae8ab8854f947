//! How much memory the machine can still give, so that what cannot fit is refused before it is tried. Reserves nothing:
//! another process may take it in between.

use super::buffer::free_bytes;

/// Bytes that the system says this process may still use; `None` where it does not tell (other than Linux).
pub fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let machine = kib_after(&text, "MemAvailable:")?.saturating_mul(1024);
    // A container may have less than the machine.
    let cgroup = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok();
    let container = cgroup("memory.max").map(|limit| limit.saturating_sub(cgroup("memory.current").unwrap_or(0)));
    Some(machine.min(container.unwrap_or(u64::MAX)))
}

/// The number behind `key` in a text of `key: number kB` lines, as /proc writes them.
fn kib_after(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

/// Whether `bytes` more can be had: by the system's account, and by asking for the addresses.
pub fn fits(bytes: u64) -> bool {
    // Recycled blocks count as used to the system, and are free to us.
    let room = available_bytes().map_or(u64::MAX, |available| available.saturating_add(free_bytes() as u64));
    let addresses = usize::try_from(bytes).is_ok_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok());
    bytes <= room && addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_fits_and_an_absurd_size_does_not() {
        assert!(fits(0) && fits(1 << 20));
        assert!(!fits(1 << 60) && !fits(u64::MAX));
        assert_eq!((kib_after("MemAvailable:  12 kB\n", "MemAvailable:"), kib_after("x: y", "x:")), (Some(12), None));
    }
}
