//! Memory of tensors: blocks aligned to a cache line, recycled so that a warm training step allocates nothing: small ones by their
//! size, here; large ones by arena.rs. Blocks come from the system, not from the program's allocator, which keeps them for a while.
//! Knows bytes and element types, no shapes.

use super::arena::Arena;
use super::cpu::threads::{Shared, parallel_ranges};
use super::element::Element;
use std::alloc::{GlobalAlloc, Layout, System, handle_alloc_error};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

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

/// Small blocks: the free ones, and sums of sizes.
struct Pool {
    /// Addresses by size in bytes and by when the block was freed, the last one first: it may still be in a cache.
    free: BTreeMap<(usize, Reverse<u64>), usize>,
    /// Sizes by when the block was freed.
    ages: BTreeMap<u64, usize>,
    free_bytes: usize,
    live_bytes: usize,
    live_bytes_max: usize,
    /// Blocks freed so far.
    clock: u64,
}

impl Pool {
    const EMPTY: Self = Self { free: BTreeMap::new(), ages: BTreeMap::new(), free_bytes: 0, live_bytes: 0, live_bytes_max: 0, clock: 0 };

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

    /// Keeps a block that was freed; gives those that are to go.
    fn recycle(&mut self, block: usize, size: usize) -> Vec<(usize, usize)> {
        self.live_bytes -= size;
        self.push(block, size);
        // Keep little more than was once live together: sizes that vary from step to step must not pile up, and those that are
        // not asked for any more go first.
        let most = self.live_bytes_max + (self.live_bytes_max / 3).min(SLACK);
        let mut surplus = Vec::new();
        while self.live_bytes + self.free_bytes > most {
            surplus.extend(self.pop_oldest());
        }
        surplus
    }

    fn push(&mut self, block: usize, size: usize) {
        self.clock += 1;
        self.free.insert((size, Reverse(self.clock)), block);
        self.ages.insert(self.clock, size);
        self.free_bytes += size;
    }
}

static POOL: Mutex<Pool> = Mutex::new(Pool::EMPTY);
static ARENA: Mutex<Arena> = Mutex::new(Arena::EMPTY);
static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static LIVE_BYTES_MAX: AtomicUsize = AtomicUsize::new(0);

/// Blocks up to this size are not recycled here: the allocator is quick with them.
const SMALL: usize = 4096;

/// Blocks from this size on come from the arena, where there is one.
const LARGE: usize = if cfg!(target_os = "linux") { 1 << 20 } else { usize::MAX };

/// Most bytes of free small blocks kept beyond the most that were ever live.
const SLACK: usize = 128 << 20;

/// Least bytes of a copy that a thread is given.
const COPY_BYTES_MIN: usize = 1 << 20;

/// The size of the block that holds `bytes`: at most one eighth larger, so that near sizes share small blocks.
fn block_size(bytes: usize) -> usize {
    let bytes = bytes.max(ALIGN);
    let step = (bytes.next_power_of_two() / 16).clamp(ALIGN, 64 << 10);
    bytes.div_ceil(step) * step
}

fn layout(size: usize) -> Layout {
    Layout::from_size_align(size, ALIGN).expect("block sizes are multiples of the alignment and below isize::MAX")
}

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().expect("the pool's lock is never held across a panic")
}

fn arena() -> MutexGuard<'static, Arena> {
    ARENA.lock().expect("the arena's lock is never held across a panic")
}

/// A block of at least `wanted` bytes, and its size.
fn take(wanted: usize) -> (NonNull<u8>, usize) {
    let (block, size) = if wanted >= LARGE { (arena().take(wanted), wanted) } else { take_small(wanted) };
    let live = LIVE_BYTES.fetch_add(size, Relaxed) + size;
    LIVE_BYTES_MAX.fetch_max(live, Relaxed);
    (block.unwrap_or_else(|| handle_alloc_error(layout(size))), size)
}

/// A free block that is at most a quarter larger, else a new one; none if there is no memory.
fn take_small(wanted: usize) -> (Option<NonNull<u8>>, usize) {
    if wanted > SMALL {
        let mut pool = pool();
        let recycled = pool.pop(wanted);
        let size = recycled.map_or(wanted, |(_, size)| size);
        pool.live_bytes += size;
        pool.live_bytes_max = pool.live_bytes_max.max(pool.live_bytes);
        if let Some((block, size)) = recycled {
            return (NonNull::new(block as *mut u8), size);
        }
    }
    // SAFETY: the layout's size is at least ALIGN, so not zero.
    (NonNull::new(unsafe { System.alloc_zeroed(layout(wanted)) }), wanted)
}

fn give_back(block: NonNull<u8>, size: usize) {
    LIVE_BYTES.fetch_sub(size, Relaxed);
    if size >= LARGE {
        // SAFETY: `take` had it from the arena with this size, and its only owner gives it up here.
        return unsafe { arena().give_back(block, size) };
    }
    let surplus = if size <= SMALL { vec![(block.as_ptr() as usize, size)] } else { pool().recycle(block.as_ptr() as usize, size) };
    for (block, size) in surplus {
        // SAFETY: `take_small` allocated it with this size; its only owner gave it up, just now or when it went to the pool.
        unsafe { System.dealloc(block as *mut u8, layout(size)) }
    }
}

/// Bytes held by live buffers now.
pub fn live_bytes() -> usize {
    LIVE_BYTES.load(Relaxed)
}

/// Bytes of free blocks that are kept for reuse.
pub fn free_bytes() -> usize {
    pool().free_bytes + arena().free_bytes()
}

/// The most bytes that live buffers ever held together.
pub fn live_bytes_max() -> usize {
    LIVE_BYTES_MAX.load(Relaxed)
}

/// Writes zeros, by all threads where that is quicker.
pub fn clear<E: Element>(values: &mut [E]) {
    let (count, shared) = (values.len(), Shared::new(values));
    // SAFETY: parallel_ranges hands out disjoint ranges.
    parallel_ranges(count, COPY_BYTES_MIN / size_of::<E>(), |range| unsafe { shared.part(range) }.fill(E::default()));
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
        clear(&mut buffer);
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
}
