//! The worker threads that share one operation. They stay awake between operations for a short while, since a step is
//! thousands of short operations. Which thread takes which task never changes a result: tasks write disjoint outputs.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::{Mutex, OnceLock};

/// Turns of the waiting loop before a worker goes to sleep: about 100 microseconds.
const SPINS: u32 = 4_000;

/// One parallel operation: its tasks are claimed by number.
struct Work {
    /// The caller's closure, its lifetime erased; see the safety argument in [`parallel`].
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

struct Pool {
    /// Number of the current operation; a worker that sees it change joins in.
    epoch: AtomicUsize,
    work: Mutex<Option<Work>>,
    next_task: AtomicUsize,
    /// Workers that are inside the current operation, and [`CLOSED`] when none may enter any more. A worker that the
    /// system let wait until all tasks were taken stays outside, and nobody waits for it.
    gate: AtomicUsize,
    panicked: AtomicBool,
    workers: Vec<std::thread::Thread>,
    asleep: Vec<AtomicBool>,
}

// SAFETY: the raw pointer in `work` is only followed while `parallel` keeps its closure alive.
unsafe impl Sync for Pool {}
// SAFETY: as above.
unsafe impl Send for Pool {}

/// The gate's flag.
const CLOSED: usize = 1 << (usize::BITS - 1);

static POOL: OnceLock<&'static Pool> = OnceLock::new();
static ACTIVE: AtomicUsize = AtomicUsize::new(0);
/// Held by the one operation that runs on the workers; others meanwhile run on their caller's thread.
static TURN: Mutex<()> = Mutex::new(());

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Cores this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get())
}

/// Threads that an operation uses now: `set_threads`, else `PERILUNE_THREADS`, else one a core.
pub fn threads() -> usize {
    match ACTIVE.load(Relaxed) {
        0 => {
            let asked = std::env::var("PERILUNE_THREADS").ok().and_then(|text| text.parse().ok()).filter(|count| *count > 0);
            let count: usize = asked.unwrap_or_else(cores).min(pool_size());
            ACTIVE.store(count, Relaxed);
            count
        }
        count => count,
    }
}

/// Uses `count` threads from now on, at least 1, at most one a core (but 2 are always allowed).
pub fn set_threads(count: usize) {
    ACTIVE.store(count.clamp(1, pool_size()), Relaxed);
}

fn pool_size() -> usize {
    cores().max(2)
}

fn pool() -> &'static Pool {
    POOL.get_or_init(|| {
        let (sender, receiver) = std::sync::mpsc::channel::<&'static Pool>();
        let receiver = std::sync::Arc::new(Mutex::new(receiver));
        let workers: Vec<_> = (0..pool_size() - 1)
            .map(|index| {
                let receiver = receiver.clone();
                std::thread::Builder::new()
                    .name(format!("kernels-{index}"))
                    .spawn(move || {
                        let pool = receiver.lock().map(|r| r.recv());
                        if let Ok(Ok(pool)) = pool {
                            work_forever(pool, index);
                        }
                    })
                    .expect("the system grants a thread a core")
                    .thread()
                    .clone()
            })
            .collect();
        let asleep = workers.iter().map(|_| AtomicBool::new(false)).collect();
        let pool: &'static Pool = Box::leak(Box::new(Pool {
            epoch: AtomicUsize::new(0),
            work: Mutex::new(None),
            next_task: AtomicUsize::new(0),
            gate: AtomicUsize::new(CLOSED),
            panicked: AtomicBool::new(false),
            workers,
            asleep,
        }));
        for _ in &pool.workers {
            sender.send(pool).expect("workers wait for their pool");
        }
        pool
    })
}

fn work_forever(pool: &'static Pool, index: usize) {
    INSIDE.set(true);
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while pool.epoch.load(Acquire) == seen {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            pool.asleep[index].store(true, SeqCst);
            // Looked at again after saying so: the caller raises the epoch first and reads `asleep` second.
            while pool.epoch.load(SeqCst) == seen {
                std::thread::park();
            }
            pool.asleep[index].store(false, SeqCst);
        }
        seen = pool.epoch.load(Acquire);
        let entered =
            index + 1 < threads() && pool.gate.fetch_update(AcqRel, Acquire, |gate| (gate & CLOSED == 0).then_some(gate + 1)).is_ok();
        if !entered {
            continue;
        }
        let job = pool.work.lock().ok().and_then(|work| work.as_ref().map(|w| (w.run, w.tasks)));
        if let Some((run, tasks)) = job {
            // SAFETY: this worker has passed the gate, and `parallel` returns only when all who did have left.
            let run = unsafe { &*run };
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| claim_tasks(pool, run, tasks))).is_err() {
                pool.panicked.store(true, Release);
            }
        }
        pool.gate.fetch_sub(1, Release);
    }
}

