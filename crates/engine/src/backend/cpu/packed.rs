//! Weight matrices in the layout that the kernels read: panels of sixteen rows. Elements keep the file's type.

use super::kernels::{Format, Int8Unit, Kernels, LANES, MatmulUnit};
use super::pages::{Pages, Piece};
use super::pool::Pool;
use crate::backend::Activations;
use crate::model::{ElementType, Tensor};
use std::io;
use std::sync::{Mutex, PoisonError};

/// A matrix `(rows, inner)`, packed. Rows are padded to whole panels with zeros.
pub(super) struct PackedMatrix {
    format: Format,
    /// How activations come to it.
    activations: Activations,
    rows: usize,
    inner: usize,
    panel_bytes: usize,
    panels: Piece,
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
    /// Packs a matrix of shape `(rows, inner)`. The loader checked that data and shape agree. Only quantised weights take
    /// activations in 8 bits; the others get them as they are.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn new(
        tensor: &Tensor<'_>,
        activations: Activations,
        pool: &mut Pool,
        pages: &mut Pages,
    ) -> io::Result<Self> {
        let [rows, inner] = [0, 1].map(|i| tensor.shape[i] as usize);
        let format = format(tensor.element);
        let row_bytes = inner / format.block_elements() * format.block_bytes();
        let panel_bytes = row_bytes * LANES;
        let count = rows.div_ceil(LANES);
        let mut panels = pages.take(count * panel_bytes)?;
        let bounds: Vec<usize> = (0..=count).map(|panel| panel * panel_bytes).collect();
        pool.parts(&mut panels, &bounds, |panel, out, _| {
            for lane in 0..LANES.min(rows - panel * LANES) {
                let row = panel * LANES + lane;
                pack_row(format, &tensor.data[row * row_bytes..(row + 1) * row_bytes], lane, out);
            }
        });
        let activations = match format {
            Format::Q8_0 | Format::Q4_0 | Format::Q4_1 => activations,
            Format::F32 | Format::F16 | Format::Bf16 => Activations::F32,
        };
        Ok(Self {
            format,
            activations,
            rows,
            inner,
            panel_bytes,
            panels,
        })
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
        Format::Q8_0 => &[(2, 1), (4, 8)],
        Format::Q4_0 => &[(2, 1), (4, 4)],
        Format::Q4_1 => &[(2, 2), (4, 4)],
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

/// Activations as the kernels read them, in each form that some matrix wants.
#[derive(Default)]
pub(super) struct PackedRows {
    pub(super) tokens: usize,
    inner: usize,
    /// Tiles of tokens, each `(inner, width)`.
    floats: Vec<f32>,
    /// Tiles of tokens in 8 bits (see [`Int8Unit`]).
    words: Vec<u32>,
    /// First element of each tile, and the end.
    bounds: Vec<usize>,
}

impl PackedRows {
    /// Packs rows `(tokens, inner)` for `matrices`. `fill(token, row)` writes one row.
    pub(super) fn pack(
        &mut self,
        kernels: Kernels,
        pool: &mut Pool,
        scratch: &Scratch,
        (tokens, matrices): (usize, &[&PackedMatrix]),
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        self.tokens = tokens;
        self.inner = matrices[0].inner;
        let inner = self.inner;
        debug_assert!(matrices.iter().all(|matrix| matrix.inner == inner));
        let wanted = |form| matrices.iter().any(|matrix| matrix.activations == form);
        if wanted(Activations::Int8) {
            let tile = kernels.int8_tile();
            self.words.resize(kernels.packed_words(tokens, inner), 0);
            self.cut(tile, |tokens| kernels.packed_words(tokens, inner));
            pool.parts(&mut self.words, &self.bounds, |index, out, worker| {
                let first = index * tile;
                let count = tile.min(tokens - first);
                let width = kernels.width(count);
                with_row(scratch, worker, inner, |row| {
                    for m in 0..count {
                        fill(first + m, row);
                        kernels.quantise(row, m, width, out);
                    }
                    if count < width {
                        row.fill(0.0);
                        (count..width).for_each(|m| kernels.quantise(row, m, width, out));
                    }
                });
            });
        }
        if wanted(Activations::F32) {
            let tile = kernels.tile();
            self.floats.resize(kernels.packed_len(tokens, inner), 0.0);
            self.cut(tile, |tokens| kernels.packed_len(tokens, inner));
            pool.parts(&mut self.floats, &self.bounds, |index, out, worker| {
                let first = index * tile;
                let count = tile.min(tokens - first);
                let width = kernels.width(count);
                with_row(scratch, worker, inner, |row| {
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

    fn cut(&mut self, tile: usize, len: impl Fn(usize) -> usize) {
        self.bounds.clear();
        self.bounds.extend((0..self.tokens).step_by(tile).map(&len));
        self.bounds.push(len(self.tokens));
    }
}

fn with_row(scratch: &Scratch, worker: usize, inner: usize, f: impl FnOnce(&mut [f32])) {
    scratch.with(worker, |room| {
        if room.len() < inner {
            room.resize(inner, 0.0);
        }
        f(&mut room[..inner]);
    });
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
            let panels = &matrix.panels[bytes];
            let (format, inner, tokens) = (matrix.format, matrix.inner, x.tokens);
            match matrix.activations {
                Activations::Int8 => kernels.int8(&mut Int8Unit {
                    format,
                    inner,
                    panels,
                    tokens,
                    x: &x.words,
                    out,
                }),
                Activations::F32 => scratch.with(worker, |scratch| {
                    kernels.matmul(&mut MatmulUnit {
                        format,
                        inner,
                        panels,
                        tokens,
                        x: &x.floats,
                        out,
                        scratch,
                    });
                }),
            }
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

    /// What rounding to 8 bits in blocks of 32 makes of a row.
    fn rounded(row: &[f32]) -> Vec<f64> {
        let blocks = row.chunks(32).map(|block| {
            let largest = block.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            let scale = f64::from(largest / 127.0);
            block
                .iter()
                .map(move |x| f64::from((x * factor).round_ties_even()) * scale)
        });
        blocks.flatten().collect()
    }

    fn check(element: ElementType, activations: Activations) {
        let (rows, inner) = (43, 96);
        let (bytes, values) = example(element, rows, inner);
        let shape = vec![rows as u64, inner as u64];
        let tensor = Tensor {
            element,
            shape,
            data: &bytes,
        };
        let mut pool = Pool::new(2, &[]).unwrap();
        let matrix = PackedMatrix::new(&tensor, activations, &mut pool, &mut Pages::default()).unwrap();
        let mut row = vec![0.0; inner];
        for r in 0..rows {
            matrix.row(r, &mut row);
            assert_eq!(row, values[r * inner..(r + 1) * inner], "{element:?} row {r}");
        }
        // One block is all zeros.
        let input = |t: usize, k: usize| {
            let x = ((t * 31 + k * 17) % 101) as f32 / 50.0 - 1.0;
            if k / 32 == t % 7 { 0.0 } else { x }
        };
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            let mut alone: Vec<Vec<f32>> = Vec::new();
            for tokens in [1, 2, 3, 5, 7, 8, 11, 12, 13, 31] {
                let scratch = Scratch::new(2);
                let mut x = PackedRows::default();
                x.pack(kernels, &mut pool, &scratch, (tokens, &[&matrix]), |t, row| {
                    row.iter_mut().enumerate().for_each(|(k, x)| *x = input(t, k));
                });
                let mut y = PanelRows::default();
                y.product(kernels, &mut pool, &scratch, &[&matrix, &matrix], &x);
                for t in 0..tokens {
                    let mut out = vec![0.0; rows];
                    y.gather(t, matrix.padded_rows(), &mut out);
                    let given: Vec<f32> = (0..inner).map(|k| input(t, k)).collect();
                    let given = match matrix.activations {
                        Activations::Int8 => rounded(&given),
                        Activations::F32 => given.into_iter().map(f64::from).collect(),
                    };
                    for r in 0..rows {
                        let weights = &values[r * inner..(r + 1) * inner];
                        let exact: f64 = weights.iter().zip(&given).map(|(w, x)| f64::from(*w) * x).sum();
                        assert!((f64::from(out[r]) - exact).abs() < 2e-4, "{element:?} {kernels:?}");
                    }
                    match alone.get(t) {
                        Some(first) => assert_eq!(&out, first, "bits changed with {tokens} tokens"),
                        None => alone.push(out),
                    }
                }
            }
        }
    }

    #[test]
    fn every_format_on_every_path_equals_a_plain_product() {
        use ElementType::*;
        for element in [F32, F16, Bf16, Q8_0, Q4_0, Q4_1] {
            check(element, Activations::F32);
            check(element, Activations::Int8);
        }
    }

    #[test]
    fn what_is_no_number_stays_none_in_8_bits() {
        let (bytes, _) = example(ElementType::Q4_1, 16, 64);
        let tensor = Tensor {
            element: ElementType::Q4_1,
            shape: vec![16, 64],
            data: &bytes,
        };
        let mut pool = Pool::new(1, &[]).unwrap();
        let matrix = PackedMatrix::new(&tensor, Activations::Int8, &mut pool, &mut Pages::default()).unwrap();
        for kernels in Isa::ALL.into_iter().filter_map(Kernels::new) {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let scratch = Scratch::new(1);
                let mut x = PackedRows::default();
                x.pack(kernels, &mut pool, &scratch, (3, &[&matrix]), |t, row| {
                    row.fill(1.0);
                    row[21 * t] = if t == 1 { bad } else { 1.0 };
                });
                let mut y = PanelRows::default();
                y.product(kernels, &mut pool, &scratch, &[&matrix], &x);
                let mut out = [0.0; 16];
                for t in 0..3 {
                    y.gather(t, 0, &mut out);
                    assert!(out.iter().all(|x| x.is_nan() == (t == 1)), "{kernels:?} {bad}");
                }
            }
        }
    }
}
