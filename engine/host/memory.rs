//! Keeps Lua's collector honest about tensors. To Lua a tensor is a few bytes, however many megabytes it holds, so a loop
//! that drops one a step would pile up thousands before Lua thinks of collecting. The engine counts the bytes itself and
//! runs the collector when they have grown.

use crate::tensor::place::{is_a_device_nearly_full, live_bytes};
use mlua::Lua;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Growth below this is not worth a collection, which walks all of Lua's heap.
const GROWTH_LEAST: usize = 64 << 20;

/// Live tensor bytes after the last collection of one Lua state.
pub struct Watermark(AtomicUsize);

impl Watermark {
    pub fn new() -> Self {
        Self(AtomicUsize::new(live_bytes()))
    }
}

impl Default for Watermark {
    fn default() -> Self {
        Self::new()
    }
}

/// Called wherever a tensor is handed to Lua: collects if tensors have grown by half since the last time, and by 64 MiB
/// at least, or by that alone where a device is nearly full. So Lua's garbage never holds more than about a third of the
/// memory, and the collector's cost stays small.
pub fn tensor_made(lua: &Lua) -> mlua::Result<()> {
    let Some(watermark) = lua.app_data_ref::<Watermark>() else { return Ok(()) };
    let (before, now) = (watermark.0.load(Relaxed), live_bytes());
    if now < before {
        watermark.0.store(now, Relaxed);
    }
    // What a device has is all there is: nobody swaps, and garbage in a graph may be what the next step lacks.
    let least = if is_a_device_nearly_full() { GROWTH_LEAST } else { GROWTH_LEAST.max(before / 2) };
    if now.saturating_sub(before) < least {
        return Ok(());
    }
    drop(watermark);
    lua.gc_collect()?;
    if let Some(watermark) = lua.app_data_ref::<Watermark>() {
        watermark.0.store(live_bytes(), Relaxed);
    }
    Ok(())
}

/// Bytes of this process in physical memory, where the system tells.
pub fn resident_bytes() -> Option<usize> {
    // statm counts pages of 4 KiB on every Linux that this engine is built for (x86-64, and aarch64 with 4 KiB pages).
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: usize = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}
