//! Memory of tensors: blocks aligned to a cache line, recycled by size so that a warm training step allocates nothing.
//! Blocks come from the system, not from the program's allocator: large ones go back to it at once, where mimalloc keeps them for
//! a while: 3.98 GiB at the peak of a step of `q05x4` in f32 against 3.80.
//! Knows bytes and element types, no shapes.

use super::cpu::threads::{Shared, parallel_ranges};
use super::element::Element;
use std::alloc::{GlobalAlloc, Layout, System, handle_alloc_error};
use std::cmp::Reverse;
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

/// Free blocks, and the sum of their sizes.
struct Pool {
    /// Addresses by size in bytes and by when the block was freed, the last one first: it may still be in a cache.
    free: BTreeMap<(usize, Reverse<u64>), usize>,
    /// Sizes by when the block was freed.
    ages: BTreeMap<u64, usize>,
    free_bytes: usize,
    /// Blocks freed so far.
    clock: u64,
}

impl Pool {
    const EMPTY: Self = Self { free: BTreeMap::new(), ages: BTreeMap::new(), free_bytes: 0, clock: 0 };

    /// Takes out the smallest free block of `wanted` to a quarter more bytes: its address and size.
    fn pop(&mut self, wanted: usize) -> Option<(usize, usize)> {
        let range = (wanted, Reverse(u64::MAX))..=(wanted + wanted / 4, Reverse(0));
        let (size, age) = *self.free.range(range).next()?.0;
        Some((self.remove(size, age.0), size))
    }

    /// Takes out the block that has been free the longest.
    fn pop_oldest(&mut self) -> Option<(usize, usize)> {
        let (age, size) = self.ages.first_key_value().map(|(age, size)| (*age, *size))?;
        Some((self.remove(size, age), size))
    }

    fn remove(&mut self, size: usize, age: u64) -> usize {
        self.ages.remove(&age);
        self.free_bytes -= size;
        self.free.remove(&(size, Reverse(age))).expect("both maps hold the same blocks")
    }

    fn push(&mut self, block: usize, size: usize) {
        self.clock += 1;
        self.free.insert((size, Reverse(self.clock)), block);
        self.ages.insert(self.clock, size);
        self.free_bytes += size;
    }
}

static POOL: Mutex<Pool> = Mutex::new(Pool::EMPTY);
static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static LIVE_BYTES_MAX: AtomicUsize = AtomicUsize::new(0);

/// Blocks up to this size are not recycled here: the allocator is quick with them.
const SMALL: usize = 4096;

/// A large page of the system's.
const HUGE_PAGE: usize = 2 << 20;

/// Blocks of at least this size lie on large pages.
const HUGE_LEAST: usize = 2 * HUGE_PAGE;

/// Most bytes of free blocks kept beyond the most that were ever live.
const SLACK: usize = 128 << 20;

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
    Layout::from_size_align(size, ALIGN).expect("block sizes are multiples of the alignment and below isize::MAX")
}

/// A block of `size` zeros, or none if there is no memory. A large one is mapped: the system's pages are zeros when they are first
/// written to, by whichever thread does that, where the allocator would fill them at once by this one. It lies on pages of 2 MiB if
/// the system has them: where a model is read once for a few rows, looking up its small pages took up to a quarter of the time
/// (8 texts of the 0.5B shape in bf16: 92 ms a token, 74 with them).
fn allocate(size: usize) -> Option<NonNull<u8>> {
    #[cfg(target_os = "linux")]
    if size >= HUGE_LEAST {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
        let room = size + HUGE_PAGE;
        // SAFETY: a new mapping, wherever the system likes. What lies before the first large page and behind the block is given
        // back, in whole pages; the advice changes no content, and a system without large pages refuses it.
        unsafe {
            let start = mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE).ok()?;
            let before = start.addr().next_multiple_of(HUGE_PAGE) - start.addr();
            let block = start.byte_add(before);
            if before > 0 {
                munmap(start, before).expect("the mapping is ours");
            }
            if before < HUGE_PAGE {
                munmap(block.byte_add(size), HUGE_PAGE - before).expect("the mapping is ours");
            }
            let _ = madvise(block, size, Advice::LinuxHugepage);
            return NonNull::new(block.cast());
        }
    }
    // SAFETY: the layout's size is at least ALIGN, so not zero.
    NonNull::new(unsafe { System.alloc_zeroed(layout(size)) })
}

