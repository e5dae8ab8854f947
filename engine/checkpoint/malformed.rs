//! Files that are not what they should be: a table of malformed ones, and random damage to a sound one. Tests only.

use super::header::Header;
use super::safetensors::SafetensorsFile;
use crate::error::Error;
use std::path::Path;

/// A file from its header text and its data, with the true header length in front.
fn file_of(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

/// Opens `bytes` as a file, and reads all of it when it opens.
fn open(bytes: &[u8]) -> Result<usize, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let file = SafetensorsFile::open(&path)?;
    for tensor in file.tensors() {
        if tensor.dtype.is_float() {
            file.read_floats::<f32>(&tensor.name)?;
        } else {
            // An unsigned value beyond i64 is the one refusal left after opening.
            let _ = file.read_integers(&tensor.name);
        }
    }
    Ok(file.tensors().len())
}

#[test]
fn sound_files_at_the_edges_open() {
    for (count, header, data) in [
        (0, "{}", 0),
        (0, "{}      ", 0),
        (0, r#"{"__metadata__":{}}"#, 0),
        (1, r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#, 4),
        (1, r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#, 0),
        (1, r#"{"a":{"dtype":"F32","shape":[0,9223372036854775],"data_offsets":[0,0]}}"#, 0),
        (1, r#"{"":{"data_offsets":[0,2],"shape":[1,1,1,2],"dtype":"BOOL"}}"#, 2),
        (2, r#"{"b":{"dtype":"BF16","shape":[3],"data_offsets":[1,7]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, 7),
        (
            3,
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]},"c":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
            2,
        ),
    ] {
        assert_eq!(open(&file_of(header.as_bytes(), &vec![1; data])).unwrap(), count, "{header}");
    }
}

#[test]
fn malformed_headers_are_refused_with_place_expected_and_found() {
    let a = |entry: &str| format!(r#"{{"a":{{{entry}}}}}"#);
    let offsets = |offsets: &str| a(&format!(r#""dtype":"F32","shape":[2],"data_offsets":{offsets}"#));
    let shape = |shape: &str| a(&format!(r#""dtype":"F32","shape":{shape},"data_offsets":[0,8]"#));
    let dtype = |dtype: &str| a(&format!(r#""dtype":{dtype},"shape":[2],"data_offsets":[0,8]"#));
    let good = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let nested = "[".repeat(100_000);
    // (header, bytes of data, what the message must hold)
    let cases: Vec<(String, usize, [&str; 2])> = vec![
        // Not a JSON object of tensors.
        ("".into(), 0, ["header", "nothing"]),
        ("[]".into(), 0, ["header", "'['"]),
        (" {}".into(), 0, ["header", "' '"]),
        ("null".into(), 0, ["header", "'n'"]),
        ("{".into(), 0, ["header", "EOF"]),
        ("{]".into(), 0, ["header", "JSON object"]),
        ("{}x".into(), 0, ["header", "trailing"]),
        ("{}{}".into(), 0, ["header", "trailing"]),
        ("{\"a\"}".into(), 0, ["a:", "expected `:`"]),
        ("{a:1}".into(), 0, ["header", "key must be a string"]),
        (r#"{"a":1}"#.into(), 0, ["a:", "an object with dtype"]),
        (r#"{"a":[]}"#.into(), 0, ["a:", "an object with dtype"]),
        (r#"{"a":null}"#.into(), 0, ["a:", "an object with dtype"]),
        (r#"{"a":"x"}"#.into(), 0, ["a:", "an object with dtype"]),
        (format!(r#"{{"a":{nested}"#), 0, ["a:", "an object with dtype"]),
        (a(&format!(r#""dtype":{nested}"#)), 0, ["a:", "recursion limit"]),
        (format!(r#"{{"a":{good}"#), 8, ["header", "EOF"]),
        (format!(r#"{{"a":{good},}}"#), 8, ["header", "trailing comma"]),
        // Names.
        (format!(r#"{{"a":{good},"a":{good}}}"#), 8, ["a:", "an overlap"]),
        (
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#.into(),
            8,
            ["a:", "twice"],
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#.into(),
            0,
            ["a:", "twice"],
        ),
        (r#"{"\ud800":{}}"#.into(), 0, ["header", "expected"]),
        ("{\"a\n\":{}}".into(), 0, ["header", "control character"]),
        // Metadata.
        (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, ["__metadata__", "twice"]),
        (r#"{"__metadata__":{"format":1}}"#.into(), 0, ["__metadata__", "an object of strings"]),
        (r#"{"__metadata__":[]}"#.into(), 0, ["__metadata__", "an object of strings"]),
        (r#"{"__metadata__":null}"#.into(), 0, ["__metadata__", "an object of strings"]),
        // Keys of an entry.
        (r#"{"a":{}}"#.into(), 0, ["a:", "dtype to be a string, found no such key"]),
        (a(r#""dtype":"F32""#), 8, ["a:", "shape to be a list"]),
        (a(r#""dtype":"F32","shape":[2]"#), 8, ["a:", "data_offsets to be [begin, end], found no such key"]),
        (a(r#""shape":[2],"data_offsets":[0,8]"#), 8, ["a:", "dtype to be a string, found no such key"]),
        (a(r#""dtype":"F32","shape":[2],"data_offsets":[0,8],"extra":1"#), 8, ["a:", "the key \"extra\""]),
        (a(r#""dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]"#), 8, ["a:", "shape twice"]),
        (a(r#""dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]"#), 8, ["a:", "dtype twice"]),
        // Types.
        (dtype("1"), 8, ["a:", "dtype to be a string, found 1"]),
        (dtype("null"), 8, ["a:", "found null"]),
        (dtype("[\"F32\"]"), 8, ["a:", "dtype to be a string"]),
        (dtype("\"f32\""), 8, ["F64, F32, F16, BF16", "\"f32\""]),
        (dtype("\"F8_E4M3\""), 8, ["a:", "F8_E4M3"]),
        (dtype("\"\""), 8, ["a:", "empty name"]),
        (dtype("\"BF16\""), 8, ["4 bytes for shape [2] of BF16", "8 bytes"]),
        (dtype("\"I64\""), 8, ["16 bytes for shape [2] of I64", "8 bytes"]),
        // Shapes.
        (shape("2"), 8, ["shape to be a list", "found 2"]),
        (shape("\"2\""), 8, ["shape to be a list", "the string"]),
        (shape("{}"), 8, ["shape to be a list", "an object"]),
        (shape("[-2]"), 8, ["shape to be a list", "something else than whole numbers"]),
        (shape("[2.0]"), 8, ["shape to be a list", "something else"]),
        (shape("[true]"), 8, ["shape to be a list", "something else"]),
        (shape("[[2]]"), 8, ["shape to be a list", "something else"]),
        (shape("[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2]"), 8, ["at most 16", "a longer list"]),
        (shape("[3]"), 8, ["12 bytes", "8 bytes"]),
        (shape("[]"), 8, ["4 bytes", "8 bytes"]),
        (shape("[0]"), 8, ["0 bytes", "8 bytes"]),
        (shape("[18446744073709551615]"), 8, ["address space", "18446744073709551615"]),
        (shape("[18446744073709551616]"), 8, ["shape to be a list", "something else"]),
        (shape("[4294967296,4294967296]"), 8, ["address space", "4294967296"]),
        // 2^62 + 2 elements of 4 bytes wrap to 8.
        (shape("[4611686018427387906]"), 8, ["address space", "4611686018427387906"]),
        (shape("[0,4294967296,4294967296,4294967296]"), 8, ["address space", "4294967296"]),
        // Offsets.
        (offsets("[0]"), 8, ["[begin, end]", "found [0]"]),
        (offsets("[0,8,8]"), 8, ["[begin, end]", "found [0, 8, 8]"]),
        (offsets("8"), 8, ["[begin, end]", "found 8"]),
        (offsets("[\"0\",\"8\"]"), 8, ["[begin, end]", "something else"]),
        (offsets("[0,-8]"), 8, ["[begin, end]", "something else"]),
        (offsets("[8,0]"), 8, ["within the 8 bytes", "[8, 0]"]),
        (offsets("[0,9]"), 8, ["within the 8 bytes", "[0, 9]"]),
        (offsets("[8,16]"), 8, ["within the 8 bytes", "[8, 16]"]),
        (offsets("[18446744073709551608,18446744073709551615]"), 8, ["within the 8 bytes", "18446744073709551608"]),
        (offsets("[0,8]"), 7, ["within the 7 bytes", "[0, 8]"]),
        (offsets("[0,8]"), 9, ["end of file: expected 8 bytes", "9 bytes"]),
        (offsets("[0,4]"), 8, ["8 bytes for shape", "4 bytes"]),
        (offsets("[1,9]"), 9, ["begin at 0", "a hole"]),
        ("{}".into(), 1, ["end of file: expected 0 bytes", "1 bytes"]),
        (
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}}"#.into(),
            7,
            ["b:", "an overlap"],
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#.into(),
            4,
            ["b:", "an overlap"],
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[5,9]}}"#.into(),
            9,
            ["b:", "a hole"],
        ),
    ];
    assert!(cases.len() > 60);
    for (header, data, wanted) in cases {
        let shown = &header[..header.len().min(120)];
        let message = open(&file_of(header.as_bytes(), &vec![0; data])).expect_err(shown).to_string();
        assert!(message.contains("model.safetensors"), "{shown}\n{message}");
        assert!(wanted.iter().all(|part| message.contains(part)), "{shown}\n{message}\nlacks one of {wanted:?}");
        assert!(message.len() < 2_000, "{} bytes of message", message.len());
    }
}

#[test]
fn malformed_lengths_and_bytes_are_refused() {
    let with_length = |length: u64, rest: &[u8]| [&length.to_le_bytes()[..], rest].concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "a file of 0 bytes"),
        (vec![2, 0, 0, 0, 0, 0, 0], "a file of 7 bytes"),
        (with_length(0, b""), "nothing"),
        (with_length(1, b""), "at most 0 bytes"),
        (with_length(3, b"{}"), "a length of 3"),
        (with_length(u64::MAX, b"{}"), "a length of 18446744073709551615"),
        (with_length(u64::MAX - 7, b"{}"), "at most 2 bytes"),
        (with_length(1 << 40, b"{}"), "at most 2 bytes"),
        (with_length(1, b"{}"), "EOF"),
        (with_length(4, b"{\"\xff\"}"), "invalid byte at offset 10"),
        (with_length(6, b"{\"\xc3\x28\"}"), "invalid byte at offset 10"),
        (b"PK\x03\x04 a zip archive, as pytorch_model.bin is".to_vec(), "not a safetensors file"),
        (b"GGUF\x03\0\0\0 another format altogether".to_vec(), "not a safetensors file"),
    ];
    for (bytes, wanted) in cases {
        let message = open(&bytes).expect_err(wanted).to_string();
        assert!(message.contains("model.safetensors") && message.contains(wanted), "{message} lacks {wanted}");
    }
}

#[test]
fn a_long_header_in_a_sparse_file_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, 200_000_000u64.to_le_bytes()).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
    let message = SafetensorsFile::open(&path).unwrap_err().to_string();
    assert!(message.contains("at most 100000000 bytes"), "{message}");
}

/// Damages a sound file in thousands of ways: it may be refused or still be sound, but never panics. Every fiftieth is
/// read from disk, with its length prefix; the others are parsed in memory, which is a hundred times faster.
#[test]
fn random_damage_never_panics() {
    let header = r#"{"__metadata__":{"format":"pt"},"x.weight":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]},"y":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},"z":{"dtype":"I64","shape":[1],"data_offsets":[32,40]}}"#;
    let sound = file_of(header.as_bytes(), &[3; 40]);
    assert_eq!(open(&sound).unwrap(), 3);
    let seed = 20_240_919u64;
    let mut state = seed;
    // SplitMix64, Steele et al. 2014.
    let mut random = |below: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    };
    let digits = b"0123456789-.[]{}\",:eE";
    let mut refused = 0;
    for round in 0..20_000 {
        let on_disk = round % 50 == 0;
        let mut bytes = if on_disk { sound.clone() } else { header.as_bytes().to_vec() };
        for _ in 0..1 + random(3) {
            let at = random(bytes.len());
            match random(5) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes[at] = digits[random(digits.len())],
                2 => bytes.truncate(at.max(1)),
                3 if bytes.len() > 1 => {
                    bytes.remove(at);
                }
                _ => bytes.insert(at, digits[random(digits.len())]),
            }
        }
        let outcome = if on_disk { open(&bytes) } else { Header::parse(Path::new("x"), &bytes, 40).map(|header| header.tensors.len()) };
        match outcome {
            Ok(count) => assert!(count <= 4, "seed {seed} round {round}"),
            Err(Error::Format { .. }) => refused += 1,
            Err(other) => panic!("seed {seed} round {round}: {other}"),
        }
    }
    assert!(refused > 15_000, "only {refused} of 20000 were refused");
}
