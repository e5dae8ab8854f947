//! stub
use crate::checkpoint::manifest::Manifest;
use crate::store::records::CheckpointRecord;
pub fn adopted(manifest: &Manifest, number: u64) -> CheckpointRecord {
    CheckpointRecord {
        number,
        name: manifest.name.clone(),
        loop_path: manifest.loop_path.clone(),
        step: manifest.step,
        generation: manifest.generation,
        manifest: manifest.hash().to_string(),
        bytes: manifest.bytes(),
        time: manifest.time,
        metrics: manifest.metrics.clone(),
        pinned: false,
        lost: None,
    }
}
