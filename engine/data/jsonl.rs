//! One line of a JSON-lines file to a record, with errors that say where. Not the file: `document_index.rs` finds lines.
//! Source: jsonlines.org; a byte order mark, CRLF, blank lines and a missing last newline are tolerated there.

use serde_json::{Map, Value};

/// A record: the fields of a JSON object. A text document is a record with the field `text`.
pub type Record = Map<String, Value>;

/// What is wrong with a line, and where in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadLine {
    /// Bytes from the document's start to the start of the line; 0 in JSON lines.
    pub offset: u64,
    /// Counted in bytes from 1; 0 when the whole line is meant.
    pub column: usize,
    pub expected: &'static str,
    pub found: String,
}

/// The record on a line, which comes without its newline.
pub fn parse_line(line: &[u8]) -> Result<Record, BadLine> {
    let expected = "a JSON object";
    if let Err(error) = std::str::from_utf8(line) {
        let at = error.valid_up_to();
        return Err(BadLine { offset: 0, column: at + 1, expected: "UTF-8", found: format!("the byte {:#04x}", line[at]) });
    }
    match serde_json::from_slice(line) {
        Ok(Value::Object(record)) => Ok(record),
        Ok(other) => Err(BadLine { offset: 0, column: 0, expected, found: kind(&other).to_string() }),
        Err(error) => {
            let message = error.to_string();
            // serde_json puts "at line 1 column N" behind, which `column` says already.
            let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(front, _)| front);
            Err(BadLine { offset: 0, column: error.column(), expected, found: format!("text that is no JSON ({message})") })
        }
    }
}

/// What sort of value this is, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gives_its_fields_in_order() {
        let record = parse_line(r#" {"b": 1, "a": "é"} "#.as_bytes()).unwrap();
        assert_eq!(record.keys().collect::<Vec<_>>(), ["b", "a"]);
    }

    #[test]
    fn a_bad_line_says_where_and_what() {
        let check = |line: &[u8], column, found: &str| {
            let bad = parse_line(line).unwrap_err();
            assert!(bad.column == column && bad.found.contains(found), "{bad:?}");
        };
        check(b"{\"a\": 1", 7, "EOF");
        check(b"{\"a\": x}", 7, "expected value");
        check(b"{} {}", 4, "trailing");
        check(b"[1]", 0, "an array");
        check(b"{\"a\": \"\xFF\"}", 8, "0xff");
        check(&[b'['; 100_000], 128, "recursion");
    }
}