/// Gives a block of [`allocate`] back to the system.
///
/// # Safety
/// The block was allocated with this size, and nobody uses it any more.
unsafe fn free(block: *mut u8, size: usize) {
    #[cfg(target_os = "linux")]
    if size >= HUGE_LEAST {
        // SAFETY: `allocate` mapped it, and the caller gives it up.
        unsafe { rustix::mm::munmap(block.cast(), size) }.expect("the mapping is ours");
        return;
    }
    // SAFETY: `allocate` used this very layout, and the caller gives the block up.
    unsafe { System.dealloc(block, layout(size)) }
}

/// A block of at least `wanted` bytes, and its size: a free one that is at most a quarter larger, else a new one.
fn take(wanted: usize) -> (NonNull<u8>, usize) {
    let recycled = (wanted > SMALL).then(|| POOL.lock().expect("the pool's lock is never held across a panic").pop(wanted)).flatten();
    let size = recycled.map_or(wanted, |(_, size)| size);
    let live = LIVE_BYTES.fetch_add(size, Relaxed) + size;
    LIVE_BYTES_MAX.fetch_max(live, Relaxed);
    match recycled {
        Some((block, size)) => (NonNull::new(block as *mut u8).expect("a block that was once allocated is not null"), size),
        None => (allocate(size).unwrap_or_else(|| handle_alloc_error(layout(size))), size),
    }
}

fn give_back(block: NonNull<u8>, size: usize) {
    LIVE_BYTES.fetch_sub(size, Relaxed);
    if size <= SMALL {
        // SAFETY: `take` had it from `allocate` with this size, and its only owner gives it up here.
        return unsafe { free(block.as_ptr(), size) };
    }
    let mut surplus = Vec::new();
    {
        let mut pool = POOL.lock().expect("the pool's lock is never held across a panic");
        pool.push(block.as_ptr() as usize, size);
        // Keep little more than was once live together: sizes that vary from step to step must not pile up, and those that are
        // not asked for any more go first. With less slack than the sizes of a step differ, its blocks go back to the system and
        // are zeroed anew each step: with a sixth 5 % of the time of a small model's GRPO, which peaks at 610 MiB, with a third 3 %.
        let live_max = LIVE_BYTES_MAX.load(Relaxed);
        while LIVE_BYTES.load(Relaxed) + pool.free_bytes > live_max + (live_max / 3).min(SLACK) {
            match pool.pop_oldest() {
                Some(oldest) => surplus.push(oldest),
                None => break,
            }
        }
    }
    for (block, size) in surplus {
        // SAFETY: the block lay in the pool, so nobody else owns it, and `allocate` made it with this size.
        unsafe { free(block as *mut u8, size) }
    }
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
    let pool = std::mem::replace(&mut *POOL.lock().expect("the pool's lock is never held across a panic"), Pool::EMPTY);
    for ((size, _), block) in pool.free {
        // SAFETY: the block lay in the pool, so nobody else owns it, and `allocate` made it with this size.
        unsafe { free(block as *mut u8, size) }
    }
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

    #[test]
    fn the_pool_gives_the_closest_block_and_forgets_the_oldest() {
        let mut pool = Pool::EMPTY;
        for (block, size) in [(1, 1000), (2, 800), (3, 1000), (4, 1300)] {
            pool.push(block, size);
        }
        assert_eq!((pool.pop(1001), pool.pop(900)), (None, Some((3, 1000))), "too small or more than a quarter larger; the last one freed");
        assert_eq!((pool.pop_oldest(), pool.pop(640), pool.free_bytes), (Some((1, 1000)), Some((2, 800)), 1300));
        assert_eq!((pool.pop_oldest(), pool.pop_oldest(), pool.free_bytes), (Some((4, 1300)), None, 0));
    }

    #[test]
    fn large_blocks_are_zeros_on_large_pages() {
        let (block, size) = (allocate(HUGE_LEAST + (1 << 20)).unwrap(), HUGE_LEAST + (1 << 20));
        // SAFETY: the block was just allocated with this size, and goes when it has been read.
        unsafe {
            assert!(std::slice::from_raw_parts(block.as_ptr(), size).iter().all(|byte| *byte == 0));
            block.as_ptr().write_bytes(7, size);
            free(block.as_ptr(), size);
        }
    }
}
