//! Weight matrices in the layout that the kernels read: panels of sixteen rows. Elements keep the file's type.

use super::kernels::{Format, Kernels, LANES, MatmulUnit};
use super::pool::Pool;
use crate::model::{ElementType, Tensor};
use std::sync::{Mutex, PoisonError};

/// A matrix `(rows, inner)`, packed. Rows are padded to whole panels with zeros.
pub(super) struct PackedMatrix {
    format: Format,
    rows: usize,
    inner: usize,
    panel_bytes: usize,
    panels: Vec<u8>,
}

/// One buffer for each thread, reused from job to job.
pub(super) struct Scratch(Vec<Mutex<Vec<f32>>>);

impl Scratch {
    pub(super) fn new(threads: usize) -> Self {
        Self((0..threads).map(|_| Mutex::new(Vec::new())).collect())
    }

    /// Lends a worker its buffer. A worker runs one unit at a time, so nobody waits.
    pub(super) fn with<R>(&self, worker: usize, f: impl FnOnce(&mut Vec<f32>) -> R) -> R {
        f(&mut self.0[worker].lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn format(element: ElementType) -> Format {
    match element {
        ElementType::F32 => Format::F32,
        ElementType::F16 => Format::F16,
        ElementType::Bf16 => Format::Bf16,
        ElementType::Q8_0 => Format::Q8_0,
        ElementType::Q4_0 => Format::Q4_0,
        ElementType::Q4_1 => Format::Q4_1,
    }
}

impl PackedMatrix {
    /// Packs a matrix of shape `(rows, inner)`. The loader checked that data and shape agree.
    pub(super) fn new(tensor: &Tensor<'_>, pool: &mut Pool) -> Self {
        let [rows, inner] = [0, 1].map(|i| tensor.shape[i] as usize);
        let format = format(tensor.element);
        let row_bytes = inner / format.block_elements() * format.block_bytes();
        let panel_bytes = row_bytes * LANES;
        let count = rows.div_ceil(LANES);
        let mut panels = vec![0; count * panel_bytes];
        let bounds: Vec<usize> = (0..=count).map(|panel| panel * panel_bytes).collect();
        pool.parts(&mut panels, &bounds, |panel, out, _| {
            for lane in 0..LANES.min(rows - panel * LANES) {
                let row = panel * LANES + lane;
                pack_row(format, &tensor.data[row * row_bytes..(row + 1) * row_bytes], lane, out);
            }
        });
        Self {
            format,
            rows,
            inner,
            panel_bytes,
            panels,
        }
    }

    /// Outputs, padded to whole panels.
    pub(super) fn padded_rows(&self) -> usize {
        self.rows.next_multiple_of(LANES)
    }

    /// One row as f32.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let from = row / LANES * self.panel_bytes;
        Kernels::decode_row(
            self.format,
            &self.panels[from..from + self.panel_bytes],
            row % LANES,
            out,
        );
    }
}

/// Spreads one row's blocks over a panel's lanes.
fn pack_row(format: Format, row: &[u8], lane: usize, panel: &mut [u8]) {
    // Fields of a block in the file: (bytes of one piece, how many pieces). Each piece becomes one group of sixteen lanes.
    let fields: &[(usize, usize)] = match format {
        Format::F32 => &[(4, 1)],
        Format::F16 | Format::Bf16 => &[(2, 1)],
        Format::Q8_0 => &[(2, 1), (1, 32)],
        Format::Q4_0 => &[(2, 1), (1, 16)],
        Format::Q4_1 => &[(2, 2), (1, 16)],
    };
    let mut from = 0;
    let mut to = 0;
    while from < row.len() {
        for (width, count) in fields {
            for _ in 0..*count {
                let at = to + lane * width;
                panel[at..at + width].copy_from_slice(&row[from..from + width]);
                from += width;
                to += width * LANES;
            }
        }
    }
}

/// Activations as the kernels read them: tiles of tokens, each `(inner, width)`.
#[derive(Default)]
pub(super) struct PackedRows {
    pub(super) tokens: usize,
    pub(super) inner: usize,
    pub(super) data: Vec<f32>,
    /// First element of each tile, and the end.
    bounds: Vec<usize>,
}

impl PackedRows {
    /// Packs `tokens` rows. `fill(tile, first_token, count, rows)` writes rows `(count, inner)` of one tile.
    pub(super) fn pack(
        &mut self,
        kernels: Kernels,
        pool: &mut Pool,
        scratch: &Scratch,
        (tokens, inner): (usize, usize),
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let tile = kernels.tile();
        self.tokens = tokens;
        self.inner = inner;
        self.data.resize(kernels.packed_len(tokens, inner), 0.0);
        self.bounds.clear();
        self.bounds.extend((0..tokens).step_by(tile).map(|first| first * inner));
        self.bounds.push(self.data.len());
        pool.parts(&mut self.data, &self.bounds, |index, out, worker| {
            let first = index * tile;
            let count = tile.min(tokens - first);
            let width = kernels.width(count);
            scratch.with(worker, |rows| {
                if rows.len() < inner {
                    rows.resize(inner, 0.0);
                }
                let row = &mut rows[..inner];
                for m in 0..count {
                    fill(first + m, row);
                    for (out, x) in out[m..].iter_mut().step_by(width).zip(row.iter()) {
                        *out = *x;
                    }
                }
            });
            for out in out.chunks_exact_mut(width) {
                out[count..].fill(0.0);
            }
        });
    }
}

/// Outputs of matrices, panel by panel: `(panels, tokens, LANES)`.
#[derive(Default)]
pub(super) struct PanelRows {
    tokens: usize,
    data: Vec<f32>,
    bounds: Vec<usize>,
}

impl PanelRows {
    /// `x` times each of `matrices`, their outputs one after another (each padded to whole panels).
    pub(super) fn product(
        &mut self,
        kernels: Kernels,
        pool: &mut Pool,
        scratch: &Scratch,
        matrices: &[&PackedMatrix],
        x: &PackedRows,
    ) {
        self.tokens = x.tokens;
        let total: usize = matrices.iter().map(|matrix| matrix.padded_rows() / LANES).sum();
        self.data.resize(total * x.tokens * LANES, 0.0);
        // Few tokens: units large enough to be worth taking. Many: a unit's decoded panels should stay in the L2 cache.
        let share = if x.tokens > kernels.tile() {
            2
        } else {
            (total / (6 * pool.threads())).clamp(4, 32)
        };
        let mut units = Vec::new();
        self.bounds.clear();
        self.bounds.push(0);
        let mut before = 0;
        for matrix in matrices {
            let count = matrix.padded_rows() / LANES;
            for first in (0..count).step_by(share) {
                let end = (first + share).min(count);
                units.push((*matrix, first..end));
                self.bounds.push((before + end) * x.tokens * LANES);
            }
            before += count;
        }
        pool.parts(&mut self.data, &self.bounds, |unit, out, worker| {
            let (matrix, panels) = &units[unit];
            let bytes = panels.start * matrix.panel_bytes..panels.end * matrix.panel_bytes;
            scratch.with(worker, |scratch| {
                kernels.matmul(&mut MatmulUnit {
                    format: matrix.format,
                    inner: matrix.inner,
                    panels: &matrix.panels[bytes],
                    tokens: x.tokens,
                    x: &x.data,
                    out,
                    scratch,
                });
            });
        });
    }

    /// Copies one token's outputs from `first` on (a multiple of [`LANES`]).
    pub(super) fn gather(&self, token: usize, first: usize, out: &mut [f32]) {
        debug_assert!(first.is_multiple_of(LANES));
        for (i, out) in out.chunks_mut(LANES).enumerate() {
            let at = ((first / LANES + i) * self.tokens + token) * LANES;
            out.copy_from_slice(&self.data[at..at + out.len()]);
        }
    }

    /// Adds one token's outputs to a row.
    pub(super) fn add_to(&self, token: usize, row: &mut [f32]) {
        for (i, row) in row.chunks_mut(LANES).enumerate() {
            let at = (i * self.tokens + token) * LANES;
            for (x, y) in row.iter_mut().zip(&self.data[at..]) {
                *x += y;
            }
        }
    }

    /// The outputs of panels `0..panels` for one writer at a time, with a second range to read beside them.
    pub(super) fn split_at_panel(&mut self, panel: usize) -> (&mut [f32], &[f32]) {
        let (first, second) = self.data.split_at_mut(panel * self.tokens * LANES);
        (first, second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Isa;
    use half::{bf16, f16};

    /// A matrix of each format whose rows are known in f32.
    fn example(element: ElementType, rows: usize, inner: usize) -> (Vec<u8>, Vec<f32>) {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        let block = element.block_elements() as usize;
        for _ in 0..rows * inner / block {
            let scale = f16::from_f32((next() % 1000) as f32 / 9000.0);
            let min = f16::from_f32((next() % 1000) as f32 / -1000.0);
            match element {
                ElementType::F32 => {
                    let x = next() as f32 / 1e7 - 0.8;
                    bytes.extend(x.to_le_bytes());
                    values.push(x);
                }
                ElementType::F16 => {
                    bytes.extend(min.to_le_bytes());
                    values.push(min.to_f32());
                }
                ElementType::Bf16 => {
                    let x = bf16::from_f32(min.to_f32());
                    bytes.extend(x.to_le_bytes());
                    values.push(x.to_f32());
                }
                ElementType::Q8_0 => {
                    bytes.extend(scale.to_le_bytes());
                    for _ in 0..32 {
                        let q = next() as i8;
                        bytes.push(q.cast_unsigned());
                        values.push(f32::from(q) * scale.to_f32());
                    }
                }
                ElementType::Q4_0 | ElementType::Q4_1 => {
                    bytes.extend(scale.to_le_bytes());
                    let offset = if element == ElementType::Q4_1 {
                        bytes.extend(min.to_le_bytes());
                        min.to_f32()
                    } else {
                        scale.to_f32() * -8.0
                    };
                    let packed: Vec<u8> = (0..16).map(|_| next() as u8).collect();
                    values.extend(packed.iter().map(|b| f32::from(b & 15) * scale.to_f32() + offset));
                    values.extend(packed.iter().map(|b| f32::from(b >> 4) * scale.to_f32() + offset));
                    bytes.extend(packed);
                }
            }
        }
        (bytes, values)
    }

    #[test]
    fn every_format_on_every_path_equals_a_plain_product() {
        use ElementType::*;
        let (rows, inner) = (43, 96);
        for element in [F32, F16, Bf16, Q8_0, Q4_0, Q4_1] {
            let (bytes, values) = example(element, rows, inner);
            let shape = vec![rows as u64, inner as u64];
            let mut pool = Pool::new(2).unwrap();
            let matrix = PackedMatrix::new(
                &Tensor {
                    element,
                    shape,
                    data: &bytes,
                },
                &mut pool,
            );
            let mut row = vec![0.0; inner];
            for r in 0..rows {
                matrix.row(r, &mut row);
                assert_eq!(row, values[r * inner..(r + 1) * inner], "{element:?} row {r}");
            }
            for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
                let mut alone: Vec<Vec<f32>> = Vec::new();
                for tokens in [1, 2, 3, 5, 7, 8, 11, 12, 13, 31] {
                    let input = |t: usize, k: usize| ((t * 31 + k * 17) % 101) as f32 / 50.0 - 1.0;
                    let scratch = Scratch::new(2);
                    let mut x = PackedRows::default();
                    x.pack(kernels, &mut pool, &scratch, (tokens, inner), |t, row| {
                        row.iter_mut().enumerate().for_each(|(k, x)| *x = input(t, k));
                    });
                    let mut y = PanelRows::default();
                    y.product(kernels, &mut pool, &scratch, &[&matrix, &matrix], &x);
                    for t in 0..tokens {
                        let mut out = vec![0.0; rows];
                        y.gather(t, matrix.padded_rows(), &mut out);
                        for r in 0..rows {
                            let exact: f64 = (0..inner)
                                .map(|k| f64::from(values[r * inner + k]) * f64::from(input(t, k)))
                                .sum();
                            assert!((f64::from(out[r]) - exact).abs() < 2e-4, "{element:?} {:?}", kernels);
                        }
                        match alone.get(t) {
                            Some(first) => assert_eq!(&out, first, "bits changed with {tokens} tokens"),
                            None => alone.push(out),
                        }
                    }
                }
            }
        }
    }
}
