//! The caching allocator of a device: freed blocks wait in classes of sizes and are taken again, since asking the driver
//! stops the device. All work is ordered on one stream, so a block may be taken again the moment it is freed.
//! What is taken while a graph is captured belongs to the graph's memory (graph.rs) and is lent to its captures alone.
//! Every block carries a label, so that running out of memory names who holds it.

use super::behind::behind_on;
use super::device::{Device, lock};
use super::graph::{capture_on, outside_capture};
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Holders that an out-of-memory error names.
const HOLDERS_NAMED: usize = 5;
/// Sizes are multiples of this, which also is how addresses are aligned.
pub const GRAIN: usize = 512;

/// Device memory as the pool sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes in buffers that live and in the memory of captured graphs.
    pub live_bytes: usize,
    /// The most that this was.
    pub live_bytes_max: usize,
    /// Bytes that wait to be taken again.
    pub free_bytes: usize,
    /// Times that the driver was asked for memory.
    pub driver_calls: usize,
    /// Times that a waiting block was taken instead.
    pub reuses: usize,
}

/// The blocks of a device.
#[derive(Default)]
pub struct Pool {
    free: BTreeMap<usize, Vec<u64>>,
    /// Blocks of the memory of captured graphs, by its number, that no buffer holds.
    reserved: HashMap<u64, BTreeMap<usize, Vec<u64>>>,
    /// The memory to which the block at an address belongs.
    owners: HashMap<u64, u64>,
    holders: HashMap<&'static str, usize>,
    statistics: Statistics,
    images: Images,
}

/// Bytes lent to copies that live for a while, until they are on the host: those that live, and the most that did, which wait in
/// the pool when these have ended.
#[derive(Default)]
struct Images {
    live: usize,
    live_max: usize,
}

/// What an out-of-memory error calls the memory of graphs that no buffer holds.
const GRAPHS: &str = "captured graphs";

/// A piece of device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub address: u64,
    pub bytes: usize,
    pub label: &'static str,
}

/// The size that a request of `bytes` gets: eight classes between two powers of two, so at most an eighth is wasted.
pub fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(1).next_multiple_of(GRAIN);
    if bytes <= 8 * GRAIN {
        return bytes;
    }
    let step = (bytes.next_power_of_two() / 2 / 8).max(GRAIN);
    bytes.next_multiple_of(step)
}

impl Pool {
    /// Frees the blocks that wait.
    pub(super) fn close(&mut self) {
        for (bytes, addresses) in std::mem::take(&mut self.free) {
            for address in addresses {
                // SAFETY: the block came from cuMemAlloc, no buffer holds it, and the caller has waited for the stream.
                // A failure would leave nothing to do.
                unsafe { sys::cuMemFree_v2(address) };
                self.statistics.free_bytes -= bytes;
            }
        }
        self.images.live_max = self.images.live;
    }

    /// All images have ended.
    pub(super) fn end_images(&mut self) {
        self.images.live = 0;
    }

    /// A block that waits, for a buffer; one of `memory`, if there is one, before the others.
    fn take(&mut self, bytes: usize, memory: Option<u64>, label: &'static str) -> Option<u64> {
        if let Some(address) = memory.and_then(|memory| pop(self.reserved.get_mut(&memory)?, bytes)) {
            *self.holders.entry(GRAPHS).or_default() -= bytes;
            *self.holders.entry(label).or_default() += bytes;
            self.statistics.reuses += 1;
            return Some(address);
        }
        let address = pop(&mut self.free, bytes)?;
        self.statistics.free_bytes -= bytes;
        self.statistics.reuses += 1;
        self.count(bytes, label);
        self.belong(address, memory);
        Some(address)
    }

    fn belong(&mut self, address: u64, memory: Option<u64>) {
        if let Some(memory) = memory {
            self.owners.insert(address, memory);
        }
    }

