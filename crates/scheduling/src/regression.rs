//! A small linear regression that learns one observation at a time: a Kalman filter over the weights of `K` features, whose
//! errors are relative to the prediction, whose outliers are clipped, and whose certainty never exceeds what a slow drift
//! allows. The first observations are learned together, from a prior of their median size, so that none of them counts for
//! being the first. Source: Durbin and Koopman, *Time Series Analysis by State Space Methods*, chapter 4 (the filter); Huber,
//! *Robust Statistics*, chapter 7 (clipped residuals).

/// How far a weight may be from its prior at first, as a multiple of it: its variance.
const PRIOR_VARIANCE: f64 = 100.0;
/// Variance that each observation adds to a weight: nodes change (clocks, neighbours), and old figures must fade.
const DRIFT_VARIANCE: f64 = 0.002;
/// Observations that are learned together.
const FIRST: usize = 8;
/// Residuals beyond so many mean ones are clipped.
const CLIP: f64 = 3.0;
/// Mean relative residual that is assumed at first.
const RESIDUAL_PRIOR: f64 = 0.5;
/// The least relative error that is assumed of a measurement.
const NOISE_MIN: f64 = 0.05;
/// Weight of the newest residual in the mean one.
const NEWEST: f64 = 1.0 / 16.0;
const SECONDS_MIN: f64 = 1e-6;

/// Learns `seconds = sum of coefficient[i] * x[i]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Regression<const K: usize> {
    /// Seconds per unit of each feature before any weight.
    prior: [f64; K],
    weight: [f64; K],
    covariance: [[f64; K]; K],
    /// Mean size of a relative residual.
    residual: f64,
    /// At most [`FIRST`].
    first: Vec<([f64; K], f64)>,
}

impl<const K: usize> Regression<K> {
    /// `prior`: seconds per unit of each feature. Its proportions matter more than its size, which the first observations
    /// set.
    pub(crate) fn new(prior: [f64; K]) -> Self {
        let mut this = Self {
            prior,
            weight: [1.0; K],
            covariance: [[0.0; K]; K],
            residual: RESIDUAL_PRIOR,
            first: Vec::new(),
        };
        this.begin(1.0);
        this
    }

    /// Observations so far, up to a few.
    pub(crate) fn seen(&self) -> usize {
        self.first.len()
    }

    /// Seconds per unit of each feature; never negative.
    pub(crate) fn coefficients(&self) -> [f64; K] {
        std::array::from_fn(|i| self.prior[i] * self.weight[i])
    }

    /// Makes the prior such that `x` takes `seconds`, where nothing was observed yet.
    pub(crate) fn scale_prior(&mut self, x: [f64; K], seconds: f64) {
        if self.first.is_empty() && seconds.is_finite() && seconds > 0.0 {
            self.begin(seconds.max(SECONDS_MIN) / self.predict(x));
        }
    }

    /// `x` took `seconds`. What is no time is ignored.
    pub(crate) fn observe(&mut self, x: [f64; K], seconds: f64) {
        if !seconds.is_finite() || seconds < 0.0 {
            return;
        }
        let seconds = seconds.max(SECONDS_MIN);
        if self.first.len() >= FIRST {
            return self.learn(x, seconds);
        }
        self.first.push((x, seconds));
        self.weight = [1.0; K];
        let mut ratios: Vec<f64> = self
            .first
            .iter()
            .map(|(x, seconds)| seconds / self.predict(*x))
            .collect();
        ratios.sort_unstable_by(f64::total_cmp);
        self.begin(ratios[(ratios.len() - 1) / 2]);
        for (x, seconds) in self.first.clone() {
            self.learn(x, seconds);
        }
    }

    /// Nothing is learned, and the prior is `scale` of what it was.
    fn begin(&mut self, scale: f64) {
        self.prior.iter_mut().for_each(|prior| *prior *= scale);
        self.weight = [1.0; K];
        self.covariance = [[0.0; K]; K];
        (0..K).for_each(|i| self.covariance[i][i] = PRIOR_VARIANCE);
        self.residual = RESIDUAL_PRIOR;
    }

    fn learn(&mut self, x: [f64; K], seconds: f64) {
        let predicted = self.predict(x);
        let z: [f64; K] = std::array::from_fn(|i| x[i] * self.prior[i] / predicted);
        let error = seconds / predicted - 1.0;
        let usual = self.residual.max(NOISE_MIN);
        // A true change shifts every residual, so that their mean grows until they are outliers no more.
        self.residual += (error.abs().min((CLIP + 1.0) * usual) - self.residual) * NEWEST;
        (0..K).for_each(|i| self.covariance[i][i] += DRIFT_VARIANCE);
        let along: [f64; K] = std::array::from_fn(|i| (0..K).map(|j| self.covariance[i][j] * z[j]).sum());
        let variance = usual.powi(2) + (0..K).map(|i| z[i] * along[i]).sum::<f64>();
        let step = error.clamp(-CLIP * usual, CLIP * usual) / variance;
        for i in 0..K {
            self.weight[i] = (self.weight[i] + along[i] * step).max(0.0);
            for j in 0..K {
                self.covariance[i][j] -= along[i] * along[j] / variance;
            }
        }
        self.bound_covariance();
    }

