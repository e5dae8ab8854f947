//! Numbers of a run as TensorBoard reads them: a file of events, each a protocol buffer in a checksummed frame. Only
//! scalars, and only writing. What is lost with the power is drawn again from the run's own log, so nothing is synced.
//! Source: TensorFlow's record_writer.h (frames, masked checksums), event.proto and summary.proto (fields).

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A file of events that is being written.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `folder`, which is created if need be: `events.out.tfevents.<seconds>.<host>`, with a number behind it if
    /// there is one of this second already. TensorBoard reads all files of a folder in the order of their names.
    ///
    /// Errors: [`Error::Io`].
    pub fn create(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|error| Error::io(folder, "create", error))?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let name = format!("events.out.tfevents.{:010}.{}", time as u64, host());
        let mut path = folder.join(&name);
        let mut again = 0;
        let file = loop {
            match File::create_new(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => again += 1,
                outcome => break outcome.map_err(|error| Error::io(&path, "create", error))?,
            }
            path = folder.join(format!("{name}.{again}"));
        };
        let mut events = Self { path, file };
        let mut event = Vec::new();
        double_field(&mut event, 1, time);
        bytes_field(&mut event, 3, b"brain.Event:2");
        events.write(&event)?;
        Ok(events)
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds the values of `step`, by tag. `wall_time` is seconds since 1970. Errors: [`Error::Io`].
    pub fn scalars(&mut self, step: u64, wall_time: f64, values: &[(&str, f32)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            bytes_field(&mut entry, 1, tag.as_bytes());
            key(&mut entry, 2, FIXED_32);
            entry.extend(value.to_le_bytes());
            bytes_field(&mut summary, 1, &entry);
        }
        let mut event = head(step, wall_time);
        bytes_field(&mut event, 5, &summary);
        self.write(&event)
    }

    /// Says that the run goes on at `step`: TensorBoard then drops what earlier files hold of this step and later ones, which
    /// the run computes again. Errors: [`Error::Io`].
    pub fn resumed(&mut self, step: u64, wall_time: f64) -> Result<()> {
        const STATUS_START: u8 = 1;
        let mut event = head(step, wall_time);
        bytes_field(&mut event, 7, &[1 << 3 | VARINT, STATUS_START]);
        self.write(&event)
    }

    /// One event in its frame: length, its checksum, the event, its checksum.
    fn write(&mut self, event: &[u8]) -> Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let mut frame = Vec::with_capacity(event.len() + 16);
        frame.extend(length);
        frame.extend(masked_checksum(&length).to_le_bytes());
        frame.extend(event);
        frame.extend(masked_checksum(event).to_le_bytes());
        self.file.write_all(&frame).map_err(|error| Error::io(&self.path, "write to", error))
    }
}

/// Rotated and moved, so that a checksum of data that holds checksums is none of its own.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

// The wire types of protocol buffers.
const VARINT: u8 = 0;
const FIXED_64: u8 = 1;
const BYTES: u8 = 2;
const FIXED_32: u8 = 5;

fn head(step: u64, wall_time: f64) -> Vec<u8> {
    let mut event = Vec::new();
    double_field(&mut event, 1, wall_time);
    key(&mut event, 2, VARINT);
    varint(&mut event, step);
    event
}

fn key(message: &mut Vec<u8>, field: u8, wire_type: u8) {
    assert!(field < 16, "field {field} would take a key of two bytes");
    message.push(field << 3 | wire_type);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn double_field(message: &mut Vec<u8>, field: u8, value: f64) {
    key(message, field, FIXED_64);
    message.extend(value.to_le_bytes());
}

fn bytes_field(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    key(message, field, BYTES);
    varint(message, bytes.len() as u64);
    message.extend(bytes);
}

/// The machine's name as part of a file's name.
fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let plain: String = name.trim().chars().map(|c| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '-' }).collect();
    if plain.is_empty() { "localhost".into() } else { plain }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field of a message: number, wire type, its bytes (a varint as eight bytes).
    type Field = (u64, u64, Vec<u8>);

    /// Reads protocol buffers of the four wire types, with nothing taken from the encoder.
    fn fields(mut bytes: &[u8]) -> Vec<Field> {
        fn number(bytes: &mut &[u8]) -> u64 {
            let mut value = 0;
            for shift in (0..).step_by(7) {
                let byte = bytes[0];
                *bytes = &bytes[1..];
                value |= u64::from(byte & 127) << shift;
                if byte < 128 {
                    break;
                }
            }
            value
        }
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = number(&mut bytes);
            let taken = match key & 7 {
                0 => {
                    fields.push((key >> 3, 0, number(&mut bytes).to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                2 => number(&mut bytes) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, key & 7, bytes[..taken].to_vec()));
            bytes = &bytes[taken..];
        }
        fields
    }

    /// The events of a file, every checksum verified with an implementation bit by bit.
    fn events(path: &Path) -> Vec<Vec<Field>> {
        let checksum = |bytes: &[u8]| {
            let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            let crc = !bytes.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)));
            crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
        };
        let file = fs::read(path).unwrap();
        let (mut rest, mut events) = (&file[..], Vec::new());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[8..12], checksum(&rest[..8]));
            let event = &rest[12..12 + length];
            assert_eq!(rest[12 + length..16 + length], checksum(event));
            events.push(fields(event));
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn events_read_back_as_their_format_says() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b");
        let mut file = EventFile::create(&folder).unwrap();
        let name = file.path().file_name().unwrap().to_str().unwrap().to_string();
        assert!(name.starts_with("events.out.tfevents.1") || name.starts_with("events.out.tfevents.2"), "{name}");
        let tag = "x".repeat(200);
        file.scalars(0, 1.5, &[("loss", 2.25)]).unwrap();
        file.scalars(300, 2.5, &[("loss", f32::NAN), (&tag, -1.0)]).unwrap();
        file.resumed(1 << 40, 3.5).unwrap();
        let events = events(file.path());
        assert_eq!(events.len(), 4);
        let double = |value: f64| (1, 1, value.to_le_bytes().to_vec());
        let step = |value: u64| (2, 0, value.to_le_bytes().to_vec());
        assert_eq!(events[0][1], (3, 2, b"brain.Event:2".to_vec()));
        assert_eq!(events[1][..2], [double(1.5), step(0)]);
        let values = |event: &[Field]| fields(&event[2].2).into_iter().map(|(_, _, value)| fields(&value)).collect::<Vec<_>>();
        let scalar = |tag: &str, value: f32| vec![(1, 2, tag.as_bytes().to_vec()), (2, 5, value.to_le_bytes().to_vec())];
        assert_eq!((events[1][2].0, values(&events[1])), (5, vec![scalar("loss", 2.25)]));
        assert_eq!(events[2][..2], [double(2.5), step(300)]);
        assert_eq!(values(&events[2]), [scalar("loss", f32::NAN), scalar(&tag, -1.0)]);
        assert_eq!(events[3][..2], [double(3.5), step(1 << 40)]);
        assert_eq!((events[3][2].0, fields(&events[3][2].2)), (7, vec![(1, 0, 1u64.to_le_bytes().to_vec())]));
    }

    #[test]
    fn a_second_file_of_the_same_second_has_a_name_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<_> = (0..4).map(|_| EventFile::create(folder.path()).unwrap().path().to_owned()).collect();
        assert!(names.windows(2).all(|pair| pair[0] < pair[1]), "{names:?}");
    }
}
