//! A function of one or two figures, known at some points and linear between them.

use super::OutOfRange;
use serde::{Deserialize, Serialize};

/// Seconds over two figures; bilinear between the points, nothing beyond them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grid {
    /// Rising values of the first figure.
    pub x: Vec<f64>,
    /// Rising values of the second.
    pub y: Vec<f64>,
    /// Seconds, `[x][y]`.
    pub seconds: Vec<Vec<f64>>,
}

/// Where a value stands on an axis: the index of the point below it, and how far it is towards the next, 0 to 1.
pub(super) fn place(axis: &[f64], value: f64, field: &'static str) -> Result<(usize, f64), OutOfRange> {
    let (low, high) = (axis[0], axis[axis.len() - 1]);
    if !(low..=high).contains(&value) {
        return Err(OutOfRange {
            field,
            value,
            low,
            high,
        });
    }
    let above = axis.partition_point(|point| *point <= value).min(axis.len() - 1).max(1);
    if axis.len() == 1 {
        return Ok((0, 0.0));
    }
    let below = above - 1;
    Ok((below, (value - axis[below]) / (axis[above] - axis[below])))
}

impl Grid {
    /// Fills a grid from a function.
    pub fn of(x: Vec<f64>, y: Vec<f64>, seconds: impl Fn(f64, f64) -> f64) -> Self {
        let row = |x: &f64| y.iter().map(|y| seconds(*x, *y)).collect();
        let seconds = x.iter().map(row).collect();
        Self { x, y, seconds }
    }

    /// The value between the points around it.
    ///
    /// # Errors
    /// Outside the grid.
    pub fn at(&self, x: f64, y: f64, fields: [&'static str; 2]) -> Result<f64, OutOfRange> {
        let (i, across) = place(&self.x, x, fields[0])?;
        let (j, along) = place(&self.y, y, fields[1])?;
        let row = |i: usize| {
            let row = &self.seconds[i];
            let next = row.get(j + 1).copied().unwrap_or(row[j]);
            row[j] + (next - row[j]) * along
        };
        let low = row(i);
        if across == 0.0 {
            return Ok(low);
        }
        Ok(low + (row(i + 1) - low) * across)
    }

    /// Makes all of it so many times as long.
    pub fn scale(&mut self, times: f64) {
        self.seconds.iter_mut().flatten().for_each(|seconds| *seconds *= times);
    }

    /// Makes all values at one point of `y` so many times as long.
    pub fn scale_column(&mut self, column: usize, times: f64) {
        self.seconds.iter_mut().for_each(|row| row[column] *= times);
    }

    /// What is wrong with it, if anything.
    pub(super) fn fault(&self) -> Option<String> {
        for (name, axis) in [("x", &self.x), ("y", &self.y)] {
            if axis.is_empty() || !axis.iter().all(|v| v.is_finite() && *v >= 0.0) || !axis.is_sorted_by(|a, b| a < b) {
                return Some(format!(".{name} must be rising numbers of at least 0"));
            }
        }
        let shape = self.seconds.len() == self.x.len() && self.seconds.iter().all(|row| row.len() == self.y.len());
        if !shape {
            return Some(format!(".seconds must be {} rows of {}", self.x.len(), self.y.len()));
        }
        let times = self.seconds.iter().flatten();
        if !times.clone().all(|s| s.is_finite() && *s >= 0.0) {
            return Some(".seconds must be numbers of at least 0".to_owned());
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_exact_at_points_linear_between_and_nothing_beyond() {
        let grid = Grid::of(vec![1.0, 2.0, 8.0], vec![0.0, 10.0], |x, y| {
            3.0 + 2.0 * x + 0.5 * y + x * y
        });
        assert_eq!(grid.fault(), None);
        for (x, y) in [(1.0, 0.0), (8.0, 10.0), (1.5, 4.0), (5.0, 9.0), (2.0, 10.0)] {
            let value = grid.at(x, y, ["x", "y"]).unwrap();
            assert!((value - (3.0 + 2.0 * x + 0.5 * y + x * y)).abs() < 1e-12, "{x} {y}");
        }
        let error = grid.at(9.0, 0.0, ["prefill.new_tokens", "y"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "prefill.new_tokens of 9 is outside the profile, which covers 1 to 8"
        );
        assert!(grid.at(1.0, 10.5, ["x", "y"]).is_err() && grid.at(f64::NAN, 1.0, ["x", "y"]).is_err());
        let single = Grid::of(vec![4.0], vec![2.0], |_, _| 7.0);
        assert_eq!(single.at(4.0, 2.0, ["x", "y"]), Ok(7.0));
    }

    #[test]
    fn faults_are_found() {
        let grid = Grid::of(vec![1.0, 2.0], vec![0.0], |x, _| x);
        let with = |change: fn(&mut Grid)| {
            let mut grid = grid.clone();
            change(&mut grid);
            grid.fault().unwrap()
        };
        assert!(with(|g| g.x = vec![2.0, 1.0]).contains(".x"));
        assert!(with(|g| g.y = Vec::new()).contains(".y"));
        assert!(with(|g| g.seconds[0][0] = f64::NAN).contains(".seconds"));
        assert!(with(|g| g.seconds.truncate(1)).contains("2 rows of 1"));
    }
}
