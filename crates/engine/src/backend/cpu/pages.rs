//! Memory for weights, in huge pages where the system has them: a decoded token reads all of it once, and with pages of 4 KiB
//! a third of that time goes into looking up their addresses (see docs/performance.md).

#![allow(unsafe_code)]

use memmap2::{MmapMut, MmapRaw};
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Bytes that are mapped at once. What nobody takes is never made present.
const CHUNK: usize = 64 << 20;
/// Size of a huge page.
const HUGE: usize = 2 << 20;
/// Where a piece may begin: at a cache line.
const LINE: usize = 64;

/// Hands out memory, each piece right behind the last one.
#[derive(Default)]
pub(super) struct Pages {
    chunk: Option<Arc<MmapRaw>>,
    /// Bytes of the chunk before the next piece.
    used: usize,
}

/// Some bytes, zeroed at first. They are this piece's alone, and are given back with the last piece of their chunk.
pub(super) struct Piece {
    chunk: Arc<MmapRaw>,
    from: usize,
    len: usize,
}

impl Pages {
    /// The next `len` bytes.
    ///
    /// # Errors
    /// What the system says when it has none.
    pub(super) fn take(&mut self, len: usize) -> io::Result<Piece> {
        let fits = |chunk: &Arc<MmapRaw>| chunk.len().checked_sub(self.used).is_some_and(|left| left >= len);
        let chunk = match self.chunk.take().filter(fits) {
            Some(chunk) => chunk,
            None => {
                let chunk = map(len.max(CHUNK))?;
                self.used = chunk.as_ptr().align_offset(HUGE);
                chunk
            }
        };
        let from = self.used;
        self.used = from.saturating_add(len).next_multiple_of(LINE);
        self.chunk = Some(Arc::clone(&chunk));
        Ok(Piece { chunk, from, len })
    }
}

/// Room for `len` bytes from the first border of a huge page on.
fn map(len: usize) -> io::Result<Arc<MmapRaw>> {
    let map = MmapMut::map_anon(len.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?)?;
    // A system without huge pages says no: then they are small.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(Arc::new(MmapRaw::from(map)))
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `take` checked that the bytes lie within the chunk, gave them to nobody else, and the chunk lives as long as
        // the piece. They are readable, writable, and zeroed by the system.
        unsafe { std::slice::from_raw_parts(self.chunk.as_ptr().add(self.from), self.len) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self`: no other reference to these bytes lives.
        unsafe { std::slice::from_raw_parts_mut(self.chunk.as_mut_ptr().add(self.from), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zeroed_apart_and_aligned() {
        let mut pages = Pages::default();
        let lens = [0, 1, 63, 64, 100_000, CHUNK - 1_000, 5, CHUNK + HUGE, 7];
        let mut pieces: Vec<Piece> = lens.into_iter().map(|len| pages.take(len).unwrap()).collect();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.iter().all(|byte| *byte == 0) && piece.as_ptr().addr().is_multiple_of(LINE));
            piece.fill(i as u8 + 1);
        }
        drop(pages);
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.len() == lens[i] && piece.iter().all(|byte| *byte == i as u8 + 1));
        }
    }

    #[test]
    fn more_than_there_can_be_is_an_error() {
        assert!(Pages::default().take(usize::MAX / 2).is_err());
        assert!(Pages::default().take(usize::MAX).is_err());
    }
}
