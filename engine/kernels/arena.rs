//! Large blocks of memory, cut from mappings of a gibibyte. What is freed grows together with its free neighbours, so that the
//! pages of a few huge blocks (the logits, the gradient of the head) serve many smaller ones later in the same step. With a pool
//! of whole blocks instead, a step of `q05x4` held 350 MB more and had 0.8 GB of fresh pages filled with zeros each time.
//! Knows bytes only.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;

/// A large page of the system's. Pages go back to it in these units: half of one would stay.
const HUGE_PAGE: usize = 2 << 20;

/// Addresses asked from the system at a time; they cost nothing until they are written to.
const MAPPING: usize = 1 << 30;

/// Blocks begin and end on small pages.
const GRANULE: usize = 4096;

/// Most bytes of free pages kept beyond the most that were ever in use.
const SLACK: usize = 96 << 20;

/// Ranges of addresses that do not touch each other, by address, by size and by age.
struct Spans {
    /// Length, and when it was freed last, by start.
    by_start: BTreeMap<usize, (usize, u64)>,
    /// Length, when it was freed (the last one first: it may still be in a cache), start.
    by_size: BTreeSet<(usize, Reverse<u64>, usize)>,
    /// When it was freed, start.
    by_age: BTreeSet<(u64, usize)>,
    bytes: usize,
}

impl Spans {
    const EMPTY: Self = Self { by_start: BTreeMap::new(), by_size: BTreeSet::new(), by_age: BTreeSet::new(), bytes: 0 };

    /// Adds a range, grown together with the ranges that it touches.
    fn add(&mut self, mut start: usize, mut len: usize, now: u64) {
        if len == 0 {
            return;
        }
        if let Some((before, (before_len, _))) = self.by_start.range(..start).next_back().map(|(start, span)| (*start, *span))
            && before + before_len == start
        {
            self.remove(before);
            (start, len) = (before, before_len + len);
        }
        if self.by_start.contains_key(&(start + len)) {
            len += self.remove(start + len);
        }
        self.by_start.insert(start, (len, now));
        self.by_size.insert((len, Reverse(now), start));
        self.by_age.insert((now, start));
        self.bytes += len;
    }

    /// Takes the range out that starts here; its length.
    fn remove(&mut self, start: usize) -> usize {
        let (len, freed) = self.by_start.remove(&start).expect("a range that is there");
        self.by_size.remove(&(len, Reverse(freed), start));
        self.by_age.remove(&(freed, start));
        self.bytes -= len;
        len
    }

    /// Cuts `len` bytes off the front of the smallest range that holds them.
    fn cut(&mut self, len: usize) -> Option<usize> {
        let (whole, Reverse(freed), start) = *self.by_size.range((len, Reverse(u64::MAX), 0)..).next()?;
        self.remove(start);
        self.add(start + len, whole - len, freed);
        Some(start)
    }
}

/// Where large blocks come from.
pub struct Arena {
    /// Free, with pages that hold whatever a block left there.
    kept: Spans,
    /// Free, without pages: zeros as soon as they are read.
    bare: Spans,
    live: usize,
    live_max: usize,
    /// Blocks freed so far.
    clock: u64,
}

/// What a block of `bytes` takes of an [`Arena`].
fn whole_pages(bytes: usize) -> usize {
    bytes.next_multiple_of(GRANULE)
}

impl Arena {
    pub const EMPTY: Self = Self { kept: Spans::EMPTY, bare: Spans::EMPTY, live: 0, live_max: 0, clock: 0 };

    /// A block of at least `bytes`, initialised: zeros, or what another block left; none if there is no memory.
    pub fn take(&mut self, bytes: usize) -> Option<NonNull<u8>> {
        let len = whole_pages(bytes);
        self.live += len;
        self.live_max = self.live_max.max(self.live);
        let start = self.kept.cut(len).or_else(|| self.take_bare(len));
        if start.is_none() {
            self.live -= len;
        }
        NonNull::new(start? as *mut u8)
    }

    /// A block on fresh pages. What is left of its last large page is kept: the system fills that page as a whole.
    fn take_bare(&mut self, len: usize) -> Option<usize> {
        let whole = len.next_multiple_of(HUGE_PAGE);
        // Before new pages come, others go.
        self.trim();
        let start = self.bare.cut(whole).or_else(|| {
            let (mapping, size) = [whole.next_multiple_of(MAPPING), whole].into_iter().find_map(|size| Some((system::map(size)?, size)))?;
            self.bare.add(mapping, size, 0);
            self.bare.cut(whole)
        })?;
        self.kept.add(start + len, whole - len, self.clock);
        Some(start)
    }

    /// Gives a block back.
    ///
    /// # Safety
    /// [`Arena::take`] gave it for this many bytes, and nobody uses it any more.
    pub unsafe fn give_back(&mut self, block: NonNull<u8>, bytes: usize) {
        let len = whole_pages(bytes);
        self.live -= len;
        self.clock += 1;
        self.kept.add(block.as_ptr() as usize, len, self.clock);
        self.trim();
    }

    /// Gives pages that were not used for the longest back to the system, while more are kept than were once in use together and
    /// a little more: blocks of one step are not those of the next.
    fn trim(&mut self) {
        let most = self.live_max + (self.live_max / 3).min(SLACK);
        while self.live + self.kept.bytes > most {
            let surplus = self.live + self.kept.bytes - most;
            if !self.drop_oldest(surplus) {
                break;
            }
        }
    }

