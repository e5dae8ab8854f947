//! Memory of tensors: blocks aligned to a cache line, recycled by size so that a warm training step allocates nothing.
//! Blocks come from the system's allocator, not from the program's: it gives large ones back to the system at once, where
//! mimalloc keeps them for a while: 3.98 GiB at the peak of a step of `q05x4` in f32 against 3.80.
//! Knows bytes and element types, no shapes.

use super::cpu::threads::{Shared, parallel_ranges};
use super::element::Element;
use std::alloc::{GlobalAlloc, Layout, System, handle_alloc_error};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// One cache line, and one AVX-512 register.
pub const ALIGN: usize = 64;

/// `len` elements on the host, zero or recycled, always initialised.
pub struct Buffer<E: Element> {
    start: NonNull<E>,
    len: usize,
    /// Bytes of the block, which may be more than `len` elements take.
    block: usize,
}

// SAFETY: a buffer owns its block alone, as Vec does, and its elements are Send and Sync plain data.
unsafe impl<E: Element> Send for Buffer<E> {}
// SAFETY: shared access gives only `&[E]`.
unsafe impl<E: Element> Sync for Buffer<E> {}

/// Free blocks by size in bytes, and the sum of their sizes.
struct Pool {
    free: BTreeMap<usize, Vec<usize>>,
    free_bytes: usize,
}

impl Pool {
    /// Takes out the smallest free block of `wanted` to a quarter more bytes: its address and size.
    fn pop(&mut self, wanted: usize) -> Option<(usize, usize)> {
        let (size, block) = self.free.range_mut(wanted..=wanted + wanted / 4).find_map(|(size, blocks)| Some((*size, blocks.pop()?)))?;
        self.free_bytes -= size;
        Some((block, size))
    }
}

static POOL: Mutex<Pool> = Mutex::new(Pool { free: BTreeMap::new(), free_bytes: 0 });
static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static LIVE_BYTES_MAX: AtomicUsize = AtomicUsize::new(0);

/// Blocks up to this size are not recycled here: the allocator is quick with them.
const SMALL: usize = 4096;

/// A large page of the system's.
const HUGE_PAGE: usize = 2 << 20;

/// Blocks of at least this size lie on large pages.
const HUGE_LEAST: usize = 2 * HUGE_PAGE;

/// Most bytes of free blocks kept beyond the most that were ever live.
const SLACK: usize = 32 << 20;

/// Least bytes of a copy that a thread is given.
const COPY_BYTES_MIN: usize = 1 << 20;

/// The size of the block that holds `bytes`: at most one eighth larger, so that near sizes share blocks, and at most 1 MiB:
/// the largest blocks are weights and their moments, whose sizes never change, and an eighth of them is gigabytes.
fn block_size(bytes: usize) -> usize {
    let bytes = bytes.max(ALIGN);
    let step = (bytes.next_power_of_two() / 16).clamp(ALIGN, 1 << 20);
    bytes.div_ceil(step) * step
}

fn layout(size: usize) -> Layout {
    let align = if size >= HUGE_LEAST { HUGE_PAGE } else { ALIGN };
    Layout::from_size_align(size, align).expect("block sizes are multiples of the alignment and below isize::MAX")
}

/// Asks the system for pages of 2 MiB, before the block is first written to: where a model is read once for a few rows, looking up
/// its small pages took up to a quarter of the time (8 texts of the 0.5B shape in bf16: 92 ms a token, 74 with them).
fn ask_for_huge_pages(block: *mut u8, size: usize) {
    #[cfg(target_os = "linux")]
    if size >= HUGE_LEAST {
        // A system without them says no, and nothing is lost.
        // SAFETY: the block is this program's own, begins at a page and is not in use; the advice changes no content.
        let _ = unsafe { rustix::mm::madvise(block.cast(), size / HUGE_PAGE * HUGE_PAGE, rustix::mm::Advice::LinuxHugepage) };
    }
    let _ = (block, size);
}

/// A block of at least `wanted` bytes, and its size: a free one that is at most a quarter larger, else a new one.
fn take(wanted: usize) -> (NonNull<u8>, usize) {
    let recycled = (wanted > SMALL).then(|| POOL.lock().expect("the pool's lock is never held across a panic").pop(wanted)).flatten();
    let size = recycled.map_or(wanted, |(_, size)| size);
    let live = LIVE_BYTES.fetch_add(size, Relaxed) + size;
    LIVE_BYTES_MAX.fetch_max(live, Relaxed);
    if let Some((block, size)) = recycled {
        return (NonNull::new(block as *mut u8).expect("a block that was once allocated is not null"), size);
    }
    // SAFETY: the layout's size is at least ALIGN, so not zero.
    let block = unsafe { System.alloc(layout(size)) };
    if !block.is_null() {
        ask_for_huge_pages(block, size);
        // SAFETY: the block has `size` bytes and nobody else knows it.
        unsafe { block.write_bytes(0, size) };
    }
    (NonNull::new(block).unwrap_or_else(|| handle_alloc_error(layout(size))), size)
}

