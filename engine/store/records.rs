//! What is remembered of a run, as plain data: serialised into the store, exported, and sent over a socket. Records that can
//! grow (an error's text, a step's inputs) have a form that fits the store's limit; nothing that a resume needs is shortened.

use crate::error::{Error, Result};
use crate::store::value::PAYLOAD_BYTES_MAX;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Longest key of a step.
pub const STEP_KEY_BYTES_MAX: usize = 256;
/// Largest output of a step that lies in its record; larger ones are files.
pub const INLINE_BYTES_MAX: usize = 3 * 1024;
/// What is kept of a step's inputs, to say how they differ. The fingerprint covers all of them.
pub const INPUTS_BYTES_MAX: usize = 1024;
/// What is kept of a reason or an error where there is room.
const TEXT_BYTES_MAX: usize = 2048;

/// Everything that is remembered of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Records {
    pub run: Option<RunRecord>,
    /// In the order in which they started.
    pub steps: Vec<StepRecord>,
    pub generations: Vec<GenerationRecord>,
    pub checkpoints: Vec<CheckpointRecord>,
    pub events: Vec<EventRecord>,
}

/// How the run stands. Times are seconds since 1970.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    pub status: Status,
    /// Why it stopped, failed or waits.
    pub reason: Option<String>,
    pub started: f64,
    /// When this record was last written.
    pub changed: f64,
    pub pid: u32,
    pub resumes: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Running,
    Paused,
    Finished,
    Stopped,
    Failed,
}

/// A step of the script: `run:step(name, inputs, fn)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Where it stands in the script: names of enclosing steps, its own, and which occurrence: `sft/eval#3`.
    pub key: String,
    /// Hash of the whole inputs and of what else decides the result.
    pub fingerprint: String,
    /// Canonical JSON, shortened: for messages only.
    pub inputs: String,
    /// Hash of the function's bytecode: advice, not identity.
    pub code: String,
    pub status: StepStatus,
    /// What it returned; of a step that failed, the message that the script got.
    pub output: Option<Output>,
    pub error: Option<String>,
    pub attempts: u32,
    pub started: f64,
    pub ended: Option<f64>,
    pub generation: u32,
    pub seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepStatus {
    Started,
    Done,
    Failed,
}

/// What a step returned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    Inline(Value),
    /// In a file of the run, by the hash of its content.
    File {
        hash: String,
        bytes: u64,
    },
}

/// A version of the run's code, and from which boundary it holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerationRecord {
    pub number: u32,
    /// None for code that held from the start.
    pub loop_path: Option<String>,
    pub step: u64,
    pub time: f64,
    /// Of the file that lists its sources, `code/gN.json`.
    pub hash: String,
    pub status: GenerationStatus,
    /// Why it was rejected.
    pub reason: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GenerationStatus {
    Accepted,
    Rejected,
}

/// A checkpoint folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    pub number: u64,
    /// Of its folder.
    pub name: String,
    pub loop_path: String,
    pub step: u64,
    pub generation: u32,
    /// Hash of its MANIFEST.json.
    pub manifest: String,
    pub bytes: u64,
    pub time: f64,
    /// The last numbers that the loop logged; those that fit, all are in metrics.jsonl.
    pub metrics: Map<String, Value>,
    /// Never removed to make room.
    pub pinned: bool,
    /// Why it cannot be used any more.
    pub lost: Option<String>,
}

/// Something from outside that changed the run, in the order of its number; a resume applies it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    pub number: u64,
    pub time: f64,
    pub kind: String,
    pub loop_path: Option<String>,
    pub step: u64,
    pub detail: Value,
}

impl RunRecord {
    /// With a reason that fits the store.
    pub fn fitted(mut self) -> Self {
        self.reason = self.reason.map(|reason| shortened(&reason, TEXT_BYTES_MAX));
        self
    }
}

