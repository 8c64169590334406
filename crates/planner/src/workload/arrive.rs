//! Other arrivals for the same requests.

use super::{Arrivals, Generator, Lengths, Workload};

impl Workload {
    /// The same requests, in the same order, when a generator says instead of when the trace does.
    pub fn arrive(&mut self, arrivals: Arrivals, seed: u64) {
        let one = Lengths::Constant(1);
        let drawn = Generator {
            requests: self.len(),
            arrivals,
            inputs: one,
            outputs: one,
        };
        let times = drawn.draw(seed);
        for (request, drawn) in self.requests.iter_mut().zip(times.requests()) {
            request.at = drawn.at;
        }
        self.sort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_and_times_change() {
        let drawn = |arrivals| Generator {
            requests: 12,
            arrivals,
            inputs: Lengths::Exponential(50.0),
            outputs: Lengths::Constant(3),
        };
        let mut workload = drawn(Arrivals::Even(1.0)).draw(1);
        let before: Vec<u32> = workload.requests().iter().map(|r| r.input).collect();
        let bursts = Arrivals::Bursts { size: 4, every_s: 2.0 };
        workload.arrive(bursts, 1);
        let after: Vec<(u64, u32)> = workload
            .requests()
            .iter()
            .map(|r| (r.at.0 / 1_000_000_000, r.input))
            .collect();
        assert_eq!(after.iter().map(|(_, input)| *input).collect::<Vec<_>>(), before);
        assert_eq!(
            after.iter().map(|(at, _)| *at).collect::<Vec<_>>(),
            [0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4]
        );
    }
}