    /// Ends the memory of captured graphs: its blocks wait for anybody, those of living buffers as soon as these end.
    pub(super) fn release(&mut self, memory: u64) {
        self.owners.retain(|_, owner| *owner != memory);
        for (bytes, addresses) in self.reserved.remove(&memory).into_iter().flatten() {
            let total = bytes * addresses.len();
            *self.holders.entry(GRAPHS).or_default() -= total;
            self.statistics.live_bytes -= total;
            self.statistics.free_bytes += total;
            self.free.entry(bytes).or_default().extend(addresses);
        }
    }

    fn count(&mut self, bytes: usize, label: &'static str) {
        *self.holders.entry(label).or_default() += bytes;
        self.statistics.live_bytes += bytes;
        self.statistics.live_bytes_max = self.statistics.live_bytes_max.max(self.statistics.live_bytes);
    }

    /// "weights 12.0 GiB, gradients 6.0 GiB": the largest holders first.
    fn largest(&self) -> String {
        let mut holders: Vec<_> = self.holders.iter().filter(|(_, bytes)| **bytes > 0).collect();
        holders.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
        let named: Vec<_> = holders.iter().take(HOLDERS_NAMED).map(|(label, bytes)| format!("{label} {}", size(**bytes))).collect();
        if named.is_empty() { "nothing of this process".into() } else { named.join(", ") }
    }
}

/// A block of `bytes` out of `blocks`.
fn pop(blocks: &mut BTreeMap<usize, Vec<u64>>, bytes: usize) -> Option<u64> {
    let addresses = blocks.get_mut(&bytes)?;
    let address = addresses.pop();
    if addresses.is_empty() {
        blocks.remove(&bytes);
    }
    address
}

fn size(bytes: usize) -> String {
    let bytes = bytes as f64;
    if bytes >= 1e9 { format!("{:.2} GB", bytes / 1e9) } else { format!("{:.1} MB", bytes / 1e6) }
}

impl Device {
    /// A block for `bytes`, from those that wait or from the driver.
    ///
    /// Errors: [`Error::Device`] that names the largest holders, if the device has no room.
    pub(super) fn take(self: &Arc<Self>, op: &'static str, label: &'static str, bytes: usize) -> Result<Block> {
        self.enter(op)?;
        let bytes = if self.settings.size_classes { size_class(bytes) } else { bytes.max(1) };
        let found = match self.find(op, label, bytes)? {
            // What is copied to the host meanwhile makes room soon.
            None if self.wait_for_marks() => self.find(op, label, bytes)?,
            found => found,
        };
        if let Some(address) = found {
            self.catch_up()?;
            return Ok(Block { address, bytes, label });
        }
        let pool = lock(&self.pool);
        let what = format!(
            "{} is out of memory: {} wanted for {label}, {} of {} in use; the largest holders: {}; a smaller batch, shorter texts and \
             `recompute` take less, and a run goes on with `perilune resume`",
            self.name,
            size(bytes),
            size(pool.statistics.live_bytes),
            size(self.memory_bytes.min(self.settings.memory_bytes_max)),
            pool.largest()
        );
        Err(Error::Device { op, what })
    }

