//! Numbers as people read them: bytes and counts in three digits.

/// 1536 bytes as `1.50 KiB`, up to TiB.
pub fn bytes(count: u64) -> String {
    scaled(count as f64, 1024.0, [" B", " KiB", " MiB", " GiB", " TiB"])
}

/// 494,032,768 as `494M`, up to T.
pub fn count(count: f64) -> String {
    scaled(count, 1000.0, ["", "K", "M", "B", "T"])
}

fn scaled(mut value: f64, step: f64, units: [&str; 5]) -> String {
    let mut place = 0;
    // 999.5 and more would round to a fourth digit.
    while value >= 999.5 && place + 1 < units.len() {
        value /= step;
        place += 1;
    }
    let digits = match value {
        _ if place == 0 => 0,
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.digits$}{}", units[place])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_at_every_size() {
        let texts = [0, 7, 999, 1000, 1023, 1024, 1536, 10 << 10, 999 << 20, 24 << 30, 5 << 40].map(bytes);
        let want = ["0 B", "7 B", "999 B", "0.98 KiB", "1.00 KiB", "1.00 KiB", "1.50 KiB", "10.0 KiB", "999 MiB", "24.0 GiB", "5.00 TiB"];
        assert_eq!(texts, want);
        assert_eq!([494_032_768.0, 999_600.0, 7.6e9, 12_288.0].map(count), ["494M", "1.00M", "7.60B", "12.3K"]);
    }
}
