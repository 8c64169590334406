//! Compute threads of one backend. A job is a count of units that any thread may take; which thread takes which unit
//! changes no result. The caller works too and never waits for a thread that has not woken: on a crowded machine it
//! simply does more itself. Threads spin for some microseconds between jobs of one step, then sleep.

#![allow(unsafe_code)]

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, ThreadId};

/// Spins before a thread sleeps or yields, some ten microseconds in all.
const SPINS: u32 = 600;

/// `state`: the number of the job, whether it may be joined, and how many threads are inside.
const OPEN: u64 = 1 << 16;
const INSIDE: u64 = OPEN - 1;
const JOB: u64 = 1 << 17;

/// What the scheduler is asked to let a computing thread have at a time, where others want its CPU too. Whoever asks for less, as
/// threads that send and receive do, still interrupts it at once when woken, since its own share is due earlier. The Linux default
/// is 3 ms or less: steps of two processes on few CPUs then take turns within one step.
const TURN: std::time::Duration = std::time::Duration::from_millis(20);

type Work = dyn Fn(usize, usize) + Sync;

/// The present job. Valid while `state` is open or anybody is inside.
struct Job {
    work: *const Work,
    units: usize,
}

struct Shared {
    state: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<Job>,
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    asleep: Mutex<usize>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the one caller while the state is closed with nobody inside, and read only by threads
// that entered through `state` (acquire) after it was opened (release). The work behind the pointer is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer is used only within `Pool::run`, which outlives every use.
unsafe impl Send for Shared {}

/// The threads. Dropping joins them.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// The caller's CPU, if it has one of its own.
    cpu: Option<usize>,
    /// The caller that was made ready to compute.
    caller: Option<ThreadId>,
}

/// Keeps this thread on one CPU.
fn pin(cpu: usize) -> std::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

/// Makes this thread one that computes: on its CPU, where it has one, and for longer turns there.
fn compute(cpu: Option<usize>) {
    if let Some(Err(error)) = cpu.map(pin) {
        tracing::warn!(?cpu, %error, "a compute thread could not be kept on its CPU");
    }
    if let Err(error) = take_long_turns() {
        tracing::debug!(%error, "the scheduler gives compute threads its usual turns");
    }
}

/// Asks the scheduler for turns of [`TURN`]; before Linux 6.12 it agrees and changes nothing. Threads of real-time
/// policies stay as they are.
fn take_long_turns() -> std::io::Result<()> {
    let mut turns = turns()?;
    if ![libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&(turns.sched_policy as i32)) {
        return Ok(());
    }
    turns.sched_runtime = TURN.as_nanos() as u64;
    // SAFETY: 0 is the calling thread; the structure is as long as it says and is only read.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const turns, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// What the scheduler was asked for on behalf of this thread.
fn turns() -> std::io::Result<libc::sched_attr> {
    // SAFETY: a structure of integers, for which zeros are values.
    let mut turns: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of_val(&turns);
    // SAFETY: 0 is the calling thread; the kernel writes `size` bytes at most.
    match unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut turns, size, 0) } {
        0 => Ok(turns),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Whether this process may use them all, and there is one for each thread.
fn check_cpus(cpus: &[usize], threads: usize) -> std::io::Result<()> {
    if cpus.len() != threads {
        let count = cpus.len();
        return Err(std::io::Error::other(format!("{count} CPUs are named for them")));
    }
    let allowed = sched_getaffinity(None)?;
    let may = |cpu: usize| cpu < CpuSet::MAX_CPU && allowed.is_set(cpu);
    match cpus.iter().find(|cpu| !may(**cpu)) {
        None => Ok(()),
        Some(cpu) => Err(std::io::Error::other(format!(
            "CPU {cpu} is not one that this process may use"
        ))),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Closes the job and waits until nobody is inside, also when a unit panics on the calling thread.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.0.state.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop()
            } else {
                std::thread::yield_now()
            }
        }
    }
}

/// A base address that units cut disjoint parts from.
struct Parts<T>(*mut T);

