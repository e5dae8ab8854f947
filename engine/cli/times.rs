//! Instants and durations as people read them. Relative where that says more, UTC where it must be exact: the time zone of
//! whoever looks is not known.

/// Seconds as two units at most: `0.2 s`, `47 s`, `2 min 3 s`, `3 h 20 min`, `5 d 2 h`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    let two = |large: u64, name: &str, small: u64, other: &str| {
        if small == 0 { format!("{large} {name}") } else { format!("{large} {name} {small} {other}") }
    };
    match whole {
        0..10 => format!("{:.1} s", seconds.max(0.0)),
        10..60 => format!("{whole} s"),
        60..3600 => two(whole / 60, "min", whole % 60, "s"),
        3600..86_400 => two(whole / 3600, "h", whole / 60 % 60, "min"),
        _ => two(whole / 86_400, "d", whole / 3600 % 24, "h"),
    }
}

/// How long before `now` the instant `then` was, in one unit: `3 h ago`.
///
/// - both Unix seconds; clocks that disagree by a little give `just now`
pub fn ago(then: f64, now: f64) -> String {
    let seconds = (now - then).max(0.0) as u64;
    match seconds {
        0..5 => "just now".into(),
        5..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// Unix seconds as `2026-11-26 10:22:11 UTC`.
pub fn utc(unix: f64) -> String {
    let seconds = unix.max(0.0) as u64;
    // Days since 1970-03-01, in years that begin with March, so that the leap day comes last. Source: Howard Hinnant,
    // "chrono-compatible low-level date algorithms", civil_from_days.
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units_at_most() {
        let wanted = [
            (-1.0, "0.0 s"),
            (0.24, "0.2 s"),
            (9.99, "10.0 s"),
            (59.9, "59 s"),
            (60.0, "1 min"),
            (123.0, "2 min 3 s"),
            (3600.0, "1 h"),
            (12_000.0, "3 h 20 min"),
            (86_400.0 * 5.0 + 7200.0, "5 d 2 h"),
        ];
        for (seconds, text) in wanted {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn instants_are_told_from_now() {
        for (seconds, text) in
            [(-9.0, "just now"), (4.0, "just now"), (59.0, "59 s ago"), (3599.0, "59 min ago"), (7200.0, "2 h ago"), (172_800.0, "2 d ago")]
        {
            assert_eq!(ago(1e9 - seconds, 1e9), text);
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        // From GNU date -u -d @N.
        for (unix, text) in [
            (0.0, "1970-01-01 00:00:00 UTC"),
            (951_782_400.0, "2000-02-29 00:00:00 UTC"),
            (951_868_799.9, "2000-02-29 23:59:59 UTC"),
            (1_709_251_200.0, "2024-03-01 00:00:00 UTC"),
            (1_795_688_531.0, "2026-11-26 10:22:11 UTC"),
            (4_107_542_400.0, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(unix), text);
        }
    }
}
