//! "Did you mean": the known name that is nearest to a mistyped one.

/// The name in `known` with the fewest edits to `name`, if it takes at most a third of its letters (and two at least).
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (name.chars().count() / 3).max(2);
    let best = known.into_iter().map(|candidate| (edits(name, candidate), candidate)).min()?;
    // Two edits make anything of a name of two letters.
    (best.0 <= limit && best.0 < name.chars().count().max(2)).then_some(best.1)
}

/// `; did you mean ...?` or nothing, to end a message with.
pub fn suggestion<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(name, known).map_or_else(String::new, |nearest| format!("; did you mean `{nearest}`?"))
}

/// Levenshtein's distance, by rows.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_offered_and_far_ones_are_not() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(nearest("stesp", ["steps", "seed"]), Some("steps"));
        assert_eq!(nearest("zzz", ["steps", "seed"]), None);
        assert_eq!(nearest("ab", ["cd"]), None);
        assert_eq!(nearest("x", []), None);
    }
}