    /// The address of a block of `bytes`; none if there is no room.
    fn find(&self, op: &'static str, label: &'static str, bytes: usize) -> Result<Option<u64>> {
        let memory = capture_on(self).map(|capture| capture.memory);
        let mut pool = lock(&self.pool);
        if let Some(address) = pool.take(bytes, memory, label) {
            return Ok(Some(address));
        }
        let address = match self.ask(op, &mut pool, bytes)? {
            Some(address) => address,
            // What waits in other classes may make room, once nothing uses it any more; a capture cannot wait.
            None if pool.statistics.free_bytes > 0 && memory.is_none() => {
                // SAFETY: the stream lives as long as `self`.
                self.check(op, "cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.own_stream()) })?;
                pool.close();
                let Some(address) = self.ask(op, &mut pool, bytes)? else { return Ok(None) };
                address
            }
            None => return Ok(None),
        };
        pool.count(bytes, label);
        pool.belong(address, memory);
        Ok(Some(address))
    }

    /// Memory from the driver, or none if it has too little.
    fn ask(&self, op: &'static str, pool: &mut Pool, bytes: usize) -> Result<Option<u64>> {
        let held = pool.statistics.live_bytes + pool.statistics.free_bytes;
        if held.saturating_add(bytes) > self.settings.memory_bytes_max {
            return Ok(None);
        }
        let mut address = 0;
        // SAFETY: writes one address to an exclusive place; the context is the thread's own.
        match outside_capture(self, || unsafe { sys::cuMemAlloc_v2(&mut address, bytes) }) {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            code => {
                self.check(op, "cuMemAlloc", code)?;
                pool.statistics.driver_calls += 1;
                Ok(Some(address))
            }
        }
    }

    /// Takes a block back. Work on it that is still in the stream comes before any that its next holder asks for.
    pub(super) fn give_back(&self, block: Block) {
        if let Some(side) = behind_on(self) {
            // The next holder's stream does not wait for this one. If the device was lost there is nothing to wait for.
            // SAFETY: the stream lives as long as the device.
            unsafe { sys::cuStreamSynchronize(side.stream) };
        }
        let mut pool = lock(&self.pool);
        *pool.holders.entry(block.label).or_default() -= block.bytes;
        if let Some(memory) = pool.owners.get(&block.address).copied() {
            *pool.holders.entry(GRAPHS).or_default() += block.bytes;
            pool.reserved.entry(memory).or_default().entry(block.bytes).or_default().push(block.address);
            return;
        }
        pool.statistics.live_bytes -= block.bytes;
        pool.statistics.free_bytes += block.bytes;
        pool.free.entry(block.bytes).or_default().push(block.address);
    }

    /// Bytes that buffers may still take: what the driver has free, or the settings leave, and what waits in the pool.
    pub fn memory_bytes_free(&self) -> u64 {
        (self.driver_bytes_free() + self.memory_statistics().free_bytes) as u64
    }

    /// Bytes that the driver still gives, or the settings allow.
    fn driver_bytes_free(&self) -> usize {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers to exclusive places; the context is made the thread's own first.
        let asked = self.enter("memory").is_ok() && unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) } == sys::CUresult::CUDA_SUCCESS;
        let statistics = self.memory_statistics();
        let held = statistics.live_bytes + statistics.free_bytes;
        let free = if asked { free } else { self.memory_bytes.saturating_sub(held) };
        free.min(self.settings.memory_bytes_max.saturating_sub(held))
    }

    /// Whether the device has room for copies of `bytes` that live until the last mark is gone, without taking what steps will
    /// want: a sixteenth of the memory stays free, and what waits in the pool counts only as far as earlier copies left it there. If so,
    /// they count from now on.
    pub fn lend_room(&self, bytes: usize) -> bool {
        let (free, reserve) = (self.driver_bytes_free(), self.memory_bytes.min(self.settings.memory_bytes_max) / 16);
        let images = &mut lock(&self.pool).images;
        let live = images.live + bytes;
        let more = live.saturating_sub(images.live_max);
        if more > 0 && more + reserve > free {
            return false;
        }
        *images = Images { live, live_max: images.live_max.max(live) };
        true
    }

    /// How much memory lives, waits and was asked for.
    pub fn memory_statistics(&self) -> Statistics {
        lock(&self.pool).statistics
    }

    /// Gives what waits back to the driver.
    pub fn release_free_memory(&self) -> Result<()> {
        self.synchronize()?;
        lock(&self.pool).close();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_their_request_and_waste_an_eighth_at_most() {
        for bytes in (0..4096).chain((0..400).map(|i| (1usize << (12 + i % 25)) | (i * 7919))) {
            let class = size_class(bytes);
            assert!(class >= bytes && class.is_multiple_of(GRAIN), "{bytes} {class}");
            assert!(class - bytes <= (bytes / 8).max(GRAIN), "{bytes} {class}");
            assert_eq!(size_class(class), class, "{bytes}");
        }
    }
}
