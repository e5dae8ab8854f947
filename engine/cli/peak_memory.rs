//! The most memory this process ever held, as the system counts it.

/// Bytes of the largest resident set so far; `None` where the system does not tell (other than Linux).
pub fn peak_memory_bytes() -> Option<u64> {
    kib_of(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:").map(|kib| kib * 1024)
}

/// The number behind `key` in a text of `key: number kB` lines, as /proc writes them.
pub fn kib_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_the_key_is_read() {
        let text = "VmPeak:\t  900 kB\nVmHWM:\t  123 kB\nVmRSS: x kB\n";
        assert_eq!((kib_of(text, "VmHWM:"), kib_of(text, "VmRSS:"), kib_of(text, "Gone:")), (Some(123), None, None));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn touching_memory_raises_the_peak() {
        let values = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(peak_memory_bytes().unwrap() > values.len() as u64);
    }
}