// SAFETY: every unit derives its own disjoint part from it (see `Pool::parts`).
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    /// # Safety
    /// `from..to` lies within the slice, and no other living reference overlaps it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, from: usize, to: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), to - from) }
    }
}

impl Pool {
    /// Starts `threads - 1` threads beside the caller's. `cpus`: none, or one for each thread, the caller's first.
    pub(super) fn new(threads: usize, cpus: &[usize]) -> std::io::Result<Self> {
        if !cpus.is_empty() {
            check_cpus(cpus, threads)?;
        }
        fn idle(_: usize, _: usize) {}
        let work: *const Work = &idle as &'static Work;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { work, units: 0 }),
            panicked: Mutex::new(None),
            stop: AtomicBool::new(false),
            asleep: Mutex::new(0),
            wake: Condvar::new(),
        });
        let mut pool = Self {
            shared: shared.clone(),
            threads: Vec::new(),
            cpu: cpus.first().copied(),
            caller: None,
        };
        for worker in 1..threads {
            let shared = shared.clone();
            let name = format!("compute-{worker}");
            let cpu = cpus.get(worker).copied();
            let serve = move || {
                compute(cpu);
                shared.serve(worker);
            };
            pool.threads.push(std::thread::Builder::new().name(name).spawn(serve)?);
        }
        Ok(pool)
    }

    /// The calling thread is the one that computes from now on.
    pub(super) fn enter(&mut self) {
        let this = std::thread::current().id();
        if self.caller.replace(this) != Some(this) {
            compute(self.cpu);
        }
    }

    /// Threads that take units, the caller's among them.
    pub(super) fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `work(unit, worker)` once for each unit; `worker` is below [`Self::threads`] and never runs two at once.
    pub(super) fn run(&mut self, units: usize, work: &(dyn Fn(usize, usize) + Sync)) {
        if units <= 1 || self.threads.is_empty() {
            (0..units).for_each(|unit| work(unit, 0));
            return;
        }
        let shared = &*self.shared;
        // A job that panicked on both sides left a second payload behind.
        lock(&shared.panicked).take();
        // SAFETY: only the lifetime is erased. The pointer is used by threads inside the job alone, and `Closing` does not
        // let this call end before all have left.
        let erased: *const Work = unsafe { std::mem::transmute::<&(dyn Fn(usize, usize) + Sync), &'static Work>(work) };
        // SAFETY: `&mut self`: no other call is running, and the last one left the state closed with nobody inside.
        unsafe { *shared.job.get() = Job { work: erased, units } };
        shared.next.store(0, Ordering::Relaxed);
        let before = shared.state.load(Ordering::Relaxed);
        shared
            .state
            .store((before & !(OPEN | INSIDE)).wrapping_add(JOB) | OPEN, Ordering::SeqCst);
        {
            let closing = Closing(shared);
            if *lock(&shared.asleep) > 0 {
                shared.wake.notify_all();
            }
            shared.take_units(work, units, 0);
            drop(closing);
        }
        if let Some(payload) = lock(&shared.panicked).take() {
            resume_unwind(payload);
        }
    }

    /// Gives each unit its own part of `out`: `work(unit, &mut out[bounds[unit]..bounds[unit + 1]], worker)`.
    ///
    /// # Panics
    /// Where the bounds do not ascend or pass the end.
    pub(super) fn parts<T: Send>(
        &mut self,
        out: &mut [T],
        bounds: &[usize],
        work: impl Fn(usize, &mut [T], usize) + Sync,
    ) {
        assert!(bounds.is_sorted() && bounds.last().is_none_or(|end| *end <= out.len()));
        let base = Parts(out.as_mut_ptr());
        let base = &base;
        self.run(bounds.len().saturating_sub(1), &|unit, worker| {
            // SAFETY: the bounds ascend and end within `out`, so parts are disjoint; each unit runs once.
            work(unit, unsafe { base.part(bounds[unit], bounds[unit + 1]) }, worker);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.asleep));
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A panic in a unit was caught and handed to the caller; serve itself does not panic.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn take_units(&self, work: &(dyn Fn(usize, usize) + Sync), units: usize, worker: usize) {
        loop {
            let unit = self.next.fetch_add(1, Ordering::Relaxed);
            if unit >= units {
                return;
            }
            work(unit, worker);
        }
    }

    /// Life of one thread: wait for a job that it has not seen, enter, work, leave.
    fn serve(&self, worker: usize) {
        let mut seen = 0;
        let mut spins = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let state = self.state.load(Ordering::SeqCst);
            let number = state / JOB;
            if number == seen || state & OPEN == 0 {
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                } else {
                    self.sleep(seen);
                    spins = 0;
                }
                continue;
            }
            if self
                .state
                .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            seen = number;
            spins = 0;
            // SAFETY: inside: the caller wrote the job before it opened the state, and waits until we leave.
            let (work, units) = unsafe { (&*(*self.job.get()).work, (*self.job.get()).units) };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.take_units(work, units, worker))) {
                *lock(&self.panicked) = Some(payload);
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn sleep(&self, seen: u64) {
        let mut asleep = lock(&self.asleep);
        *asleep += 1;
        loop {
            let state = self.state.load(Ordering::SeqCst);
            let fresh = state & OPEN != 0 && state / JOB != seen;
            if fresh || self.stop.load(Ordering::SeqCst) {
                break;
            }
            asleep = self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner);
        }
        *asleep -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_runs_once_over_many_jobs() {
        let mut pool = Pool::new(4, &[]).unwrap();
        for units in (0..200).chain([5_000]) {
            let mut out = vec![0u32; 3 * units];
            let bounds: Vec<usize> = (0..=units).map(|u| 3 * u).collect();
            pool.parts(&mut out, &bounds, |unit, part, _| {
                part.iter_mut().for_each(|x| *x += unit as u32 + 1)
            });
            assert!(out.iter().enumerate().all(|(i, x)| *x == i as u32 / 3 + 1));
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3, &[]).unwrap();
        for _ in 0..20 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, &|unit, _| assert!(unit != 40, "unit 40"));
            }));
            assert!(caught.is_err());
            let count = AtomicUsize::new(0);
            pool.run(64, &|_, _| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 64);
        }
    }

    #[test]
    fn threads_that_compute_take_long_turns() {
        std::thread::spawn(|| {
            let usual = turns().unwrap();
            let mut pool = Pool::new(2, &[]).unwrap();
            pool.enter();
            let long = turns().unwrap();
            assert_eq!(
                (long.sched_policy, long.sched_nice),
                (usual.sched_policy, usual.sched_nice)
            );
            // Older kernels tell no turns of ordinary threads.
            if usual.sched_runtime > 0 {
                assert_eq!(long.sched_runtime, TURN.as_nanos() as u64);
            }
        })
        .join()
        .unwrap();
    }

    #[test]
    fn threads_stay_on_their_cpus() {
        let allowed = sched_getaffinity(None).unwrap();
        let cpu = (0..CpuSet::MAX_CPU).rfind(|cpu| allowed.is_set(*cpu)).unwrap();
        std::thread::spawn(move || {
            let mut pool = Pool::new(2, &[cpu, cpu]).unwrap();
            assert_eq!(
                sched_getaffinity(None).unwrap(),
                allowed,
                "who makes it computes nothing yet"
            );
            pool.enter();
            let mut elsewhere = [0; 64];
            pool.parts(&mut elsewhere, &Vec::from_iter(0..=64), |_, part, _| {
                let set = sched_getaffinity(None).unwrap();
                part[0] = u32::from(set.count() != 1 || !set.is_set(cpu));
            });
            assert_eq!(elsewhere, [0; 64]);
        })
        .join()
        .unwrap();
        let refused = |threads, cpus: &[usize]| Pool::new(threads, cpus).err().unwrap().to_string();
        assert_eq!(refused(2, &[cpu]), "1 CPUs are named for them");
        assert!(refused(1, &[CpuSet::MAX_CPU]).contains("may use"));
    }
}