fn give_back(block: NonNull<u8>, size: usize) {
    LIVE_BYTES.fetch_sub(size, Relaxed);
    if size > SMALL {
        let mut pool = POOL.lock().expect("the pool's lock is never held across a panic");
        // Keep little more than was once live together: sizes that vary from step to step must not pile up. Without the
        // slack the blocks of a step's peak go back to the system and are zeroed anew each step: 4% of a small model's time.
        let live_max = LIVE_BYTES_MAX.load(Relaxed);
        if LIVE_BYTES.load(Relaxed) + pool.free_bytes + size <= live_max + (live_max / 8).min(SLACK) {
            pool.free_bytes += size;
            pool.free.entry(size).or_default().push(block.as_ptr() as usize);
            return;
        }
    }
    // SAFETY: `take` allocated the block with this very layout, and its only owner gives it up here.
    unsafe { System.dealloc(block.as_ptr(), layout(size)) }
}

/// Bytes held by live buffers now.
pub fn live_bytes() -> usize {
    LIVE_BYTES.load(Relaxed)
}

/// Bytes of free blocks that are kept for reuse.
pub fn free_bytes() -> usize {
    POOL.lock().expect("the pool's lock is never held across a panic").free_bytes
}

/// The most bytes that live buffers ever held together.
pub fn live_bytes_max() -> usize {
    LIVE_BYTES_MAX.load(Relaxed)
}

/// Returns all recycled blocks to the operating system.
pub fn release_free() {
    let mut pool = POOL.lock().expect("the pool's lock is never held across a panic");
    for (size, blocks) in std::mem::take(&mut pool.free) {
        for block in blocks {
            // SAFETY: the block lay in the pool, so nobody else owns it, and `take` allocated it with this layout.
            unsafe { System.dealloc(block as *mut u8, layout(size)) }
        }
    }
    pool.free_bytes = 0;
}

impl<E: Element> Buffer<E> {
    /// `len` elements of whatever an earlier buffer left there: for results that are written in full.
    pub fn scratch(len: usize) -> Self {
        let bytes = len
            .checked_mul(size_of::<E>())
            .filter(|bytes| *bytes < isize::MAX as usize / 2)
            .expect("a buffer's size fits the address space");
        if len == 0 {
            return Self { start: NonNull::dangling(), len, block: 0 };
        }
        const { assert!(align_of::<E>() <= ALIGN) };
        let (start, block) = take(block_size(bytes));
        Self { start: start.cast(), len, block }
    }

    /// `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        let mut buffer = Self::scratch(len);
        buffer.fill(E::default());
        buffer
    }

    /// A copy of `values`.
    pub fn copy_of(values: &[E]) -> Self {
        let mut buffer = Self::scratch(values.len());
        let shared = Shared::new(&mut buffer);
        // The system hands out fresh pages as they are first written, which takes longer than copying: all threads do it.
        parallel_ranges(values.len(), COPY_BYTES_MIN / size_of::<E>(), |range| {
            // SAFETY: parallel_ranges hands out disjoint ranges.
            unsafe { shared.part(range.clone()) }.copy_from_slice(&values[range]);
        });
        buffer
    }
}

impl<E: Element> Drop for Buffer<E> {
    fn drop(&mut self) {
        if self.len > 0 {
            give_back(self.start.cast(), self.block);
        }
    }
}

impl<E: Element> Deref for Buffer<E> {
    type Target = [E];
    fn deref(&self) -> &[E] {
        // SAFETY: the block holds at least `len` elements, initialised when it was allocated or by an earlier owner; every
        // bit pattern is a valid element. With len 0 the dangling pointer is aligned, which is all a slice asks.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<E: Element> DerefMut for Buffer<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        // SAFETY: as in `deref`, and `&mut self` makes the access the only one.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<E: Element> Clone for Buffer<E> {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl<E: Element> std::fmt::Debug for Buffer<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer<{}>[{}]", E::DTYPE, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_zeroed_and_little_larger_than_asked() {
        for len in [0, 1, 7, 33, 1000, 4097, 70_001] {
            let buffer = Buffer::<f32>::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % if len == 0 { 4 } else { ALIGN }, 0);
            assert!(buffer.iter().all(|v| *v == 0.0));
        }
        for bytes in (1..2_000_000).step_by(997) {
            let size = block_size(bytes);
            assert!(size >= bytes && size.is_multiple_of(ALIGN) && size <= bytes + bytes / 8 + ALIGN, "{bytes} gave {size}");
        }
    }
}