fn claim_tasks(pool: &Pool, run: &(dyn Fn(usize) + Sync), tasks: usize) {
    loop {
        let task = pool.next_task.fetch_add(1, Relaxed);
        if task >= tasks {
            return;
        }
        run(task);
    }
}

/// Runs `run(0)` to `run(tasks - 1)`, each once, over the threads, and returns when all are done. Called from inside a
/// task, or while another operation has the workers, it runs them all on the caller's thread.
pub fn parallel(tasks: usize, run: impl Fn(usize) + Sync) {
    if tasks <= 1 || INSIDE.get() || threads() == 1 {
        (0..tasks).for_each(run);
        return;
    }
    let Ok(_turn) = TURN.try_lock() else {
        (0..tasks).for_each(run);
        return;
    };
    let pool = pool();
    let run: &(dyn Fn(usize) + Sync) = &run;
    // SAFETY: only the lifetime changes. Workers follow the pointer only between entering and leaving by the gate, and
    // this function leaves, by return or by panic, only after closing the gate and seeing it empty.
    let erased: *const (dyn Fn(usize) + Sync) =
        unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(run) };
    *pool.work.lock().expect("no panic happens under this lock") = Some(Work { run: erased, tasks });
    pool.next_task.store(0, Relaxed);
    pool.gate.store(0, Release);
    pool.epoch.fetch_add(1, SeqCst);
    for (worker, asleep) in pool.workers.iter().zip(&pool.asleep) {
        if asleep.load(SeqCst) {
            worker.unpark();
        }
    }
    INSIDE.set(true);
    let own = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| claim_tasks(pool, run, tasks)));
    INSIDE.set(false);
    let mut spins = 0u32;
    pool.gate.fetch_or(CLOSED, AcqRel);
    while pool.gate.load(Acquire) != CLOSED {
        spins += 1;
        if spins > SPINS {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
    *pool.work.lock().expect("no panic happens under this lock") = None;
    let worker_panicked = pool.panicked.swap(false, AcqRel);
    drop(_turn);
    if let Err(panic) = own {
        std::panic::resume_unwind(panic);
    }
    assert!(!worker_panicked, "a kernel task panicked on a worker thread");
}

/// Splits `count` items into ranges of about equal size, a few a thread, none smaller than `least`, and runs `run` on each.
pub fn parallel_ranges(count: usize, least: usize, run: impl Fn(std::ops::Range<usize>) + Sync) {
    let tasks = (count / least.max(1)).clamp(1, threads() * 4);
    let size = count.div_ceil(tasks).max(1);
    parallel(count.div_ceil(size), |task| run(task * size..((task + 1) * size).min(count)));
}

/// A mutable slice that tasks of one operation share, each writing its own part.
pub struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    owner: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `part`, whose callers promise disjoint ranges, so it is a split of a `&mut [T]`.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: std::marker::PhantomData }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No other part that overlaps `range` may be alive, on this thread or another.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: std::ops::Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {} elements", self.len);
        // SAFETY: in bounds by the assertion; alone by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.end - range.start) }
    }

    /// The first element's address, for kernels that write strided tiles.
    pub fn as_mut_ptr(&self) -> *mut T {
        self.start
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_task_runs_once_however_many_operations_follow() {
        for round in 0..2_000 {
            let counts: Vec<AtomicU32> = (0..round % 17).map(|_| AtomicU32::new(0)).collect();
            parallel(counts.len(), |task| {
                counts[task].fetch_add(1, Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "round {round}");
        }
    }

    #[test]
    fn ranges_cover_the_count_once() {
        for count in [0, 1, 7, 64, 1001] {
            let mut hits = vec![0u8; count];
            let shared = Shared::new(&mut hits);
            // SAFETY: parallel_ranges hands out disjoint ranges.
            parallel_ranges(count, 8, |range| unsafe { shared.part(range) }.iter_mut().for_each(|hit| *hit += 1));
            assert!(hits.iter().all(|hit| *hit == 1), "{count}");
        }
    }

    #[test]
    fn a_task_may_start_an_operation_of_its_own_and_a_panic_reaches_the_caller() {
        let total = AtomicU32::new(0);
        parallel(4, |_| {
            parallel(5, |_| {
                total.fetch_add(1, Relaxed);
            })
        });
        assert_eq!(total.load(Relaxed), 20);
        assert!(std::panic::catch_unwind(|| parallel(8, |task| assert!(task != 3, "planned"))).is_err());
        parallel(8, |_| {
            total.fetch_add(1, Relaxed);
        });
        assert_eq!(total.load(Relaxed), 28);
    }
}