    /// Gives whole large pages of the oldest range that has one back to the system, of about `surplus` bytes; whether there was one.
    fn drop_oldest(&mut self, surplus: usize) -> bool {
        let oldest = self.kept.by_age.iter().find_map(|(freed, start)| {
            let end = start + self.kept.by_start[start].0;
            let (first, last) = (start.next_multiple_of(HUGE_PAGE), end / HUGE_PAGE * HUGE_PAGE);
            (first < last).then_some((*freed, *start, end, first, last))
        });
        let Some((freed, start, end, first, last)) = oldest else { return false };
        let last = last.min(first + surplus.next_multiple_of(HUGE_PAGE));
        self.kept.remove(start);
        self.kept.add(start, first - start, freed);
        self.kept.add(last, end - last, freed);
        // SAFETY: the range is free, inside mappings of ours, and in whole pages.
        unsafe { system::drop_pages(first, last - first) };
        self.bare.add(first, last - first, 0);
        true
    }

    /// Bytes of free pages that are kept.
    pub fn free_bytes(&self) -> usize {
        self.kept.bytes
    }
}

/// Mappings of Linux.
#[cfg(target_os = "linux")]
mod system {
    use super::HUGE_PAGE;
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

    /// `size` bytes of zeros that begin on a large page, or none if the system refuses. They lie on large pages if the system has
    /// them: where a model is read once for a few rows, looking up its small pages took up to a quarter of the time (8 texts of the
    /// 0.5B shape in bf16: 92 ms a token, 74 with them).
    pub fn map(size: usize) -> Option<usize> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping, wherever the system likes. What lies before its first large page and behind `size` bytes from there
        // is given back, in whole pages; the advice changes no content, and a system without large pages refuses it.
        unsafe {
            let start = mmap_anonymous(std::ptr::null_mut(), size + HUGE_PAGE, ProtFlags::READ | ProtFlags::WRITE, flags).ok()?;
            let before = start.addr().next_multiple_of(HUGE_PAGE) - start.addr();
            let block = start.byte_add(before);
            if before > 0 {
                munmap(start, before).expect("the mapping is ours");
            }
            munmap(block.byte_add(size), HUGE_PAGE - before).expect("the mapping is ours");
            let _ = madvise(block, size, Advice::LinuxHugepage);
            Some(block as usize)
        }
    }

    /// Gives the pages of a range back; it reads as zeros.
    ///
    /// # Safety
    /// The range consists of whole pages of [`map`]'s, and nobody uses it.
    pub unsafe fn drop_pages(start: usize, len: usize) {
        // SAFETY: as the caller promises.
        unsafe { madvise(start as *mut _, len, Advice::LinuxDontNeed) }.expect("the mapping is ours");
    }
}

/// Other systems have no large blocks here.
#[cfg(not(target_os = "linux"))]
mod system {
    pub fn map(_: usize) -> Option<usize> {
        None
    }
    pub unsafe fn drop_pages(_: usize, _: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_grow_together_and_the_smallest_that_suffices_is_cut() {
        let mut spans = Spans::EMPTY;
        for (start, len, now) in [(100, 10, 1), (120, 10, 2), (200, 50, 3), (300, 10, 4)] {
            spans.add(start, len, now);
        }
        spans.add(110, 10, 5);
        assert_eq!(spans.by_start.iter().map(|(start, (len, _))| (*start, *len)).collect::<Vec<_>>(), [(100, 30), (200, 50), (300, 10)]);
        assert_eq!((spans.cut(20), spans.cut(10)), (Some(100), Some(120)), "of two that fit alike the one that was freed last");
        assert_eq!((spans.cut(51), spans.cut(10), spans.cut(50), spans.cut(1)), (None, Some(300), Some(200), None));
        assert_eq!(spans.bytes, 0);
    }

    #[test]
    fn a_large_block_serves_smaller_ones_and_comes_together_again() {
        let (mut arena, mib) = (Arena::EMPTY, 1 << 20);
        let whole = arena.take(64 * mib).unwrap();
        // SAFETY: blocks are used with the sizes that they were taken with, and given back once.
        unsafe {
            assert!(std::slice::from_raw_parts(whole.as_ptr(), 64 * mib).iter().all(|byte| *byte == 0));
            whole.write_bytes(7, 64 * mib);
            arena.give_back(whole, 64 * mib);
            let parts: Vec<_> = (0..16).map(|_| arena.take(4 * mib).unwrap()).collect();
            assert!(parts.iter().all(|part| (whole..whole.byte_add(64 * mib)).contains(part) && part.read() == 7), "the same pages");
            for first in [0, 1] {
                parts.iter().skip(first).step_by(2).for_each(|part| arena.give_back(*part, 4 * mib));
            }
            assert_eq!((arena.live, arena.free_bytes()), (0, 64 * mib));
            assert_eq!(arena.take(64 * mib), Some(whole));
        }
    }

    #[test]
    fn no_more_pages_are_kept_than_were_once_in_use_and_a_third() {
        let (mut arena, mib) = (Arena::EMPTY, 1 << 20);
        // SAFETY: as above.
        unsafe {
            for size in [30, 31, 33, 36, 40, 45] {
                let block = arena.take(size * mib).unwrap();
                block.write_bytes(1, size * mib);
                let other = arena.take(20 * mib).unwrap();
                arena.give_back(block, size * mib);
                arena.give_back(other, 20 * mib);
                assert!(arena.live + arena.free_bytes() <= arena.live_max + arena.live_max / 3, "{size}");
            }
            while arena.drop_oldest(usize::MAX / 2) {}
            assert_eq!(arena.free_bytes() / HUGE_PAGE, 0, "all but what is left of large pages");
            let again = arena.take(45 * mib).unwrap();
            assert!(std::slice::from_raw_parts(again.as_ptr(), 45 * mib).iter().all(|byte| *byte == 0));
        }
    }
}