impl StepRecord {
    /// In a form that fits the store: inputs and error shortened.
    ///
    /// Errors: [`Error::Argument`] for a key over 256 bytes or an inline output over 3 KiB.
    pub fn fitted(mut self) -> Result<Self> {
        if self.key.is_empty() || self.key.len() > STEP_KEY_BYTES_MAX {
            let expected = format!("1 to {STEP_KEY_BYTES_MAX} bytes, enclosing steps included");
            return Err(Error::argument("run:step", "name", expected, format!("{} bytes", self.key.len())));
        }
        if let Some(Output::Inline(value)) = &self.output {
            let bytes = json_bytes(value);
            if bytes > INLINE_BYTES_MAX {
                let expected = format!("at most {INLINE_BYTES_MAX} bytes as JSON; larger ones are written to a file");
                return Err(Error::argument("run:step", format!("output of {}", self.key), expected, format!("{bytes} bytes")));
            }
        }
        self.inputs = shortened(&self.inputs, INPUTS_BYTES_MAX);
        // Text grows when it is quoted, so what is left is measured rather than computed. The error goes first: the file of
        // the run's log has all of it.
        for bytes in [TEXT_BYTES_MAX, 1024, 512, 256] {
            self.error = self.error.map(|error| shortened(&error, bytes));
            if json_bytes(&self) <= PAYLOAD_BYTES_MAX {
                return Ok(self);
            }
        }
        for bytes in [512, 256, 128, 64, 0] {
            self.inputs = shortened(&self.inputs, bytes);
            if json_bytes(&self) <= PAYLOAD_BYTES_MAX {
                return Ok(self);
            }
        }
        let expected = format!("a name, hashes and an output that take at most {PAYLOAD_BYTES_MAX} bytes together");
        Err(Error::argument("run:step", self.key.clone(), expected, format!("{} bytes", json_bytes(&self))))
    }
}

impl GenerationRecord {
    /// With a reason that fits the store.
    pub fn fitted(mut self) -> Self {
        self.reason = self.reason.map(|reason| shortened(&reason, TEXT_BYTES_MAX));
        self
    }
}

impl CheckpointRecord {
    /// With as many metrics as fit the store, the first ones.
    pub fn fitted(mut self) -> Self {
        self.lost = self.lost.map(|reason| shortened(&reason, 512));
        while json_bytes(&self) > PAYLOAD_BYTES_MAX {
            let Some(last) = self.metrics.keys().next_back().cloned() else { break };
            self.metrics.shift_remove(&last);
        }
        self
    }
}

/// Bytes of `value` as JSON.
fn json_bytes(value: &impl Serialize) -> usize {
    serde_json::to_vec(value).expect("records have text keys and no other way to fail").len()
}

