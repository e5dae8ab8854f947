//! Parquet files that Apache Arrow wrote (tests/golden/make_parquet.py) give the rows they were made of, in any order, from
//! any position; and damaged ones give errors that name file, row and column.

use perilune::data::chat_template::ChatTemplate;
use perilune::data::conversation::{Form, Rules};
use perilune::data::dataset::Dataset;
use perilune::data::document_index::Part;
use perilune::data::jsonl::{Record, parse_line};
use perilune::data::pack::Packing;
use perilune::data::source::OnError;
use perilune::data::tokenizer::Tokenizer;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parquet").join(file)
}

fn rows() -> Vec<Record> {
    let text = std::fs::read_to_string(golden("rows.jsonl")).unwrap();
    text.lines().map(|line| parse_line(line.as_bytes()).unwrap()).collect()
}

fn numbers(records: &[Record]) -> Vec<i64> {
    records.iter().map(|record| record["id"].as_i64().unwrap()).collect()
}

#[test]
fn every_encoding_gives_the_rows_in_order() {
    for file in ["snappy", "gzip", "zstd", "plain", "pages_v2"] {
        let mut data = Dataset::parquet([golden(&format!("{file}.parquet"))]);
        assert_eq!(data.documents().unwrap(), 23);
        assert_eq!(data.take_rows(100).unwrap(), rows(), "{file}");
    }
    let mut both = Dataset::parquet([golden("zstd.parquet"), golden("plain.parquet")]);
    assert_eq!(both.take_rows(100).unwrap(), [rows(), rows()].concat());
}

#[test]
fn odd_types_become_what_json_has() {
    let record = Dataset::parquet([golden("odd.parquet")]).take_rows(1).unwrap().remove(0);
    let expected = json!({ "text": "a", "day": "2024-02-29", "price": "12.50", "small": -7, "unsigned": u64::MAX, "half": 1.5,
        "single": f64::from(0.1f32), "holes": [1, null, 3] });
    assert_eq!(serde_json::Value::Object(record), expected);
}

#[test]
fn shuffled_split_and_resumed_rows_are_each_read_once() {
    let data = || Dataset::parquet([golden("snappy.parquet")]).shuffle(3).epochs(2);
    let all = data().take_rows(100).unwrap();
    let ids = numbers(&all);
    for epoch in ids.chunks(23) {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..23) && epoch != (0..23).collect::<Vec<_>>());
    }
    assert!(all.iter().all(|record| *record == rows()[record["id"].as_u64().unwrap() as usize]));
    for taken in 0..=46 {
        let mut first = data();
        first.take_rows(taken).unwrap();
        let mut rest = data();
        rest.restore(&first.cursor().unwrap()).unwrap();
        assert_eq!(numbers(&rest.take_rows(100).unwrap()), ids[taken..], "after {taken}");
    }
    // A row stays on its side in whatever file it lies.
    let part = |data: Dataset, part| numbers(&data.split(part, 0.3).take_rows(100).unwrap());
    for side in [Part::Train, Part::Validation] {
        let lines = part(Dataset::jsonl([golden("rows.jsonl")]), side);
        assert_eq!(part(Dataset::parquet([golden("zstd.parquet")]), side), lines);
        assert_eq!(part(Dataset::records(rows()), side), lines);
        assert!(!lines.is_empty());
    }
}

#[test]
fn conversations_are_those_of_the_same_json_lines() {
    let batch = |data: Dataset| {
        let chat = data.chat(Arc::new(ChatTemplate::default()), Rules::new(Form::Conversations));
        chat.tokenizer(Arc::new(Tokenizer::bytes_with_chat())).pack(Packing::Whole).take_batch(99).unwrap().unwrap()
    };
    let lines = batch(Dataset::jsonl([golden("rows.jsonl")]));
    assert_eq!((lines.rows(), batch(Dataset::parquet([golden("snappy.parquet")]))), (23, lines.clone()));
    assert_eq!(batch(Dataset::records(rows())), lines);
}

#[test]
fn what_cannot_be_read_is_named() {
    let told = |data: Dataset| data.fresh().take_rows(100).unwrap_err().to_string();
    let binary = || Dataset::parquet([golden("binary.parquet")]);
    let says = told(binary());
    assert!(says.contains("binary.parquet: row 2, column image: expected text") && says.contains("2 bytes that are no text"), "{says}");
    let mut skipping = binary().on_error(OnError::Skip);
    assert_eq!(skipping.take_rows(9).unwrap().len(), 2);
    assert_eq!(skipping.tally().skipped, 1);
    let says = told(Dataset::parquet([golden("brotli.parquet")]));
    assert!(says.contains("brotli.parquet: column \"id\": compression with brotli is not supported; write the file with snappy"), "{says}");
    let says = told(Dataset::parquet([golden("rows.jsonl")]));
    assert!(says.contains("rows.jsonl: footer: expected a Parquet file"), "{says}");
    assert!(told(Dataset::parquet([golden("empty.parquet")])).contains("at least one document"));
    assert!(told(Dataset::parquet([golden("none.parquet")])).contains("none.parquet: cannot open"));
    assert!(told(Dataset::parquet(Vec::<PathBuf>::new())).contains("at least one file"));
    let mut texts = Dataset::parquet([golden("snappy.parquet")]).tokenizer(Arc::new(Tokenizer::bytes_with_chat()));
    texts = texts.pack(Packing::Whole);
    let says = texts.take_batch(1).unwrap_err().to_string();
    assert!(says.contains("snappy.parquet: row 1: expected a string, found no field \"text\", only id, messages"), "{says}");
    let says = Dataset::records(rows()).tokenizer(Arc::new(Tokenizer::bytes_with_chat())).pack(Packing::Whole).take_batch(1);
    assert!(says.unwrap_err().to_string().contains("records: record 1: expected a string"));
}

#[test]
fn damaged_bytes_are_errors_and_never_wrong_text_in_silence_about_their_shape() {
    let whole = std::fs::read(golden("snappy.parquet")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.parquet");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Dataset::parquet([&path]).take_rows(100)
    };
    for length in (0..whole.len()).step_by(97) {
        assert!(read(&whole[..length]).is_err(), "cut to {length}");
    }
    // A changed byte of text can go unseen; what must not happen is a crash or another number of rows.
    let mut errors = 0;
    for at in (4..whole.len()).step_by(13) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x5A;
        match read(&damaged) {
            Ok(rows) => assert!(rows.len() <= 23, "{} rows with byte {at} changed", rows.len()),
            Err(error) => {
                errors += 1;
                assert!(error.to_string().contains("damaged.parquet") || error.to_string().contains("document"), "{error}");
            }
        }
    }
    assert!(errors > 20, "{errors}");
}
