//! What the machine did meanwhile.

use rustix::time::{ClockId, clock_gettime};
use std::time::Instant;

/// CPU seconds of this process so far, user and system.
pub fn cpu_of_process() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Busy CPU seconds of the whole machine so far; none where the system does not say.
pub fn cpu_of_machine() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let line = text.lines().next()?;
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .map_while(|word| word.parse().ok())
        .collect();
    // user, nice, system, irq, softirq, steal
    let busy = [0, 1, 2, 5, 6, 7]
        .into_iter()
        .filter_map(|field| ticks.get(field))
        .sum::<f64>();
    Some(busy / rustix::param::clock_ticks_per_second() as f64)
}

/// One moment of this process and its machine.
pub struct Moment {
    pub wall: Instant,
    pub cpu: f64,
    pub machine: f64,
}

impl Moment {
    pub fn now() -> Self {
        Self {
            machine: cpu_of_machine().unwrap_or(0.0),
            cpu: cpu_of_process(),
            wall: Instant::now(),
        }
    }
}