/// `text`, cut to at most `bytes` bytes of which the last say how much is missing. Quoting may make it longer: quotes, line
/// ends and control characters are counted as they are written in JSON.
fn shortened(text: &str, bytes: usize) -> String {
    let quoted = |c: char| match c {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        c if c < ' ' => 6,
        c => c.len_utf8(),
    };
    if text.chars().map(quoted).sum::<usize>() <= bytes {
        return text.to_string();
    }
    let note = |cut: usize| format!("... ({} more bytes)", text.len() - cut);
    let room = bytes.saturating_sub(note(0).len());
    let (mut end, mut used) = (0, 0);
    for c in text.chars() {
        used += quoted(c);
        if used > room {
            break;
        }
        end += c.len_utf8();
    }
    format!("{}{}", &text[..end], note(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn step(inputs: &str, output: Option<Value>, error: Option<&str>) -> StepRecord {
        StepRecord {
            key: "sft/eval#3".into(),
            fingerprint: "f".repeat(64),
            inputs: inputs.into(),
            code: "c".repeat(64),
            status: StepStatus::Done,
            output: output.map(Output::Inline),
            error: error.map(Into::into),
            attempts: 1,
            started: 1.76e9 + 0.123_456_7,
            ended: Some(1.76e9 + 5.5),
            generation: 2,
            seconds: 5.376_543_3,
        }
    }

    /// The record fits, and what must not change has not.
    fn check_fits(record: StepRecord) -> StepRecord {
        let fitted = record.clone().fitted().unwrap();
        assert!(json_bytes(&fitted) <= PAYLOAD_BYTES_MAX, "{} bytes", json_bytes(&fitted));
        let without_texts = |record: &StepRecord| StepRecord { inputs: String::new(), error: None, ..record.clone() };
        assert_eq!(without_texts(&fitted), without_texts(&record));
        fitted
    }

    #[test]
    fn steps_fit_whatever_their_texts() {
        assert_eq!(check_fits(step("{\"lr\":1e-5}", Some(json!({ "loss": 2.5 })), None)).inputs, "{\"lr\":1e-5}");
        let long = check_fits(step(&"\"\\\n".repeat(4000), None, None)).inputs;
        assert!(long.ends_with(" more bytes)") && long.starts_with("\"\\\n\""), "{long}");
        check_fits(step(&"é".repeat(3000), Some(json!("x".repeat(INLINE_BYTES_MAX - 2))), Some(&"trace\n\tback".repeat(500))));
        let error = check_fits(step("{}", None, Some(&"\u{1}".repeat(5000)))).error.unwrap();
        assert!(error.contains("... (") && error.len() > 100, "{error}");
        let mut named = step(&"\"".repeat(2000), Some(json!("é\"".repeat(760))), Some(&"\"".repeat(2000)));
        named.key = "k".repeat(STEP_KEY_BYTES_MAX);
        check_fits(named);
    }

    #[test]
    fn what_must_not_be_shortened_is_refused() {
        let message = step("", Some(json!("x".repeat(INLINE_BYTES_MAX))), None).fitted().unwrap_err().to_string();
        assert!(message.contains("`output of sft/eval#3` should be at most 3072 bytes"), "{message}");
        let mut long = step("", None, None);
        long.key = "k".repeat(STEP_KEY_BYTES_MAX + 1);
        assert!(long.fitted().unwrap_err().to_string().contains("1 to 256 bytes"));
    }

    #[test]
    fn checkpoints_keep_the_metrics_that_fit() {
        let metrics: Map<String, Value> = (0..400).map(|i| (format!("metric_{i}"), json!(i as f64 / 7.0))).collect();
        let record = CheckpointRecord {
            number: 3,
            name: "train-000050".into(),
            loop_path: "train".into(),
            step: 50,
            generation: 0,
            manifest: "m".repeat(64),
            bytes: 1 << 40,
            time: 1.5,
            metrics,
            pinned: false,
            lost: Some("x".repeat(9000)),
        };
        let fitted = record.fitted();
        assert!(json_bytes(&fitted) <= PAYLOAD_BYTES_MAX && fitted.metrics.len() > 50, "{}", fitted.metrics.len());
        assert_eq!(fitted.metrics.keys().next().unwrap(), "metric_0");
    }

    #[test]
    fn records_pass_through_json_unchanged() {
        let records = Records {
            run: Some(RunRecord { status: Status::Paused, reason: None, started: 0.1, changed: 1e9 + 0.3, pid: 7, resumes: 1 }),
            steps: vec![step("{}", Some(json!([1, 2.5, null, { "b": 1, "a": 2 }])), Some("é"))],
            generations: vec![],
            checkpoints: vec![],
            events: vec![EventRecord {
                number: 1,
                time: 2.0,
                kind: "set".into(),
                loop_path: Some("t".into()),
                step: 4,
                detail: json!({ "lr": 1e-7 }),
            }],
        };
        let text = serde_json::to_string(&records).unwrap();
        assert!(text.contains(r#""status":"paused""#) && text.contains(r#""output":{"inline":[1,2.5,null,{"b":1,"a":2}]}"#), "{text}");
        assert_eq!(serde_json::from_str::<Records>(&text).unwrap(), records);
    }
}
