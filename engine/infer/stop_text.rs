//! Stop strings in streamed text: what may be shown at once, and where the text ends. A stop string may begin in one piece
//! and end in another, so its possible beginning is held back until the next piece decides.

use crate::error::{Error, Result};

/// Watches a stream of text for the first of some strings.
#[derive(Debug, Clone)]
pub struct StopText {
    stops: Vec<String>,
    /// A tail that may yet become a stop string.
    held: String,
}

impl StopText {
    /// Errors: [`Error::Argument`] for an empty stop string, which would end every text.
    pub fn new(stops: &[String]) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::argument("generate", "stop", "texts of at least one character", "an empty one"));
        }
        Ok(Self { stops: stops.to_vec(), held: String::new() })
    }

    /// Takes the next piece: the text that may be shown, and whether a stop string ended it. The stop string itself and
    /// what follows it are dropped.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        // The first place where one begins; the rest of the stream cannot bring an earlier one.
        if let Some(end) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(end);
            return (text, true);
        }
        let undecided = self.held.char_indices().map(|(index, _)| index).find(|index| {
            let tail = &self.held[*index..];
            self.stops.iter().any(|stop| stop.starts_with(tail))
        });
        let tail = self.held.split_off(undecided.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, tail), false)
    }

    /// What is still held back when the stream ends by itself.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown after each piece, and whether it ended there.
    fn stream(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool, String) {
        let mut stop = StopText::new(&stops.iter().map(|stop| stop.to_string()).collect::<Vec<_>>()).unwrap();
        let mut shown = Vec::new();
        for piece in pieces {
            let (text, ended) = stop.push(piece);
            shown.push(text);
            if ended {
                return (shown, true, stop.finish());
            }
        }
        (shown, false, stop.finish())
    }

    #[test]
    fn text_ends_before_a_stop_string_wherever_it_is_cut() {
        let whole = "one STOP two";
        for cut in 0..=whole.len() {
            let (shown, ended, rest) = stream(&["STOP"], &[&whole[..cut], &whole[cut..]]);
            assert_eq!((shown.concat().as_str(), ended, rest.as_str()), ("one ", true, ""), "cut at {cut}");
        }
        let letters: Vec<String> = whole.chars().map(String::from).collect();
        let (shown, ended, _) = stream(&["STOP"], &letters.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!((shown.concat().as_str(), ended), ("one ", true));
    }

    #[test]
    fn only_an_undecided_tail_is_held_back() {
        assert_eq!(stream(&["\n\n"], &["a\n", "b", "\n"]), (vec!["a".into(), "\nb".into(), "".into()], false, "\n".into()));
        // A repeated beginning: the second "aa" of "aaab" belongs to the stop string.
        assert_eq!(stream(&["aab"], &["aa", "ab", "x"]), (vec!["".into(), "a".into()], true, "".into()));
        assert_eq!(stream(&["éé"], &["xé", "ü"]), (vec!["x".into(), "éü".into()], false, "".into()));
    }

    #[test]
    fn the_earliest_of_several_wins_and_none_holds_nothing() {
        assert_eq!(stream(&["two", "one"], &["zero one two"]).0, ["zero "]);
        assert_eq!(stream(&[], &["as it comes"]), (vec!["as it comes".into()], false, "".into()));
        assert!(StopText::new(&[String::new()]).is_err());
    }
}