    /// Directions that are never observed would else grow uncertain without end, and jump at the first observation.
    fn bound_covariance(&mut self) {
        let shrink: [f64; K] = std::array::from_fn(|i| (PRIOR_VARIANCE / self.covariance[i][i]).sqrt().min(1.0));
        for i in 0..K {
            for j in 0..K {
                self.covariance[i][j] *= shrink[i] * shrink[j];
            }
        }
    }

    fn predict(&self, x: [f64; K]) -> f64 {
        let coefficients = self.coefficients();
        (0..K).map(|i| x[i] * coefficients[i]).sum::<f64>().max(SECONDS_MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PRIOR: [f64; 2] = [0.02, 2.0];

    /// Sizes 0.05 to 8.0 in an order without pattern.
    fn sizes(count: u32) -> impl Iterator<Item = f64> {
        (0..count).map(|i| 0.05 + f64::from(i * 7919 % 160) / 20.0)
    }

    fn off(model: &Regression<2>, truth: impl Fn(f64) -> f64) -> f64 {
        let errors = [0.1, 1.0, 4.0, 8.0].map(|size| (model.predict([1.0, size]) / truth(size) - 1.0).abs());
        errors.into_iter().fold(0.0, f64::max)
    }

    #[test]
    fn it_finds_overhead_and_slope_from_a_prior_a_thousand_times_off() {
        for scale in [1e-3, 1.0, 1e3] {
            let truth = |size: f64| scale * (0.02 + 0.5 * size);
            let mut model = Regression::new(PRIOR);
            sizes(40).for_each(|size| model.observe([1.0, size], truth(size)));
            assert!(off(&model, truth) < 0.05, "{model:?}");
        }
    }

    #[test]
    fn a_tenth_of_outliers_moves_it_little() {
        let truth = |size: f64| 0.02 + 0.5 * size;
        let mut model = Regression::new(PRIOR);
        for (index, size) in sizes(300).enumerate() {
            let factor = if index % 10 == 9 { 30.0 } else { 1.0 };
            model.observe([1.0, size], truth(size) * factor);
        }
        assert!(off(&model, truth) < 0.2, "{model:?}");
    }

    #[test]
    fn a_first_observation_that_was_an_outlier_is_forgotten() {
        let truth = |size: f64| 0.02 + 0.5 * size;
        let mut model = Regression::new(PRIOR);
        model.observe([1.0, 1.0], 40.0);
        sizes(40).for_each(|size| model.observe([1.0, size], truth(size)));
        assert!(off(&model, truth) < 0.2, "{model:?}");
    }

    #[test]
    fn a_node_that_becomes_slower_is_found_out() {
        let (before, after) = (|size: f64| 0.02 + 0.5 * size, |size: f64| 0.06 + 1.5 * size);
        let mut model = Regression::new(PRIOR);
        sizes(500).for_each(|size| model.observe([1.0, size], before(size)));
        sizes(60).for_each(|size| model.observe([1.0, size], after(size)));
        assert!(off(&model, after) < 0.25, "{model:?}");
    }

    #[test]
    fn one_size_for_long_does_not_make_others_absurd() {
        let truth = |size: f64| 0.02 + 0.5 * size;
        let mut model = Regression::new(PRIOR);
        (0..5000).for_each(|_| model.observe([1.0, 1.0], truth(1.0)));
        assert!(off(&model, truth) < 0.5, "{model:?}");
        sizes(40).for_each(|size| model.observe([1.0, size], truth(size)));
        assert!(off(&model, truth) < 0.2, "{model:?}");
    }

    proptest! {
        #[test]
        fn it_stays_finite_and_never_negative(
            seen in prop::collection::vec((0.0f64..1e3, prop_oneof![Just(f64::NAN), Just(-1.0), Just(0.0), 1e-9f64..1e6]), 0..60),
            size in 0.0f64..1e3,
        ) {
            let mut model = Regression::new(PRIOR);
            seen.iter().for_each(|(size, seconds)| model.observe([1.0, *size], *seconds));
            prop_assert!(model.coefficients().iter().all(|c| c.is_finite() && *c >= 0.0), "{model:?}");
            prop_assert!(model.predict([1.0, size]).is_finite());
        }
    }
}
